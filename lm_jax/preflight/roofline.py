"""How long a compiled step must take: each instruction at the chip's peak, its memory's or its links' bandwidth.

Every instruction of the optimized program takes the longer of its arithmetic at the peak and its bytes at the memory's
bandwidth; attention's kernels take their FLOPs at the rate that the compiler's own schedule of them reaches. A loop's
collectives that run beside it take no time of their own where they are shorter than what they run beside; others add to
it. What a link carries follows from the bytes by the ring algorithm, on as many links as the mesh axes' places in the
torus give. It is an estimate on the kind side: nothing here waits for a host, a kernel's start, or a slow neighbour
(but an operand is read whole even where a look-up takes a part of it, and what visits from a host's memory takes no
time). docs/preflight.md says how far above it published runs are.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from lm_jax.hlo import Collective, Computation, Op, called, parse, trip_count, type_bytes
from lm_jax.preflight.chips import Chip, Target

# Attention's kernels, of the peak, with a head dim of 128: bundles of a 1,024 x 1,024 tile by the compiler's count
# (benchmarks/README.md), over the cycles that its products take at the peak; forward, backward. Of GPUs, what cuDNN
# reaches on an H200 (644 and 541 TFLOP/s, causal, 8,192 long), for our kernels too: no chip has timed those yet.
_ATTENTION = {
    "TPU v5 lite": (0.95, 0.95),
    "TPU v5": (0.95, 0.95),
    "TPU v6 lite": (1024 / 1782, 2560 / 3929),
    "TPU7x": (1024 / 1782, 2560 / 3929),
    "NVIDIA H100": (0.65, 0.55),
    "NVIDIA H200": (0.65, 0.55),
}
_GEMM = 'custom_call_target="__cublas$'  # how XLA for GPUs writes a product that cuBLAS makes
_KERNELS = re.compile(r'custom_call_target="(tpu_custom_call|mosaic_gpu|__cudnn\$fmha)')
_FREE = ("bitcast", "tuple", "get-tuple-element", "parameter", "constant", "after-all", "partition-id", "iota")
_CUTS = ("dynamic-slice", "slice")
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")
_LAID_OUT = re.compile(r"\w+\[[\d,]*\](?:\{[^}]*\})?")


class Link(NamedTuple):
    """What the devices along some mesh axes are joined by.

    Attributes:
      name: `ici` between TPUs, `nvlink` between GPUs of a host, `network` between slices and hosts.
      bandwidth: bytes a second out of a device, over all links that such a group uses.
      devices: of a group.
    """

    name: str
    bandwidth: float
    devices: int


class Sent(NamedTuple):
    """All collectives of a kind over the same axes: bytes of a device and step, the link, and seconds at its rate."""

    kind: str
    axes: tuple[str, ...]
    link: str
    bytes: float
    seconds: float
    overlaps: float  # of the bytes, that run beside something


@dataclasses.dataclass(frozen=True)
class Time:
    """Seconds of a step, and where they go.

    Attributes:
      total: of all.
      compute: of instructions that the peak bounds.
      memory: of those that the memory's bandwidth bounds.
      exposed: of collectives that nothing hides.
      sent: the collectives.
    """

    total: float
    compute: float
    memory: float
    exposed: float
    sent: tuple[Sent, ...]

    @property
    def bound_by(self) -> str:
        """What takes most of it."""
        parts = {"arithmetic": self.compute, "memory bandwidth": self.memory, "links": self.exposed}
        return max(parts, key=lambda name: parts[name])


def step_time(
    program: str,
    found: list[Collective],
    chip: Chip,
    peak: float,
    links: Mapping[tuple[str, ...], Link],
    *,
    attention_flops: tuple[float, float],
    head_dim: int,
) -> Time:
    """The time of a program.

    Args:
      program: the optimized program's text.
      found: its collectives.
      chip: what runs it.
      peak: its FLOPs a second.
      links: by mesh axes.
      attention_flops: of a device and step, in the kernels' forward (as often as they run) and backward pass.
      head_dim: of attention.
    """
    parts: dict[str, list[float]] = {}
    for loop, flops, size, times in _instructions(parse(program)):
        arithmetic, moving = flops / peak, size / chip.memory_bandwidth
        spent = parts.setdefault(loop, [0.0, 0.0])
        spent[moving > arithmetic] += times * max(arithmetic, moving)
    rate = peak * min(1.0, head_dim / 128)
    kernels = sum(n / (rate * share) for n, share in zip(attention_flops, _ATTENTION[chip.kind], strict=True))
    hidden: dict[tuple[str, str], float] = {}
    exposed = 0.0
    for c in found:
        seconds = c.times * seconds_of(c.kind, c.bytes, links[c.axes])
        if c.overlaps:
            key = c.loop, links[c.axes].name
            hidden[key] = hidden.get(key, 0.0) + seconds
        else:
            exposed += seconds
    work = {loop: sum(spent) for loop, spent in parts.items()}
    inner = sum(work[loop] for loop in work if loop) or 1.0
    for (loop, _), seconds in hidden.items():
        # Attention stands in the loops over layers, in each by its share of them.
        there = work.get(loop, 0.0) + (kernels * work.get(loop, 0.0) / inner if loop else 0.0)
        exposed += max(0.0, seconds - there)
    compute = sum(spent[0] for spent in parts.values()) + kernels
    memory = sum(spent[1] for spent in parts.values())
    return Time(compute + memory + exposed, compute, memory, exposed, _sums(found, links))


def attends_in_kernels(program: str) -> bool:
    """Whether attention is kernels in a program's text; else its products stand there like all others."""
    return bool(_KERNELS.search(program))


