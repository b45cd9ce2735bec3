"""What a device's memory holds that the model's own arrays do not tell: how kernels want them laid out, what a ring
adds to them, and what a TPU's fast memory takes instead. Parts of `costs.memory`, each for a reason that plans of the
compiler show (docs/preflight.md, "What fits where", has how near the sums come).

Shapes: T length, H head dim.
"""

from __future__ import annotations

import math

import numpy as np
from jax.sharding import AbstractMesh

from lm_jax.kernels.flash_attention.pallas_tpu_mask import LANES, VMEM_BYTES
from lm_jax.models.transformer import TransformerConfig

# Bytes of a chip's fast memory (VMEM), by how its kind begins; the others have less than a kernel may take.
_VMEM = {"TPU v5 lite": 2**27, "TPU v5e": 2**27, "TPU v6": 2**27}


def rows_of(mesh: AbstractMesh, shape: tuple[int, int]) -> int:
    """Tokens of a device, of so many rows of a length."""
    return math.prod(shape) // math.prod(mesh.shape[axis] for axis in ("data", "fsdp", "sequence"))


def laid_out(c: TransformerConfig, mesh: AbstractMesh, shape: tuple[int, int]) -> tuple[int, int]:
    """Bytes on a device of what attention's backward pass is handed and gives (queries and output, keys and values, and
    the gradients of all): in whole lanes and blocks, as a TPU's kernels have `[.., T, H]`; and as they are."""
    heads = 4 * (c.heads + (c.kv_heads or c.heads)) // mesh.shape["tensor"]
    plain = rows_of(mesh, shape) * heads * c.head_size * np.dtype(c.compute_dtype).itemsize
    length, lanes = (n + -n % LANES for n in (shape[1], c.head_size))
    return plain * length * lanes // (shape[1] * c.head_size), plain


def ring(c: TransformerConfig, mesh: AbstractMesh, shape: tuple[int, int]) -> int:
    """Bytes on a device that a ring (`kernels/flash_attention/ring.py`) holds in its backward pass beside attention's
    operands: the sums of all gradients, in float32; the keys and values that are here, and the sums of theirs that
    arrive; of what a kernel is handed and gives, a half, since it computes one chunk of two at a time."""
    if mesh.shape["sequence"] == 1:
        return 0
    rows, item = rows_of(mesh, shape), np.dtype(c.compute_dtype).itemsize
    q, kv = (rows * n * c.head_size // mesh.shape["tensor"] for n in (c.heads, c.kv_heads or c.heads))
    return 4 * (q + 2 * kv) + (item + 4) * 2 * kv + item * 4 * (q + kv) // 2


def without_fast(need: dict[str, int], mesh: AbstractMesh, logits: int, *, scanned: bool) -> dict[str, int]:
    """`need` without what lies in fast memory instead, which decides for small models alone.

    A kernel of attention may take `VMEM_BYTES` of it; what is left holds arrays over its time: what a layer works with
    first, then gradients, and where no loop stacks it what is kept.

    Args:
      need: bytes by what they hold, as of `costs.memory`.
      mesh: with its device.
      logits: bytes of `working` that are one array.
      scanned: whether the layers are a loop.
    """
    kind = mesh.abstract_device.device_kind if mesh.abstract_device else ""
    room = max(0, next((size for name, size in _VMEM.items() if kind.startswith(name)), 0) - VMEM_BYTES)
    left = dict(need)
    stays = logits if logits > room else 0
    for name in ("working", "gradients", *(() if scanned else ("activations",))):
        there = min(room, left[name] - (stays if name == "working" else 0))
        left[name] -= there
        room -= there
    return left
