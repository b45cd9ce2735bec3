"""The arithmetic of a tile of attention, forward and backward, for `xla.py`: plain functions of one row's arrays.

Shapes: B batch, T queries, S keys, N query heads, K key-value heads, G query heads a key head, H head dim; of a tile: Q
queries, P keys; R rows of a product, the queries of a group of heads below each other (G * Q); D distances, of which
entry `T - 1 - t + s` stands for query t and key s.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lm_jax.kernels.flash_attention.implementation import Call, accumulator
from lm_jax.kernels.products import turned

Array = jax.Array


def dtype_of(call: Call) -> Any:
    """Of everything that is computed with."""
    return accumulator(call.q_BTNH, call.k_BSKH, call.v_BSKH)


class Sums(NamedTuple):
    """The softmax over the keys that were seen so far: the highest score, and sums of exponentials relative to it."""

    highest_NQ1: Array
    total_NQ1: Array
    out_NQH: Array

    @classmethod
    def start(cls, q_NQH: Array, sinks_N: Array | None) -> Sums:
        nothing = jnp.zeros_like(q_NQH[..., :1])  # like q, so that in a shard_map it varies over devices as q does
        if sinks_N is None:
            return cls(nothing - jnp.inf, nothing, jnp.zeros_like(q_NQH))
        return cls(nothing + sinks_N[:, None, None].astype(q_NQH.dtype), nothing + 1, jnp.zeros_like(q_NQH))

    def add(self, scores_NQP: Array, v_KHP: Array) -> tuple[Sums, Array]:
        """With further keys; and the weights of these, relative to the highest score there is now."""
        highest = jnp.maximum(self.highest_NQ1, jnp.max(scores_NQP, -1, keepdims=True))
        finite = jnp.where(highest == -jnp.inf, 0, highest)
        weights, shrink = jnp.exp(scores_NQP - finite), jnp.exp(self.highest_NQ1 - finite)
        total = self.total_NQ1 * shrink + jnp.sum(weights, -1, keepdims=True)
        return Sums(highest, total, self.out_NQH * shrink + _over_keys(weights, v_KHP)), weights

    def finish(self) -> tuple[Array, Array, Array]:
        """`out_NQH`, `lse_NQ1` and the inverse of the total; 0, -inf and 1 for a query that has seen nothing."""
        some = self.total_NQ1 != 0  # a NaN stays one
        total = jnp.where(some, self.total_NQ1, 1)
        lse = jnp.where(some, jnp.log(total) + self.highest_NQ1, -jnp.inf)
        return self.out_NQH / total, lse, 1 / total


# The products. A head's numbers stand in front of its keys, and of its queries where the sum is over them (`turned`):
# XLA's products on CPU are then the fastest (54 to 84 GFLOP/s of 29 to 84 that the other orders gave).


def _with_keys(q_NQH: Array, k_KHP: Array) -> Array:
    """`[N, Q, P]`."""
    y = jnp.einsum("krh,khs->krs", q_NQH.reshape(len(k_KHP), -1, q_NQH.shape[2]), k_KHP)
    return y.reshape(*q_NQH.shape[:2], -1)


def _over_keys(weights_NQP: Array, v_KHP: Array) -> Array:
    """`[N, Q, H]`."""
    y = jnp.einsum("krs,khs->krh", weights_NQP.reshape(len(v_KHP), -1, weights_NQP.shape[2]), v_KHP)
    return y.reshape(*weights_NQP.shape[:2], -1)


def _over_queries(q_KHR: Array, weights_NQP: Array) -> Array:
    """`[K, H, P]`."""
    return jnp.einsum("khr,krs->khs", q_KHR, weights_NQP.reshape(len(q_KHR), -1, weights_NQP.shape[2]))


def _by_group(q_NQH: Array, K: int) -> Array:
    """`[K, H, R]`."""
    return turned(q_NQH.reshape(K, -1, q_NQH.shape[2]))


def scores_of(
    q_NQH: Array, k_KHP: Array, soft_cap: float | None, bias_NQP: Array | None, see_QP: Array | None
) -> tuple[Array, Array | None]:
    """The scores of a tile, -inf where a key is not seen, and the derivative of the soft cap at them.

    Args: q is scaled; no bias where there is none, no `see` where all is seen.
    """
    scores, slope = _with_keys(q_NQH, k_KHP), None
    if soft_cap is not None:
        bent = jnp.tanh(scores / soft_cap)
        scores, slope = soft_cap * bent, 1 - bent * bent
    if bias_NQP is not None:
        scores = scores + bias_NQP
    if see_QP is not None:
        scores = jnp.where(see_QP, scores, -jnp.inf)
    return scores, slope


class Side(NamedTuple):
    """What the backward pass reads of a block of queries: q (scaled), the gradient g of its output, and delta, the mean
    of `g v` under the softmax less the gradient of lse."""

    q_NQH: Array
    q_KHR: Array
    g_NQH: Array
    g_KHR: Array
    delta_NQ1: Array

    @classmethod
    def of(cls, q_NQH: Array, g_NQH: Array, delta_NQ1: Array, K: int) -> Side:
        return cls(q_NQH, _by_group(q_NQH, K), g_NQH, _by_group(g_NQH, K), delta_NQ1)


class TileGradients(NamedTuple):
    dq_NQH: Array
    dk_KHP: Array
    dv_KHP: Array
    dbias_NQP: Array


def tile_gradients(
    weights_NQP: Array, slope_NQP: Array | None, side: Side, k_KHP: Array, v_KHP: Array
) -> TileGradients:
    ds = dbias = weights_NQP * (_with_keys(side.g_NQH, v_KHP) - side.delta_NQ1)
    if slope_NQP is not None:
        ds = ds * slope_NQP
    dv = _over_queries(side.g_KHR, weights_NQP)
    return TileGradients(_over_keys(ds, k_KHP), _over_queries(side.q_KHR, ds), dv, dbias)


# ---------------------------------------------------------------------------------------------------------------- bias


def bands_of(call: Call, T: int, S: int) -> tuple[Array | None, Callable[[Array], Array] | None]:
    """`[B, N, D]`, what is added to scores by distance, and the function from its gradient to that of the bias."""
    if call.position_bias is None:
        return None, None
    (array,), tree = jax.tree.flatten(call.position_bias)
    offset_B = jnp.broadcast_to(jnp.asarray(call.mask.q_offset), call.q_BTNH.shape[:1])
    distance_BD = offset_B[:, None] + T - 1 - jnp.arange(T + S - 1)

    def bands(array: Array) -> Array:
        return jnp.swapaxes(jax.tree.unflatten(tree, [array]).of(distance_BD, 0), 0, 1).astype(dtype_of(call))

    value, pull = jax.vjp(bands, array)
    return value, lambda d_bands: pull(d_bands)[0]


def from_band(band_ND: Array, Q: int, P: int) -> Array:
    """`[N, Q, P]` with entry `Q - 1 - q + p` at q, p: rows of D + 1 that are read as rows of D shift by one each."""
    N, D = band_ND.shape
    rows = jnp.broadcast_to(jnp.pad(band_ND, ((0, 0), (0, 1)))[:, None], (N, Q, D + 1)).reshape(N, -1)
    return rows[:, Q - 1 : Q - 1 + Q * D].reshape(N, Q, D)[:, :, :P]


def to_band(tile_NQP: Array) -> Array:
    """`[N, D]`, the sums along diagonals: the transpose of `from_band`."""
    N, Q, P = tile_NQP.shape
    D = Q + P - 1
    rows = jnp.pad(tile_NQP, ((0, 0), (0, 0), (0, D - P))).reshape(N, -1)
    return jnp.pad(rows, ((0, 0), (Q - 1, 1))).reshape(N, Q, D + 1).sum(1)[:, :D]
