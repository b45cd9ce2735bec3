"""A config against the memory that is there: what is refused, and the remat policy that picks itself."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from launch import memory
from lm_jax import costs
from lm_jax.errors import UserError
from lm_jax.models.transformer import TransformerConfig
from lm_jax.sharding import MeshConfig
from lm_jax.training.run import RunConfig, TrainConfig

CONFIG = RunConfig(
    model=TransformerConfig(layers=8, embed=256, heads=4, vocab=512, dtype="float32"),
    train=TrainConfig(batch_size=8, length=512, remat="auto"),
)


def need(policy: str) -> int:
    train = dataclasses.replace(CONFIG.train, remat=policy)
    return memory.need(dataclasses.replace(CONFIG, train=train), 1)["total"]


@pytest.mark.parametrize("policy", memory.AUTO)
def test_auto_is_the_first_policy_that_fits(policy: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    needs = [need(p) for p in memory.AUTO]
    assert needs == sorted(needs, reverse=True) and len(set(needs)) == len(needs)  # each saves something
    monkeypatch.setattr(costs, "device_memory", lambda device: int(need(policy) / memory.FILL) + 10)
    assert memory.fitted(CONFIG).train.remat == policy
    assert f"auto is {policy}" in capsys.readouterr().err


def test_auto_fills_a_given_budget_or_stays_frugal(monkeypatch: pytest.MonkeyPatch) -> None:
    for available in (None, 10**12):
        monkeypatch.setattr(costs, "device_memory", lambda device, available=available: available)
        train = dataclasses.replace(CONFIG.train, memory_gb=need("dots") / 1e9 + 1e-6)
        assert memory.fitted(dataclasses.replace(CONFIG, train=train)).train.remat == "dots"
    monkeypatch.setattr(costs, "device_memory", lambda device: None)
    assert memory.fitted(CONFIG).train.remat == "full"  # nothing is known


def test_what_does_not_fit_at_all_is_refused_with_what_would(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "device_memory", lambda device: need("full") - 10)
    with pytest.raises(UserError, match=r"does not fit(.|\n)*this fits: --config.train.microbatches=2"):
        memory.fitted(CONFIG)


def test_named_policies_and_other_keys_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "device_memory", lambda device: 10**12)
    named = dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, remat="full"))
    assert memory.fitted(named) is named
    settled = memory.fitted(CONFIG)
    assert dataclasses.replace(settled, train=CONFIG.train) == CONFIG


def test_split_state_needs_less_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 8 devices: the optimizer's state, the gradients and the weights a part each, stage by stage."""

    def needs(**mesh: Any) -> dict[str, int]:
        config = dataclasses.replace(
            CONFIG, mesh=MeshConfig(data=1, fsdp=8, **mesh), train=dataclasses.replace(CONFIG.train, remat="full")
        )
        return memory.need(config, 8)

    whole = need_of_one = needs(zero=1)["parameters"]
    stages = [needs(zero=zero) for zero in (1, 2, 3)]
    small = stages[2]["parameters"]
    assert whole / 8 <= small < whole / 7  # norms are never split
    assert [s["parameters"] for s in stages] == [whole, whole, small]
    assert [s["gradients"] for s in stages] == [whole, small, small]
    assert all(need_of_one / 4 <= s["optimizer"] < need_of_one / 3.5 for s in stages)  # two moments
    # Moments on the host, which is the device itself on a CPU; elsewhere they come when activations are gone.
    plain = stages[2]
    assert needs(offload_optimizer=True) == plain
    monkeypatch.setattr(costs, "platform", lambda: "tpu")
    away = needs(offload_optimizer=True)
    assert away["optimizer"] < 100 and away["working"] >= plain["optimizer"] - plain["activations"] - 100
