"""Attention in several blocks of queries, its rows, heads and length split over eight devices, against one device."""

import jax
import numpy as np

from lm_jax.kernels.flash_attention import AttentionMask, attention
from lm_jax.sharding import MeshConfig, constrain
from tests.multi_device import layouts

RANDOM = np.random.default_rng(0)
B, T, N, K, H = 8, 304, 4, 2, 8  # three blocks, the last one not full
Q, KEYS, VALUES, G = (RANDOM.standard_normal((B, T, n, H)).astype(np.float32) for n in (N, K, K, N))
SEGMENTS = np.sort(RANDOM.integers(0, 3, (B, T)), -1).astype(np.int32)


@jax.jit
def value_and_gradients(q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array, ids: jax.Array) -> list[jax.Array]:
    q, g = (constrain(a, "batch", "length", "heads", "head_dim") for a in (q, g))
    k, v = (constrain(a, "batch", "key_length", "kv_heads", "head_dim") for a in (k, v))
    of_queries, of_keys = constrain(ids, "batch", "length"), constrain(ids, "batch", "key_length")
    mask = AttentionMask(q_segment_ids=of_queries, kv_segment_ids=of_keys)
    y, back = jax.vjp(lambda q, k, v: attention(q, k, v, mask=mask), q, k, v)
    return [y, *back(g)]


def run(config: MeshConfig) -> list[np.ndarray]:
    with jax.set_mesh(layouts.mesh_of(config)):
        return [np.asarray(a) for a in value_and_gradients(Q, KEYS, VALUES, G, SEGMENTS)]


assert len(jax.devices()) == 8
EXPECTED = run(layouts.ONE)
for layout in layouts.SOME:
    worst = max(layouts.relative(a, b) for a, b in zip(run(layout), EXPECTED, strict=True))
    assert worst < 1e-6, (layout, worst)
    print(layout, worst, flush=True)
