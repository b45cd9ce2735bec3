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
    if S % chunks[1]:
        length = S if mask.kv_length is None else mask.kv_length
        mask = dataclasses.replace(
            mask, kv_length=min(length, S) if isinstance(length, int) else jnp.minimum(length, S)
        )
        S += -S % chunks[1]
    ratio = chunks[0] // parts[0], chunks[1] // parts[1]
    opened = _in_blocks(tile_kinds(mask, T, S, *chunks), per) == OPEN
    live = _in_blocks(tile_kinds(mask, T, S, *parts), (per[0] * ratio[0], per[1] * ratio[1])) != DEAD
    xp = np if isinstance(opened, np.ndarray) else jnp
    nth = xp.cumsum(opened.reshape(*opened.shape[:3], -1), -1)
    whole = opened & (nth <= nth[..., -1:] // steps * steps).reshape(opened.shape)
    live = live & ~xp.repeat(xp.repeat(whole, ratio[0], 3), ratio[1], 4)
    counts = xp.stack([live.sum((3, 4)), whole.sum((3, 4))], -1)
    return xp.concatenate([counts, _listed(live), _listed(whole)], -1).astype(np.int32)[:, :, :, None]


def _in_blocks(kinds: Any, per: tuple[int, int]) -> Any:
    """`[B, X * I, Y * J]` -> `[B, X, Y, I, J]`; what is missing at the end is dead."""
    xp = np if isinstance(kinds, np.ndarray) else jnp
    B, rows, columns = kinds.shape
    kinds = xp.pad(kinds, ((0, 0), (0, -rows % per[0]), (0, -columns % per[1])), constant_values=DEAD)
    return xp.swapaxes(kinds.reshape(B, kinds.shape[1] // per[0], per[0], -1, per[1]), 2, 3)


def _listed(chosen: Any) -> Any:
    """`[B, X, Y, I * J]`: the packed indices of the chosen first."""
    flat = ~chosen.reshape(*chosen.shape[:3], -1)
    order = np.argsort(flat, -1, kind="stable") if isinstance(flat, np.ndarray) else jnp.argsort(flat, -1, stable=True)
    return pack(order // chosen.shape[4], order % chosen.shape[4])
