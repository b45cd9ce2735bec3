"""Rotary positions: what they are, and their derivative."""

import jax
import jax.numpy as jnp
import numpy as np

from lm_jax.models.positions import POSITIONS, PositionConfig, alibi_slopes

C = PositionConfig(rope_base=100.0)
ROPE = POSITIONS["rope"]


def turned(x_BTNH: np.ndarray, positions_BT: np.ndarray) -> jax.Array:
    state = ROPE.prepare(jnp.asarray(positions_BT), x_BTNH.shape[-1], C)
    return ROPE.rotate(jnp.asarray(x_BTNH, jnp.float32), state)


def by_complex_numbers(x_BTNH: np.ndarray, positions_BT: np.ndarray) -> np.ndarray:
    """Pair (i, i + H / 2) as a complex number, times e^(i position / base^(2i / H)), in float64."""
    half = x_BTNH.shape[-1] // 2
    angle = positions_BT[:, :, None, None] * 100.0 ** (-np.arange(half) / half)
    z = (x_BTNH[..., :half] + 1j * x_BTNH[..., half:]) * np.exp(1j * angle)
    return np.concatenate([z.real, z.imag], -1)


def test_value_and_gradient() -> None:
    random = np.random.default_rng(0)
    x, g = random.standard_normal((2, 2, 5, 3, 8))
    positions = random.integers(0, 50, (2, 5))
    y, back = jax.vjp(lambda x: turned(x, positions), jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(y, by_complex_numbers(x, positions), atol=1e-5)
    # A rotation is linear: <g, R x> has the gradient R^-1 g.
    np.testing.assert_allclose(back(jnp.asarray(g, jnp.float32))[0], by_complex_numbers(g, -positions), atol=1e-5)


def test_scores_depend_on_the_distance_alone() -> None:
    q, k = np.random.default_rng(0).standard_normal((2, 1, 1, 1, 16))

    def score(at_q: int, at_k: int) -> float:
        return float(jnp.sum(turned(q, np.array([[at_q]])) * turned(k, np.array([[at_k]]))))

    assert abs(score(7, 3) - score(24, 20)) < 1e-4
    assert abs(score(7, 3) - score(7, 4)) > 1e-2


def test_position_zero_is_left_alone() -> None:
    x = np.random.default_rng(0).standard_normal((1, 4, 2, 8))
    np.testing.assert_array_equal(turned(x, np.zeros((1, 4), int)), x.astype(np.float32))


def test_bfloat16_stays_bfloat16() -> None:
    state = ROPE.prepare(jnp.arange(4)[None], 8, C)
    assert ROPE.rotate(jnp.ones((1, 4, 2, 8), jnp.bfloat16), state).dtype == jnp.bfloat16


def test_no_positions() -> None:
    none = POSITIONS["none"]
    x = jnp.ones((1, 4, 2, 8))
    assert none.rotate(x, none.prepare(jnp.arange(4)[None], 8, C)) is x


def test_alibi_slopes_are_those_of_the_paper() -> None:
    """The geometric sequence that the paper names for 8 heads, and its rule for counts between powers of two."""
    np.testing.assert_allclose(alibi_slopes(8), [2.0**-i for i in range(1, 9)])
    np.testing.assert_allclose(alibi_slopes(16)[:3], [2**-0.5, 2**-1.0, 2**-1.5])
    np.testing.assert_allclose(alibi_slopes(12), [*alibi_slopes(8), *alibi_slopes(16)[0:8:2]])
    np.testing.assert_allclose(alibi_slopes(1), [2.0**-8])
    assert all(len(alibi_slopes(n)) == n and (alibi_slopes(n) > 0).all() for n in range(1, 40))
