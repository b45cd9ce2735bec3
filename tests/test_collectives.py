"""What layouts call for, by arithmetic done by hand. Against compiled programs: `tests/aot/test_collectives.py`."""

from __future__ import annotations

from typing import Any

import pytest

from lm_jax.collectives import expected
from lm_jax.costs import parameters
from lm_jax.models.transformer import TransformerConfig
from lm_jax.sharding import MeshConfig

# Of 4 layers of 64, 2 key-value heads of 16 and a vocabulary of 512.
C = TransformerConfig(
    layers=4, embed=64, heads=4, kv_heads=2, feed_forward_dim=192, vocab=512, norm="rms_no_gain", dtype="bfloat16"
)
LAYERS = 4 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 192)  # numbers
TABLE = 512 * 64
BATCH, LENGTH = 16, 32
TOKENS = BATCH * LENGTH


def of(config: MeshConfig, devices: int, c: TransformerConfig = C, remat: str = "full", **cut: Any) -> dict[Any, float]:
    return expected(c, config, devices, batch_size=BATCH, length=LENGTH, remat=remat, **cut)


def test_the_numbers_are_those_of_the_model() -> None:
    assert parameters(C)["total"] == LAYERS + 2 * TABLE


@pytest.mark.parametrize("context", ["gather", "ring", "all_to_all"])
def test_one_device_sends_nothing(context: str) -> None:
    assert of(MeshConfig(data=1, context=context), 1) == {}


def test_copies_sum_their_gradients() -> None:
    assert of(MeshConfig(), 8) == {("all-reduce", ("data",)): 2 * LAYERS + 2 * TABLE + 4 * TABLE}


def test_split_weights_are_gathered_and_their_gradients_scattered() -> None:
    gathered, scattered = ("all-gather", ("fsdp",)), ("reduce-scatter", ("data", "fsdp"))
    config = MeshConfig(data=2, fsdp=4)
    assert of(config, 8) == {gathered: 2 * 2 * LAYERS + 2 * 2 * TABLE, scattered: 2 * LAYERS + 6 * TABLE}
    assert of(config, 8, remat="none")[gathered] == 2 * LAYERS + 2 * 2 * TABLE


def test_microbatches_gather_again() -> None:
    once, twice = (of(MeshConfig(data=2, fsdp=4), 8, microbatches=n) for n in (1, 2))
    assert twice == {key: 2 * n for key, n in once.items()}


def test_whole_weights_come_back_once_in_float32() -> None:
    found = of(MeshConfig(data=2, fsdp=4, zero=1), 8, microbatches=2)
    assert found["all-gather", ("fsdp",)] == 4 * (LAYERS + 2 * TABLE)
    assert found["all-reduce", ("data", "fsdp")] == 2 * 2 * LAYERS


@pytest.mark.parametrize(("remat", "sums"), [("none", 4), ("dots", 4), ("attention", 5), ("full", 5)])
def test_tensor_parallelism_sums_activations(remat: str, sums: int) -> None:
    x = 2 * TOKENS * 64
    plain = of(MeshConfig(data=1, tensor=2), 2, remat=remat)
    assert plain == {("all-reduce", ("tensor",)): (4 * sums + 2) * x + 3 * 4 * TOKENS}
    split = of(MeshConfig(data=1, tensor=2, split_residual=True), 2, remat=remat)
    assert split["reduce-scatter", ("tensor",)] >= 4 * sums * x
    assert split["all-gather", ("tensor",)] == (4 * (4 if remat == "none" else 6) + 1) * x + 2 * TABLE


def test_a_ring_sends_what_a_gather_brings() -> None:
    """Forward, n - 1 parts of keys and values arrive either way."""
    config = MeshConfig(data=1, sequence=4)
    keys_and_values = 2 * 2 * TOKENS * 32
    found = of(config, 4, remat="none")
    assert found["all-gather", ("sequence",)] == 4 * keys_and_values + 4 * TOKENS
    assert found["reduce-scatter", ("sequence",)] == 4 * keys_and_values
    there = 2 * 3 / 4 * (keys_and_values + 4 * TOKENS)
    ring = of(MeshConfig(data=1, sequence=4, context="ring"), 4, remat="none")
    home = (1 + 3 * 2) / 4 * keys_and_values  # four hops of gradients, the first in bfloat16
    assert ring["collective-permute", ("sequence",)] == 4 * (there + home)