def _sums(found: list[Collective], links: Mapping[tuple[str, ...], Link]) -> tuple[Sent, ...]:
    groups: dict[tuple[str, tuple[str, ...]], list[Collective]] = {}
    for c in found:
        groups.setdefault((c.kind, c.axes), []).append(c)
    sums = []
    for (kind, axes), members in groups.items():
        size = sum(c.bytes * c.times for c in members)
        beside = sum(c.bytes * c.times for c in members if c.overlaps)
        seconds = sum(c.times * seconds_of(kind, c.bytes, links[axes]) for c in members)
        sums.append(Sent(kind, axes, links[axes].name, size, seconds, beside / size if size else 0.0))
    return tuple(sorted(sums, key=lambda s: -s.seconds))


# --------------------------------------------------------------------------------------------------------------- links


def seconds_of(kind: str, size: float, link: Link) -> float:
    """Seconds of a collective of so many bytes (the larger side, as `hlo.py` counts) on a ring of `link`'s devices."""
    n = link.devices
    steps = {
        "all-gather": (n - 1) / n,
        "reduce-scatter": (n - 1) / n,
        "all-reduce": 2 * (n - 1) / n,
        "all-to-all": n / 4 if link.name == "ici" else (n - 1) / n,  # each byte travels a quarter of the ring
        "collective-permute": 1.0,
    }
    return size * steps[kind] / link.bandwidth


def links_of(coordinates: list[list[int]], mesh: Mapping[str, int], axes: tuple[str, ...], target: Target) -> Link:
    """What joins the groups along some mesh axes.

    Args:
      coordinates: of each device in the mesh's order: slice (of GPUs, host), place in the torus, core of the chip.
      mesh: the size of each mesh axis, in order.
      axes: those that the groups reach along.
      target: what the devices are.
    """
    chip = target.chip
    places = np.array(coordinates).reshape(*mesh.values(), -1)
    group = places[tuple(slice(None) if axis in axes else 0 for axis in mesh)].reshape(-1, places.shape[-1])
    groups = len(set(group[:, 0].tolist()))
    if groups > 1:  # what arrives at a slice or host comes over the network of all its devices in the group
        return Link("network", chip.network * len(group) / groups, len(group))
    if not target.torus:
        return Link("nvlink", chip.link, len(group))
    bandwidth = 0.0
    for dimension, whole in enumerate(target.torus):
        reach = len(set(group[:, 1 + dimension].tolist()))
        if reach > 1:
            around = reach == whole and whole % chip.wraps == 0
            bandwidth += chip.link * (2 if around else 1) / chip.per_chip
    if not bandwidth:  # the halves of a chip
        bandwidth = chip.memory_bandwidth / 2
    return Link("ici", bandwidth, len(group))


# -------------------------------------------------------------------------------------------------------- instructions


def _instructions(program: dict[str, Computation]) -> Iterator[tuple[str, float, float, int]]:
    """The loop, FLOPs, bytes and times of each instruction that a step runs, but kernels of attention (their bytes
    count)."""
    entry = next(c for c in program.values() if c.entry)
    yield from _walk(program, entry, 1, "")


def _walk(
    program: dict[str, Computation], here: Computation, times: int, loop: str
) -> Iterator[tuple[str, float, float, int]]:
    for op in here.ops.values():
        if op.code == "while":
            (body,) = called(op, "body")
            try:
                trips = trip_count(program, here, op)
            except ValueError:
                trips = 1
            yield from _walk(program, program[body], times * trips, body)
        elif op.code in ("call", "conditional"):
            for name in called(op, "to_apply", "branch_computations"):
                yield from _walk(program, program[name], times, loop)
        elif op.code not in _FREE and not op.code.endswith(("-done", "-update")) and op.kind is None:
            yield loop, _flops(program, here, op), _moved(program, here, op), times


