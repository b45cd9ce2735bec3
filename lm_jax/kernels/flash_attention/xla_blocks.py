"""Attention in blocks, for XLA to compile: what a CPU runs, and a chip that no other implementation knows.

Memory is linear in length. A short call is a few blocks of queries, each against the keys that any of them can see, and
the backward pass reads the probabilities that the forward pass kept; `kept_probabilities` says when they are few enough
for that. A longer one is a loop over the live tiles of its mask that keeps nothing: the softmax is summed up tile by
tile (Dao et al. 2022, arXiv:2205.14135), and the backward pass computes each tile again.

Both are written for one row of a batch. Short rows go side by side, so that there are few and large operations; long
ones go one after another, so that a tile stays in the cache and each row skips the tiles that are dead for it alone.

Shapes: B batch, T queries, S keys, N query heads, K key-value heads, G query heads a key head, H head dim; of a tile: Q
queries, P keys; I blocks of queries, J blocks of keys; D distances `(T - 1 - t) + s` between a query and a key.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm_jax.kernels.flash_attention.implementation import Call, Gradients, Implementation, accumulator, with_gradient
from lm_jax.kernels.flash_attention.mask import AttentionMask
from lm_jax.kernels.flash_attention.schedule import DEAD, OPEN, PARTIAL, is_static, live_tiles, tile_kinds

Array = jax.Array

_PIECE = 128  # queries of a short call's block; smaller ones save less than their products lose
_MOST_PIECES = 8  # each is a piece of program of its own
_Q, _P = 256, 256


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
    kinds = _known_kinds(mask, T, S, size, _PIECE)
    found: list[Piece] = []
    for i, row in enumerate(kinds):
        live = np.flatnonzero(row != DEAD)
        first, last = (live[0], live[-1] + 1) if len(live) else (0, 1)
        keys = slice(int(first) * _PIECE, min(int(last) * _PIECE, S))
        start, is_open = i * size, bool((row[first:last] == OPEN).all())
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
    """How many probabilities a row keeps for the backward pass: all it computes, or 0 where that is more than the
    numbers in its queries, keys, values, output and the gradient of that. Only shapes are read.

    Up to this size they are linear in length, and reading them is faster than computing them again.
    """
    (_, T, N, H), (_, S, K, _) = call.q_BTNH.shape, call.k_BSKH.shape
    kept = N * sum(piece.size for piece in pieces(call.mask, T, S))
    if call.soft_cap is not None:
        kept *= 2  # and how steep the cap is at each
    return kept if kept <= (3 * T * N + 2 * S * K) * H else 0


# --------------------------------------------------------------------------------------------------------------- tiles


class _Sums(NamedTuple):
    """The softmax over the keys that were seen so far: the highest score, and sums of exponentials relative to it."""

    highest_NQ1: Array
    total_NQ1: Array
    out_NQH: Array

    @classmethod
    def start(cls, q_NQH: Array, sinks_N: Array | None) -> _Sums:
        N, Q, _ = q_NQH.shape
        nothing = jnp.zeros_like(q_NQH, shape=(N, Q, 1))  # like q: in a shard_map it varies over the devices as q does
        if sinks_N is None:
            return cls(nothing - jnp.inf, nothing, jnp.zeros_like(q_NQH))
        return cls(nothing + sinks_N[:, None, None], nothing + 1, jnp.zeros_like(q_NQH))

    def add(self, scores_NQP: Array, v_KPH: Array) -> tuple[_Sums, Array, Array]:
        """With further keys; and their weights, relative to the highest score that comes back beside them."""
        highest = jnp.maximum(self.highest_NQ1, jnp.max(scores_NQP, -1, keepdims=True))
        finite = jnp.where(highest == -jnp.inf, 0, highest)
        weights = jnp.exp(scores_NQP - finite)
        shrink = jnp.exp(self.highest_NQ1 - finite)
        total = self.total_NQ1 * shrink + jnp.sum(weights, -1, keepdims=True)
        return _Sums(highest, total, self.out_NQH * shrink + _grouped("krs,ksh->krh", weights, v_KPH)), weights, finite

    def finish(self) -> tuple[Array, Array]:
        """Output and `lse_NQ`: zeros and -inf for a query that has seen nothing."""
        some = self.total_NQ1 > 0
        total = jnp.where(some, self.total_NQ1, 1)
        lse = jnp.where(some, jnp.log(total) + self.highest_NQ1, -jnp.inf)
        return self.out_NQH / total, lse[:, :, 0]


def _grouped(product: str, a_NQX: Array, b_KXX: Array) -> Array:
    """A product of `[N, Q, ...]` with what a group of heads shares, or with another such where the sum is over queries;
    the queries of a group go below each other, which is only a reshape."""
    K = b_KXX.shape[0]
    y = jnp.einsum(product, a_NQX.reshape(K, -1, a_NQX.shape[2]), b_KXX)
    return y.reshape(*a_NQX.shape[:2], -1)


def _over_queries(a_NQX: Array, b_NQY: Array, K: int) -> Array:
    """`[K, X, Y]`: the sum over the queries of all heads of a group."""
    a, b = (x.reshape(K, -1, x.shape[2]) for x in (a_NQX, b_NQY))
    return jnp.einsum("krx,kry->kxy", a, b)


class _Scores(NamedTuple):
    """The scores of a tile, -inf where a key is not seen, and the derivative of the soft cap at them."""

    scores_NQP: Array
    slope_NQP: Array | None


def _scores(
    q_NQH: Array, k_KPH: Array, soft_cap: float | None, bias_NQP: Array | None, see_QP: Array | None
) -> _Scores:
    """Args: q: scaled; bias, see: None where there is none, and where all is seen."""
    scores, slope = _grouped("krh,ksh->krs", q_NQH, k_KPH), None
    if soft_cap is not None:
        bent = jnp.tanh(scores / soft_cap)
        scores, slope = soft_cap * bent, 1 - bent * bent
    if bias_NQP is not None:
        scores = scores + bias_NQP
    if see_QP is not None:
        scores = jnp.where(see_QP, scores, -jnp.inf)
    return _Scores(scores, slope)


class _TileGradients(NamedTuple):
    dq_NQH: Array
    dk_KHP: Array
    dv_KHP: Array
    dbias_NQP: Array


def _tile_gradients(
    weights_NQP: Array,
    slope_NQP: Array | None,
    q_NQH: Array,
    k_KPH: Array,
    v_KPH: Array,
    g_NQH: Array,
    delta_NQ1: Array,
) -> _TileGradients:
    """Args: q: scaled; g: of the output; delta: the mean of `g v` under the softmax, less the gradient of lse."""
    K = k_KPH.shape[0]
    ds = dbias = weights_NQP * (_grouped("krh,ksh->krs", g_NQH, v_KPH) - delta_NQ1)
    if slope_NQP is not None:
        ds = ds * slope_NQP
    dq = _grouped("krs,ksh->krh", ds, k_KPH)
    # Keys behind, which is faster than in front: the long side of a product is then its rows' length.
    return _TileGradients(dq, _over_queries(q_NQH, ds, K), _over_queries(g_NQH, weights_NQP, K), dbias)


# ---------------------------------------------------------------------------------------------------------------- bias


def _bands(call: Call, T: int, S: int) -> tuple[Array | None, Callable[[Array], Array] | None]:
    """`[B, N, D]`, what is added to scores by distance alone, and the function from its gradient to the bias's."""
    if call.position_bias is None:
        return None, None
    B, dtype = call.q_BTNH.shape[0], accumulator(call.q_BTNH, call.k_BSKH, call.v_BSKH)
    offset_B1 = jnp.broadcast_to(jnp.reshape(jnp.asarray(call.mask.q_offset), (-1, 1)), (B, 1))
    leaves, tree = jax.tree.flatten(call.position_bias)

    def bands(array: Array) -> Array:
        bias = tree.unflatten([array])
        return jnp.swapaxes(bias.of(offset_B1 + T - 1 - jnp.arange(T + S - 1), 0), 0, 1).astype(dtype)

    value, pull = jax.vjp(bands, leaves[0])
    return value, lambda d_bands: pull(d_bands)[0]


