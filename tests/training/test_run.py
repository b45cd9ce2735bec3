"""A layout that does not divide what it splits is told by the key, with the nearest that does."""

from __future__ import annotations

from typing import Any

import pytest

from lm_jax.errors import ConfigError
from lm_jax.models.transformer import TransformerConfig
from lm_jax.sharding import MeshConfig
from lm_jax.training.run import RunConfig, TrainConfig


def check(devices: int, mesh: dict[str, Any], model: dict[str, Any] | None = None, **train: Any) -> None:
    small: dict[str, Any] = {"embed": 64, "heads": 8, "vocab": 512} | (model or {})
    train = {"batch_size": 16, "length": 256} | train
    RunConfig(
        model=TransformerConfig(**small), mesh=MeshConfig(**{"data": 1, **mesh}), train=TrainConfig(**train)
    ).check_layout(devices)


@pytest.mark.parametrize(
    ("key", "says", "wrong"),
    [
        (
            "train.batch_size",
            "20 rows .* data=8 .*\n.*nearest that fits is 16",
            {"mesh": {"data": 8}, "batch_size": 20},
        ),
        ("train.length", "250 .* mesh.sequence = 4\n.* 248", {"mesh": {"sequence": 4, "data": 2}, "length": 250}),
        (
            "model.heads",
            "6 .* mesh.tensor = 4\n.* is 8",
            {"mesh": {"tensor": 4, "data": 2}, "model": {"heads": 6, "head_dim": 8}},
        ),
        ("model.kv_heads", "2 .* mesh.tensor = 8\n.* is 8", {"mesh": {"tensor": 8}, "model": {"kv_heads": 2}}),
        ("model.vocab", "510 .* mesh.tensor = 8\n.* is 512", {"mesh": {"tensor": 8}, "model": {"vocab": 510}}),
        (
            "model.embed",
            "72 .* mesh.fsdp = 16\n.* is 64",
            {"mesh": {"fsdp": 16}, "model": {"embed": 72, "heads": 8, "head_dim": 8}},
        ),
        (
            "train.length",
            "252 .* mesh.sequence x mesh.tensor = 8\n.* is 256",
            {"mesh": {"sequence": 2, "tensor": 4, "split_residual": True}, "length": 252},
        ),
        (
            "model.heads",
            "4 .* mesh.tensor x mesh.sequence = 8\n.* is 8",
            {"mesh": {"sequence": 4, "tensor": 2, "context": "all_to_all"}, "model": {"heads": 4}},
        ),
        (
            "train.length",
            "252 .* 8 parts of a ring over mesh.sequence\n.* is 256",
            {"mesh": {"sequence": 4, "data": 2, "context": "ring"}, "length": 252},
        ),
    ],
)
def test_what_does_not_divide_is_named_with_the_nearest_that_does(key: str, says: str, wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{key}: {says}"):
        check(16 if "fsdp" in says else 8, **wrong)


def test_a_ring_with_a_window_needs_no_more_than_equal_parts() -> None:
    check(8, {"sequence": 4, "data": 2, "context": "ring"}, {"window": 64}, length=252)


@pytest.mark.parametrize(("key", "value"), [("zero", 0), ("zero", 4), ("context", "rings")])
def test_choices_that_are_none(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"mesh.{key}: .*{value}.*\nuse "):
        MeshConfig(**{key: value})
    with pytest.raises(ConfigError, match=r"train.memory_gb: -1"):
        TrainConfig(memory_gb=-1)