def _flops(program: dict[str, Computation], here: Computation, op: Op) -> float:
    """Two for each product of numbers: from a matrix product's three sizes, whose product is (m k) (k n) (m n), each as
    often as there are products side by side."""
    if op.code in ("dot", "convolution") or (op.code == "custom-call" and _GEMM in op.attributes):
        sizes = [_numbers(here.ops[name].type) for name in op.operands[:2]] + [_numbers(op.type)]
        return 2 * math.sqrt(math.prod(sizes) / _side_by_side(here.ops[op.operands[0]].type, op.attributes))
    inner = called(op, "calls") if op.code in ("fusion", "async-start") else []
    return sum(_flops(program, program[name], o) for name in inner for o in program[name].ops.values())


def _side_by_side(type_: str, attributes: str) -> int:
    """Over how many products a matrix product runs: the sizes of its batch dimensions."""
    found = re.search(r'lhs_batch_dim(?:ension)?s"?[=:] ?[{\[]([\d,"]*)[}\]]', attributes)
    dims = _SHAPE.search(type_)
    if not found or not dims or not found[1]:
        return 1
    sizes = [int(d) for d in dims[2].split(",")]
    return math.prod(sizes[int(d)] for d in found[1].replace('"', "").split(","))


def _numbers(type_: str) -> float:
    m = _SHAPE.search(type_)
    return math.prod(int(d) for d in m[2].split(",") if d) if m else 0.0


def _moved(program: dict[str, Computation], here: Computation, op: Op) -> float:
    """Bytes between an instruction and the device's memory: its operands and results that lie there, of those that it
    only cuts from or puts into, what is cut or put."""
    if op.code in ("copy-start", "slice-start", "async-start"):
        return float(type_bytes(op.type.strip("()").split(", ")[0]))  # what arrives
    if op.code == "dynamic-update-slice":
        return 2 * float(type_bytes(here.ops[op.operands[1]].type))
    if op.code in _CUTS:
        return min(_in_memory(here.ops[op.operands[0]].type), float(type_bytes(op.type))) + _in_memory(op.type)
    if op.code != "fusion":
        return sum(_in_memory(here.ops[name].type) for name in op.operands) + _in_memory(op.type)
    inner = program[called(op, "calls")[0]]
    read = 0.0
    for number, name in enumerate(op.operands):
        size = _in_memory(here.ops[name].type)
        read += min(size, _read(program, inner, _parameter(inner, number).name, size)) if size else 0.0
    return read + _written(program, inner, [m[0] for m in _LAID_OUT.finditer(op.type)])


def _in_memory(type_: str) -> float:
    """Bytes of a type that lie in the device's memory: not in its fast memory, nor on the host."""
    return float(sum(type_bytes(m[0]) for m in _SHAPE.finditer(type_) if not re.search(r"S\(\d+\)", m[3] or "")))


def _parameter(inner: Computation, number: int) -> Op:
    return next(o for o in inner.ops.values() if o.code == "parameter" and int(o.inside) == number)


def _read(program: dict[str, Computation], inner: Computation, name: str, size: float) -> float:
    """Bytes of an array of `size` that a fusion's body reads, where it is called `name`; fusions stand in fusions."""
    total = 0.0
    for user in inner.users.get(name, []):
        if user.code in _CUTS:
            total += type_bytes(user.type)
        elif user.code == "fusion":
            body = program[called(user, "calls")[0]]
            for number, operand in enumerate(user.operands):
                total += _read(program, body, _parameter(body, number).name, size) if operand == name else 0.0
        elif user.code in ("bitcast", "convert"):
            wider = type_bytes(inner.ops[name].type) / type_bytes(user.type)
            total += wider * _read(program, inner, user.name, size / wider)
        elif not (user.code == "tuple" or (user.code == "dynamic-update-slice" and user.operands[0] == name)):
            return size
    return total


def _written(program: dict[str, Computation], inner: Computation, types: list[str]) -> float:
    """Bytes that a fusion's body writes, whose results have these types: nothing for an operand that it hands on, and
    what is put for an array that it puts something into."""
    root = next(o for o in inner.ops.values() if o.root)
    made = [inner.ops[name] for name in root.operands] if root.code == "tuple" else [root]
    if len(made) != len(types):
        return sum(map(_in_memory, types))
    total = 0.0
    for op, type_ in zip(made, types, strict=True):
        while op.code == "bitcast":
            op = inner.ops[op.operands[0]]
        size = _in_memory(type_)
        if op.code == "dynamic-update-slice":
            size = min(size, float(type_bytes(inner.ops[op.operands[1]].type)))
        elif op.code == "fusion" and not op.type.startswith("("):
            size = min(size, _written(program, program[called(op, "calls")[0]], [type_]))
        total += 0.0 if op.code in ("parameter", "get-tuple-element") else size
    return total
