"""Whether a config fits the machine, told before anything is made: what it needs, what is there, and what would fit."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AbstractDevice

from launch.cli import load
from lm_jax import costs
from lm_jax.config import build
from lm_jax.errors import UserError
from lm_jax.models.transformer import transformer_specs
from lm_jax.params import count
from lm_jax.sharding import slices_of
from lm_jax.training.memory import AUTO, FILL, fastest_remat, fitting, need, with_remat
from lm_jax.training.run import RunConfig

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
SHIPPED = ("70b", "13b", "7b", "3b", "1b", "760m", "350m", "125m", "tiny")  # from the largest


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
    budget = config.train.memory_gb
    if config.train.remat == "auto":
        room = int(budget * 1e9) if budget is not None else None if available is None else int(FILL * available)
        policy = _of_all_processes(AUTO[-1] if room is None else fastest_remat(known, devices, room))
        if jax.process_index() == 0:
            filled = "unknown memory" if room is None else f"{costs.amount(room)} a device"
            print(f"train.remat: auto is {policy}, for {filled}", file=sys.stderr, flush=True)
        config, known = with_remat(config, policy), with_remat(known, policy)
    if available is None:
        return config
    problem = costs.shortage(need(known, devices), available)
    if problem is None:
        return config
    here = f"{devices} x {jax.devices()[0].device_kind}"
    slices = slices_of(jax.devices()) if jax.devices()[0].platform == "tpu" else 1
    raise UserError(f"this does not fit ({here}): {problem}\n{remedy(known, devices, available, slices=slices)}")


def _of_all_processes(policy: str) -> str:
    """The most frugal policy that any process has chosen: all must run the same program."""
    if jax.process_count() == 1:
        return policy
    return AUTO[int(multihost_utils.process_allgather(np.int32(AUTO.index(policy))).max())]


def remedy(
    config: RunConfig, devices: int, available: int, *, device: AbstractDevice | None = None, slices: int = 1
) -> str:
    """The nearest setting of this config that fits, as flags; if there is none, the largest shipped config that does.

    Args:
      config, devices, available, device, slices: as of `fitting`.
    """
    where: dict[str, Any] = {"device": device, "slices": slices}
    keys = fitting(config, devices, available, **where)
    if keys is not None:
        return f"this fits:{_as_flags(keys)}"
    size = count(transformer_specs(config.model))
    for name in SHIPPED:
        other = build(RunConfig, load(str(CONFIGS / f"{name}.py"))).with_likely_vocab()
        if count(transformer_specs(other.model)) < size:
            keys = fitting(dataclasses.replace(other, mesh=config.mesh), devices, available, **where)
            if keys is not None:
                return f"the nearest shipped config that fits: --config=configs/{name}.py{_as_flags(keys)}"
    return "no shipped config fits: use a machine with more memory"


def _as_flags(keys: dict[str, Any]) -> str:
    return "".join(f" --config.{key}={value}" for key, value in keys.items())
