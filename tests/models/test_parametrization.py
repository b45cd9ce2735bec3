"""Parametrisations against the papers' tables, and against the standard model that each of them is at its base size.

Shapes: B batch, T length.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm_jax.errors import ConfigError
from lm_jax.interop.nnx import transformer_module
from lm_jax.models.parametrization import PARAMETRIZATIONS, Scale
from lm_jax.models.transformer import TransformerConfig, hidden, init_cache, logits, transformer_specs
from lm_jax.objectives.next_token import next_token
from lm_jax.params import Normal, Tree, initialize, named
from lm_jax.training.optimizers import OptimizerConfig, make_optimizer, multipliers, peak_rates
from tests.support import tiny

TOKENS = np.random.default_rng(0).integers(0, 64, (2, 12)).astype(np.int32)
MUP: dict[str, Any] = {"parametrization": "mup", "base_embed": 8}  # of 32: four times as wide
DEEP: dict[str, Any] = {"parametrization": "completep", "base_embed": 16, "base_layers": 1}  # twice as wide and deep


def base(name: str, **sizes: int) -> dict[str, Any]:
    return {"parametrization": name} | {f"base_{k}": v for k, v in sizes.items()}


# ----------------------------------------------------------------------------------------------------------- the tables

# Yang et al. 2022, table 8, for a width of four times the base's: (initial variance over that of the base, multiplier
# of Adam's rate, multiplier of SGD's). Input weights and biases: 1, 1, fan_out. Output weights (their multiplier is
# 1 / fan_in): 1, 1, fan_in. Hidden weights: 1 / fan_in, 1 / fan_in, 1.
INPUT, OUTPUT, HIDDEN = (1, 1, 4), (1, 1, 4), (1 / 4, 1 / 4, 1)
TABLE_8 = {
    "embedding": INPUT,
    "output": OUTPUT,
    "final_norm/gain": INPUT,
    "blocks/attention_norm/gain": INPUT,
    "blocks/feed_forward_norm/gain": INPUT,
    "blocks/attention/query": HIDDEN,
    "blocks/attention/key": HIDDEN,
    "blocks/attention/value": HIDDEN,
    "blocks/attention/out": HIDDEN,
    "blocks/feed_forward/gate": HIDDEN,
    "blocks/feed_forward/up": HIDDEN,
    "blocks/feed_forward/down": HIDDEN,
}
NARROW = TransformerConfig(layers=2, embed=32, heads=2, kv_heads=1, feed_forward_dim=64, vocab=1000)
WIDE = dataclasses.replace(
    NARROW, embed=128, heads=8, kv_heads=4, feed_forward_dim=256, parametrization="mup", base_embed=32
)


def test_initial_values_follow_table_8() -> None:
    def variances(c: TransformerConfig) -> dict[str, float]:
        specs = named(transformer_specs(c))
        return {name: spec.init.std**2 if isinstance(spec.init, Normal) else 1.0 for name, spec in specs.items()}

    narrow, wide = variances(NARROW), variances(WIDE)
    assert narrow.keys() == TABLE_8.keys()
    for name, (variance, _, _) in TABLE_8.items():
        np.testing.assert_allclose(wide[name] / narrow[name], variance, rtol=1e-9, err_msg=name)


@pytest.mark.parametrize(("optimizer", "column"), [("adamw", 1), ("sgd", 2)])
def test_learning_rates_follow_table_8(optimizer: str, column: int) -> None:
    config = OptimizerConfig(name=optimizer)
    found = named(multipliers(config, transformer_specs(WIDE), WIDE.scale))
    assert {name: found[name] for name in TABLE_8} == {name: row[column] for name, row in TABLE_8.items()}


def test_a_tied_table_has_one_rate() -> None:
    """What table 8 gives a look-up and an output is the same: that is what it is for."""
    assert INPUT == OUTPUT
    tied = dataclasses.replace(WIDE, tied=True)
    specs = transformer_specs(tied)
    assert multipliers(OptimizerConfig(name="sgd"), specs, tied.scale)["embedding"] == 4
    assert multipliers(OptimizerConfig(name="adamw"), specs, tied.scale)["embedding"] == 1


def test_initial_values_of_completep() -> None:
    """Dey et al. 2025, table 1, alpha = 1: no initial size depends on the depth, ours at the base's depth included."""
    deep = dataclasses.replace(WIDE, layers=32, parametrization="completep", base_layers=2)
    blocks, base_blocks = (transformer_specs(c)["blocks"] for c in (deep, WIDE))
    for part, name in (("attention", "out"), ("feed_forward", "down"), ("attention", "query")):
        assert blocks[part][name].init == base_blocks[part][name].init
    shallow = dataclasses.replace(WIDE, layers=32)
    assert transformer_specs(shallow)["blocks"]["attention"]["out"].init.std < blocks["attention"]["out"].init.std


