"""Root-mean-square norms against the plain formula, with derivatives by autodiff, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm_jax.models.norms import NormConfig, norm, norm_specs

EPSILON = 1e-3  # large enough to see where it goes


def plain(x: jax.Array, gain: jax.Array) -> jax.Array:
    return x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True) + EPSILON) * gain


@pytest.mark.parametrize("shape", [(3, 5, 16), (2, 3, 4, 8)])
@pytest.mark.parametrize("kind", ["rms", "rms_no_gain"])
def test_value_and_gradients(kind: str, shape: tuple[int, ...]) -> None:
    random = np.random.default_rng(0)
    x, g = random.standard_normal((2, *shape))
    x[0, 0] *= 0.01  # a row that epsilon matters to
    gain = 1 + 0.3 * random.standard_normal(shape[-1]) if kind == "rms" else np.ones(shape[-1])
    c = NormConfig(norm=kind, norm_epsilon=EPSILON)
    with jax.enable_x64(True):
        y, back = jax.vjp(plain, jnp.asarray(x), jnp.asarray(gain))
        dx, d_gain = back(jnp.asarray(g))
    params = {"gain": jnp.asarray(gain, jnp.float32)} if kind == "rms" else {}
    got, back = jax.vjp(lambda p, x: norm(p, x, c=c), params, jnp.asarray(x, jnp.float32))
    d_params, got_dx = back(jnp.asarray(g, jnp.float32))
    np.testing.assert_allclose(got, y, rtol=2e-6, atol=1e-6)
    np.testing.assert_allclose(got_dx, dx, rtol=2e-6, atol=2e-6 * np.abs(dx).max())
    if kind == "rms":
        np.testing.assert_allclose(d_params["gain"], d_gain, rtol=2e-6, atol=1e-5)
    assert set(norm_specs(c, 8)) == set(params)


@pytest.mark.parametrize("kind", ["rms", "rms_no_gain"])
def test_bfloat16_is_computed_in_float32(kind: str) -> None:
    x = jnp.asarray(100 + np.random.default_rng(0).standard_normal((4, 64)), jnp.bfloat16)
    params = {"gain": jnp.ones(64, jnp.bfloat16)} if kind == "rms" else {}
    c = NormConfig(norm=kind)
    y, back = jax.vjp(lambda x: norm(params, x, c=c), x)
    assert y.dtype == jnp.bfloat16 and back(y)[0].dtype == jnp.bfloat16
    exact = norm({"gain": jnp.ones(64)} if kind == "rms" else {}, x.astype(jnp.float32), c=c)
    np.testing.assert_array_equal(y, exact.astype(jnp.bfloat16))
