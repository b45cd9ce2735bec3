"""Attention in blocks of queries, for XLA to compile: what runs where there is no kernel.

A block of queries is multiplied with the keys that any of them can see and no others, which saves up to half of a
causal mask. The backward pass is written by hand from the kept probabilities: on CPU it is faster than the traced one.

Shapes: B batch, T queries, S keys, N query heads, K key-value heads, G query heads a key head, H head dim.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lm_jax.kernels.flash_attention.mask import AttentionMask
from lm_jax.sharding import axis_size, merge_dims, out_sharding, split_dim

Array = jax.Array
Block = tuple[int, int, int]  # queries from, queries to, keys to
_BLOCK = 128  # queries; smaller blocks save less than their products lose (T 256, two cores: 38 ms, 40 with 64)
_MOST_BLOCKS = 8  # each is a piece of program of its own


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
    blocks = tuple((lo * G, hi * G, keys) for lo, hi, keys in visible_blocks(mask, T, S))
    out = _attend(q, k, v, allowed, H**-0.5 if scale is None else scale, blocks)
    return merge_dims(jnp.transpose(split_dim(out, 2, T, G), (0, 2, 1, 3, 4)), 2)


def visible_blocks(mask: AttentionMask, T: int, S: int) -> tuple[Block, ...]:
    """Blocks of queries that make up all T, each with how many of the keys, from the first, it may see at most."""
    if not mask.causal or not isinstance(mask.q_offset, int) or axis_size("sequence") > 1:
        return ((0, T, S),)
    size = max(_BLOCK, -(-T // _MOST_BLOCKS))
    starts = range(0, T, size)
    return tuple((lo, min(lo + size, T), max(1, min(S, mask.q_offset + lo + size))) for lo in starts)


class _Saved(NamedTuple):
    """What the backward pass reads; of every block, the probabilities as weights and the inverse of their sum."""

    q: Array
    k: Array
    v: Array
    weights: list[Array]
    inverses: list[Array]
    out: Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(q: Array, k: Array, v: Array, allowed: Array, scale: float, blocks: tuple[Block, ...]) -> Array:
    """`[B, K, R, H]` from q `[B, K, R, H]`, k and v `[B, K, S, H]`; R are the queries of a group, T * G."""
    return _forward(q, k, v, allowed, scale, blocks)[0]


def _forward(
    q: Array, k: Array, v: Array, allowed: Array, scale: float, blocks: tuple[Block, ...]
) -> tuple[Array, _Saved]:
    parts = [
        _forward_block(q[:, :, lo:hi], k[:, :, :keys], v[:, :, :keys], allowed[:, :, lo:hi, :keys], scale)
        for lo, hi, keys in blocks
    ]
    outs, weights, inverses = (list(a) for a in zip(*parts, strict=True))
    out = _joined(outs)
    return out, _Saved(q, k, v, weights, inverses, out)


def _forward_block(q: Array, k: Array, v: Array, allowed: Array, scale: float) -> tuple[Array, Array, Array]:
    scores = jnp.einsum("bkrh,bksh->bkrs", q, k, preferred_element_type=jnp.float32) * scale
    scores = jnp.where(allowed, scores, -jnp.inf)
    highest = jnp.max(scores, -1, keepdims=True)
    weights = jnp.exp(scores - jnp.where(highest == -jnp.inf, 0.0, highest))
    total = jnp.sum(weights, -1, keepdims=True)
    inverse = 1 / jnp.where(total == 0, 1.0, total)  # a query that sees nothing gives zeros
    weights = weights.astype(v.dtype)
    out = jnp.einsum("bkrs,bksh->bkrh", weights, v, preferred_element_type=jnp.float32) * inverse
    return out.astype(v.dtype), weights, inverse


def _backward(scale: float, blocks: tuple[Block, ...], saved: _Saved, g: Array) -> tuple[Array, Array, Array, None]:
    q, k, v, weights, inverses, out = saved
    parts = []
    for (lo, hi, keys), w, inverse in zip(blocks, weights, inverses, strict=True):
        q_block, out_block, g_block = (a[:, :, lo:hi] for a in (q, out, g))
        parts.append(_backward_block(q_block, out_block, g_block, k[:, :, :keys], v[:, :, :keys], w, inverse, scale))
    dq, dk, dv = (list(a) for a in zip(*parts, strict=True))
    return _joined(dq), _over_keys(dk, k), _over_keys(dv, v), None


def _backward_block(
    q: Array, out: Array, g: Array, k: Array, v: Array, weights: Array, inverse: Array, scale: float
) -> tuple[Array, Array, Array]:
    """The gradients for q `[B, K, R, H]`, and for k and v as `[B, K, H, S]`."""
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
    return dq, dk, dv


def _joined(parts: list[Array]) -> Array:
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, 2)


def _over_keys(parts: list[Array], like: Array) -> Array:
    """The sum of gradients `[B, K, H, keys]`, each at least as long as the one before, as `[B, K, S, H]`."""
    total = parts[0]
    for more in parts[1:]:
        end = total.shape[3]
        total = jnp.concatenate([more[..., :end] + total, more[..., end:]], 3)
    unseen = like.shape[2] - total.shape[3]  # keys behind every query
    return jnp.swapaxes(jnp.pad(total, ((0, 0), (0, 0), (0, 0), (0, unseen))), 2, 3)


_attend.defvjp(_forward, _backward)
