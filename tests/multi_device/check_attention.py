"""Attention with its rows, heads and length split over eight devices, against one device: values and gradients.

In float64: the gradient of a slope sums hundreds of thousands of terms of both signs, and float32 leaves six digits.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm_jax import sharding
from lm_jax.kernels.flash_attention import AttentionMask, DistanceTable, Slopes, flash_attention
from lm_jax.sharding import MeshConfig
from tests.multi_device import layouts

jax.config.update("jax_enable_x64", True)
RANDOM = np.random.default_rng(0)
B, T, N, K, H = 8, 304, 4, 2, 8  # three blocks, the last one not full
SHAPES = {"q": (B, T, N, H), "k": (B, T, K, H), "v": (B, T, K, H), "sinks": (N,), "slopes": (N,), "table": (N, 50)}
ARRAYS = {name: RANDOM.standard_normal(shape) for name, shape in SHAPES.items()}
G, G_LSE = (RANDOM.standard_normal(s) for s in ((B, T, N, H), (B, T, N)))
SEGMENTS = np.sort(RANDOM.integers(0, 3, (B, T)), -1).astype(np.int32)
OFFSETS = np.arange(B, dtype=np.int32)


def value_and_gradients(arrays: dict[str, Any], ids: jax.Array, offsets: jax.Array, bias: str) -> dict[str, Any]:
    mask = AttentionMask(q_segment_ids=ids, kv_segment_ids=ids, q_offset=offsets, window=200)

    def f(a: dict[str, Any]) -> Any:
        of_bias = Slopes(a["slopes"]) if bias == "slopes" else DistanceTable(a["table"])
        return flash_attention(
            a["q"], a["k"], a["v"], mask=mask, position_bias=of_bias, sinks_N=a["sinks"], return_lse=True
        )

    (out, lse), back = jax.vjp(f, arrays)
    g, g_lse = (jax.sharding.reshard(jnp.asarray(a), jax.typeof(b).sharding) for a, b in ((G, out), (G_LSE, lse)))
    return {"out": out, "lse": lse} | back((g, g_lse))[0]


def run(config: MeshConfig, bias: str) -> dict[str, np.ndarray]:
    with jax.set_mesh(layouts.mesh_of(config)):
        got = jax.jit(value_and_gradients, static_argnums=3)(ARRAYS, SEGMENTS, OFFSETS, bias)
        return {name: np.asarray(a) for name, a in got.items()}


assert len(jax.devices()) == 8
for kind, on in (("slopes", "cpu"), ("table", "cpu"), ("table", "gpu")):
    expected = run(layouts.ONE, kind)
    # On GPUs the types inside of `shard_map` are not checked, and gradients are summed by another rule.
    sharding.platform = lambda on=on: on
    jax.clear_caches()
    for layout in layouts.PLAIN:
        got = run(layout, kind)
        for name, want in expected.items():
            if want.any():  # the other bias has no gradient
                assert layouts.relative(got[name], want) < 1e-13, (layout, name, layouts.relative(got[name], want))
        print(layout, kind, on, flush=True)