# ------------------------------------------------------------------------------------------------------- at base size

AT_BASE = [
    base("mup", embed=32),
    base("mup", embed=32, head_dim=8),
    base("completep", embed=32, layers=2),
]


@pytest.mark.parametrize("changes", AT_BASE)
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_at_its_base_size_it_is_the_standard_program(changes: dict[str, Any], optimizer: str) -> None:
    """The same initial values, and not one operation more: the traced programs are the same text."""

    def program(c: TransformerConfig) -> str:
        specs = transformer_specs(c)
        rule = make_optimizer(OptimizerConfig(name=optimizer), specs, 4, c.scale)
        batch = tiny.batch(2, 8)

        def step(params: Tree, key: jax.Array) -> Any:
            def loss(params: Tree) -> jax.Array:
                return next_token(c).terms(params, {}, {}, batch, key)[0]["cross_entropy"]

            updates = rule.update(jax.grad(loss)(params), rule.init(params), params)
            return initialize(specs, key), updates, logits(params, hidden(params, batch["tokens"], c=c)[0], c=c)

        return str(jax.make_jaxpr(step)(tiny.parameters(c), jax.random.key(0)))

    standard, sized = tiny.config(), tiny.config(**changes)
    assert program(sized) == program(standard)
    twice = dataclasses.replace(sized, base_embed=16)
    assert program(twice) != program(standard)


# ----------------------------------------------------------------------------------------------------- the multipliers


@pytest.mark.parametrize("tied", [False, True])
def test_logits_are_divided_by_the_width_over_the_base(tied: bool) -> None:
    c = tiny.config(tied=tied)
    params = tiny.parameters(c)
    got = tiny.full_logits(params, TOKENS, tiny.config(tied=tied, **MUP))
    np.testing.assert_allclose(got * 4, tiny.full_logits(params, TOKENS, c), rtol=1e-5, atol=1e-5)


def test_scores_are_divided_by_the_head_s_width() -> None:
    """Rotation is linear: a factor of the scores is one of the queries."""
    c = tiny.config()
    params = tiny.parameters(c)
    sized = tiny.config(**MUP, base_head_dim=2)
    factor = (math.sqrt(2) / 8) / 8**-0.5
    attention = params["blocks"]["attention"] | {"query": params["blocks"]["attention"]["query"] * factor}
    scaled = params | {"blocks": params["blocks"] | {"attention": attention}}
    want = tiny.full_logits(scaled, TOKENS, c) / 4
    np.testing.assert_allclose(tiny.full_logits(params, TOKENS, sized), want, rtol=1e-5, atol=1e-5)
    assert np.abs(tiny.full_logits(params, TOKENS, c) / 4 - want).max() > 1e-2