def _from_band(band_ND: Array, Q: int, P: int) -> Array:
    """`[N, Q, P]` with `band[n, Q - 1 - q + p]` at `n, q, p`: rows of one more than D, read as rows of D, shift by one
    each."""
    N, D = band_ND.shape
    rows = jnp.broadcast_to(jnp.pad(band_ND, ((0, 0), (0, 1)))[:, None], (N, Q, D + 1)).reshape(N, -1)
    return rows[:, Q - 1 : Q - 1 + Q * D].reshape(N, Q, D)[:, :, :P]


def _to_band(tile_NQP: Array) -> Array:
    """`[N, D]`, the sums along diagonals: the transpose of `_from_band`."""
    N, Q, P = tile_NQP.shape
    D = Q + P - 1
    rows = jnp.pad(tile_NQP, ((0, 0), (0, 0), (0, D - P))).reshape(N, -1)
    return jnp.pad(rows, ((0, 0), (Q - 1, 1))).reshape(N, Q, D + 1).sum(1)[:, :D]


# ---------------------------------------------------------------------------------------------------------------- rows


class _Row(NamedTuple):
    """One row of a batch: what is an array of it, and its mask, whose arrays are `[1, ...]` or scalars."""

    q_TNH: Array
    k_SKH: Array
    v_SKH: Array
    band_ND: Array | None
    mask: AttentionMask
    schedule: Any = None


