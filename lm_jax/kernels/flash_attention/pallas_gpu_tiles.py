"""What the Hopper kernels share: how work is cut, which tiles are visited, and the arithmetic of one tile.

The arithmetic is in functions of arrays that know nothing of copies, barriers or layouts, so that any machine can run
them. A tile of scores stands as queries x keys, or as keys x queries where gradients of keys and values are summed;
`query_dim` says which of its two dimensions is the queries'.

Shapes: B batch, T queries, S keys, I blocks of queries, J blocks of keys; x and y the two dimensions of a tile, q and k
its queries and keys.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lm_jax.kernels.flash_attention.implementation import Call
from lm_jax.kernels.flash_attention.schedule import live_tiles, tile_kinds

Array = jax.Array
LOG2E = 1.4426950408889634
LOWEST = -1e38  # where a maximum starts: finite, so that `-inf` less it is `-inf`
ROWS = 64  # of a tile that one warpgroup computes: the matrix unit's own number
WARPGROUPS = 2  # that compute; one more copies
Q_OFFSET, PREFIX_LENGTH, KV_LENGTH = range(3)  # the columns of `Work.scalars_B3`


@dataclasses.dataclass(frozen=True)
class GpuBlocks:
    """How the Hopper kernels cut their work; the other side of each tile is `WARPGROUPS * ROWS`.

    Attributes:
      forward_kv, dq_kv: keys of a tile, forward and where gradients of queries are summed.
      dkv_q: queries of a tile where gradients of keys and values alone are summed.
      fused_q: queries of a tile where all gradients are: 8,192 numbers.
      forward_stages, dq_stages, dkv_stages, fused_stages: how many tiles shared memory holds at once.
      fused_one_loop: whether tiles and query heads are one loop, or two.
    """

    forward_kv: int
    forward_stages: int
    dq_kv: int
    dq_stages: int
    dkv_q: int
    dkv_stages: int
    fused_q: int
    fused_stages: int
    fused_one_loop: bool


class Parts(NamedTuple):
    """What of a mask a kernel knows when it is traced.

    Attributes:
      q_offset, length: the number, or None where each row's is read from the table of scalars.
      every_key: whether there is no key behind the last one to hide.
      segments: whether there are segment ids.
    """

    causal: bool
    window: int | None
    prefix: bool
    q_offset: int | None
    length: int | None
    every_key: bool
    segments: bool


class Work(NamedTuple):
    """The operands that say what to visit and what is seen there.

    Attributes:
      counts: `[B or 1, X, 2]`, how many tiles a block has to visit: partly open ones and open ones.
      tiles: `[B or 1, X, Y]`, which they are, the partly open ones first.
      scalars_B3: `q_offset`, `prefix_length`, `kv_length` of each row.
      q_ids, k_ids: `[B, T]`, `[B, S]` segment ids, padded; `[1, 1]` where there are none.
    """

    counts: Array
    tiles: Array
    scalars_B3: Array
    q_ids: Array
    k_ids: Array


def up(n: int, multiple: int) -> int:
    """The next multiple from `n` on."""
    return n + -n % multiple


def padded(x: Array, length: int, value: float = 0.0, dim: int = 1) -> Array:
    """`x` with `dim` filled up to `length`."""
    widths = [(0, length - n if d == dim else 0) for d, n in enumerate(x.shape)]
    return x if x.shape[dim] == length else jnp.pad(x, widths, constant_values=value)


def parts_of(call: Call, S: int) -> Parts:
    """`S`: keys with what fills their last block."""
    mask, keys = call.mask, call.k_BSKH.shape[1]
    known = mask.kv_length is None or isinstance(mask.kv_length, int)
    length = min(keys, mask.kv_length) if isinstance(mask.kv_length, int) else keys
    return Parts(
        causal=mask.causal,
        window=mask.window,
        prefix=mask.prefix_length is not None,
        q_offset=mask.q_offset if isinstance(mask.q_offset, int) else None,
        length=length if known else None,
        every_key=known and length == S,
        segments=mask.q_segment_ids is not None,
    )


def work_of(call: Call, T: int, S: int, q_block: int, kv_block: int, *, for_keys: bool) -> Work:
    """The schedule of a kernel and the mask's operands.

    Args:
      T, S: the lengths with what fills their last blocks.
      for_keys: the lists are of queries to visit for each block of keys, and not the other way round.
    """
    mask, B = call.mask, call.q_BTNH.shape[0]
    keys = call.k_BSKH.shape[1]
    q_ids = k_ids = jnp.zeros((1, 1), jnp.int32)
    if mask.q_segment_ids is not None and mask.kv_segment_ids is not None:
        # Padding is -1 among queries and -2 among keys, so that to compare ids is enough.
        q_ids, k_ids = _ids(mask.q_segment_ids, T, -1), _ids(mask.kv_segment_ids, S, -2)
    length = keys if mask.kv_length is None else mask.kv_length
    length = min(length, keys) if isinstance(length, int) else jnp.minimum(length, keys)
    prefix = 0 if mask.prefix_length is None else mask.prefix_length
    rows = [jnp.broadcast_to(jnp.asarray(x, jnp.int32), (B,)) for x in (mask.q_offset, prefix, length)]
    everywhere = isinstance(length, int) and length == S
    filled = mask if everywhere else dataclasses.replace(mask, kv_length=length)
    if mask.q_segment_ids is not None:
        filled = dataclasses.replace(filled, q_segment_ids=q_ids, kv_segment_ids=k_ids)
    kinds = tile_kinds(filled, T, S, q_block, kv_block)
    counts, tiles = live_tiles(kinds.swapaxes(1, 2) if for_keys else kinds)
    return Work(jnp.asarray(counts), jnp.asarray(tiles), jnp.stack(rows, 1), q_ids, k_ids)


def marked(work: Work) -> Work:
    """The same with partly open tiles as `-1 - tile`: a list that says itself where the mask is needed."""
    partly = jnp.arange(work.tiles.shape[-1]) < work.counts[..., :1]
    return work._replace(tiles=jnp.where(partly, -1 - work.tiles, work.tiles))


def unmarked(tile: Any) -> Any:
    """The number of a tile in a marked list."""
    return jnp.where(tile < 0, -1 - tile, tile)


def _ids(ids_BT: Array, length: int, padding: int) -> Array:
    return padded(jnp.where(ids_BT < 0, padding, ids_BT.astype(jnp.int32)), length, padding)


# --- the arithmetic of a tile ----------------------------------------------------------------------------------------


def along(x: Array, tile: Array, dim: int) -> Array:
    """A vector as a tile: the same number wherever the index along `dim` is the same."""
    return jax.lax.broadcast_in_dim(x, tile.shape, (dim,))


def visible(parts: Parts, prefix: Any, length: Any, q_at: Array, k_at: Array, ids: tuple[Array, Array] | None) -> Any:
    """Which scores of a tile count, None where all do.

    Args:
      prefix, length: of the row; read where the mask has such a part.
      q_at, k_at: `[x, y]` positions of a tile's queries and keys.
      ids: `[x, y]` segment ids of both, or None.
    """
    see: Any = None
    if parts.causal:
        see = k_at <= q_at
    if parts.window is not None:
        near = q_at - k_at < parts.window
        see = near if see is None else see & near
        if not parts.causal:
            see = see & (k_at - q_at < parts.window)
    if parts.prefix and see is not None:
        see = see | (k_at < prefix)
    if not parts.every_key:
        there = k_at < length
        see = there if see is None else see & there
    if ids is not None:
        same = ids[0] == ids[1]
        see = same if see is None else see & same
    return see


def softmax_step(scores_qk: Array, see_qk: Any, factor: float, highest: Array, total: Array) -> tuple[Array, ...]:
    """One step of the online softmax, in powers of two (Milakov and Gimelshein 2018, arXiv:1805.02867).

    Args:
      scores_qk: products of queries and keys, not scaled yet.
      see_qk: which count, None for all.
      factor: the scale times `LOG2E`, above 0, so that the largest product stays the largest score.
      highest, total: `[q]` of the steps before; they start with `LOWEST` and 0.

    Returns:
      `[q, k]` probabilities but for their sum, the new `highest` and `total`, and `[q]` what the sums before shrink by.
    """
    scores = scores_qk if see_qk is None else jnp.where(see_qk, scores_qk, -jnp.inf)
    moved = jnp.maximum(highest, jnp.max(scores, axis=1) * factor)
    shrink = jnp.exp2(highest - moved)
    p = jnp.exp2(scores * factor - along(moved, scores, 0))
    return p, moved, total * shrink + jnp.sum(p, axis=1), shrink


def probabilities(scores: Array, see: Any, factor: float, lse2: Array, query_dim: int) -> Array:
    """The probabilities again, from the logarithm (to base 2) of their sums; `lse2` is `[q]`, `-LOWEST` where a query
    sees nothing."""
    p = jnp.exp2(scores * factor - along(lse2, scores, query_dim))
    return p if see is None else jnp.where(see, p, 0.0)


def score_gradient(p: Array, d_p: Array, delta: Array, query_dim: int) -> Array:
    """The gradient of scaled scores: `p * (d_p - delta)` (Dao et al. 2022, arXiv:2205.14135)."""
    return p * (d_p - along(delta, p, query_dim))
