"""Other layouts of the same run: guessed for all, compiled for the best guesses, so that what is advised was tried."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax

from lm_jax import costs
from lm_jax.collectives import expected
from lm_jax.errors import Failure, UserError
from lm_jax.models.transformer import transformer_specs
from lm_jax.params import named, role
from lm_jax.preflight.chips import Target, target_of
from lm_jax.preflight.verdict import Verdict, predicted, preflight
from lm_jax.slices import slices
from lm_jax.training.memory import AUTO, state_bytes
from lm_jax.training.run import RunConfig

_TENSOR = (1, 2, 4, 8)
_OFF = 1.15  # how far costs.py may be off: where nothing is predicted to fit, so much more is tried


@dataclasses.dataclass(frozen=True)
class Found:
    """A layout that was compiled: the keys to change, and its verdict, which names the slice."""

    keys: dict[str, Any]
    verdict: Verdict

    @property
    def fits(self) -> bool:
        return bool(self.verdict["fits"])

    @property
    def seconds(self) -> float:
        return float(self.verdict["step"]["seconds"])


class Guess(NamedTuple):
    """A layout that was not compiled: a guess of its step's time, what it is predicted to need of a device, the keys to
    change, and the config with them."""

    seconds: float
    need: int
    keys: dict[str, Any]
    config: RunConfig


def search(
    config: RunConfig,
    target: Target,
    first: Verdict,
    *,
    tries: int = 4,
    tell: Callable[[str], None] = lambda text: None,
) -> list[Found]:
    """The layouts that were compiled: those that fit first, the fastest first.

    Mesh (`tensor` up to 8, the rest to `fsdp`), remat and micro-batches vary; the model and its batch stay. What the
    compiler finds too large is tried with more micro-batches. Where nothing fits, the next larger slices of this
    generation follow.

    Args:
      config: the run's, its vocabulary known.
      target: what for.
      first: its verdict as it is.
      tries: how many layouts to compile.
      tell: is handed what is going on, with the time that is left.
    """
    work = _Work(tries, tell, float(first["seconds"]))
    guesses = candidates(config, target, 2 * tries) or candidates(config, target, 2 * tries, slack=_OFF)
    found = [Found({}, first), *_tried(config, target, guesses, work, found=bool(first["fits"]))]
    if not any(f.fits for f in found):
        work.left = work.left or 1
        found += _on_larger(config, target, work)
    return sorted(found, key=lambda f: (not f.fits, f.verdict["chips"], f.seconds))


def _tried(config: RunConfig, target: Target, guesses: list[Guess], work: _Work, *, found: bool) -> list[Found]:
    """What is compiled of the guesses, and of finer cuts of those that do not fit. Args: found: whether one that fits
    is known already."""
    compiled: list[Found] = []
    while guesses and work.left:
        # Where none fits yet, the last try is for the one that needs least.
        last = work.left == 1 and not found and not any(f.fits for f in compiled)
        guess = min(guesses, key=lambda g: g.need) if last else guesses[0]
        guesses = [g for g in guesses if g is not guess]
        verdict = work.compile(guess, target)
        if verdict is None:
            continue
        compiled.append(Found(guess.keys, verdict))
        if not verdict["fits"]:
            # The others are held to what the compiler has made of this estimate.
            room = int(target.chip.memory * guess.need / verdict["bytes_per_device"]["compiler_total"])
            within = [_within(config, g, target, room) for g in (guess, *guesses)]
            guesses = sorted((g for g in within if g), key=lambda g: g.seconds)
    return compiled


class _Work:
    """Compiles one layout after the other, and tells how long that will take."""

    def __init__(self, tries: int, tell: Callable[[str], None], seconds: float) -> None:
        self.tries, self.left, self._tell, self._each = tries, tries, tell, [seconds]

    def compile(self, guess: Guess, target: Target) -> Verdict | None:
        """A verdict; None where there is none."""
        started, which = time.monotonic(), self.tries - self.left + 1
        self.left = max(0, self.left - 1)
        label = " ".join(f"{key.split('.')[1]}={value}" for key, value in guess.keys.items()) or "as it is"
        each = sum(self._each) / len(self._each)

        def tell(text: str) -> None:
            remaining = each * (1 + self.left) - (time.monotonic() - started)
            self._tell(
                f"{min(which, self.tries)} of {self.tries}, {label} on {target.name}: {text};"
                f" about {max(1.0, remaining):.0f} s left"
            )

        try:
            verdict = preflight(guess.config, target, tell=tell)
        except (UserError, Failure) as e:  # of one layout: the others may do
            self._tell(f"{label}: {str(e).splitlines()[0]}")
            return None
        if not verdict.get("from_cache"):
            self._each.append(time.monotonic() - started)
        return verdict


# ------------------------------------------------------------------------------------------------------------- guesses


def candidates(config: RunConfig, target: Target, most: int | None = None, slack: float = 1.0) -> list[Guess]:
    """Of each mesh and each remat the least number of micro-batches that is predicted to fit, the fastest by the guess
    first. Not the config as it is.

    Args:
      config: the run's, its vocabulary known.
      target: what for.
      most: how many are wanted; None: all.
      slack: how much of a device's memory may be predicted to be needed.
    """
    room = int(slack * target.chip.memory)
    coarse: list[tuple[float, int, dict[str, Any], str, list[int]]] = []
    for mesh in _meshes(config, target):
        times = _microbatches(config, mesh, target.devices)
        if _too_large(config, mesh, times, target, room):
            continue
        for remat in AUTO:
            first = next((other for n in times if (other := _other(config, mesh, remat, n, target))), None)
            if first is not None:
                coarse.append((_seconds(first, target), len(coarse), mesh, remat, times))
    found: list[Guess] = []
    for _, _, mesh, remat, times in sorted(coarse, key=lambda entry: entry[:2]):
        guess = _least(config, mesh, remat, times, target, room)
        if guess is not None and guess.keys:
            found.append(guess)
        if len(found) == most:
            break
    return sorted(found, key=lambda g: g.seconds)


def _too_large(config: RunConfig, keys: dict[str, Any], times: list[int], target: Target, room: int) -> bool:
    """Whether nothing on this mesh can fit: told by the state alone, else with all computed again, cut finest."""
    finest = next((n for n in reversed(times) if _other(config, keys, AUTO[-1], n, target)), None)
    if finest is None:
        return True
    if state_bytes(dataclasses.replace(config, mesh=_mesh(config, keys)), target.devices, target.device) > room:
        return True
    guess = _guess(config, keys, AUTO[-1], finest, target)
    return guess is None or guess.need > room


def _least(
    config: RunConfig, keys: dict[str, Any], remat: str, times: list[int], target: Target, room: int
) -> Guess | None:
    """The least of so many numbers of micro-batches with which it is predicted to fit; None where none is."""
    found = None
    low, high = 0, len(times)
    while low < high:
        middle = (low + high) // 2
        guess = _guess(config, keys, remat, times[middle], target)
        if guess is not None and guess.need <= room:
            found, high = guess, middle
        else:
            low = middle + 1
    return found


def _within(config: RunConfig, guess: Guess, target: Target, room: int) -> Guess | None:
    """A guess, or else the same with the least micro-batches that is predicted to fit into `room`; None where none."""
    if guess.need <= room:
        return guess
    mesh = {key: value for key, value in guess.keys.items() if key.startswith("mesh.")}
    train = guess.config.train
    finer = [n for n in _microbatches(config, mesh, target.devices) if n > train.microbatches]
    return _least(config, mesh, train.remat, finer, target, room)


def _meshes(config: RunConfig, target: Target) -> Iterator[dict[str, Any]]:
    """Keys of each mesh of the devices: the config's own (no keys), then weights over `fsdp` and so much `tensor`."""
    yield {}
    devices, outer = target.devices, target.slices
    context = config.mesh.sizes(devices)["sequence"]
    for tensor in _TENSOR:
        if devices % (outer * tensor * context) == 0:
            keys = {"mesh.data": outer, "mesh.fsdp": devices // (outer * tensor * context), "mesh.tensor": tensor}
            if _mesh(config, keys).sizes(devices) != config.mesh.sizes(devices):
                yield keys


def _mesh(config: RunConfig, keys: dict[str, Any]) -> Any:
    sizes = {key.removeprefix("mesh."): size for key, size in keys.items()}
    return dataclasses.replace(config.mesh, **sizes)


def _microbatches(config: RunConfig, keys: dict[str, Any], devices: int) -> list[int]:
    """Into how many parts the rows of a device can be cut: powers of two, and the config's own number."""
    size = _mesh(config, keys).sizes(devices)
    rows = config.train.batch_size // (size["data"] * size["fsdp"])
    powers = {2**i for i in range(max(1, rows).bit_length()) if rows % 2**i == 0}
    return sorted(powers | {config.train.microbatches})


def _other(config: RunConfig, keys: dict[str, Any], remat: str, microbatches: int, target: Target) -> RunConfig | None:
    """None where the layout does not suit the devices or the model."""
    train = dataclasses.replace(config.train, remat=remat, microbatches=microbatches)
    other = dataclasses.replace(config, mesh=_mesh(config, keys), train=train)
    try:
        other.check_layout(target.devices)
    except UserError:
        return None
    return other


def _guess(config: RunConfig, keys: dict[str, Any], remat: str, microbatches: int, target: Target) -> Guess | None:
    other = _other(config, keys, remat, microbatches, target)
    if other is None:
        return None
    changed = {"train.remat": remat, "train.microbatches": microbatches}
    was = {"train.remat": config.train.remat, "train.microbatches": config.train.microbatches}
    keys = keys | {key: value for key, value in changed.items() if value != was[key]}
    return Guess(_seconds(other, target), predicted(other, target)["total"], keys, other)


def _on_larger(config: RunConfig, target: Target, work: _Work) -> list[Found]:
    """What fits on the smallest slice of this generation on which something does, if one is known."""
    if not target.torus:
        return []
    for larger in slices(target.name.partition(":")[0]):
        if larger.chips <= target.chips:
            continue
        on = target_of(larger.name, target.slices)
        try:
            config.mesh.sizes(on.devices)
            guesses = candidates(config, on, 2 * work.tries)
            own = _guess(config, {}, config.train.remat, config.train.microbatches, on)
        except UserError:  # a mesh with a size for each axis
            continue
        if own is not None and own.need <= on.chip.memory:
            guesses = sorted([own, *guesses], key=lambda g: g.seconds)
        compiled = _tried(config, on, guesses, work, found=False)
        if any(f.fits for f in compiled):
            return compiled
        work.left = work.left or 1
    return []


def _seconds(config: RunConfig, target: Target) -> float:
    """A guess of a step's time: arithmetic, what is computed again, what no computation hides of the links."""
    chip, c, train, devices = target.chip, config.model, config.train, target.devices
    peak = costs.peak_flops(chip.kind)
    assert peak is not None
    blocks = sum(
        math.prod(s.shape)
        for name, s in named(transformer_specs(c)).items()
        if role(s) == "matrix" and "blocks" in name
    )
    attention = costs.attention_flops(c, train.length)
    again = {"none": 0.0, "dots": attention, "attention": 2.0 * blocks}
    tokens = train.batch_size * train.length / devices
    flops = costs.flops_per_token(c, train.length) + again.get(train.remat, 2.0 * blocks + attention)
    compute = tokens * flops / peak
    mesh = costs.abstract_mesh(config.mesh, devices, target.device)
    cut: dict[str, Any] = {"batch_size": train.batch_size, "length": train.length, "microbatches": train.microbatches}
    with jax.sharding.use_abstract_mesh(mesh):
        traffic = expected(c, config.mesh, devices, remat=train.remat, **cut)
    bandwidth = chip.link * (2 if target.torus else 1) / chip.per_chip
    hidden = sum(n for (_, axes), n in traffic.items() if "tensor" not in axes) / bandwidth
    exposed = sum(n for (_, axes), n in traffic.items() if "tensor" in axes) / bandwidth
    return max(compute, hidden) + exposed
