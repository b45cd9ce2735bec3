"""Slices of TPU pods: which shapes can be had, and what Google's tools call them.

    slice_of("v5p:4x4x4")    a generation and a topology in chips, as libtpu names it
    slice_of("v5p-128")      an accelerator type: v4, v5p and tpu7x count cores (two a chip), v5e and v6e count chips

Taken in November 2026 from cloud.google.com/tpu/docs (pages v4, v5e, v5p, v6e, tpu7x, runtimes) and from GKE's page on
planning TPUs.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import re
from collections.abc import Iterator

from lm_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Generation:
    """A generation of TPUs.

    Attributes:
      name: as libtpu says it: `v5e`.
      cores: TensorCores of a chip.
      counts_cores: whether the number in an accelerator type counts cores; else it counts chips.
      prefix: what comes before that number: `v5litepod`.
      gke_accelerator: the value of the node label `cloud.google.com/gke-tpu-accelerator`.
      machine: GKE's machine types, with `{}` for the chips of a host.
      runtime: the software version that the Cloud TPU API installs; empty where that API does not serve it.
      dimensions: of its topologies.
      most_chips: of one slice.
      whole_host: the chips of a host that has a slice to itself; slices over several hosts have 4 a host.
    """

    name: str
    cores: int
    counts_cores: bool
    prefix: str
    gke_accelerator: str
    machine: str
    runtime: str
    dimensions: int
    most_chips: int
    whole_host: int


GENERATIONS = {
    g.name: g
    for g in (
        Generation("v4", 2, True, "v4", "tpu-v4-podslice", "ct4p-hightpu-{}t", "tpu-ubuntu2204-base", 3, 3072, 4),
        Generation(
            "v5e", 1, False, "v5litepod", "tpu-v5-lite-podslice", "ct5lp-hightpu-{}t", "v2-alpha-tpuv5-lite", 2, 256, 8
        ),
        Generation("v5p", 2, True, "v5p", "tpu-v5p-slice", "ct5p-hightpu-{}t", "v2-alpha-tpuv5", 3, 6144, 4),
        Generation("v6e", 1, False, "v6e", "tpu-v6e-slice", "ct6e-standard-{}t", "v2-alpha-tpuv6e", 2, 256, 8),
        Generation("tpu7x", 2, True, "tpu7x", "tpu7x", "tpu7x-standard-{}t", "", 3, 9216, 4),
    )
}
_ALIASES = {"v5litepod": "v5e", "v5lite": "v5e", "trillium": "v6e", "ironwood": "tpu7x", "v7x": "tpu7x"}

_FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_SMALL = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))  # below a cube of 4 x 4 x 4; whole cubes from there on
_CUBE = 4
_LONGEST = 256  # of an edge: the longest of those that are published is 244


@dataclasses.dataclass(frozen=True)
class Slice:
    """A slice that can be had.

    Attributes:
      generation: its name, `v5p`.
      topology: its shape in chips, `4x4x4`.
      chips: how many.
      hosts: virtual machines, each of which runs one process.
      chips_per_host: that each of them sees.
      accelerator_type: what `gcloud` calls a slice of so many chips, `v5p-128`. Of several topologies with that number
        it means one: `slice_of(accelerator_type)`.
      gke_accelerator: the node label of GKE.
      machine_type: of GKE's nodes.
      runtime: the software version for `gcloud`; empty where the Cloud TPU API does not serve this generation.
    """

    generation: str
    topology: str
    chips: int
    hosts: int
    chips_per_host: int
    accelerator_type: str
    gke_accelerator: str
    machine_type: str
    runtime: str

    @property
    def name(self) -> str:
        """As libtpu names it: `v5p:4x4x4`."""
        return f"{self.generation}:{self.topology}"


def slice_of(text: str) -> Slice:
    """The slice that a name means.

    Args:
      text: `v5p:4x4x4`, `v5e:4x4`, or an accelerator type: `v5p-128`, `v5litepod-16`, `v6e-64`.

    Raises:
      UserError: there is none of that name; names the nearest that there is.
    """
    match = re.fullmatch(r"([a-z0-9]+?)(?::([0-9x]+)|-(\d+))", text.strip().lower())
    if match is None:
        raise UserError(f"{text!r} names no TPU slice\nwrite a generation and a topology, as v5p:4x4x4 or v5e:4x4")
    name, topology, count = match.groups()
    g = GENERATIONS.get(_ALIASES.get(name, name))
    if g is None:
        near = difflib.get_close_matches(name, GENERATIONS, n=1, cutoff=0.5)
        raise UserError(
            f"{text}: there is no TPU {name}" + (f": did you mean {near[0]}?" if near else "") + "\n"
            f"there are {', '.join(GENERATIONS)}"
        )
    wanted: float
    if topology is not None:
        sizes = tuple(int(size) for size in topology.split("x") if size)
        if sizes in _shapes(g):
            return _slice(g, sizes)
        wanted = math.prod(sizes)
    else:
        wanted = int(count) / (g.cores if g.counts_cores else 1)
        sizes = _of_chips(g).get(int(wanted), ())
        if sizes and int(wanted) == wanted:
            return _slice(g, sizes)
    near_slice = _nearest(g, wanted, sizes)
    counted = "" if topology or not g.counts_cores else f" ({g.name} counts cores, {g.cores} a chip)"
    raise UserError(
        f"{text} cannot be had: {_rule(g)}{counted}\n"
        f"the nearest that can: {near_slice.name} ({near_slice.accelerator_type}, {near_slice.chips} chips)"
    )


def slices(generation: str) -> Iterator[Slice]:
    """All slices of a generation, the smallest first; of one number of chips, the most compact first."""
    g = GENERATIONS[generation]
    for sizes in sorted(_shapes(g), key=lambda s: (math.prod(s), sum(s))):
        yield _slice(g, sizes)


def _slice(g: Generation, sizes: tuple[int, ...]) -> Slice:
    chips = math.prod(sizes)
    each = chips if chips <= g.whole_host else 4
    return Slice(
        generation=g.name,
        topology="x".join(map(str, sizes)),
        chips=chips,
        hosts=chips // each,
        chips_per_host=each,
        accelerator_type=f"{g.prefix}-{chips * g.cores if g.counts_cores else chips}",
        gke_accelerator=g.gke_accelerator,
        machine_type=g.machine.format(each),
        runtime=g.runtime,
    )


@functools.cache
def _shapes(g: Generation) -> frozenset[tuple[int, ...]]:
    if g.dimensions == 2:
        return frozenset(_FLAT)
    cubes = g.most_chips // _CUBE**3
    edges = range(1, _LONGEST // _CUBE + 1)
    whole = [(a, b, c) for a in edges for b in edges if a <= b for c in edges if b <= c and a * b * c <= cubes]
    return frozenset(_SMALL) | {(a * _CUBE, b * _CUBE, c * _CUBE) for a, b, c in whole}


@functools.cache
def _of_chips(g: Generation) -> dict[int, tuple[int, ...]]:
    """What an accelerator type stands for: the most compact shape of so many chips."""
    compact: dict[int, tuple[int, ...]] = {}
    for sizes in sorted(_shapes(g), key=lambda s: (sum(s), s)):
        compact.setdefault(math.prod(sizes), sizes)
    return compact


def _nearest(g: Generation, chips: float, sizes: tuple[int, ...]) -> Slice:
    """The one whose chips are nearest in proportion; of those, the one most like `sizes`, else the most compact."""
    alike = sorted(sizes)

    def distance(shape: tuple[int, ...]) -> tuple[float, float, int]:
        proportion = abs(math.log(math.prod(shape) / max(chips, 0.5)))
        edges = sum(abs(math.log(a / max(b, 0.5))) for a, b in zip(sorted(shape), alike, strict=False))
        return proportion, edges if len(alike) == len(shape) else 0.0, sum(shape)

    return _slice(g, min(_shapes(g), key=distance))


def _rule(g: Generation) -> str:
    if g.dimensions == 2:
        return f"{g.name} comes as {', '.join('x'.join(map(str, s)) for s in _FLAT)}"
    small = ", ".join("x".join(map(str, s)) for s in _SMALL)
    return f"{g.name} comes as {small}, or AxBxC in multiples of 4, A <= B <= C, up to {g.most_chips} chips"
