"""Attention for XLA against loops in float64, and in blocks of queries against the formula."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm_jax.kernels.flash_attention import AttentionMask, attention
from lm_jax.kernels.flash_attention.xla import visible_blocks

B, T, N, K, H = 2, 6, 4, 2, 8
SEGMENTS = np.array([[0, 0, 0, 1, 1, -1], [2, 2, 5, 5, 5, 5]], np.int32)

# By name: the mask, the keys' length, and what it means: may the query at t of row b see the key at s?
CASES: dict[str, tuple[Callable[[], AttentionMask], int, Callable[[int, int, int], bool]]] = {
    "causal": (AttentionMask, T, lambda b, t, s: s <= t),
    "full": (lambda: AttentionMask(causal=False), T, lambda b, t, s: True),
    "fewer keys": (lambda: AttentionMask(causal=False, kv_length=3), T, lambda b, t, s: s < 3),
    "no keys": (lambda: AttentionMask(kv_length=np.array([0, 4])), T, lambda b, t, s: s <= t and s < (0, 4)[b]),
    "behind": (
        lambda: AttentionMask(q_offset=np.array([0, 3]), kv_length=np.array([6, 9])),
        10,
        lambda b, t, s: s <= t + (0, 3)[b],
    ),
    "behind alike": (lambda: AttentionMask(q_offset=2), 8, lambda b, t, s: s <= t + 2),
    "segments": (
        lambda: AttentionMask(q_segment_ids=jnp.asarray(SEGMENTS), kv_segment_ids=jnp.asarray(SEGMENTS)),
        T,
        lambda b, t, s: s <= t and SEGMENTS[b, t] == SEGMENTS[b, s] >= 0,
    ),
    "segments both ways": (
        lambda: AttentionMask(causal=False, q_segment_ids=jnp.asarray(SEGMENTS), kv_segment_ids=jnp.asarray(SEGMENTS)),
        T,
        lambda b, t, s: SEGMENTS[b, t] == SEGMENTS[b, s] >= 0,
    ),
}


def by_loops(q: np.ndarray, k: np.ndarray, v: np.ndarray, see: Callable[[int, int, int], bool], scale: float) -> Any:
    """A query, a head, a row at a time."""
    out = np.zeros(q.shape)
    for b, t, n in np.ndindex(q.shape[:3]):
        keys = [s for s in range(k.shape[1]) if see(b, t, s)]
        if keys:
            head = n // (q.shape[2] // k.shape[2])
            scores = np.array([scale * (q[b, t, n] @ k[b, s, head]) for s in keys])
            weights = np.exp(scores - scores.max())
            out[b, t, n] = weights @ v[b, keys, head] / weights.sum()
    return out


def plain(q: jax.Array, k: jax.Array, v: jax.Array, see_BTS: np.ndarray, scale: float) -> jax.Array:
    """The formula, for autodiff to derive: heads repeated, masked weights divided by their sum."""
    k, v = (jnp.repeat(a, q.shape[2] // k.shape[2], 2) for a in (k, v))
    weights = jnp.exp(jnp.einsum("btnh,bsnh->bnts", q, k) * scale) * see_BTS[:, None]
    total = weights.sum(-1, keepdims=True)
    return jnp.einsum("bnts,bsnh->btnh", weights / jnp.where(total == 0, 1, total), v)


def inputs(S: int, heads: int = N, key_heads: int = K) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    shapes = (B, T, heads, H), (B, S, key_heads, H), (B, S, key_heads, H), (B, T, heads, H)
    return [random.standard_normal(s) for s in shapes]


@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("scale", [None, 0.7])
def test_value_and_gradients(case: str, scale: float | None) -> None:
    mask, S, see = CASES[case]
    q, k, v, g = inputs(S)
    size = H**-0.5 if scale is None else scale
    y = by_loops(q, k, v, see, size)
    see_BTS = np.array([[[see(b, t, s) for s in range(S)] for t in range(T)] for b in range(B)])
    with jax.enable_x64(True):
        y64, back = jax.vjp(lambda *a: plain(*a, see_BTS, size), *map(jnp.asarray, (q, k, v)))
        expected = back(jnp.asarray(g))
    np.testing.assert_allclose(y64, y, atol=1e-12)
    q32, k32, v32, g32 = (jnp.asarray(a, jnp.float32) for a in (q, k, v, g))
    got, back = jax.vjp(lambda q, k, v: attention(q, k, v, mask=mask(), scale=scale), q32, k32, v32)
    np.testing.assert_allclose(got, y, atol=2e-6)
    for name, a, b in zip("qkv", back(g32), expected, strict=True):
        np.testing.assert_allclose(a, b, atol=3e-6 * max(1, np.abs(b).max()), err_msg=name)


@pytest.mark.parametrize(
    ("length", "keys", "offset"), [(300, 300, 0), (256, 400, 100), (300, 200, 0), (300, 300, -140)]
)
def test_blocks_of_queries(length: int, keys: int, offset: int) -> None:
    """Several blocks, the last one not full; keys behind all queries; queries behind all keys, and before them."""
    random = np.random.default_rng(0)
    shapes = (B, length, N, H), (B, keys, K, H), (B, keys, K, H), (B, length, N, H)
    q, k, v, g = (random.standard_normal(s) for s in shapes)
    segments = np.sort(random.integers(0, 3, (B, max(length, keys))), -1).astype(np.int32)
    mask = AttentionMask(
        q_segment_ids=jnp.asarray(segments[:, :length]), kv_segment_ids=jnp.asarray(segments[:, :keys]), q_offset=offset
    )
    assert len(visible_blocks(mask, length, keys)) > 1
    t, s = np.arange(length)[:, None] + offset, np.arange(keys)
    see_BTS = (s <= t) & (segments[:, :length, None] == segments[:, None, :keys])
    with jax.enable_x64(True):
        expected, back64 = jax.vjp(lambda *a: plain(*a, see_BTS, H**-0.5), *map(jnp.asarray, (q, k, v)))
        gradients = back64(jnp.asarray(g))
    q32, k32, v32, g32 = (jnp.asarray(a, jnp.float32) for a in (q, k, v, g))
    got, back = jax.vjp(lambda *a: attention(*a, mask=mask), q32, k32, v32)
    np.testing.assert_allclose(got, expected, atol=2e-6)
    for name, a, b in zip("qkv", back(g32), gradients, strict=True):
        np.testing.assert_allclose(a, b, atol=3e-6 * max(1, np.abs(b).max()), err_msg=name)


def test_a_block_meets_the_keys_that_it_sees_and_no_others() -> None:
    assert visible_blocks(AttentionMask(), 300, 300) == ((0, 128, 128), (128, 256, 256), (256, 300, 300))
    assert visible_blocks(AttentionMask(q_offset=100), 256, 400) == ((0, 128, 228), (128, 256, 356))
    assert visible_blocks(AttentionMask(), 4096, 4096) == tuple((i, i + 512, i + 512) for i in range(0, 4096, 512))
    assert visible_blocks(AttentionMask(causal=False), 300, 300) == ((0, 300, 300),)
    assert visible_blocks(AttentionMask(q_offset=jnp.zeros(2, jnp.int32)), 300, 300) == ((0, 300, 300),)


@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (4, 1), (6, 3)])
def test_groups_of_heads(heads: int, key_heads: int) -> None:
    q, k, v, _ = inputs(T, heads, key_heads)
    got = attention(*(jnp.asarray(a, jnp.float32) for a in (q, k, v)), mask=AttentionMask())
    np.testing.assert_allclose(got, by_loops(q, k, v, lambda b, t, s: s <= t, H**-0.5), atol=2e-6)


def test_a_query_that_sees_nothing_gives_zero_without_nan() -> None:
    q, k, v, g = (jnp.asarray(a, jnp.float32) for a in inputs(T))
    mask = AttentionMask(q_segment_ids=jnp.asarray(SEGMENTS), kv_segment_ids=jnp.asarray(SEGMENTS))
    y, back = jax.vjp(lambda *a: attention(*a, mask=mask), q, k, v)
    assert not y[0, -1].any() and np.isfinite(y).all()
    dq, dk, dv = back(g)
    assert not dq[0, -1].any() and not dk[0, -1].any() and not dv[0, -1].any()
    assert all(np.isfinite(a).all() for a in (dq, dk, dv))


def test_large_scores_do_not_overflow() -> None:
    q, k, v, _ = (jnp.asarray(a, jnp.float32) for a in inputs(T))
    y = attention(q * 100, k, v, mask=AttentionMask())  # float32's exp ends at 88
    exact = by_loops(*(np.asarray(a, float) for a in (q * 100, k, v)), lambda b, t, s: s <= t, H**-0.5)
    np.testing.assert_allclose(y, exact, atol=1e-3)


def test_bfloat16_stays_bfloat16() -> None:
    q, k, v, g = (jnp.asarray(a, jnp.bfloat16) for a in inputs(T))
    y, back = jax.vjp(lambda *a: attention(*a, mask=AttentionMask()), q, k, v)
    assert y.dtype == jnp.bfloat16 and {a.dtype for a in back(g)} == {jnp.dtype(jnp.bfloat16)}
    exact = attention(*(a.astype(jnp.float32) for a in (q, k, v)), mask=AttentionMask())
    np.testing.assert_allclose(y.astype(jnp.float32), exact, atol=0.03)


def test_what_does_not_fit_is_refused() -> None:
    q, k, v, _ = (jnp.asarray(a, jnp.float32) for a in inputs(T))
    with pytest.raises(ValueError, match="do not fit"):
        attention(q, k, v[:, :-1], mask=AttentionMask())
    with pytest.raises(ValueError, match="do not fit"):
        attention(q, k[:1], v[:1], mask=AttentionMask())
    with pytest.raises(ValueError, match="3 query heads cannot share 2"):
        attention(q[:, :, :3], k, v, mask=AttentionMask())
    with pytest.raises(ValueError, match="go together"):
        AttentionMask(q_segment_ids=jnp.asarray(SEGMENTS))
