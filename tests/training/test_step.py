"""The step: what it minimises, what it accumulates, what it clips, and what it refuses."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lm_jax.objectives.next_token import next_token
from lm_jax.objectives.objective import Objective
from lm_jax.params import Tree
from lm_jax.training.state import TrainState
from lm_jax.training.step import Metrics, make_train_step
from tests.support import tiny

C = tiny.config()
BATCH = tiny.batch(8, 12)

# An optimizer that leaves the parameters and keeps the gradient that it was given.
KEEP = optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params),
    lambda gradient, state, params=None: (jax.tree.map(jnp.zeros_like, gradient), gradient),
)


def fresh(params: Tree, optimizer: optax.GradientTransformation, ema: Tree | None = None) -> TrainState:
    zero = jnp.zeros((), jnp.int32)
    return TrainState(
        params, {}, {"seen": jnp.zeros(())}, optimizer.init(params), ema, zero, zero, zero, jax.random.key(0)
    )


def jitted(objective: Objective, optimizer: optax.GradientTransformation, **settings: Any) -> Any:
    return jax.jit(make_train_step(objective, optimizer, lambda updates: 0.1 * updates, **settings))


def equal(a: Any, b: Any) -> bool:
    """Bit for bit."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs)


# --- the language model's loss and gradient --------------------------------------------------------------------------


@functools.cache
def model_step(microbatches: int) -> Any:
    return jitted(next_token(C, z_loss=0.01), KEEP, microbatches=microbatches)


@pytest.fixture(scope="module")
def whole() -> tuple[TrainState, Metrics]:
    return model_step(1)(fresh(tiny.parameters(C), KEEP), BATCH)


def test_the_loss_is_the_mean_over_targets_that_count(whole: tuple[TrainState, Metrics]) -> None:
    packed = {"positions_BT": BATCH["positions"], "segment_ids_BT": BATCH["segment_ids"]}
    z = np.asarray(tiny.full_logits(tiny.parameters(C), BATCH["tokens"], C, **packed), np.float64)
    mask = BATCH["loss_mask"]
    log_z = np.log(np.exp(z).sum(-1))
    ce = log_z - np.take_along_axis(z, BATCH["targets"][..., None], -1)[..., 0]
    metrics = whole[1]
    np.testing.assert_allclose(metrics["cross_entropy"], ce[mask].mean(), rtol=1e-6)
    np.testing.assert_allclose(metrics["z_loss"], 0.01 * np.square(log_z[mask]).mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], metrics["cross_entropy"] + metrics["z_loss"], rtol=1e-6)
    assert metrics["targets"] == mask.sum() and 0 < mask.sum() < mask.size


def test_without_segment_ids_a_row_is_one_document() -> None:
    one = {**BATCH, "segment_ids": np.zeros_like(BATCH["segment_ids"])}
    none = {**BATCH, "segment_ids": None}
    losses = [float(model_step(1)(fresh(tiny.parameters(C), KEEP), b)[1]["loss"]) for b in (one, none, BATCH)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6) and losses[0] != pytest.approx(losses[2], rel=1e-4)
    with pytest.raises(KeyError):  # forgotten, packing would be ignored in silence
        model_step(1)(fresh(tiny.parameters(C), KEEP), {k: a for k, a in BATCH.items() if k != "segment_ids"})


def test_accumulation_equals_one_batch(whole: tuple[TrainState, Metrics]) -> None:
    microbatches = 4
    counts = BATCH["loss_mask"].sum(1)
    assert len({int(counts[i::microbatches].sum()) for i in range(microbatches)}) > 1  # parts of different weight
    state, metrics = model_step(microbatches)(fresh(tiny.parameters(C), KEEP), BATCH)
    for name in ("loss", "cross_entropy", "z_loss", "grad_norm"):
        np.testing.assert_allclose(metrics[name], whole[1][name], rtol=1e-6, err_msg=name)
    assert metrics["batch_hash"] == whole[1]["batch_hash"] and metrics["targets"] == whole[1]["targets"]
    for a, b in zip(jax.tree.leaves(state.opt_state), jax.tree.leaves(whole[0].opt_state), strict=True):
        assert np.linalg.norm(a - b) <= 2e-6 * np.linalg.norm(b)


def test_a_token_beyond_the_vocabulary_is_refused_by_the_step() -> None:
    before = fresh(tiny.parameters(C), KEEP)
    tokens = np.where(np.arange(12) == 0, 64, BATCH["tokens"]).astype(np.int32)
    after, metrics = model_step(1)(before, BATCH | {"tokens": tokens})
    assert equal((after.params, after.opt_state), (before.params, before.opt_state))
    assert metrics["bad_steps"] == 1 and np.isnan(metrics["loss"])


# --- the step itself, on a loss that compiles at once ----------------------------------------------------------------

# Rows of numbers; those of a row above 99 count as infinite. The loss: mean over rows of (w * row - 1)^2.


def _terms(params: Tree, frozen: Any, extra: Any, batch: Any, key: jax.Array) -> tuple[dict[str, jax.Array], Any]:
    x = jnp.where(batch["x"] > 99, jnp.inf, batch["x"].astype(jnp.float32))
    return {"square": jnp.sum(jnp.square(x * params["w"] - 1))}, {"seen": extra["seen"] + x.shape[0]}


