"""Attention by our own TPU kernels; on a machine without a TPU they run interpreted, for tests.

Shapes: B batch, T queries, S keys, N query heads, K key-value heads, H head dim.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from lm_jax.kernels.flash_attention import block_sizes, pallas_tpu_backward, pallas_tpu_forward
from lm_jax.kernels.flash_attention.bias import DistanceTable
from lm_jax.kernels.flash_attention.implementation import Call, Gradients, Implementation, with_gradient
from lm_jax.sharding import platform

Array = jax.Array
_MOST_HEAD_DIM = 256


def refuses(call: Call) -> str | None:
    """Why the kernels cannot serve a call, or None."""
    H = call.q_BTNH.shape[3]
    if call.q_BTNH.dtype == jnp.float64:
        return "TPUs have no float64"
    if H > _MOST_HEAD_DIM:
        return f"it has head dims up to {_MOST_HEAD_DIM}, and this is {H}"
    if isinstance(call.position_bias, DistanceTable):
        return "it has no DistanceTable"
    return None


def _forward(call: Call) -> tuple[Array, Array, None]:
    blocks = block_sizes.forward_blocks(call)
    out, lse = pallas_tpu_forward.forward(call, blocks, interpret=platform() != "tpu")
    return out, lse, None


def _backward(call: Call, out: Array, lse: Array, saved: Any, d_out: Array, d_lse: Array) -> Gradients:
    del saved
    blocks = block_sizes.backward_blocks(call)
    return pallas_tpu_backward.backward(call, out, lse, d_out, d_lse, blocks, interpret=platform() != "tpu")


IMPLEMENTATION = Implementation("pallas_tpu", refuses, with_gradient(_forward, _backward), _forward, _backward)
