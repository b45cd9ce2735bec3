"""Coordinate checks tell a parametrisation that transfers from one that does not, and name what is wrong."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import numpy as np
import pytest

from launch.train import objective
from lm_jax.errors import UserError
from lm_jax.models import transformer
from lm_jax.models.parametrization import Scale
from lm_jax.models.transformer import TransformerConfig, hidden, logits
from lm_jax.scaling import coordinates
from lm_jax.scaling.coordinates import Check, Scales, checkable, deepened, draw, measure, slope, verdicts, widened
from lm_jax.training import optimizers
from lm_jax.training.optimizers import OptimizerConfig
from lm_jax.training.run import RunConfig
from tests.support import tiny

WIDTHS, STEPS, LIMIT = (64, 512), 3, 0.15
MUP = {"parametrization": "mup", "base_embed": 64}


def config(**changes: Any) -> RunConfig:
    model = TransformerConfig(layers=2, embed=64, heads=4, kv_heads=2, feed_forward_dim=176, vocab=256, **changes)
    return checkable(RunConfig(model=model, optimizer=OptimizerConfig(learning_rate=1e-3)), STEPS)


def scales_of(width: int, changes: dict[str, Any]) -> Scales:
    run = config(**changes)
    models = {width: widened(run.model, WIDTHS)[width]}
    return measure(run, models, objective, steps=STEPS, seeds=1)


@functools.cache
def narrow() -> Scales:
    """At its base's width a model is the standard one, faults of multipliers included."""
    return scales_of(WIDTHS[0], {})


def checks(changes: dict[str, Any]) -> dict[str, Check]:
    wide = scales_of(WIDTHS[1], changes)
    both = jax.tree.map(lambda a, b: np.concatenate([a, b]), narrow(), wide)
    return {check.kind: check for check in verdicts(WIDTHS, both, "width", LIMIT)}


def test_mup_moves_every_activation_as_far_at_every_width() -> None:
    assert [c.suspect for c in checks(MUP).values() if not c.ok] == []


def test_the_standard_parametrisation_moves_further_the_wider_it_is() -> None:
    """With Adam a step changes the output of a matrix by up to its fan-in: Yang et al. 2022, figure 5."""
    found = checks({})
    for kind in ("attention", "feed_forward", "residual", "margin"):
        assert not found[kind].ok and 0.2 < found[kind].change < 1.2, found[kind]
    assert found["margin"].change > 0.5
    assert found["embedding"].ok


@pytest.mark.parametrize("fault", ["output multiplier", pytest.param("matrix rates", marks=pytest.mark.slow)])
def test_planted_faults_are_named(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if fault == "output multiplier":

        def undivided(params: Any, c: TransformerConfig) -> jax.Array:
            return transformer.constrain(params["output"].astype(c.compute_dtype), None, "vocab")

        monkeypatch.setattr(transformer, "output_weight", undivided)
        monkeypatch.setattr("lm_jax.objectives.next_token.output_weight", undivided)
    else:
        monkeypatch.setitem(optimizers.WIDTH_POWERS, "adamw", {})
    failed = [check for check in checks(MUP).values() if not check.ok]
    if fault == "output multiplier":
        assert {check.kind for check in failed} == {"logits", "margin"}
        assert "multiplier" in failed[0].suspect
    else:
        assert failed[0].kind == "attention" and "learning rates" in failed[0].suspect


def test_it_sees_what_the_model_computes() -> None:
    """The activations lead to the very logits that training and decoding see."""
    c = tiny.config(parametrization="completep", base_embed=16, base_layers=1, kv_heads=1)
    params, tokens = tiny.parameters(c), np.random.default_rng(0).integers(0, 64, (2, 8))
    found = jax.jit(lambda p: coordinates.activations(p, {"tokens": tokens, "targets": tokens}, c))(params)
    x_BTD = jax.jit(lambda p: hidden(p, tokens, c=c)[0])(params)
    np.testing.assert_allclose(found["logits"], logits(params, x_BTD, c=c), rtol=1e-5, atol=1e-5)
    branches = found["attention"].sum(0) + found["feed_forward"].sum(0)
    np.testing.assert_allclose(found["embedding"] + branches, found["residual"], rtol=1e-5, atol=1e-5)
    z_BTV = np.asarray(found["logits"])
    margin = np.mean([z[t] - z.mean() for z, t in zip(z_BTV.reshape(-1, 64), tokens.ravel(), strict=True)])
    np.testing.assert_allclose(found["margin"], margin, rtol=1e-4, atol=1e-6)


def test_models_of_each_width() -> None:
    c = TransformerConfig(embed=192, heads=4, kv_heads=2, feed_forward_dim=512, vocab=64, **MUP)
    models = widened(c, (64, 128, 512))
    assert [(m.embed, m.heads, m.key_heads, m.head_size) for m in models.values()] == [
        (64, 4, 2, 16),
        (128, 8, 4, 16),
        (512, 32, 16, 16),
    ]
    assert [m.inner for m in models.values()] == [171, 341, 1365]
    assert [m.scale for m in models.values()] == [Scale(1.0), Scale(2.0), Scale(8.0)]
    wider = widened(dataclasses.replace(c, base_head_dim=16), (64, 256))[256]
    assert (wider.heads, wider.key_heads, wider.head_size) == (4, 2, 64)
    with pytest.raises(UserError, match=r"--widths: 96 (.|\n)* multiples of 64"):
        widened(c, (64, 96))
    assert [m.layers for m in deepened(c, (2, 8)).values()] == [2, 8]


def test_slopes_are_powers() -> None:
    assert math.isclose(slope((64, 128, 512), 3 * np.array([64.0, 128, 512]) ** 0.5), 0.5)
    assert slope((1, 2), np.zeros(2)) == 0.0
    assert math.isnan(slope((1, 2), np.array([1.0, math.nan]))) and math.isnan(slope((1, 2), np.array([1.0, 0.0])))


@pytest.mark.parametrize(
    ("kind", "change", "level", "ok", "axis"),
    [
        ("residual", 0.1, 0.1, True, "width"),
        ("residual", -0.2, 0.0, False, "width"),
        ("residual", 0.2, 0.0, False, "width"),
        ("residual", 0.0, 0.2, False, "width"),
        ("residual", 0.0, -0.5, True, "width"),
        ("logits", -0.5, -0.5, True, "width"),
        ("logits", 0.2, 0.0, False, "width"),
        ("margin", math.nan, 0.0, False, "width"),
        ("residual", -0.2, 0.0, True, "depth"),
        ("margin", -0.2, 0.0, False, "depth"),
    ],
)
def test_what_passes(kind: str, change: float, level: float, ok: bool, axis: coordinates.Axis) -> None:
    values = {k: np.ones((2, 2)) for k in coordinates.KINDS}
    grown = Scales(*(values | {kind: np.array([[1, 1], [1, 4.0**power]])} for power in (level, change)))
    (found,) = [check for check in verdicts((1, 4), grown, axis, LIMIT) if check.kind == kind]
    assert found.ok is ok


def test_the_picture_is_one() -> None:
    values = {kind: np.ones((2, STEPS + 1)) for kind in coordinates.KINDS}
    assert draw((64, 128), Scales(values, values), "width", "a title").startswith(b"\x89PNG")
