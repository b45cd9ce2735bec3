"""Whether a config fits the machine, told before anything is made: what it needs, what is there, and what would fit."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from launch.cli import load
from lm_jax import costs
from lm_jax.config import build
from lm_jax.errors import UserError
from lm_jax.models.transformer import transformer_specs
from lm_jax.params import count
from lm_jax.sharding import MeshConfig, slices_of
from lm_jax.training.optimizers import make_optimizer
from lm_jax.training.run import RunConfig
from lm_jax.training.state import abstract_state

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
SHIPPED = ("70b", "13b", "7b", "3b", "1b", "760m", "350m", "125m", "tiny")  # from the largest


AUTO = ("none", "dots", "attention", "full")  # the policies that `auto` chooses from, the fastest first
_FILL = 0.9  # of what a device has, where what is needed is an estimate


def fitted(config: RunConfig) -> RunConfig:
    """The config with `train.remat = "auto"` settled: the fastest policy that fits this machine's devices, or the
    budget that the config gives.

    Raises:
      UserError: where a training step needs more memory than this machine's devices have.
    """
    available = costs.device_memory(jax.local_devices()[0])
    devices = jax.device_count()
    known = config.with_likely_vocab()
    known.check_layout(devices)
    budget, train = config.train.memory_gb, config.train
    if train.remat == "auto":
        room = int(budget * 1e9) if budget is not None else None if available is None else int(_FILL * available)
        policy = _of_all_processes(AUTO[-1] if room is None else _fastest(known, devices, room))
        if jax.process_index() == 0:
            filled = "unknown memory" if room is None else f"{costs.amount(room)} a device"
            print(f"train.remat: auto is {policy}, for {filled}", file=sys.stderr, flush=True)
        config, known = (
            dataclasses.replace(c, train=dataclasses.replace(train, remat=policy)) for c in (config, known)
        )
    if available is None:
        return config
    problem = costs.shortage(need(known, devices), available)
    if problem is None:
        return config
    here = f"{devices} x {jax.devices()[0].device_kind}"
    raise UserError(f"this does not fit ({here}): {problem}\n{_remedy(known, devices, available)}")


def _of_all_processes(policy: str) -> str:
    """The most frugal policy that any process has chosen: all must run the same program."""
    if jax.process_count() == 1:
        return policy
    return AUTO[int(multihost_utils.process_allgather(np.int32(AUTO.index(policy))).max())]


def _fastest(config: RunConfig, devices: int, room: int) -> str:
    """The first policy of `AUTO` that needs no more than `room`; the last one where none does."""

    def total(policy: str) -> int:
        train = dataclasses.replace(config.train, remat=policy)
        return need(dataclasses.replace(config, train=train), devices)["total"]

    return next((policy for policy in AUTO[:-1] if total(policy) <= room), AUTO[-1])


def _state(config: RunConfig, mesh: Any, mesh_config: MeshConfig) -> Any:
    specs = transformer_specs(config.model)
    optimizer = make_optimizer(config.optimizer, specs, config.train.total_steps, config.model.scale)
    return abstract_state(specs, optimizer, mesh, ema=config.optimizer.ema is not None, config=mesh_config)


def need(config: RunConfig, devices: int) -> dict[str, int]:
    mesh = costs.abstract_mesh(config.mesh, devices)
    train = config.train
    return costs.memory(
        config.model,
        _state(config, mesh, config.mesh),
        mesh,
        batch_size=train.batch_size,
        length=train.length,
        remat=train.remat,
        microbatches=train.microbatches,
        config=config.mesh,
    )


def _remedy(config: RunConfig, devices: int, available: int) -> str:
    """The nearest setting of this config that fits; if there is none, the largest shipped config that does."""
    keys = _fitting(config, devices, available)
    if keys is not None:
        return f"this fits:{_as_flags(keys)}"
    size = count(transformer_specs(config.model))
    for name in SHIPPED:
        other = build(RunConfig, load(str(CONFIGS / f"{name}.py"))).with_likely_vocab()
        if count(transformer_specs(other.model)) < size:
            keys = _fitting(dataclasses.replace(other, mesh=config.mesh), devices, available)
            if keys is not None:
                return f"the nearest shipped config that fits: --config=configs/{name}.py{_as_flags(keys)}"
    return "no shipped config fits: use a machine with more memory"


def _fitting(config: RunConfig, devices: int, available: int) -> dict[str, Any] | None:
    """What to change for the config to fit; None where nothing that keeps its model and its batch does."""

    def state(mesh: Any, mesh_config: MeshConfig) -> Any:
        return _state(config, mesh, mesh_config)

    train = config.train
    return costs.suggest(
        config.model,
        state,
        config.mesh,
        devices,
        available,
        batch_size=train.batch_size,
        length=train.length,
        remat=train.remat,
        microbatches=train.microbatches,
        slices=slices_of(jax.devices()) if jax.devices()[0].platform == "tpu" else 1,
    )


def _as_flags(keys: dict[str, Any]) -> str:
    return "".join(f" --config.{key}={value}" for key, value in keys.items())
