"""Attention as its formula says, with all scores in memory: the oracle of the tests.

Shapes: B batch, T queries, S keys, N query heads, K key-value heads, G query heads a key head, H head dim.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lm_jax.kernels.flash_attention.implementation import (
    ATTENDED,
    Call,
    Gradients,
    Implementation,
    Operands,
    accumulator,
    split,
)

Array = jax.Array


def attend(call: Call) -> tuple[Array, Array]:
    """Scores, mask, softmax, values; everything in float32 (float64 where the arguments are), gradients traced."""
    dtype = accumulator(call.q_BTNH, call.k_BSKH, call.v_BSKH)
    (B, T, N, H), S = call.q_BTNH.shape, call.k_BSKH.shape[1]
    q = call.q_BTNH.astype(dtype).reshape(B, T, N // call.group, call.group, H)
    k, v = call.k_BSKH.astype(dtype), call.v_BSKH.astype(dtype)
    exact = jax.lax.Precision.HIGHEST
    scores = jnp.einsum("btkgh,bskh->bkgts", q, k, precision=exact).reshape(B, N, T, S) * call.scale
    if call.soft_cap is not None:
        scores = call.soft_cap * jnp.tanh(scores / call.soft_cap)
    if call.position_bias is not None:
        scores = scores + _bias_BNTS(call, T, S)
    see = call.mask.allowed(T, S)[:, None]
    # The masked score is a number, so that its gradient is zero and not NaN; a sum over no keys is 0.
    scores = jnp.where(see, scores, 0)
    highest = jnp.max(jnp.where(see, scores, -jnp.inf), -1, keepdims=True)
    if call.sinks_N is not None:
        sinks = call.sinks_N.astype(dtype)[:, None, None]
        highest = jnp.maximum(highest, sinks)
    highest = jax.lax.stop_gradient(jnp.where(highest == -jnp.inf, 0, highest))
    weights = jnp.where(see, jnp.exp(scores - highest), 0)
    total = weights.sum(-1, keepdims=True)
    if call.sinks_N is not None:
        total = total + jnp.exp(sinks - highest)
    some = total != 0  # a NaN stays one
    inside = jnp.where(some, total, 1)
    probabilities = (weights / inside).reshape(B, N // call.group, call.group, T, S)
    out = jnp.einsum("bkgts,bskh->btkgh", probabilities, v, precision=exact).reshape(B, T, N, H)
    lse = jnp.where(some, jnp.log(inside) + highest, -jnp.inf)[..., 0]
    return checkpoint_name(out.astype(call.q_BTNH.dtype), ATTENDED), jnp.swapaxes(lse, 1, 2)


def _bias_BNTS(call: Call, T: int, S: int) -> Array:
    assert call.position_bias is not None
    q_BT = jnp.reshape(jnp.asarray(call.mask.q_offset), (-1, 1)) + jnp.arange(T)
    return jnp.swapaxes(call.position_bias.of(q_BT[:, :, None], jnp.arange(S)), 0, 1)


def _forward(call: Call) -> tuple[Array, Array, None]:
    return *attend(call), None


def _backward(call: Call, out: Array, lse: Array, _: None, d_out: Array, d_lse: Array) -> Gradients:
    """Of a whole that these keys are a part of: `out = sum_i w_i out_i` over its parts, `w_i = exp(lse_i - lse)`."""
    statics, operands = split(call)

    def part(*moving: Any) -> tuple[Array, Array]:
        return attend(statics.join(Operands._make((*moving, operands.mask))))

    (out_i, lse_i), pull = jax.vjp(part, *operands[:-1])
    weight = jnp.where(lse == -jnp.inf, 0, jnp.exp(lse_i - jnp.where(lse == -jnp.inf, 0, lse)))
    of_out, dtype = weight[..., None] * d_out, lse.dtype
    moved = (d_out.astype(dtype) * (out_i.astype(dtype) - out.astype(dtype))).sum(-1)
    return Gradients(*pull((of_out.astype(out_i.dtype), weight * (moved + d_lse))))


IMPLEMENTATION = Implementation("reference", lambda call: None, attend, _forward, _backward)
