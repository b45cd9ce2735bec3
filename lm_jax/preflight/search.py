"""Other layouts of the same run on the same slice: guessed for all, compiled for the best guesses."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax

from lm_jax import costs
from lm_jax.collectives import expected
from lm_jax.errors import UserError
from lm_jax.models.transformer import transformer_specs
from lm_jax.params import named, role
from lm_jax.preflight.chips import Target
from lm_jax.preflight.verdict import Verdict, predicted, preflight
from lm_jax.training.memory import AUTO
from lm_jax.training.run import RunConfig

_TENSOR = (1, 2, 4, 8)
_MICROBATCHES = (1, 2, 4)
_SURE = 1.1  # what is predicted to need more than this of the capacity is not compiled


@dataclasses.dataclass(frozen=True)
class Found:
    """A layout that was compiled: the keys to change, and its verdict."""

    keys: dict[str, Any]
    verdict: Verdict


def search(
    config: RunConfig,
    target: Target,
    *,
    tries: int = 4,
    tell: Callable[[str], None] = lambda text: None,
) -> list[Found]:
    """The best of the layouts that keep the model and its batch: those that fit first, the fastest first.

    Mesh (`tensor` up to 8, the rest to `fsdp`), remat and micro-batches vary. Each is guessed from the arithmetic and
    `collectives.expected`; of those predicted to fit, the `tries` fastest are compiled.

    Args:
      config: the run's, its vocabulary known.
      target: what for.
      tries: how many layouts to compile.
      tell: is handed what is going on.
    """
    others = list(_others(config, target))
    guesses = sorted((_seconds(other, target), i) for i, (_, other) in enumerate(others))
    found: list[Found] = []
    for _, i in guesses:
        keys, other = others[i]
        if len(found) == tries:
            break
        if predicted(other, target)["total"] > _SURE * target.chip.memory:
            continue
        label = " ".join(f"{key.split('.')[1]}={value}" for key, value in keys.items()) or "as it is"
        try:
            verdict = preflight(other, target, tell=functools.partial(_prefixed, tell, label))
        except UserError as e:
            tell(f"{label}: {e}")
            continue
        found.append(Found(keys, verdict))
    return sorted(found, key=lambda f: (not f.verdict["fits"], f.verdict["step"]["seconds"]))


def _prefixed(tell: Callable[[str], None], label: str, text: str) -> None:
    tell(f"{label}: {text}")


def _others(config: RunConfig, target: Target) -> Iterator[tuple[dict[str, Any], RunConfig]]:
    """Every layout that the devices and the model can be split by, with the keys that differ from the config's."""
    devices, slices = target.devices, target.slices
    context = config.mesh.sizes(devices)["sequence"]
    for tensor, remat, microbatches in itertools.product(_TENSOR, AUTO, _MICROBATCHES):
        if devices % (slices * tensor * context):
            continue
        axes: dict[str, Any] = {"data": slices, "fsdp": devices // (slices * tensor * context), "tensor": tensor}
        mesh = dataclasses.replace(config.mesh, **axes, sequence=context)
        if mesh.sizes(devices) == config.mesh.sizes(devices):
            mesh, axes = config.mesh, {}
        train = dataclasses.replace(config.train, remat=remat, microbatches=microbatches)
        other = dataclasses.replace(config, mesh=mesh, train=train)
        try:
            other.check_layout(devices)
        except UserError:
            continue
        keys = {f"mesh.{axis}": size for axis, size in axes.items()}
        changed = {"train.remat": remat, "train.microbatches": microbatches}
        was = {"train.remat": config.train.remat, "train.microbatches": config.train.microbatches}
        yield keys | {key: value for key, value in changed.items() if value != was[key]}, other


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
    again = {"none": 0.0, "dots": attention, "attention": 2.0 * blocks, "full": 2.0 * blocks + attention}
    tokens = train.batch_size * train.length / devices
    compute = tokens * (costs.flops_per_token(c, train.length) + again[train.remat]) / peak
    mesh = costs.abstract_mesh(config.mesh, devices, target.device)
    cut: dict[str, Any] = {"batch_size": train.batch_size, "length": train.length, "microbatches": train.microbatches}
    with jax.sharding.use_abstract_mesh(mesh):
        traffic = expected(c, config.mesh, devices, remat=train.remat, **cut)
    bandwidth = chip.link * (2 if target.torus else 1) / chip.per_chip
    hidden = sum(n for (_, axes), n in traffic.items() if "tensor" not in axes) / bandwidth
    exposed = sum(n for (_, axes), n in traffic.items() if "tensor" in axes) / bandwidth
    return max(compute, hidden) + exposed
