"""Attention by cuDNN, through `jax.nn.dot_product_attention`: for the plain masks, on NVIDIA GPUs.

Shapes: B batch, T queries, S keys, N query heads, K key-value heads, H head dim.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lm_jax.kernels.flash_attention.implementation import ATTENDED, Call, Implementation
from lm_jax.sharding import device_kind, platform

Array = jax.Array


def refuses(call: Call) -> str | None:
    """Why cuDNN cannot serve a call, or None."""
    mask, H = call.mask, call.q_BTNH.shape[3]
    if platform() != "gpu" or "NVIDIA" not in device_kind():
        return f"it needs an NVIDIA GPU, and this is {device_kind()}"
    if call.q_BTNH.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it needs bfloat16 or float16, and the queries are {call.q_BTNH.dtype}"
    capability = compute_capability()
    if capability is None or capability < (8, 0):
        found = "unknown" if capability is None else "{}.{}".format(*capability)
        return f"it needs a GPU of compute capability 8.0 or more, and {device_kind()} has {found}"
    most = 256 if capability >= (9, 0) else 128
    if H % 8 or most < H:
        return f"on {device_kind()} it needs a head dim of at most {most} that 8 divides, and it is {H}"
    parts = {
        "segment ids": mask.q_segment_ids is not None,
        "a prefix": mask.prefix_length is not None,
        "a pattern": mask.pattern is not None,
        "an offset of the queries": not isinstance(mask.q_offset, int) or mask.q_offset > 0,
        "lengths a row": not (mask.kv_length is None or isinstance(mask.kv_length, int)),
        "a row without keys": mask.kv_length == 0 if isinstance(mask.kv_length, int) else False,
        "queries without keys": mask.window is not None and call.q_BTNH.shape[1] - mask.window >= _keys(call),
        "a window on both sides": mask.window is not None and not mask.causal,
        "a soft cap": call.soft_cap is not None,
        "a position bias": call.position_bias is not None,
        "sinks": call.sinks_N is not None,
        "the log-sum-exp (cuDNN's is rounded and has no gradient)": call.return_lse,
    }
    wanted = [name for name, asked in parts.items() if asked]
    return f"it has no {', no '.join(wanted)}" if wanted else None


def compute_capability() -> tuple[int, int] | None:
    """Of this process's first GPU, which is where JAX's own checks look; None where there is none that says it."""
    try:
        major, minor = jax.local_devices(backend="gpu")[0].compute_capability.split(".")
    except (RuntimeError, AttributeError):  # no GPU: the mesh only describes one; or not a CUDA device
        return None
    return int(major), int(minor)


def _keys(call: Call) -> int:
    S, length = call.k_BSKH.shape[1], call.mask.kv_length
    return min(S, length) if isinstance(length, int) else S


def attend(call: Call) -> tuple[Array, None]:
    """The output; `refuses` has ruled out calls that want the log-sum-exp."""
    mask = call.mask
    k, v = call.k_BSKH, call.v_BSKH
    if isinstance(mask.kv_length, int):
        k, v = k[:, : mask.kv_length], v[:, : mask.kv_length]
    window = None if mask.window is None else (mask.window - 1, 0)  # theirs counts the keys before the query
    out = jax.nn.dot_product_attention(
        call.q_BTNH,
        k,
        v,
        scale=call.scale,
        is_causal=mask.causal,
        local_window_size=window,
        implementation="cudnn",
    )
    # Its log-sum-exp stays inside of it, so what is kept by name does not spare the backward pass the forward.
    return checkpoint_name(out, ATTENDED), None


IMPLEMENTATION = Implementation("cudnn", refuses, attend)
