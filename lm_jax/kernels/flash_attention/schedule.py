"""Which blocks of a mask are worth computing: a tile of queries by keys is dead, partly open, or open.

Shapes: B batch, I blocks of queries, J blocks of keys.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm_jax.kernels.flash_attention.mask import AttentionMask

DEAD, PARTIAL, OPEN = 0, 1, 2


def is_static(mask: AttentionMask) -> bool:
    """Whether a mask is all integers, so that its schedule is known when a program is traced."""
    return all(isinstance(leaf, int) for leaf in jax.tree.leaves(mask))


def tile_kinds(mask: AttentionMask, T: int, S: int, q_block: int, kv_block: int) -> Any:
    """`[B or 1, I, J]` int32: DEAD, PARTIAL or OPEN for each tile of `q_block x kv_block`; the last ones may be ragged.

    In numpy where the mask is static, traced otherwise. DEAD and OPEN are always true. PARTIAL may stand for either
    where segment ids do not rise along a row, or where a pattern meets an offset that is traced.
    """
    t0, k0 = np.arange(0, T, q_block), np.arange(0, S, kv_block)
    t1, k1 = np.minimum(t0 + q_block, T) - 1, np.minimum(k0 + kv_block, S) - 1
    offset = _per_row(mask.q_offset)
    q0, q1 = offset + t0[:, None], offset + t1[:, None]  # [B or 1, I, 1]: the positions of a block's first and last
    some, every = _by_position(mask, q0, q1, k0, k1)
    if mask.prefix_length is not None:
        prefix = _per_row(mask.prefix_length)
        some, every = some | (k0 < prefix), every | (k1 < prefix)
    if mask.kv_length is not None:
        length = _per_row(mask.kv_length)
        some, every = some & (k0 < length), every & (k1 < length)
    if mask.q_segment_ids is not None and mask.kv_segment_ids is not None:
        q_low, q_high, q_all = (a[:, :, None] for a in _range_of_ids(mask.q_segment_ids, q_block))
        k_low, k_high, k_all = (a[:, None, :] for a in _range_of_ids(mask.kv_segment_ids, kv_block))
        some = some & (q_low <= k_high) & (k_low <= q_high)
        every = every & q_all & k_all & (q_low == k_low) & (q_high == q_low) & (k_high == k_low)
    xp = np if is_static(mask) else jnp
    return xp.where(every, OPEN, xp.where(some, PARTIAL, DEAD)).astype(np.int32)


def _by_position(mask: AttentionMask, q0: Any, q1: Any, k0: Any, k1: Any) -> tuple[Any, Any]:
    """Whether `causal`, `window` and `pattern` allow any pair of these blocks, and whether they allow all pairs."""
    some = every = q0 + k0 == q0 + k0
    if mask.causal:
        some, every = some & (k0 <= q1), every & (k1 <= q0)
    if mask.window is not None:
        some = some & (q0 - k1 < mask.window) & (k0 - q1 < mask.window)
        every = every & (q1 - k0 < mask.window) & (k1 - q0 < mask.window)
    if mask.pattern is not None:
        if not isinstance(mask.q_offset, int):
            return some, every & False
        part = _pattern_parts(mask, q0, q1, k0, k1)
        some, every = some & part[0], every & part[1]
    return some, every


def _pattern_parts(mask: AttentionMask, q0: Any, q1: Any, k0: Any, k1: Any) -> tuple[Any, Any]:
    """Whether the pattern and the rules of distance allow any pair of its own small blocks inside a tile, and all."""
    assert mask.pattern is not None
    block = mask.pattern.block
    some = np.zeros((1, q0.shape[1], len(k0)), bool)
    every = np.ones_like(some)
    for i in range(some.shape[1]):
        a0, a1 = int(q0[0, i, 0]), int(q1[0, i, 0])
        a = np.arange(a0 // block, a1 // block + 1)[:, None]
        for j in range(some.shape[2]):
            b = np.arange(k0[j] // block, k1[j] // block + 1)
            sees = mask.pattern.sees(a, b)
            every[0, i, j] = sees.all()
            # A small block that the pattern opens may be shut by the others.
            near, far = np.maximum(a * block, a0), np.minimum(a * block + block - 1, a1)
            first, last = np.maximum(b * block, k0[j]), np.minimum(b * block + block - 1, k1[j])
            if mask.causal:
                sees = sees & (first <= far)
            if mask.window is not None:
                sees = sees & (near - last < mask.window) & (first - far < mask.window)
            some[0, i, j] = sees.any()
    return some, every


def _range_of_ids(ids_BT: jax.Array, block: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`[B, blocks]` each: the lowest and highest id that is no padding (low above high where all is padding), and
    whether there is no padding."""
    big = jnp.iinfo(jnp.int32).max
    fill = -ids_BT.shape[1] % block
    ids = jnp.pad(ids_BT.astype(jnp.int32), ((0, 0), (0, fill)), mode="edge")
    ids = ids.reshape(ids.shape[0], -1, block)
    real = ids >= 0
    return jnp.where(real, ids, big).min(2), jnp.where(real, ids, -1).max(2), real.all(2)


def _per_row(x: Any) -> Any:
    """A scalar or `[B]` as `[1 or B, 1, 1]`, in numpy where it is known."""
    return np.reshape(x, (1, 1, 1)) if isinstance(x, int) else jnp.reshape(x, (-1, 1, 1))


def live_tiles(kinds: Any) -> tuple[Any, Any]:
    """For each block of queries, the blocks of keys to visit: the partly open ones first, then the open ones.

    Args:
      kinds: `[B, I, J]` of `tile_kinds` (transposed for the visits of a block of keys).

    Returns:
      counts `[B, I, 2]` (how many are partly open, how many open) and tiles `[B, I, J]` (indices; behind the counted
      ones stand dead tiles), both int32.
    """
    xp = np if isinstance(kinds, np.ndarray) else jnp
    counts = xp.stack([(kinds == PARTIAL).sum(-1), (kinds == OPEN).sum(-1)], -1).astype(np.int32)
    rank = xp.where(kinds == DEAD, 2, xp.where(kinds == OPEN, 1, 0))
    order = np.argsort(rank, -1, kind="stable") if xp is np else jnp.argsort(rank, -1, stable=True)
    return counts, order.astype(np.int32)