@pytest.mark.parametrize("scan", [False, True])
def test_what_a_block_adds_is_divided_by_the_depth_over_the_base(scan: bool) -> None:
    """The projections out of attention and feed-forward are linear: a factor of what they add is one of them."""
    c = tiny.config(scan=scan)
    params = tiny.parameters(c)
    blocks = {name: dict(part) for name, part in params["blocks"].items()}
    blocks["attention"]["out"] /= 2
    blocks["feed_forward"]["down"] /= 2
    want = tiny.full_logits(params | {"blocks": blocks}, TOKENS, c) / 2
    got = tiny.full_logits(params, TOKENS, tiny.config(scan=scan, **DEEP))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


# ----------------------------------------------------------------------------------- everywhere that logits are made


@pytest.mark.parametrize("changes", [MUP | {"base_head_dim": 2}, DEEP, MUP | {"tied": True}])
def test_the_loss_decoding_and_flax_see_the_same_logits(changes: dict[str, Any]) -> None:
    c = tiny.config(**changes)
    params = tiny.parameters(c)
    targets = np.roll(TOKENS, -1, 1)
    batch = {
        "tokens": TOKENS,
        "targets": targets,
        "segment_ids": np.zeros_like(TOKENS),
        "positions": np.broadcast_to(np.arange(12, dtype=np.int32), (2, 12)),
        "loss_mask": np.ones((2, 12), bool),
    }

    @jax.jit
    def all_of_them(params: Tree) -> tuple[jax.Array, ...]:
        total = next_token(c).terms(params, {}, {}, batch, jax.random.key(0))[0]["cross_entropy"]
        cache, seen = init_cache(c, 2, 12), []
        for part in np.split(TOKENS, [7], axis=1):
            x, cache = hidden(params, part, c=c, cache=cache)
            seen.append(logits(params, x, c=c))
        module = transformer_module(params, c)
        return tiny.full_logits(params, TOKENS, c), total, jnp.concatenate(seen, 1), module(jnp.asarray(TOKENS))

    whole, total, decoded, flax = all_of_them(params)
    z_BTV = np.asarray(whole, np.float64)
    each = np.log(np.exp(z_BTV).sum(-1)) - np.take_along_axis(z_BTV, targets[..., None], -1)[..., 0]
    np.testing.assert_allclose(total, each.sum(), rtol=1e-5)
    np.testing.assert_allclose(decoded, z_BTV, atol=1e-5)
    np.testing.assert_allclose(flax, z_BTV, atol=1e-5)


# -------------------------------------------------------------------------------------------------------------- config


@pytest.mark.parametrize(
    ("changes", "key", "says"),
    [
        ({"parametrization": "mu"}, "parametrization", "use one of standard, mup, completep"),
        ({"parametrization": "mup"}, "base_embed", "mup needs it"),
        (base("completep", embed=32), "base_layers", "completep needs it"),
        ({"base_embed": 32}, "base_embed", "leave it None, or use mup or completep"),
        ({"base_head_dim": 8}, "base_head_dim", "leave it None, or use mup or completep"),
        (base("mup", embed=32, layers=2), "base_layers", "leave it None, or use completep"),
        (base("mup", embed=0), "base_embed", "0 is too small"),
    ],
)
def test_sizes_that_are_missing_or_have_no_meaning_are_refused(changes: dict[str, Any], key: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as error:
        tiny.config(**changes)
    assert str(error.value).startswith(f"model.{key}")


def test_scale() -> None:
    assert tiny.config().scale == Scale(1.0, 1.0)
    assert tiny.config(**MUP).scale == Scale(4.0, 1.0)
    assert tiny.config(**DEEP).scale == Scale(2.0, 2.0)
    assert set(PARAMETRIZATIONS) == {"standard", "mup", "completep"}


def test_peak_rates_are_the_user_s() -> None:
    """The multipliers do not show in the rate that a run reports."""
    rates = peak_rates(OptimizerConfig(learning_rate=0.01), transformer_specs(WIDE))
    assert set(jax.tree.leaves(rates)) == {0.01}
