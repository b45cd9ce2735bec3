"""Feed-forward layers against the plain formula, with derivatives by autodiff, in float64."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm_jax.models.feed_forward import FEED_FORWARDS, FeedForwardConfig, feed_forward, feed_forward_specs
from lm_jax.params import Normal, map_specs

PLAIN: dict[str, Callable[..., jax.Array]] = {
    "swiglu": lambda x, p: ((x @ p["gate"]) / (1 + jnp.exp(-(x @ p["gate"]))) * (x @ p["up"])) @ p["down"],
    "squared_relu": lambda x, p: jnp.maximum(x @ p["up"], 0) ** 2 @ p["down"],
}


@pytest.mark.parametrize("kind", list(FEED_FORWARDS))
def test_value_and_gradients(kind: str) -> None:
    c = FeedForwardConfig(embed=12, feed_forward=kind, feed_forward_dim=20)
    random = np.random.default_rng(0)
    x, g = random.standard_normal((2, 2, 5, 12))
    params = map_specs(lambda s: random.standard_normal(s.shape) / 3, feed_forward_specs(c, Normal(1.0)))
    with jax.enable_x64(True):
        y, back = jax.vjp(PLAIN[kind], jnp.asarray(x), jax.tree.map(jnp.asarray, params))
        expected = back(jnp.asarray(g))
    x32, g32, params32 = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), (x, g, params))
    got, back = jax.vjp(lambda x, p: feed_forward(p, x, c=c), x32, params32)
    np.testing.assert_allclose(got, y, atol=2e-6 * np.abs(y).max())
    for a, b in zip(jax.tree.leaves(back(g32)), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6 * np.abs(b).max())


def test_usual_widths() -> None:
    assert FeedForwardConfig(embed=256).inner == 704  # 8/3 of 256 is 683, up to a multiple of 64
    assert FeedForwardConfig(embed=4096).inner == 10944
    assert FeedForwardConfig(embed=128, feed_forward="squared_relu").inner == 512
