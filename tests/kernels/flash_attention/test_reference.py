"""The oracle itself: against loops over rows, heads, queries and keys in Python, and against `jax.nn`'s attention.

What a mask means is written here a second time, as one question about one query and one key.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm_jax.kernels.flash_attention import AttentionMask
from tests.kernels.flash_attention import cases
from tests.kernels.flash_attention.cases import MASKS, OPTIONS, Options, Shape

SMALL = Shape(B=2, T=66, S=66, N=2, K=1, H=3)


def sees(mask: AttentionMask, b: int, t: int, k: int) -> bool:
    """May the query at `t` of row `b` see key `k`? By the text of the definition."""

    def of_row(x: Any) -> int:
        return int(x if np.ndim(x) == 0 else x[b])

    q = of_row(mask.q_offset) + t
    if mask.kv_length is not None and k >= of_row(mask.kv_length):
        return False
    if mask.q_segment_ids is not None and mask.kv_segment_ids is not None:
        q_id, k_id = int(mask.q_segment_ids[b, t]), int(mask.kv_segment_ids[b, k])
        if q_id != k_id or q_id < 0:
            return False
    if mask.prefix_length is not None and k < of_row(mask.prefix_length):
        return True
    if mask.causal and k > q:
        return False
    if mask.window is not None and abs(q - k) >= mask.window:
        return False
    if mask.pattern is not None:
        p: Any = mask.pattern
        i, j = q // p.block, k // p.block
        near = abs(i - j) < p.local
        if hasattr(p, "stride"):
            return near or (i - j) % p.stride == 0
        return near or i < p.global_blocks or j < p.global_blocks
    return True


def by_loops(a: dict[str, np.ndarray], mask: AttentionMask, options: Options) -> tuple[np.ndarray, np.ndarray]:
    """Output and log-sum-exp, one number at a time."""
    mask = jax.tree.map(np.asarray, mask)
    q, k, v = a["q"], a["k"], a["v"]
    out, lse = np.zeros(q.shape), np.full(q.shape[:3], -np.inf)
    scale = q.shape[3] ** -0.5 if options.scale is None else options.scale
    for b, t, n in np.ndindex(q.shape[:3]):
        head = n // (q.shape[2] // k.shape[2])
        offset: Any = mask.q_offset
        position = int(offset if np.ndim(offset) == 0 else offset[b]) + t
        weights: dict[int, float] = {}
        for s in range(k.shape[1]):
            if sees(mask, b, t, s):
                score = scale * float(q[b, t, n] @ k[b, s, head])
                if options.soft_cap is not None:
                    score = options.soft_cap * math.tanh(score / options.soft_cap)
                if options.bias == "slopes":
                    score -= a["bias"][n] * abs(position - s)
                if options.bias == "table":
                    table = a["bias"][n]
                    score += table[min(max(position - s + 9, 0), len(table) - 1)]
                weights[s] = math.exp(score)
        total = sum(weights.values()) + (math.exp(a["sinks"][n]) if options.sinks else 0)
        if total:
            lse[b, t, n] = math.log(total)
        for s, w in weights.items():
            out[b, t, n] += w / total * v[b, s, head]
    return out, lse


def compare(name: str, shape: Shape, options: Options) -> None:
    mask, a = MASKS[name](shape), cases.arguments(shape, options)
    got = cases.expected(a, mask, options)
    out, lse = by_loops(a, mask, options)
    np.testing.assert_allclose(got["out"], out, atol=1e-13)
    np.testing.assert_allclose(got["lse"], lse, atol=1e-13)


@pytest.mark.parametrize("name", list(MASKS))
def test_masks_mean_what_they_say(name: str) -> None:
    compare(name, SMALL, Options())


@pytest.mark.parametrize("name", [n for n in OPTIONS if n != "plain"])
def test_options_mean_what_they_say(name: str) -> None:
    compare("segments", SMALL, OPTIONS[name])
    compare("decoding", dataclasses.replace(SMALL, T=5), OPTIONS[name])


@pytest.mark.parametrize("name", ["causal", "offsets a row", "all parts"])
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    """Along a random direction, of every argument at once; tracing through a mask's `where` could go wrong."""
    shape, options = SMALL.replace(T=20, S=24), OPTIONS["all"]
    mask, a = MASKS[name](shape), cases.arguments(shape, options)
    got = cases.expected(a, mask, options)
    random = np.random.default_rng(3)
    step = {n: random.standard_normal(a[n].shape) for n in a if n not in ("g", "g_lse")}
    seen = np.isfinite(got["lse"])

    def total(distance: float) -> float:
        moved = {n: x + distance * step[n] if n in step else x for n, x in a.items()}
        out, lse = by_loops(moved, mask, options)
        return float((out * a["g"]).sum() + (np.where(seen, lse, 0) * a["g_lse"]).sum())

    slope = (total(1e-5) - total(-1e-5)) / 2e-5
    by_gradient = sum(float((got[f"d {n}"] * d).sum()) for n, d in step.items())
    assert by_gradient == pytest.approx(slope, rel=1e-7)


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("causal", {"is_causal": True}),
        ("full", {}),
        ("window", {"is_causal": True, "local_window_size": (69, 0)}),
        ("window both ways", {"local_window_size": (69, 69)}),
    ],
)
def test_jax_nn_says_the_same(name: str, theirs: dict[str, Any]) -> None:
    shape = Shape(T=90, S=90)
    a = cases.arguments(shape)
    with jax.enable_x64(True):
        other: Callable[..., Any] = jax.nn.dot_product_attention
        q, k, v, g = (jnp.asarray(a[n]) for n in ("q", "k", "v", "g"))
        out, back = jax.vjp(lambda q, k, v: other(q, k, v, implementation="xla", **theirs), q, k, v)
        grads = back(g)
    a["g_lse"] *= 0
    got = cases.expected(a, MASKS[name](shape), Options())
    for n, want in zip(("out", "d q", "d k", "d v"), (out, *grads), strict=True):
        np.testing.assert_allclose(got[n], want, atol=2e-6)  # their softmax is in float32
