"""Numbers against the textbook's formulas, written out here, and against what training and generation really hold."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from lm_jax import costs, numbers
from lm_jax.errors import UserError
from lm_jax.models.transformer import TransformerConfig, init_cache, transformer_specs
from lm_jax.objectives.next_token import next_token
from lm_jax.sharding import MeshConfig
from lm_jax.training.optimizers import RULES, OptimizerConfig, make_optimizer
from lm_jax.training.state import abstract_state
from tests.support import tiny

LLAMA_2_70B = TransformerConfig(layers=80, embed=8192, heads=64, kv_heads=8, feed_forward_dim=28672, vocab=32_000)


def gpt(layers: int, embed: int, heads: int, vocab: int, **changes: Any) -> TransformerConfig:
    """Attention of 4 D^2 and a feed-forward layer of 8 D^2."""
    shape: dict[str, Any] = dict(feed_forward="squared_relu", feed_forward_dim=4 * embed, tied=True)
    return TransformerConfig(layers=layers, embed=embed, heads=heads, vocab=vocab, **(shape | changes))


# ---------------------------------------------------------------------------------------------------------------- FLOPs


def test_flops_are_those_of_the_textbook() -> None:
    L, D, V, T = 48, 1600, 50_257, 1024
    found = numbers.flops_per_token(gpt(L, D, 25, V), T)
    matrices, gains = 12 * L * D**2, (2 * L + 1) * D
    assert found["kaplan"] == 6 * (matrices + gains)
    assert found["chinchilla"] == 6 * (matrices + gains + V * D)
    assert found["all_pairs"] == 6 * (matrices + V * D) + 12 * L * D * T  # PaLM, appendix B: 6 N + 12 L H Q T
    assert found["causal"] == 6 * (matrices + V * D) + 6 * L * D * (T + 1)


# -------------------------------------------------------------------------------------------------- bytes a parameter

MODELS = {
    "factored": dict(layers=3, embed=256, heads=2, kv_heads=1, head_dim=128, feed_forward_dim=384, vocab=512),
    "narrow heads": dict(layers=2, embed=128, heads=4, head_dim=32, feed_forward_dim=192, vocab=130, tied=True),
    "many layers": dict(layers=130, embed=128, heads=2, head_dim=64, feed_forward_dim=256, vocab=64),
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("optimizer", RULES)
def test_state_is_that_of_training_byte_for_byte(optimizer: str, model: str) -> None:
    c = tiny.config(**{"kv_heads": None, **MODELS[model]})
    specs = transformer_specs(c)
    rule = make_optimizer(OptimizerConfig(name=optimizer), specs, 10)
    state = abstract_state(specs, rule, costs.abstract_mesh(MeshConfig(), 1))
    leaves = jax.tree.leaves((state.params, state.opt_state))
    real = sum(costs.tree_bytes(a) for a in leaves if a.ndim)
    held = numbers.bytes_per_parameter(c, optimizer, "float32")
    assert (held["weights"] + held["state"]) * costs.parameters(c)["total"] == pytest.approx(real, abs=1e-3)
    assert sum(costs.tree_bytes(a) for a in leaves if not a.ndim) <= 16  # counters


def test_gradients_are_float32_where_compute_is_bfloat16() -> None:
    c = tiny.config(dtype="bfloat16")

    def loss(params: Any) -> jax.Array:
        terms = next_token(c).terms(params, {}, {}, tiny.batch(2, 8), jax.random.key(0))[0]
        return terms["cross_entropy"]

    gradients = jax.tree.leaves(jax.eval_shape(jax.grad(loss), tiny.parameters(c)))
    assert {g.dtype for g in gradients} == {jnp.dtype("float32")}
    assert numbers.RECIPES["float32"].gradient == 4


def test_recipes_are_those_of_the_textbook() -> None:
    def total(optimizer: str, recipe: str) -> float:
        return numbers.bytes_per_parameter(LLAMA_2_70B, optimizer, recipe)["total"]

    assert total("adamw", "mixed") == total("adamw", "float32") == 16  # Rajbhandari et al. 2020: 2 + 2 + 12
    assert total("sgd", "mixed") == total("sgd", "float32") == 12
    assert total("sgd without momentum", "mixed") == 8
    assert 8 < total("adafactor", "float32") < 8.01


def test_adafactor_keeps_a_row_and_a_column_a_matrix() -> None:
    c = TransformerConfig(layers=1, embed=256, heads=2, kv_heads=2, feed_forward_dim=512, vocab=1024)
    attention = 4 * (2 * 256 + 2 * 128)  # a mean over each of the two largest dimensions, [256, 2, 128]
    matrices = 3 * (256 + 512) + 2 * (1024 + 256)
    gains = 3 * 256
    unused = 4 + 3 + 2 + 3 * 2
    assert numbers.state_numbers(c, "adafactor") == attention + matrices + gains + unused


# -------------------------------------------------------------------------------------------- activations and the cache


def test_activations_are_those_counted_by_hand() -> None:
    D, N, K, H, F = 256, 4, 2, 64, 640
    c = TransformerConfig(layers=5, embed=D, heads=N, kv_heads=K, feed_forward_dim=F, vocab=512)
    kept = numbers.activations(c, 128, numbers.CHIPS["v5p"])
    block_input, attended = 2 * D, 2 * N * H + 4 * N  # bfloat16; the log-sum-exp is float32
    assert kept["full"]["bytes"] == block_input  # Korthikanti et al. 2022, arXiv:2205.05198, table 2: 2 s b h
    assert kept["attention"]["bytes"] == block_input + attended
    assert kept["dots"]["bytes"] == block_input + 2 * ((N + 2 * K) * H + D + 2 * F)
    # Two inputs and outputs of norms with a number each, queries, keys, values, three arrays of the feed-forward layer.
    least = 4 * 2 * D + 2 * 4 + 2 * (N + 2 * K) * H + attended + 3 * 2 * F
    twice = 2 * N * H + 2 * D  # may be kept in two shapes: what attention gives, and what goes into the feed-forward
    assert least <= kept["none"]["bytes"] <= least + twice
    layer = (costs.parameters(c)["attention"] + costs.parameters(c)["feed_forward"]) // 5 + 2 * D
    assert kept["none"]["weight_bytes"] == 2 * layer
    assert {kept[policy]["weight_bytes"] for policy in ("dots", "attention", "full")} == {0}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_cache_is_that_of_generation(dtype: str) -> None:
    c = tiny.config(dtype=dtype)
    itemsize = jnp.dtype(dtype).itemsize
    real = jax.eval_shape(lambda: init_cache(c, 3, 40))
    assert 3 * 40 * numbers.cache_bytes(c, itemsize) == costs.tree_bytes((real.keys, real.values))


def test_caches_are_those_of_the_textbook() -> None:
    one_head = 2 * 80 * 128 * 2
    heads = {"own": 8, "MHA": 64, "GQA": 8, "MQA": 1}
    assert numbers.caches(LLAMA_2_70B, 2) == {name: k * one_head for name, k in heads.items()}
    assert "GQA" not in numbers.caches(tiny.config(), 2)  # 8 key-value heads cannot be shared by 4
    assert numbers.cache_bytes(gpt(40, 5120, 40, 50_272), 2) == 800 * 1024  # OPT-13B, Kwon et al. 2023, section 3


# --------------------------------------------------------------------------------------------- chips, time, the inverse


@pytest.mark.parametrize("name", numbers.CHIPS)
def test_every_chip_has_a_peak(name: str) -> None:
    assert numbers.chip(name.upper()).peak > 0
    assert numbers.compute_dtype(tiny.config(dtype="auto"), numbers.chip(name)) == "bfloat16"


def test_peaks_are_those_of_whole_chips() -> None:
    published = {"v3": 123e12, "v4": 275e12, "v5p": 459e12, "tpu7x": 2307e12, "a100": 312e12, "h100": 989e12}
    assert {name: numbers.CHIPS[name].peak for name in published} == published


def test_time_and_its_inverse() -> None:
    flops = 6 * 70e9 * 2e12
    hours = numbers.training_hours(flops, chips=1000, peak=312e12, mfu=0.4)
    assert hours == pytest.approx(6 * 70e9 * 2e12 / (1000 * 312e12 * 0.4) / 3600)
    assert numbers.implied_mfu(flops, 1000 * hours, 312e12) == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: numbers.chip("h10"), ["--chip", "'h10'", "h100"]),
        (lambda: numbers.chip("abacus"), ["--chip", "'abacus'", "v5p"]),
        (lambda: numbers.training_hours(1e20, 1, 1e12, 0.0), ["--mfu", "0", "at most 1"]),
        (lambda: numbers.training_hours(1e20, 1, 1e12, 40.0), ["--mfu", "40", "at most 1"]),
        (lambda: numbers.training_hours(1e20, 1, 1e12, math.nan), ["--mfu", "nan"]),
        (lambda: numbers.training_hours(1e20, 0, 1e12, 0.4), ["--chips", "0", "1 or more"]),
        (lambda: numbers.implied_mfu(1e20, -5.0, 1e12), ["--chip_hours", "-5", "above 0"]),
    ],
)
def test_what_cannot_be_is_told(call: Any, says: list[str]) -> None:
    with pytest.raises(UserError) as told:
        call()
    assert all(word in str(told.value) for word in says) and len(str(told.value).splitlines()) <= 3
