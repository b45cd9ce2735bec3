"""Attention by our own kernels for NVIDIA Hopper (sm_90a), in Pallas Mosaic GPU.

They compile for the chip, and their steps were run by Pallas' interpreter; no chip has run them yet. So they are in no
default order (`api.DEFAULTS`) and compute only what names them. docs/attention.md has the commands that check and
measure them on a GPU. FlashAttention-3: Shah et al. 2024, arXiv:2407.08608.

The kernels are loaded by the first call that names them: Mosaic GPU takes a while to load, and everyone would wait.

Shapes: B batch, T queries, S keys, N query heads, K key-value heads, H head dim.
"""

from __future__ import annotations

import functools
import importlib.metadata
import re
from typing import Any

import jax
import jax.numpy as jnp

from lm_jax.kernels.flash_attention import block_sizes
from lm_jax.kernels.flash_attention.implementation import Call, Gradients, Implementation, with_gradient
from lm_jax.sharding import device_kind, platform

Array = jax.Array
HEAD_DIMS = (64, 128)
_HOPPER = {"H100", "H200", "H800", "H20", "GH200"}
# Of NVIDIA's assembler; between them it miscompiles causal kernels (a fault known to Pallas' own kernels).
_FAULTY, _MENDED = (12, 8, 0), (12, 9, 1)


def refuses(call: Call) -> str | None:
    """Why the kernels cannot serve a call, or None."""
    if platform() not in ("gpu", "cuda") or not _HOPPER & set(re.split(r"\W+", device_kind())):
        return f"it needs an NVIDIA Hopper GPU (H100, H200), and this is {device_kind()}"
    version = _assembler()
    if version is not None and _FAULTY <= version < _MENDED:
        return f"CUDA {'.'.join(map(str, version))} miscompiles it: install nvidia-cuda-nvcc-cu12 12.9.1 or newer"
    return cannot(call)


def cannot(call: Call) -> str | None:
    """What of a call the kernels have no part for, on any chip, or None."""
    H, dtype = call.q_BTNH.shape[3], call.q_BTNH.dtype
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"it needs bfloat16 or float16, and the queries are {dtype}"
    if H not in HEAD_DIMS:
        return f"it has head dims {' and '.join(map(str, HEAD_DIMS))}, and this is {H}"
    if call.scale <= 0:
        return f"it needs a scale above 0, and this is {call.scale}"
    parts = {
        "pattern": call.mask.pattern is not None,
        "soft cap": call.soft_cap is not None,
        "position bias": call.position_bias is not None,
    }
    wanted = [name for name, asked in parts.items() if asked]
    return f"it has no {', no '.join(wanted)}" if wanted else None


def _assembler() -> tuple[int, ...] | None:
    """The version of NVIDIA's assembler that came with JAX, None where it came another way."""
    try:
        found = importlib.metadata.version("nvidia-cuda-nvcc-cu12")
    except importlib.metadata.PackageNotFoundError:
        return None
    return tuple(int(n) for n in re.findall(r"\d+", found)[:3])


def forward(call: Call, interpret: Any = None) -> tuple[Array, Array, None]:
    """`out`, `lse` and nothing saved; `interpret` as in `pallas_gpu_forward.forward`."""
    from lm_jax.kernels.flash_attention import pallas_gpu_forward

    out, lse = pallas_gpu_forward.forward(call, block_sizes.gpu_blocks(call), interpret=interpret)
    if call.sinks_N is None:
        return out, lse, None
    # A sink is one more part of the softmax, whose values are zeros.
    with_sink = jnp.logaddexp(lse, call.sinks_N.astype(jnp.float32))
    share = jnp.where(lse == -jnp.inf, 0.0, jnp.exp(lse - with_sink))
    return (out * share[..., None]).astype(out.dtype), with_sink, None


def backward(
    call: Call,
    out: Array,
    lse: Array,
    saved: Any,
    d_out: Array,
    d_lse: Array,
    *,
    deterministic: bool = False,
    interpret: Any = None,
) -> Gradients:
    """The gradients by one kernel, or by two that give the same bits in every run; the other arguments as
    `implementation.with_gradient` gives them."""
    from lm_jax.kernels.flash_attention import pallas_gpu_backward

    del saved
    delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), -1) - d_lse.astype(jnp.float32)
    blocks = block_sizes.gpu_blocks(call)
    d_out = d_out.astype(call.q_BTNH.dtype)
    grads = pallas_gpu_backward.backward(
        call, lse, delta, d_out, blocks, deterministic=deterministic, interpret=interpret
    )
    if call.sinks_N is None:
        return Gradients(*grads)
    share = jnp.where(lse == -jnp.inf, 0.0, jnp.exp(call.sinks_N.astype(jnp.float32) - lse))
    return Gradients(*grads, sinks_N=-jnp.sum(share * delta, (0, 1)).astype(call.sinks_N.dtype))


def _implementation(name: str, deterministic: bool) -> Implementation:
    back = functools.partial(backward, deterministic=deterministic)
    return Implementation(name, refuses, with_gradient(forward, back), forward, back)


IMPLEMENTATION = _implementation("pallas_gpu", deterministic=False)
DETERMINISTIC = _implementation("pallas_gpu_deterministic", deterministic=True)
