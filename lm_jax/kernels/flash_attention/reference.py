"""Attention with its scores in memory: plain, float32 inside, the oracle for every other implementation.

The backward pass is written by hand from the kept probabilities: on CPU it is faster than the traced one.

Shapes: B batch, T queries, S keys, N query heads, K key-value heads, G query heads a key head, H head dim.
"""

import functools

import jax
import jax.numpy as jnp

from lm_jax.kernels.flash_attention.mask import AttentionMask
from lm_jax.sharding import out_sharding

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
    allowed = mask.allowed(T, S)[:, None, None]  # [B or 1, 1, 1, T, S]
    # Heads before length, so that both products are batches of plain matrix products.
    q = jnp.transpose(q_BTNH.reshape(B, T, K, N // K, H), (0, 2, 3, 1, 4))
    k, v = (jnp.transpose(a, (0, 2, 1, 3)) for a in (k_BSKH, v_BSKH))
    out = _attend(q, k, v, allowed, H**-0.5 if scale is None else scale)
    return jnp.transpose(out, (0, 3, 1, 2, 4)).reshape(B, T, N, H)


def _probabilities(q: Array, k: Array, allowed: Array, scale: float) -> Array:
    """`[B, K, G, T, S]` float32; rows that see nothing are zero."""
    scores = jnp.einsum("bkgth,bksh->bkgts", q, k, preferred_element_type=jnp.float32) * scale
    scores = jnp.where(allowed, scores, -jnp.inf)
    highest = jnp.max(scores, -1, keepdims=True)
    weights = jnp.exp(scores - jnp.where(highest == -jnp.inf, 0.0, highest))
    total = jnp.sum(weights, -1, keepdims=True)
    return weights / jnp.where(total == 0, 1.0, total)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q: Array, k: Array, v: Array, allowed: Array, scale: float) -> Array:
    """`[B, K, G, T, H]` from q `[B, K, G, T, H]`, k and v `[B, K, S, H]`."""
    return _forward(q, k, v, allowed, scale)[0]


def _forward(q: Array, k: Array, v: Array, allowed: Array, scale: float) -> tuple[Array, tuple[Array, ...]]:
    p = _probabilities(q, k, allowed, scale).astype(v.dtype)
    out = jnp.einsum("bkgts,bksh->bkgth", p, v)
    return out, (q, k, v, p, out)


def _backward(scale: float, saved: tuple[Array, ...], g: Array) -> tuple[Array, Array, Array, None]:
    q, k, v, p, out = saved
    # Queries may be split over length, keys are not: these two sums cross the split.
    keys = out_sharding("batch", "kv_heads", "key_length", "head_dim")
    dv = jnp.einsum("bkgts,bkgth->bksh", p, g, out_sharding=keys)
    dp = jnp.einsum("bkgth,bksh->bkgts", g, v, preferred_element_type=jnp.float32)
    mean = jnp.sum(g.astype(jnp.float32) * out.astype(jnp.float32), -1, keepdims=True)  # = sum over keys of p * dp
    ds = (p * (dp - mean) * scale).astype(q.dtype)
    return jnp.einsum("bkgts,bksh->bkgth", ds, k), jnp.einsum("bkgts,bkgth->bksh", ds, q, out_sharding=keys), dv, None


_attend.defvjp(_forward, _backward)
