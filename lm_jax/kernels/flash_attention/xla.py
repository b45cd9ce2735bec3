"""Attention in blocks, for XLA to compile: what a CPU runs, and a chip that no other implementation knows.

Memory is linear in length. A short call is a few blocks of queries, each against the keys that any of them can see, and
the backward pass reads the probabilities that the forward pass kept; `kept_probabilities` says when they are few enough
for that. A longer one is a loop over the live tiles of its mask that keeps nothing: the softmax is summed up tile by
tile (Dao et al. 2022, arXiv:2205.14135), and the backward pass computes each tile again.

The rows of a batch go one after another: what one row computes with stays in the cache, memory is used again and not
asked of the system anew, and each row skips the tiles that are dead for it alone. Rows of a short call that are small
go several at a time (`rows_together`).

Shapes: B batch, T queries, S keys, N query heads, K key-value heads, G query heads a key head, H head dim; of a tile: Q
queries, P keys; I blocks of queries, J blocks of keys; D distances, of which entry `T - 1 - t + s` stands for query t
and key s.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm_jax.kernels.flash_attention.implementation import Call, Gradients, Implementation, with_gradient
from lm_jax.kernels.flash_attention.mask import AttentionMask
from lm_jax.kernels.flash_attention.schedule import DEAD, OPEN, PARTIAL, is_static, live_tiles, tile_kinds
from lm_jax.kernels.flash_attention.xla_tiles import (
    Side,
    Sums,
    TileGradients,
    bands_of,
    dtype_of,
    from_band,
    scores_of,
    tile_gradients,
    to_band,
)

Array = jax.Array

_PIECE = 128  # queries of a short call's block; smaller ones save less than their products lose
_MOST_PIECES = 8  # each is a piece of program of its own
# Narrower heads may keep as much as heads of this: T 128 to 896, H 8 to 32 took 1.1 to 4.5 times as long in loops.
_NARROW = 64
# Scores of the short rows that go together. A step of models of 0.8M to 13.8M parameters (T 64 to 512) took 0.77 to
# 0.98 of its time with a row at a time. Eight times as much won up to 8% more on a processor with 32 MiB of cache;
# others have less.
_TOGETHER = 2**21
# A long call's tile. From 128 to 512 by 256 to 1024 the others took 0.96 to 1.25 of its time (T 1024, 2048, 4096).
_Q, _P = 256, 512


# ------------------------------------------------------------------------------------------------------ short or long


class Piece(NamedTuple):
    """A block of queries of a short call and the keys it meets; `open`: all of them see all of these."""

    queries: slice
    keys: slice
    open: bool

    @property
    def size(self) -> int:
        return (self.queries.stop - self.queries.start) * (self.keys.stop - self.keys.start)


def pieces(mask: AttentionMask, T: int, S: int) -> tuple[Piece, ...]:
    """Blocks of queries that make up all T, each with the range of keys that it may see, by what is known of the mask
    when the program is traced. Blocks with the same range are one."""
    size = max(_PIECE, -(-T // _MOST_PIECES))
    found: list[Piece] = []
    for i, kinds in enumerate(_known_kinds(mask, T, S, size, _PIECE)):
        live = np.flatnonzero(kinds != DEAD)
        first, behind = (int(live[0]), int(live[-1]) + 1) if len(live) else (0, 1)
        keys, start = slice(first * _PIECE, min(behind * _PIECE, S)), i * size
        is_open = bool((kinds[first:behind] == OPEN).all())
        if found and (found[-1].keys, found[-1].open) == (keys, is_open):
            start = found.pop().queries.start
        found.append(Piece(slice(start, min((i + 1) * size, T)), keys, is_open))
    return tuple(found)


def _known_kinds(mask: AttentionMask, T: int, S: int, q_block: int, kv_block: int) -> Any:
    """`[I, J]` in numpy: the kinds of tiles, partly open where only the values of arrays could tell."""
    if not isinstance(mask.q_offset, int):
        return np.full((-(-T // q_block), -(-S // kv_block)), PARTIAL)
    known = dataclasses.replace(
        mask,
        q_segment_ids=None,
        kv_segment_ids=None,
        kv_length=mask.kv_length if isinstance(mask.kv_length, int) else None,
        prefix_length=mask.prefix_length if isinstance(mask.prefix_length, int | None) else S,
    )
    kinds = tile_kinds(known, T, S, q_block, kv_block)[0]
    return kinds if is_static(mask) else np.minimum(kinds, PARTIAL)


def kept_probabilities(call: Call) -> int:
    """How many probabilities a row keeps for the backward pass: all that it computes, or 0 where that is more than the
    numbers in its queries, keys, values, output and their gradients would be with heads of 64 or more. Only shapes are
    read.

    Up to there they are linear in length by that rule (causal, G 1: T up to 16 H - 128), and keeping them is faster
    than computing them again (T 256 by 1.4, 512 and 768 by 1.3).
    """
    (_, T, N, H), (_, S, K, _) = call.q_BTNH.shape, call.k_BSKH.shape
    kept = N * sum(piece.size for piece in pieces(call.mask, T, S))
    if call.soft_cap is not None:
        kept *= 2  # and how steep the cap is at each
    return kept if kept <= 4 * (T * N + S * K) * max(H, _NARROW) else 0


def rows_together(call: Call) -> int:
    """How many rows of a short call are computed at a time: a divisor of the batch, and as many as have together no
    more scores than a cache holds."""
    (B, T, N, _), S = call.q_BTNH.shape, call.k_BSKH.shape[1]
    most = _TOGETHER // (N * sum(piece.size for piece in pieces(call.mask, T, S)))
    return max(rows for rows in range(1, max(1, min(most, B)) + 1) if B % rows == 0)


# ------------------------------------------------------------------------------------------------- what both ways need


def _each_row(function: Callable[..., Any], mask: AttentionMask, *arrays: Any, together: int = 1) -> Any:
    """`function(mask, *arrays)` of one row after another, or of so many at a time, the results stacked. The arrays of
    its mask are scalars or `[1, T]`."""
    leaves, tree = jax.tree.flatten(mask)
    by_row = [leaf if jnp.ndim(leaf) else None for leaf in leaves]

    def one(row: Any) -> Any:
        arrays, by_row = row
        own = [a if x is None else x[None] if x.ndim else x for a, x in zip(leaves, by_row, strict=True)]
        return function(jax.tree.unflatten(tree, own), *arrays)

    if together == len(arrays[0]):
        return jax.vmap(one)((arrays, by_row))
    return jax.lax.map(one, (arrays, by_row), batch_size=together if together > 1 else None)


def _heads_first(x_TNH: Array, dtype: Any) -> Array:
    return jnp.swapaxes(x_TNH, 0, 1).astype(dtype)


def _keys_last(x_SKH: Array, dtype: Any) -> Array:
    return jnp.moveaxis(x_SKH, -3, -1).astype(dtype)


def _delta(call: Call, out: Array, d_out: Array, d_lse: Array) -> Array:
    """`[B, T, N, 1]`: the gradient of a score is its probability times that of the probability less this."""
    product = d_out.astype(dtype_of(call)) * out.astype(dtype_of(call))
    return jnp.sum(product, -1, keepdims=True) - d_lse[..., None]


def _d_sinks(call: Call, lse_BTN: Array, delta_BTN1: Array) -> Array | None:
    """A sink is the score of a key whose value is zero."""
    if call.sinks_N is None:
        return None
    probability = jnp.exp(call.sinks_N.astype(lse_BTN.dtype) - _for_probabilities(lse_BTN))
    return -jnp.sum(probability * delta_BTN1[..., 0], (0, 1)).astype(call.sinks_N.dtype)


def _for_probabilities(lse: Array) -> Array:
    """Such that `exp(score - lse)` is 0 for a query that sees nothing."""
    return jnp.where(lse == -jnp.inf, jnp.inf, lse)


# --------------------------------------------------------------------------------------------------------------- short


class _Kept(NamedTuple):
    """Of a piece: its weights, one over their sum, and the slopes of the soft cap."""

    weights_BNQP: Array
    inverse_BNQ1: Array
    slope_BNQP: Array | None


def _forward_short(call: Call) -> tuple[Array, Array, list[_Kept]]:
    T, S, dtype = call.q_BTNH.shape[1], call.k_BSKH.shape[1], dtype_of(call)

    def row(mask: AttentionMask, q_TNH: Array, k_SKH: Array, v_SKH: Array, band_ND: Array | None) -> Any:
        q, k, v = _heads_first(q_TNH, dtype) * call.scale, _keys_last(k_SKH, dtype), _keys_last(v_SKH, dtype)
        outs, lses, kept = [], [], []
        for piece in pieces(call.mask, T, S):
            q_piece = q[:, piece.queries]
            Q, P, at = q_piece.shape[1], piece.keys.stop - piece.keys.start, _band_of(piece, T)
            bias = None if band_ND is None else from_band(band_ND[:, at], Q, P)
            see = None if piece.open else mask.allowed(Q, P, piece.queries.start, piece.keys.start)[0]
            scores, slope = scores_of(q_piece, k[:, :, piece.keys], call.soft_cap, bias, see)
            sums, weights = Sums.start(q_piece, call.sinks_N).add(scores, v[:, :, piece.keys])
            out, lse, inverse = sums.finish()
            outs.append(out)
            lses.append(lse)
            kept.append(_Kept(weights.astype(q_TNH.dtype), inverse, slope))
        out, lse = (jnp.swapaxes(jnp.concatenate(parts, 1), 0, 1) for parts in (outs, lses))
        return out.astype(q_TNH.dtype), lse[..., 0], kept

    arrays = call.q_BTNH, call.k_BSKH, call.v_BSKH, bands_of(call, T, S)[0]
    return _each_row(row, call.mask, *arrays, together=rows_together(call))


def _band_of(piece: Piece, T: int) -> slice:
    """The distances that occur in a piece."""
    return slice(T - piece.queries.stop + piece.keys.start, T - 1 - piece.queries.start + piece.keys.stop)


def _backward_short(call: Call, out: Array, lse: Array, kept: list[_Kept], d_out: Array, d_lse: Array) -> Gradients:
    T, S, dtype = call.q_BTNH.shape[1], call.k_BSKH.shape[1], dtype_of(call)
    delta = _delta(call, out, d_out, d_lse)
    bands, pull = bands_of(call, T, S)

    def row(_: AttentionMask, q_TNH: Array, k_SKH: Array, v_SKH: Array, *rest: Any) -> Any:
        *of_queries, band_ND, kept = rest
        q, g, delta = (_heads_first(x, dtype) for x in (q_TNH, *of_queries))
        q, k, v = q * call.scale, _keys_last(k_SKH, dtype), _keys_last(v_SKH, dtype)
        dqs, dk, dv = [], jnp.zeros_like(q, shape=k.shape), jnp.zeros_like(q, shape=k.shape)
        d_band = None if band_ND is None else jnp.zeros_like(q, shape=band_ND.shape)
        for piece, (weights, inverse, slope) in zip(pieces(call.mask, T, S), kept, strict=True):
            queries, keys = piece.queries, piece.keys
            side = Side.of(q[:, queries], g[:, queries] * inverse, delta[:, queries] * inverse, len(k))
            grads = tile_gradients(weights.astype(dtype), slope, side, k[:, :, keys], v[:, :, keys])
            dqs.append(grads.dq_NQH * call.scale)
            dk, dv = dk.at[:, :, keys].add(grads.dk_KHP), dv.at[:, :, keys].add(grads.dv_KHP)
            if d_band is not None:
                d_band = d_band.at[:, _band_of(piece, T)].add(to_band(grads.dbias_NQP))
        dq = jnp.swapaxes(jnp.concatenate(dqs, 1), 0, 1).astype(q_TNH.dtype)
        return dq, *(jnp.moveaxis(x, -1, 0).astype(k_SKH.dtype) for x in (dk, dv)), d_band

    arrays = call.q_BTNH, call.k_BSKH, call.v_BSKH, d_out, delta, bands, kept
    dq, dk, dv, d_bands = _each_row(row, call.mask, *arrays, together=rows_together(call))
    return Gradients(dq, dk, dv, None if pull is None else pull(d_bands), _d_sinks(call, lse, delta))


# ---------------------------------------------------------------------------------------------------------------- long


class _Blocks(NamedTuple):
    """A long call, filled up so that it is whole blocks."""

    q_BIQNH: Array
    k_BJPKH: Array
    v_BJPKH: Array
    mask: AttentionMask
    counts_BI2: Array  # of `live_tiles`, as the next
    tiles_BIJ: Array
    occurring: frozenset[int]  # kinds of tiles

    @property
    def sizes(self) -> tuple[int, int]:
        return self.q_BIQNH.shape[2], self.k_BJPKH.shape[2]

    @property
    def lengths(self) -> tuple[int, int]:
        return self.q_BIQNH.shape[1] * self.sizes[0], self.k_BJPKH.shape[1] * self.sizes[1]

    def band_start(self, i: Any, j: Any) -> Any:
        """The first of the distances that occur in a tile."""
        return self.lengths[0] - (i + 1) * self.sizes[0] + j * self.sizes[1]


def _blocks(call: Call) -> _Blocks:
    B, T, S = *call.q_BTNH.shape[:2], call.k_BSKH.shape[1]
    Q, P = _even_part(T, _Q), _even_part(S, _P)
    q, k, v = _in_blocks(call.q_BTNH, Q), _in_blocks(call.k_BSKH, P), _in_blocks(call.v_BSKH, P)
    mask, T_filled, S_filled = call.mask, q.shape[1] * Q, k.shape[1] * P
    if S_filled > S:
        length = S if mask.kv_length is None else mask.kv_length
        length = min(length, S) if isinstance(length, int) else jnp.minimum(length, S)
        mask = dataclasses.replace(mask, kv_length=length)
    if mask.q_segment_ids is not None and mask.kv_segment_ids is not None:
        q_ids, k_ids = _filled(mask.q_segment_ids, T_filled, -1), _filled(mask.kv_segment_ids, S_filled, -1)
        mask = dataclasses.replace(mask, q_segment_ids=q_ids, kv_segment_ids=k_ids)
    kinds = tile_kinds(mask, T_filled, S_filled, Q, P)
    occurring = frozenset(kinds.flat) if isinstance(kinds, np.ndarray) else frozenset((DEAD, PARTIAL, OPEN))
    counts, tiles = (jnp.broadcast_to(x, (B, *x.shape[1:])) for x in live_tiles(kinds))
    return _Blocks(q, k, v, mask, counts, tiles, occurring)


def _even_part(length: int, most: int) -> int:
    """What a length divides into, rounded up to the vectors of a CPU."""
    return -(-length // -(-length // most) // 16) * 16


def _filled(x_BT: Array, length: int, value: float = 0) -> Array:
    behind = [(0, 0), (0, length - x_BT.shape[1])] + [(0, 0)] * (x_BT.ndim - 2)
    return jnp.pad(x_BT, behind, constant_values=value)


def _in_blocks(x_BT: Array, block: int, value: float = 0) -> Array:
    blocks = -(-x_BT.shape[1] // block)
    return _filled(x_BT, blocks * block, value).reshape(x_BT.shape[0], blocks, block, *x_BT.shape[2:])


def _whole(x_BIQ: Array, length: int) -> Array:
    return x_BIQ.reshape(x_BIQ.shape[0], -1, *x_BIQ.shape[3:])[:, :length]


def _visit(blocks: _Blocks, counts_2: Array, tiles_J: Array, tile: Callable[[Any, bool, Any], Any], carry: Any) -> Any:
    """`tile(j, masked, carry)` for the live blocks of keys of a block of queries: first those partly open."""

    def step(masked: bool, n: Any, carry: Any) -> Any:
        return tile(tiles_J[n], masked, carry)

    partial, live = counts_2[0], counts_2[0] + counts_2[1]
    if PARTIAL in blocks.occurring:
        carry = jax.lax.fori_loop(0, partial, functools.partial(step, True), carry)
    if OPEN in blocks.occurring:
        carry = jax.lax.fori_loop(partial, live, functools.partial(step, False), carry)
    return carry


class _RowOfTiles(NamedTuple):
    """One row of a long call, for the scores of its tiles."""

    call: Call
    blocks: _Blocks
    mask: AttentionMask
    k_JKHP: Array
    band_ND: Array | None

    def scores(self, q_NQH: Array, i: Any, j: Any, masked: bool) -> tuple[Array, Array | None]:
        (Q, P), bias = self.blocks.sizes, None
        if self.band_ND is not None:
            band = jax.lax.dynamic_slice_in_dim(self.band_ND, self.blocks.band_start(i, j), Q + P - 1, 1)
            bias = from_band(band, Q, P)
        see = self.mask.allowed(Q, P, i * Q, j * P)[0] if masked else None
        return scores_of(q_NQH, self.k_JKHP[j], self.call.soft_cap, bias, see)


def _forward_long(call: Call) -> tuple[Array, Array, None]:
    blocks, dtype = _blocks(call), dtype_of(call)

    def row(mask: AttentionMask, q: Array, k: Array, v: Array, band: Array | None, *schedule: Array) -> Any:
        k_JKHP, v_JKHP = _keys_last(k, dtype), _keys_last(v, dtype)
        tiles = _RowOfTiles(call, blocks, mask, k_JKHP, band)

        def block(_: None, x: Any) -> Any:
            i, q_QNH, counts_2, tiles_J = x
            q_NQH = _heads_first(q_QNH, dtype) * call.scale

            def tile(j: Any, masked: bool, sums: Sums) -> Sums:
                return sums.add(tiles.scores(q_NQH, i, j, masked)[0], v_JKHP[j])[0]

            sums = _visit(blocks, counts_2, tiles_J, tile, Sums.start(q_NQH, call.sinks_N))
            out, lse = (jnp.swapaxes(a, 0, 1) for a in sums.finish()[:2])
            return None, (out.astype(q.dtype), lse[..., 0])

        return jax.lax.scan(block, None, (jnp.arange(len(q)), q, *schedule))[1]

    bands = bands_of(call, *blocks.lengths)[0]
    arrays = blocks.q_BIQNH, blocks.k_BJPKH, blocks.v_BJPKH, bands, blocks.counts_BI2, blocks.tiles_BIJ
    out, lse = (_whole(x, call.q_BTNH.shape[1]) for x in _each_row(row, blocks.mask, *arrays))
    return out, lse, None


class _OverKeys(NamedTuple):
    """Gradients of a row that are sums over its queries."""

    dk_JKHP: Array
    dv_JKHP: Array
    d_band_ND: Array | None

    @classmethod
    def start(cls, row: _RowOfTiles, like: Array) -> _OverKeys:
        zero = jnp.zeros_like(like, row.k_JKHP.dtype, shape=row.k_JKHP.shape)
        band = row.band_ND
        return cls(zero, zero, None if band is None else jnp.zeros_like(like, band.dtype, shape=band.shape))

    def add(self, grads: TileGradients, j: Any, band_start: Any) -> _OverKeys:
        dk, dv, band = self.dk_JKHP.at[j].add(grads.dk_KHP), self.dv_JKHP.at[j].add(grads.dv_KHP), self.d_band_ND
        if band is not None:
            more = to_band(grads.dbias_NQP)
            more = jax.lax.dynamic_slice_in_dim(band, band_start, more.shape[1], 1) + more
            band = jax.lax.dynamic_update_slice_in_dim(band, more, band_start, 1)
        return _OverKeys(dk, dv, band)


def _backward_long(call: Call, out: Array, lse: Array, _: None, d_out: Array, d_lse: Array) -> Gradients:
    blocks, dtype = _blocks(call), dtype_of(call)
    Q, delta = blocks.sizes[0], _delta(call, out, d_out, d_lse)
    bands, pull = bands_of(call, *blocks.lengths)

    def row(mask: AttentionMask, k: Array, v: Array, band: Array | None, *by_block: Array) -> Any:
        k_JKHP, v_JKHP = _keys_last(k, dtype), _keys_last(v, dtype)
        tiles = _RowOfTiles(call, blocks, mask, k_JKHP, band)

        def block(over_keys: _OverKeys, x: Any) -> Any:
            i, *of_queries, counts_2, tiles_J = x
            q, g, lse, delta = (_heads_first(a, dtype) for a in of_queries)
            side = Side.of(q * call.scale, g, delta, k.shape[2])

            def tile(j: Any, masked: bool, carry: tuple[Array, _OverKeys]) -> tuple[Array, _OverKeys]:
                scores, slope = tiles.scores(side.q_NQH, i, j, masked)
                grads = tile_gradients(jnp.exp(scores - lse), slope, side, k_JKHP[j], v_JKHP[j])
                return carry[0] + grads.dq_NQH, carry[1].add(grads, j, blocks.band_start(i, j))

            dq, over_keys = _visit(blocks, counts_2, tiles_J, tile, (jnp.zeros_like(q), over_keys))
            return over_keys, jnp.swapaxes(dq * call.scale, 0, 1).astype(call.q_BTNH.dtype)

        q = by_block[0]
        sums, dq = jax.lax.scan(block, _OverKeys.start(tiles, q), (jnp.arange(len(q)), *by_block))
        dk, dv = (jnp.moveaxis(x, -1, 1).astype(k.dtype) for x in (sums.dk_JKHP, sums.dv_JKHP))
        return dq, dk, dv, sums.d_band_ND

    known = _for_probabilities(lse)[..., None]
    of_queries = blocks.q_BIQNH, _in_blocks(d_out, Q), _in_blocks(known, Q, jnp.inf), _in_blocks(delta, Q)
    arrays = blocks.k_BJPKH, blocks.v_BJPKH, bands, *of_queries, blocks.counts_BI2, blocks.tiles_BIJ
    dq, dk, dv, d_bands = _each_row(row, blocks.mask, *arrays)
    dq, dk, dv = _whole(dq, out.shape[1]), _whole(dk, call.k_BSKH.shape[1]), _whole(dv, call.k_BSKH.shape[1])
    return Gradients(dq, dk, dv, None if pull is None else pull(d_bands), _d_sinks(call, lse, delta))


# ------------------------------------------------------------------------------------------------------------- the two


def _forward(call: Call) -> tuple[Array, Array, Any]:
    return _forward_short(call) if kept_probabilities(call) else _forward_long(call)


def _backward(call: Call, out: Array, lse: Array, kept: Any, d_out: Array, d_lse: Array) -> Gradients:
    backward = _backward_long if kept is None else _backward_short
    return backward(call, out, lse, kept, d_out, d_lse)


IMPLEMENTATION = Implementation("xla", lambda call: None, with_gradient(_forward, _backward), _forward, _backward)
