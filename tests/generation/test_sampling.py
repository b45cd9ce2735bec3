"""Which tokens can be drawn, and how often."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm_jax.errors import ConfigError
from lm_jax.generation.sampling import SamplingConfig, allowed, sample

PROBABILITIES = np.array([0.1, 0.4, 0.05, 0.3, 0.15])
LOGITS = jnp.asarray(np.log(PROBABILITIES), jnp.float32)[None]


def kept(**settings: float) -> list[int]:
    return np.flatnonzero(np.isfinite(np.asarray(allowed(LOGITS, SamplingConfig(**settings)))[0])).tolist()


@pytest.mark.parametrize(
    ("settings", "ids"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"top_k": 2}, [1, 3]),
        ({"top_k": 9}, [0, 1, 2, 3, 4]),
        ({"top_p": 0.39}, [1]),
        ({"top_p": 0.41}, [1, 3]),
        ({"top_p": 0.69}, [1, 3]),
        ({"top_p": 0.71}, [1, 3, 4]),
        ({"top_p": 1.0}, [0, 1, 2, 3, 4]),
        ({"top_p": 1e-6}, [1]),
        # Top-p looks at what top-k has left: 0.4 / 0.7 of it is the first, so 0.6 needs both and 0.5 needs one.
        ({"top_k": 2, "top_p": 0.6}, [1, 3]),
        ({"top_k": 2, "top_p": 0.5}, [1]),
        # and at probabilities behind the temperature: at 0.25 the first has 0.74 of the mass.
        ({"temperature": 0.25, "top_p": 0.7}, [1]),
    ],
)
def test_what_can_be_drawn(settings: dict[str, float], ids: list[int]) -> None:
    assert kept(**settings) == ids


def test_ties_are_kept_together() -> None:
    even = jnp.zeros((1, 4))
    assert np.isfinite(allowed(even, SamplingConfig(top_k=2))).all()
    assert np.isfinite(allowed(even, SamplingConfig(top_p=0.3))).all()


def draws(settings: SamplingConfig, n: int = 20_000) -> np.ndarray:
    keys = jax.random.split(jax.random.key(0), n)
    ids = jax.jit(lambda keys: sample(jnp.broadcast_to(LOGITS, (n, 5)), keys, settings))(keys)
    return np.bincount(np.asarray(ids), minlength=5) / n


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_distribution(temperature: float) -> None:
    expected = PROBABILITIES ** (1 / temperature)
    np.testing.assert_allclose(draws(SamplingConfig(temperature=temperature)), expected / expected.sum(), atol=0.015)


def test_draws_keep_to_what_is_allowed() -> None:
    found = draws(SamplingConfig(top_k=3, top_p=0.8))  # 0.4, 0.3, 0.15 over 0.85: the third begins at 0.82
    np.testing.assert_allclose(found, np.array([0, 4, 0, 3, 0]) / 7, atol=0.015)


def test_greedy_takes_the_first_of_the_best() -> None:
    logits = jnp.array([[0.0, 3.0, 3.0], [5.0, -1.0, 2.0]])
    ids = sample(logits, jax.random.split(jax.random.key(0), 2), SamplingConfig(temperature=0))
    assert ids.tolist() == [1, 0] and ids.dtype == jnp.int32


def test_a_row_is_its_own_affair() -> None:
    keys = jax.random.split(jax.random.key(3), 8)
    rows = jax.random.normal(jax.random.key(1), (8, 5))
    together = sample(rows, keys, SamplingConfig())
    assert together.tolist() == [int(sample(rows[i : i + 1], keys[i : i + 1], SamplingConfig())[0]) for i in range(8)]


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": float("nan")},
    ],
)
def test_wrong_settings_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        SamplingConfig(**wrong)
