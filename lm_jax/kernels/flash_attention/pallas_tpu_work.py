"""The work of a TPU kernel as lists: whole chunks where a mask is open, small parts of chunks where it is partly open.

Small parts skip more of what is dead; large chunks are faster. A causal mask over 8192 positions with chunks of 512 and
parts of 256 so computes 1.03 times the half of all scores, and 1.06 times with chunks alone.

Shapes: B batch, T queries, S keys, X and Y blocks of queries and keys, I and J chunks (or parts) in such a block.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from lm_jax.kernels.flash_attention.mask import AttentionMask
from lm_jax.kernels.flash_attention.pallas_tpu_mask import pack
from lm_jax.kernels.flash_attention.schedule import DEAD, OPEN, tile_kinds


def two_lists(
    mask: AttentionMask,
    T: int,
    S: int,
    chunks: tuple[int, int],
    parts: tuple[int, int],
    per: tuple[int, int],
    steps: int,
) -> Any:
    """What each block of a kernel's grid has to compute.

    Args:
      chunks: queries and keys of a chunk; where the keys do not fill theirs, the kernel must hide what is added.
      parts: queries and keys of a part; they divide those of a chunk.
      per: chunks of queries and of keys in a block.
      steps: the open chunks of a block are a multiple of it; the parts of those left over go with the masked ones.

    Returns:
      `[B or 1, X, Y, 1, 2 + parts + chunks in a block]` int32: how many parts, how many chunks, then `pack(i, j)` of
      the parts and of the chunks, indices in the block; what stands behind the counted ones is not to be computed. In
      numpy where the mask is static.
    """
    mask, S = _padded(mask, S, S + -S % chunks[1])
    kinds = tile_kinds(mask, T, S, *parts)
    xp = np if isinstance(kinds, np.ndarray) else jnp
    ratio = chunks[0] // parts[0], chunks[1] // parts[1]
    missing = (0, 0), (0, -kinds.shape[1] % ratio[0]), (0, 0)  # behind the queries, in their last chunk
    opened = xp.pad(kinds == OPEN, missing, constant_values=True)
    opened = opened.reshape(len(kinds), -1, ratio[0], kinds.shape[2] // ratio[1], ratio[1]).all((2, 4))
    opened, live = _in_blocks(opened, per), _in_blocks(kinds != DEAD, (per[0] * ratio[0], per[1] * ratio[1]))
    nth = _counted(opened)
    whole = nth[..., -1:, -1:].astype(np.int32) // steps * steps
    cut = ~(opened & (nth <= whole))[:, :, :, :, None, :, None]
    live = live.reshape(*opened.shape[:4], ratio[0], per[1], ratio[1]) & cut
    lists = _counted(live.reshape(*opened.shape[:3], per[0] * ratio[0], -1)), xp.minimum(nth, whole)
    counts = [nth[..., -1, -1:].astype(np.int32) for nth in lists]
    return xp.concatenate([*counts, *map(_listed, lists)], -1)[:, :, :, None]


def _padded(mask: AttentionMask, S: int, to: int) -> tuple[AttentionMask, int]:
    """Keys added that nobody sees."""
    if to == S:
        return mask, S
    length, ids = S if mask.kv_length is None else mask.kv_length, mask.kv_segment_ids
    length = min(length, S) if isinstance(length, int) else jnp.minimum(length, S)
    ids = None if ids is None else jnp.pad(ids, ((0, 0), (0, to - S)), constant_values=-1)
    return dataclasses.replace(mask, kv_length=length, kv_segment_ids=ids), to


def _in_blocks(tiles: Any, per: tuple[int, int]) -> Any:
    """`[B, X * I, Y * J]` -> `[B, X, Y, I, J]`; what is missing at the end is False."""
    xp = np if isinstance(tiles, np.ndarray) else jnp
    B, rows, columns = tiles.shape
    tiles = xp.pad(tiles, ((0, 0), (0, -rows % per[0]), (0, -columns % per[1])))
    return xp.swapaxes(tiles.reshape(B, tiles.shape[1] // per[0], per[0], -1, per[1]), 2, 3)


def _counted(chosen: Any) -> Any:
    """`[B, X, Y, I, J]` float32: how many are chosen up to here, row by row, itself included."""
    rows, columns = chosen.shape[3:]
    inside = _product(chosen.astype(np.float32), np.triu(np.ones((columns, columns), np.float32)))
    before = _product(inside[..., None, :, -1], np.triu(np.ones((rows, rows), np.float32), 1))
    return inside + before.swapaxes(-1, -2)


def _listed(nth: Any) -> Any:
    """`[B, X, Y, I * J]` int32: the packed indices of the chosen ones in order, and then `pack(I, 0)`.

    Without a sort: as many rows, and as many of a row, stand in front of one as have counted no further than to it.
    """
    rows, columns = nth.shape[3:]
    xp = np if isinstance(nth, np.ndarray) else jnp
    n = np.arange(rows * columns)[:, None]
    i = (nth[..., None, :, -1] <= n).sum(-1, dtype=np.int32)
    row = _product((i[..., None] == np.arange(rows)).astype(np.float32), nth)
    j = (row <= n).sum(-1, dtype=np.int32)
    return pack(i, xp.where(i < rows, j, 0))


def _product(a: Any, b: Any) -> Any:
    """Exact for whole numbers."""
    return a @ b if isinstance(a, np.ndarray) else jnp.matmul(a, b, precision="highest")