def _each_row(function: Callable[..., Any], mask: AttentionMask, arrays: Any, *, together: bool) -> Any:
    """`function(mask, *arrays)` of each row, its results stacked: of all rows at once, or of one after another."""
    leaves, tree = jax.tree.flatten(mask)
    own = [leaf if jnp.ndim(leaf) else None for leaf in leaves]

    def one(row: Any) -> Any:
        arrays, own = row
        parts = [
            leaf if mine is None else mine[None] if mine.ndim else mine for leaf, mine in zip(leaves, own, strict=True)
        ]
        return function(tree.unflatten(parts), *arrays)

    return jax.vmap(one)((arrays, own)) if together else jax.lax.map(one, (arrays, own))


def _heads_first(x_TNH: Array, dtype: Any) -> Array:
    return jnp.swapaxes(x_TNH, 0, 1).astype(dtype)


# --------------------------------------------------------------------------------------------------------------- short


class _Kept(NamedTuple):
    """Of a piece: the weights and the slopes of the soft cap `[B, N, Q, P]`, and one over the sum of weights."""

    weights: Array
    inverse: Array
    slope: Array | None


def _forward_short(call: Call) -> tuple[Array, Array, list[_Kept]]:
    T, S, dtype = call.q_BTNH.shape[1], call.k_BSKH.shape[1], _dtype(call)
    bands, _ = _bands(call, T, S)

    def row(mask: AttentionMask, q_TNH: Array, k_SKH: Array, v_SKH: Array, band_ND: Array | None) -> Any:
        q, k, v = (_heads_first(x, dtype) for x in (q_TNH, k_SKH, v_SKH))
        outs, lses, kept = [], [], []
        for piece in pieces(call.mask, T, S):
            q_piece, k_piece, v_piece = q[:, piece.queries] * call.scale, k[:, piece.keys], v[:, piece.keys]
            scores = _piece_scores(piece, q_piece, k_piece, band_ND, mask, call)
            sums, weights, _ = _Sums.start(q_piece, call.sinks_N).add(scores.scores_NQP, v_piece)
            out, lse = sums.finish()
            outs.append(out)
            lses.append(lse)
            inverse = 1 / jnp.where(sums.total_NQ1 > 0, sums.total_NQ1, 1)
            kept.append(_Kept(weights.astype(q_TNH.dtype), inverse, scores.slope_NQP))
        out, lse = jnp.concatenate(outs, 1), jnp.concatenate(lses, 1)
        return jnp.swapaxes(out, 0, 1).astype(q_TNH.dtype), lse.T, kept

    return _each_row(row, call.mask, (call.q_BTNH, call.k_BSKH, call.v_BSKH, bands), together=True)


def _piece_scores(
    piece: Piece, q_NQH: Array, k_KPH: Array, band_ND: Array | None, mask: AttentionMask, call: Call
) -> _Scores:
    T, Q, P = call.q_BTNH.shape[1], q_NQH.shape[1], k_KPH.shape[1]
    bias = None
    if band_ND is not None:
        first = T - piece.queries.start - Q + piece.keys.start
        bias = _from_band(band_ND[:, first : first + Q + P - 1], Q, P)
    see = None if piece.open else mask.allowed(Q, P, piece.queries.start, piece.keys.start)[0]
    return _scores(q_NQH, k_KPH, call.soft_cap, bias, see)


