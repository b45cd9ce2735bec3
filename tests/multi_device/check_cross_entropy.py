"""The cross-entropy with its vocabulary, rows and length split over eight devices against one device."""

import jax
import jax.numpy as jnp
import numpy as np

from lm_jax.kernels.cross_entropy import Sums, cross_entropy
from lm_jax.sharding import MeshConfig, constrain
from tests.multi_device import layouts

RANDOM = np.random.default_rng(0)
X = RANDOM.standard_normal((8, 16, 12)).astype(np.float32)
W = RANDOM.standard_normal((12, 80)).astype(np.float32)
TARGETS, MASK = RANDOM.integers(0, 80, (8, 16)), RANDOM.random((8, 16)) < 0.6


@jax.jit
def gradient(x: jax.Array, w: jax.Array) -> tuple[tuple[jax.Array, Sums], tuple[jax.Array, jax.Array]]:
    def loss(x: jax.Array, w: jax.Array) -> tuple[jax.Array, Sums]:
        x, w = constrain(x, "batch", "length", None), constrain(w, None, "vocab")
        targets, mask = (constrain(jnp.asarray(a), "batch", "length") for a in (TARGETS, MASK))
        sums = cross_entropy(x, w, targets, mask, z_loss=0.1, soft_cap=3.0, chunk=3)
        return sums.total, sums

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(x, w)


def run(config: MeshConfig) -> list[np.ndarray]:
    with jax.set_mesh(layouts.mesh_of(config)):
        return [np.asarray(a) for a in jax.tree.leaves(gradient(X, W))]


assert len(jax.devices()) == 8
EXPECTED = run(layouts.ONE)
for layout in (*layouts.PLAIN, *layouts.EIGHT):
    worst = max(layouts.relative(a, b) for a, b in zip(run(layout), EXPECTED, strict=True))
    assert worst < 1e-6, (layout, worst)
    print(layout, worst, flush=True)
