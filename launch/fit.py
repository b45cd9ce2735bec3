"""Whether a config fits the machine, told before anything is made: what it needs, what is there, and what would fit."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax

from launch.cli import load
from lm_jax import costs
from lm_jax.config import build
from lm_jax.errors import UserError
from lm_jax.models.transformer import transformer_specs
from lm_jax.params import count
from lm_jax.training.optimizers import make_optimizer
from lm_jax.training.run import RunConfig
from lm_jax.training.state import abstract_state

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
SHIPPED = ("70b", "13b", "7b", "3b", "1b", "760m", "350m", "125m", "tiny")  # from the largest
_UNKNOWN_VOCABULARY = 257  # of bytes; characters have fewer or are few beside the rest


def refuse_what_does_not_fit(config: RunConfig) -> None:
    """Raises UserError where a training step of the config needs more memory than this machine's devices have."""
    available = costs.device_memory(jax.local_devices()[0])
    if available is None:
        return
    devices = jax.device_count()
    config = _with_vocabulary(config)
    config.check_layout(devices)
    problem = costs.shortage(_need(config, devices), available)
    if problem is None:
        return
    here = f"{devices} x {jax.devices()[0].device_kind}"
    raise UserError(f"this does not fit ({here}): {problem}\n{_remedy(config, devices, available)}")


def _with_vocabulary(config: RunConfig) -> RunConfig:
    """The config with the vocabulary that its tokenizer will have, as far as that is known before there is one."""
    if config.model.vocab is not None:
        return config
    return config.with_vocab(
        config.data.vocab_size if config.data.tokenizer == "sentencepiece" else _UNKNOWN_VOCABULARY
    )


def _state(config: RunConfig, mesh: Any) -> Any:
    specs = transformer_specs(config.model)
    optimizer = make_optimizer(config.optimizer, specs, config.train.total_steps)
    return abstract_state(specs, optimizer, mesh, ema=config.optimizer.ema is not None)


def _need(config: RunConfig, devices: int) -> dict[str, int]:
    mesh = costs.abstract_mesh(config.mesh, devices)
    train = config.train
    return costs.memory(
        config.model,
        _state(config, mesh),
        mesh,
        batch_size=train.batch_size,
        length=train.length,
        remat=train.remat,
        microbatches=train.microbatches,
    )


def _remedy(config: RunConfig, devices: int, available: int) -> str:
    """The nearest setting of this config that fits; if there is none, the largest shipped config that does."""
    keys = _fitting(config, devices, available)
    if keys is not None:
        return f"this fits:{_as_flags(keys)}"
    size = count(transformer_specs(config.model))
    for name in SHIPPED:
        other = _with_vocabulary(build(RunConfig, load(str(CONFIGS / f"{name}.py"))))
        if count(transformer_specs(other.model)) < size:
            keys = _fitting(dataclasses.replace(other, mesh=config.mesh), devices, available)
            if keys is not None:
                return f"the nearest shipped config that fits: --config=configs/{name}.py{_as_flags(keys)}"
    return "no shipped config fits: use a machine with more memory"


def _fitting(config: RunConfig, devices: int, available: int) -> dict[str, Any] | None:
    """What to change for the config to fit; None where nothing that keeps its model and its batch does."""

    def state(mesh: Any) -> Any:
        return _state(config, mesh)

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
    )


def _as_flags(keys: dict[str, Any]) -> str:
    return "".join(f" --config.{key}={value}" for key, value in keys.items())
