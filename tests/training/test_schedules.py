"""Learning-rate schedules against their definitions."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm_jax.training.optimizers import OptimizerConfig
from lm_jax.training.schedules import SCHEDULES, learning_rate


def fractions(steps: int, **keys: object) -> np.ndarray:
    """A schedule's fractions at steps 0 .. steps (the last is one past the last update)."""
    config = OptimizerConfig(**keys)  # type: ignore[arg-type]
    longest = jnp.arange(2001)  # one shape for all, or each would be compiled anew
    return np.asarray(SCHEDULES[config.schedule](config, steps)(longest))[: steps + 1]


def by_definition(schedule: str, t: int, N: int, W: int, f: float, share: float) -> float:
    """The definitions, a step at a time in Python's own floats."""
    if t < W:
        return (t + 1) / (W + 1)
    if schedule == "constant":
        return 1.0
    if schedule == "inverse_sqrt":
        return math.sqrt((W + 1) / (t + 1))
    if schedule == "cosine":
        return f + (1 - f) * (1 + math.cos(math.pi * (t - W) / (N - W))) / 2
    start = W if schedule == "linear" else max(W, (1 - share) * N)
    return 1.0 if t < start else f + (1 - f) * (N - t) / (N - start)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("W", [0, 1, 7])
def test_equals_its_definition(schedule: str, W: int) -> None:
    N, f, share = 50, 0.1, 0.3
    got = fractions(N, schedule=schedule, warmup_steps=W, final_fraction=f, decay_fraction=share)
    want = [by_definition(schedule, t, N, W, f, share) for t in range(N + 1)]
    np.testing.assert_allclose(got, want, rtol=2e-6, atol=2e-7)


def test_linear_to_zero_is_the_shakespeare_recipe() -> None:
    got = fractions(2000, schedule="linear", warmup_steps=20, final_fraction=0.0)
    want = [(t + 1) / 21 if t < 20 else (2000 - t) / 1980 for t in range(2001)]
    np.testing.assert_allclose(got, want, rtol=1e-6)
    assert got[20] == 1.0 and got[2000] == 0.0 and got[1999] > 0


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("W", [10, 11, 1000, 2**40])
def test_a_warm_up_longer_than_the_run_is_cut(schedule: str, W: int) -> None:
    got = fractions(10, schedule=schedule, warmup_steps=W)[:10]
    np.testing.assert_allclose(got, [(t + 1) / (W + 1) for t in range(10)], rtol=1e-6)


@settings(max_examples=40, deadline=None)
@given(
    schedule=st.sampled_from(sorted(SCHEDULES)),
    steps=st.integers(1, 300),
    warmup=st.integers(0, 400),
    final=st.floats(0, 1),
    share=st.floats(0.01, 1),
)
def test_rises_then_falls_within_bounds(schedule: str, steps: int, warmup: int, final: float, share: float) -> None:
    keys = {"schedule": schedule, "warmup_steps": warmup, "final_fraction": final, "decay_fraction": share}
    got = fractions(steps, **keys)[:steps]
    peak = min(warmup, steps - 1)
    assert np.isfinite(got).all() and got.min() > 0 and got.max() <= 1 + 1e-6
    assert (np.diff(got[: peak + 1]) >= -1e-6).all() and (np.diff(got[peak:]) <= 1e-6).all()
    if warmup < steps:
        np.testing.assert_allclose(got[peak], 1.0, rtol=1e-6)
    if schedule in ("linear", "cosine", "wsd"):
        assert got[peak:].min() >= min(final, got[peak]) - 1e-6


def test_the_logged_rate_is_the_peak_times_the_fraction() -> None:
    config = OptimizerConfig(learning_rate=0.02, schedule="linear", warmup_steps=4, final_fraction=0.0)
    rate = jax.jit(learning_rate(config, 10))
    np.testing.assert_allclose([rate(0), rate(4), rate(7)], [0.02 / 5, 0.02, 0.01], rtol=1e-6)
