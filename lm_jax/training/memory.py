"""What a run's config needs of a device's memory, and the nearest setting of it that fits; estimates, by `costs.py`."""

from __future__ import annotations

import dataclasses
from typing import Any

from jax.sharding import AbstractDevice

from lm_jax import costs
from lm_jax.models.transformer import transformer_specs
from lm_jax.sharding import MeshConfig
from lm_jax.training.optimizers import make_optimizer
from lm_jax.training.run import RunConfig
from lm_jax.training.state import abstract_state

AUTO = ("none", "dots", "attention", "full")  # the policies that `auto` chooses from, the fastest first
FILL = 0.9  # of what a device has, where what is needed is an estimate


def need(config: RunConfig, devices: int, device: AbstractDevice | None = None) -> dict[str, int]:
    """Bytes that a training step needs on each device, as `costs.memory` has them.

    Args:
      config: the run's, its vocabulary known.
      devices: how many there are.
      device: what they are; None: as those of the default backend.
    """
    mesh = costs.abstract_mesh(config.mesh, devices, device)
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


def state_bytes(config: RunConfig, devices: int, device: AbstractDevice | None = None) -> int:
    """Of `need`, what no remat and no cutting of rows saves: the state of training. Nothing is traced for it."""
    mesh = costs.abstract_mesh(config.mesh, devices, device)
    return costs.tree_bytes(_state(config, mesh, config.mesh))


def with_remat(config: RunConfig, policy: str) -> RunConfig:
    """The config with another `train.remat`."""
    return dataclasses.replace(config, train=dataclasses.replace(config.train, remat=policy))


def fastest_remat(config: RunConfig, devices: int, room: int, device: AbstractDevice | None = None) -> str:
    """The first policy of `AUTO` that needs no more than `room` bytes; the last one where none does."""
    fits = (p for p in AUTO[:-1] if need(with_remat(config, p), devices, device)["total"] <= room)
    return next(fits, AUTO[-1])


def fitting(
    config: RunConfig, devices: int, available: int, *, device: AbstractDevice | None = None, slices: int = 1
) -> dict[str, Any] | None:
    """What to change, as keys of the config, for a step to fit; None where nothing that keeps model and batch does.

    Args:
      config: the run's, its vocabulary known.
      devices: how many there are.
      available: bytes on each.
      device: what they are; None: as those of the default backend.
      slices: which `mesh.data` must be a multiple of.
    """

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
        slices=slices,
        device=device,
    )


def _state(config: RunConfig, mesh: Any, mesh_config: MeshConfig) -> Any:
    specs = transformer_specs(config.model)
    optimizer = make_optimizer(config.optimizer, specs, config.train.total_steps, config.model.scale)
    return abstract_state(specs, optimizer, mesh, ema=config.optimizer.ema is not None, config=mesh_config)
