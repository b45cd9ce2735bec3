"""Attention with its scores in memory: plain, float32 inside, the oracle for every other implementation.

The backward pass is written by hand from the kept probabilities: on CPU it is faster than the traced one.

Shapes: B batch, T queries, S keys, N query heads, K key-value heads, G query heads a key head, H head dim.
"""

import functools

import jax
import jax.numpy as jnp

from lm_jax.kernels.flash_attention.mask import AttentionMask
from lm_jax.sharding import merge_dims, out_sharding, split_dim

Array = jax.Array


def attention(q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, *, mask: AttentionMask, scale: float | None = None) -> Array:
    """`softmax(q k^T * scale) v` over the keys that the mask lets a query see (Vaswani et al. 2017, arXiv:1706.03762).

    Heads are grouped (Ainslie et al. 2023, arXiv:2305.13245): query head `n` reads key head `n // (N / K)`. A query
    that sees no key gives zeros.

    Args:
      q_BTNH: queries; k_BSKH, v_BSKH: keys and values, all of one dtype.
      mask: what may see what.
      scale: of the scores; `H ** -0.5` if None.

    Returns:
      `[B, T, N, H]` in the dtype of the queries.

    Raises:
      ValueError: where the shapes do not fit each other.
    """
    (B, T, N, H), (S, K) = q_BTNH.shape, k_BSKH.shape[1:3]
    if k_BSKH.shape != v_BSKH.shape or k_BSKH.shape[0] != B or k_BSKH.shape[3] != H:
        raise ValueError(f"queries {q_BTNH.shape}, keys {k_BSKH.shape} and values {v_BSKH.shape} do not fit each other")
    if N % K:
        raise ValueError(f"{N} query heads cannot share {K} key-value heads evenly")
    G = N // K
    # Heads before length, so that the products are batches of plain matrix products; the queries of a group beside each
    # other, because XLA's loops on CPU are several times slower over five dimensions than over four.
    q = merge_dims(jnp.transpose(split_dim(q_BTNH, 2, K, G), (0, 2, 1, 3, 4)), 2)
    k, v = (jnp.transpose(a, (0, 2, 1, 3)) for a in (k_BSKH, v_BSKH))
    allowed = mask.allowed(T, S)[:, None, :, None]  # [B or 1, 1, T, 1, S]
    allowed = merge_dims(jnp.broadcast_to(allowed, (*allowed.shape[:3], G, S)), 2)
    out = _attend(q, k, v, allowed, H**-0.5 if scale is None else scale)
    return merge_dims(jnp.transpose(split_dim(out, 2, T, G), (0, 2, 1, 3, 4)), 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q: Array, k: Array, v: Array, allowed: Array, scale: float) -> Array:
    """`[B, K, R, H]` from q `[B, K, R, H]`, k and v `[B, K, S, H]`; R are the queries of a group, T * G."""
    return _forward(q, k, v, allowed, scale)[0]


def _forward(q: Array, k: Array, v: Array, allowed: Array, scale: float) -> tuple[Array, tuple[Array, ...]]:
    """The result, and what the backward pass reads: the probabilities as weights and the inverse of their sum."""
    scores = jnp.einsum("bkrh,bksh->bkrs", q, k, preferred_element_type=jnp.float32) * scale
    scores = jnp.where(allowed, scores, -jnp.inf)
    highest = jnp.max(scores, -1, keepdims=True)
    weights = jnp.exp(scores - jnp.where(highest == -jnp.inf, 0.0, highest))
    total = jnp.sum(weights, -1, keepdims=True)
    inverse = 1 / jnp.where(total == 0, 1.0, total)  # a query that sees nothing gives zeros
    weights = weights.astype(v.dtype)
    out = jnp.einsum("bkrs,bksh->bkrh", weights, v, preferred_element_type=jnp.float32) * inverse
    out = out.astype(v.dtype)
    return out, (q, k, v, weights, inverse, out)


def _backward(scale: float, saved: tuple[Array, ...], g: Array) -> tuple[Array, Array, Array, None]:
    q, k, v, weights, inverse, out = saved
    # Queries may be split over length, keys are not: these two sums cross the split.
    keys = out_sharding("batch", "kv_heads", "head_dim", "key_length")
    g32 = g.astype(jnp.float32) * inverse
    mean = jnp.sum(g32 * out.astype(jnp.float32), -1, keepdims=True)  # = sum over keys of p * dp, times inverse
    g = g32.astype(q.dtype)
    dv = jnp.einsum("bkrh,bkrs->bkhs", g, weights, out_sharding=keys)
    dp = jnp.einsum("bkrh,bksh->bkrs", g, v, preferred_element_type=jnp.float32)
    ds = (weights * (dp - mean) * scale).astype(q.dtype)
    dq = jnp.einsum("bkrs,bksh->bkrh", ds, k)
    dk = jnp.einsum("bkrh,bkrs->bkhs", q, ds, out_sharding=keys)
    return dq, jnp.swapaxes(dk, 2, 3), jnp.swapaxes(dv, 2, 3), None


_attend.defvjp(_forward, _backward)