def _backward_short(call: Call, out: Array, lse: Array, kept: list[_Kept], d_out: Array, d_lse: Array) -> Gradients:
    T, S, dtype = call.q_BTNH.shape[1], call.k_BSKH.shape[1], _dtype(call)
    bands, pull = _bands(call, T, S)
    delta = _delta(call, out, d_out, d_lse)

    def row(
        _: AttentionMask, q_TNH: Array, k_SKH: Array, v_SKH: Array, g_TNH: Array, delta_TN1: Array, kept: Any
    ) -> Any:
        q, k, v, g, delta = (_heads_first(x, dtype) for x in (q_TNH, k_SKH, v_SKH, g_TNH, delta_TN1))
        dq = []
        dk = dv = jnp.zeros_like(jnp.swapaxes(k, 1, 2))
        d_band = None if bands is None else jnp.zeros_like(bands[0])
        for piece, (weights, inverse, slope) in zip(pieces(call.mask, T, S), kept, strict=True):
            at, keys = piece.queries, piece.keys
            grads = _tile_gradients(
                weights.astype(dtype),
                slope,
                q[:, at] * call.scale,
                k[:, keys],
                v[:, keys],
                g[:, at] * inverse,
                delta[:, at] * inverse,
            )
            dq.append(grads.dq_NQH * call.scale)
            dk, dv = dk.at[:, :, keys].add(grads.dk_KHP), dv.at[:, :, keys].add(grads.dv_KHP)
            if d_band is not None:
                first = T - at.stop + keys.start
                band = _to_band(grads.dbias_NQP)
                d_band = d_band.at[:, first : first + band.shape[1]].add(band)
        dk, dv = (jnp.transpose(x, (2, 0, 1)).astype(k_SKH.dtype) for x in (dk, dv))
        return jnp.swapaxes(jnp.concatenate(dq, 1), 0, 1).astype(q_TNH.dtype), dk, dv, d_band

    arrays = call.q_BTNH, call.k_BSKH, call.v_BSKH, d_out, delta, kept
    dq, dk, dv, d_bands = _each_row(row, call.mask, arrays, together=True)
    return Gradients(dq, dk, dv, None if pull is None else pull(d_bands), _d_sinks(call, lse, delta))


def _dtype(call: Call) -> Any:
    return accumulator(call.q_BTNH, call.k_BSKH, call.v_BSKH)


def _delta(call: Call, out: Array, d_out: Array, d_lse: Array) -> Array:
    """`[B, T, N, 1]`: the gradient of a score is its probability times that of the probability less this."""
    product = d_out.astype(_dtype(call)) * out.astype(_dtype(call))
    return product.sum(-1, keepdims=True) - d_lse[..., None]


def _d_sinks(call: Call, lse_BTN: Array, delta_BTN1: Array) -> Array | None:
    """A sink is a score whose value is zero."""
    if call.sinks_N is None:
        return None
    probability = jnp.exp(call.sinks_N.astype(lse_BTN.dtype) - jnp.where(lse_BTN == -jnp.inf, jnp.inf, lse_BTN))
    return -(probability * delta_BTN1[..., 0]).sum((0, 1)).astype(call.sinks_N.dtype)


# ---------------------------------------------------------------------------------------------------------------- long


class _Blocks(NamedTuple):
    """A long call, filled up so that it is whole blocks: of queries `[B, I, Q, ...]`, of keys `[B, J, P, ...]`."""

    q: Array
    k: Array
    v: Array
    bands: Array | None
    counts: Array
    tiles: Array
    mask: AttentionMask
    kinds: Any  # in numpy those that may occur