TOY = Objective(lambda batch: {"square": jnp.float32(batch["x"].shape[0])}, _terms)
PARAMS = {"w": jnp.array([0.5, -2.0])}
GOOD, BAD = {"x": np.array([[1, 2], [3, 0]], np.int32)}, {"x": np.array([[1, 2], [100, 0]], np.int32)}
GRADIENT = np.array([1 * (0.5 - 1) + 3 * (1.5 - 1), 2 * (-4.0 - 1)])  # of the mean over two rows


def test_gradients_reach_the_optimizer_as_they_are() -> None:
    state, metrics = jitted(TOY, KEEP)(fresh(PARAMS, KEEP), GOOD)
    np.testing.assert_allclose(state.opt_state["w"], GRADIENT, rtol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], np.linalg.norm(GRADIENT), rtol=1e-6)
    assert set(metrics) == {"loss", "grad_norm", "learning_rate", "targets", "batch_hash", "bad_steps"}
    assert state.step == 1 and state.bad_steps == 0 and state.extra["seen"] == 2


@pytest.mark.parametrize(("clip", "norm"), [(1.0, 1.0), (1e6, np.linalg.norm(GRADIENT))])
def test_clipping_keeps_the_direction(clip: float, norm: float) -> None:
    state, metrics = jitted(TOY, KEEP, clip_norm=clip)(fresh(PARAMS, KEEP), GOOD)
    np.testing.assert_allclose(state.opt_state["w"], GRADIENT * (norm / np.linalg.norm(GRADIENT)), rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], np.linalg.norm(GRADIENT), rtol=1e-6)  # what it was


@pytest.mark.parametrize("microbatches", [1, 2])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_step_that_is_not_finite_changes_nothing(microbatches: int, clip: float | None) -> None:
    optimizer = optax.adamw(0.1)
    step = jitted(TOY, optimizer, microbatches=microbatches, clip_norm=clip, ema=0.9)
    start = fresh(PARAMS, optimizer, jax.tree.map(jnp.copy, PARAMS))
    before, _ = step(start, GOOD)
    after, metrics = step(before, BAD)
    for part in ("params", "opt_state", "ema", "extra"):
        assert not equal(getattr(before, part), getattr(start, part)), part
        assert equal(getattr(after, part), getattr(before, part)), part
    assert not np.isfinite(metrics["loss"])
    assert (before.bad_steps, after.bad_steps, after.step, metrics["bad_steps"]) == (0, 1, 2, 1)
    assert before.applied == after.applied == 1
    twice, _ = step(after, BAD)
    assert twice.bad_steps == 2
    again, _ = step(twice, GOOD)
    assert again.bad_steps == 0 and again.applied == 2 and not equal(again.params, before.params)


def test_a_gradient_that_is_not_finite_is_refused_with_a_finite_loss() -> None:
    def terms(params: Tree, frozen: Any, extra: Any, batch: Any, key: jax.Array) -> tuple[dict[str, jax.Array], Any]:
        return {"root": jnp.sum(jnp.sqrt(params["w"]))}, extra  # at zero: value 0, slope infinite

    objective, params = Objective(lambda batch: {"root": jnp.float32(1)}, terms), {"w": jnp.zeros(2)}
    state, metrics = jitted(objective, optax.sgd(0.1))(fresh(params, optax.sgd(0.1)), GOOD)
    assert np.isfinite(metrics["loss"]) and equal(state.params, params) and state.bad_steps == 1


def test_a_batch_without_targets_is_no_step_to_fear() -> None:
    objective = Objective(
        lambda batch: {"square": jnp.float32(0)}, lambda *a: ({"square": 0 * jnp.sum(a[0]["w"])}, a[2])
    )
    state, metrics = jitted(objective, optax.sgd(0.1))(fresh(PARAMS, optax.sgd(0.1)), GOOD)
    assert metrics["loss"] == 0 and state.bad_steps == 0 and equal(state.params, PARAMS)


def test_the_average_follows() -> None:
    step = jitted(TOY, optax.sgd(0.01), ema=0.5)
    state, _ = step(fresh(PARAMS, optax.sgd(0.01), jax.tree.map(jnp.copy, PARAMS)), GOOD)
    state, _ = step(state, GOOD)
    between = np.sort(np.stack([PARAMS["w"], state.ema["w"], state.params["w"]]), 0)
    assert (between[1] == state.ema["w"]).all() and not (between[0] == between[1]).any()


def test_the_rate_told_is_that_of_the_updates_so_far() -> None:
    step, rates = jitted(TOY, optax.sgd(0.01)), []
    state = fresh(PARAMS, optax.sgd(0.01))
    for batch in (GOOD, BAD, GOOD, GOOD):
        state, metrics = step(state, batch)
        rates.append(float(metrics["learning_rate"]))
    np.testing.assert_allclose(rates, [0, 0.1, 0.1, 0.2])


def test_every_step_and_micro_batch_has_a_key_of_its_own() -> None:
    def terms(params: Tree, frozen: Any, extra: Any, batch: Any, key: jax.Array) -> tuple[dict[str, jax.Array], Any]:
        number = jax.random.uniform(key)
        return {"noise": 0 * jnp.sum(params["w"]) + number}, {"seen": number}

    objective = Objective(lambda batch: {"noise": jnp.float32(1)}, terms)
    step = jitted(objective, KEEP, microbatches=2)
    state, first = step(fresh(PARAMS, KEEP), GOOD)
    assert float(first["loss"]) != 2 * float(state.extra["seen"])  # its two parts drew different numbers
    _, second = step(state, GOOD)
    _, again = step(fresh(PARAMS, KEEP), GOOD)
    assert first["loss"] == again["loss"] != second["loss"]