def _block_sizes(T: int, S: int) -> tuple[int, int]:
    """Q and P: even parts of the length, none larger than what was found to be fast."""

    def part(length: int, most: int) -> int:
        return -(-length // -(-length // most) // 8) * 8

    return part(T, _Q), part(S, _P)


def _fill(x: Array, to: int, value: float = 0) -> Array:
    """`[B, T, ...]` with T up to `to`."""
    return jnp.pad(x, ((0, 0), (0, to - x.shape[1]), *((0, 0),) * (x.ndim - 2)), constant_values=value)


def _in_blocks(x: Array, block: int, value: float = 0) -> Array:
    """`[B, T, ...]` as `[B, I, Q, ...]`."""
    blocks = -(-x.shape[1] // block)
    return _fill(x, blocks * block, value).reshape(x.shape[0], blocks, block, *x.shape[2:])


def _blocks(call: Call) -> _Blocks:
    B, T, S = *call.q_BTNH.shape[:2], call.k_BSKH.shape[1]
    Q, P = _block_sizes(T, S)
    q, k, v = (_in_blocks(x, n) for x, n in ((call.q_BTNH, Q), (call.k_BSKH, P), (call.v_BSKH, P)))
    T_full, S_full = q.shape[1] * Q, k.shape[1] * P
    mask = call.mask
    if S_full > S:
        length = S if mask.kv_length is None else mask.kv_length
        mask = dataclasses.replace(
            mask, kv_length=min(length, S) if isinstance(length, int) else jnp.minimum(length, S)
        )
    if mask.q_segment_ids is not None and mask.kv_segment_ids is not None:
        mask = dataclasses.replace(
            mask,
            q_segment_ids=_fill(mask.q_segment_ids, T_full, -1),
            kv_segment_ids=_fill(mask.kv_segment_ids, S_full, -1),
        )
    kinds = tile_kinds(mask, T_full, S_full, Q, P)
    counts, tiles = (jnp.broadcast_to(x, (B, *x.shape[1:])) for x in live_tiles(kinds))
    occur = np.unique(kinds) if isinstance(kinds, np.ndarray) else np.array([DEAD, PARTIAL, OPEN])
    return _Blocks(q, k, v, _bands(call, T_full, S_full)[0], counts, tiles, mask, occur)


def _visit(blocks: _Blocks, counts_2: Array, tiles_J: Array, tile: Callable[[Any, bool, Any], Any], start: Any) -> Any:
    """`tile(j, masked, carry)` for the live blocks of keys of a block of queries: first those partly open."""

    def step(masked: bool, n: Any, carry: Any) -> Any:
        return tile(tiles_J[n], masked, carry)

    carry = start
    if PARTIAL in blocks.kinds:
        carry = jax.lax.fori_loop(0, counts_2[0], functools.partial(step, True), carry)
    if OPEN in blocks.kinds:
        carry = jax.lax.fori_loop(counts_2[0], counts_2[0] + counts_2[1], functools.partial(step, False), carry)
    return carry


def _long_scores(
    call: Call,
    blocks: _Blocks,
    mask: AttentionMask,
    band_ND: Array | None,
    q_NQH: Array,
    k_KPH: Array,
    at: Any,
    masked: bool,
) -> _Scores:
    """Args: at: which block of queries, which of keys."""
    (i, j), Q, P = at, q_NQH.shape[1], k_KPH.shape[1]
    bias = None
    if band_ND is not None:
        bias = _from_band(jax.lax.dynamic_slice_in_dim(band_ND, _band_start(blocks, i, j), Q + P - 1, 1), Q, P)
    see = mask.allowed(Q, P, i * Q, j * P)[0] if masked else None
    return _scores(q_NQH, k_KPH, call.soft_cap, bias, see)


def _band_start(blocks: _Blocks, i: Any, j: Any) -> Any:
    I, Q = blocks.q.shape[1:3]
    return (I - 1 - i) * Q + j * blocks.k.shape[2]


def _forward_long(call: Call) -> tuple[Array, Array, None]:
    blocks, dtype = _blocks(call), _dtype(call)

    def row(mask: AttentionMask, q: Array, k: Array, v: Array, band: Array | None, counts: Array, tiles: Array) -> Any:
        k, v = (jnp.swapaxes(x, 1, 2).astype(dtype) for x in (k, v))  # [J, K, P, H]

        def block(_: None, x: Any) -> Any:
            i, q_QNH, counts_2, tiles_J = x
            q_NQH = _heads_first(q_QNH, dtype) * call.scale

            def tile(j: Any, masked: bool, sums: _Sums) -> _Sums:
                scores = _long_scores(call, blocks, mask, band, q_NQH, k[j], (i, j), masked)
                return sums.add(scores.scores_NQP, v[j])[0]

            out, lse = _visit(blocks, counts_2, tiles_J, tile, _Sums.start(q_NQH, call.sinks_N)).finish()
            return None, (jnp.swapaxes(out, 0, 1).astype(q.dtype), lse.T)

        return jax.lax.scan(block, None, (jnp.arange(q.shape[0]), q, counts, tiles))[1]

    arrays = blocks.q, blocks.k, blocks.v, blocks.bands, blocks.counts, blocks.tiles
    out, lse = (_whole(x, call.q_BTNH.shape[1]) for x in _each_row(row, blocks.mask, arrays, together=False))
    return out, lse, None


def _whole(x: Array, length: int) -> Array:
    """`[B, I, Q, ...]` as `[B, T, ...]`."""
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]


def _backward_long(call: Call, out: Array, lse: Array, _: None, d_out: Array, d_lse: Array) -> Gradients:
    blocks, dtype = _blocks(call), _dtype(call)
    (T, S), (Q, P) = (call.q_BTNH.shape[1], call.k_BSKH.shape[1]), (blocks.q.shape[2], blocks.k.shape[2])
    delta = _delta(call, out, d_out, d_lse)

    def row(mask: AttentionMask, q: Array, g: Array, lse: Array, delta: Array, k: Array, v: Array, *rest: Any) -> Any:
        band, counts, tiles = rest
        k, v = (jnp.swapaxes(x, 1, 2).astype(dtype) for x in (k, v))  # [J, K, P, H]

        def block(carry: Any, x: Any) -> Any:
            i, q_QNH, g_QNH, lse_QN1, delta_QN1, counts_2, tiles_J = x
            q_NQH, g_NQH, lse_NQ1, delta_NQ1 = (_heads_first(a, dtype) for a in (q_QNH, g_QNH, lse_QN1, delta_QN1))
            q_NQH = q_NQH * call.scale

            def tile(j: Any, masked: bool, carry: Any) -> Any:
                dq, dk, dv, d_band = carry
                scores = _long_scores(call, blocks, mask, band, q_NQH, k[j], (i, j), masked)
                weights = jnp.exp(scores.scores_NQP - lse_NQ1)
                grads = _tile_gradients(weights, scores.slope_NQP, q_NQH, k[j], v[j], g_NQH, delta_NQ1)
                dq, dk, dv = dq + grads.dq_NQH, dk.at[j].add(grads.dk_KHP), dv.at[j].add(grads.dv_KHP)
                if d_band is not None:
                    first, more = _band_start(blocks, i, j), _to_band(grads.dbias_NQP)
                    old = jax.lax.dynamic_slice_in_dim(d_band, first, more.shape[1], 1)
                    d_band = jax.lax.dynamic_update_slice_in_dim(d_band, old + more, first, 1)
                return dq, dk, dv, d_band

            dq, *carry = _visit(blocks, counts_2, tiles_J, tile, (jnp.zeros_like(q_NQH), *carry))
            return tuple(carry), jnp.swapaxes(dq * call.scale, 0, 1).astype(q.dtype)

        zero = jnp.zeros_like(jnp.swapaxes(k, 2, 3))
        start = zero, zero, None if band is None else jnp.zeros_like(band)
        (dk, dv, d_band), dq = jax.lax.scan(block, start, (jnp.arange(q.shape[0]), q, g, lse, delta, counts, tiles))
        dk, dv = (jnp.transpose(x, (0, 3, 1, 2)).astype(call.k_BSKH.dtype) for x in (dk, dv))
        return dq, dk, dv, d_band

    # A query that sees nothing has the lse -inf, and all its probabilities are 0.
    known = jnp.where(lse == -jnp.inf, jnp.inf, lse)[..., None]
    arrays = (
        blocks.q,
        _in_blocks(d_out, Q),
        _in_blocks(known, Q, jnp.inf),
        _in_blocks(delta, Q),
        blocks.k,
        blocks.v,
        blocks.bands,
        blocks.counts,
        blocks.tiles,
    )
    dq, dk, dv, d_bands = _each_row(row, blocks.mask, arrays, together=False)
    pull = _bands(call, blocks.q.shape[1] * Q, blocks.k.shape[1] * P)[1]
    d_bias = None if pull is None else pull(d_bands)
    return Gradients(_whole(dq, T), _whole(dk, S), _whole(dv, S), d_bias, _d_sinks(call, lse, delta))


# ------------------------------------------------------------------------------------------------------------- the two


def _forward(call: Call) -> tuple[Array, Array, Any]:
    return _forward_short(call) if kept_probabilities(call) else _forward_long(call)


def _backward(call: Call, out: Array, lse: Array, kept: Any, d_out: Array, d_lse: Array) -> Gradients:
    backward = _backward_short if kept_probabilities(call) else _backward_long
    return backward(call, out, lse, kept, d_out, d_lse)


IMPLEMENTATION = Implementation("xla", lambda call: None, with_gradient(_forward, _backward))
