"""How the kernels cut their work: a table by chip, head dim and dtype, each row with what chose it.

`python -m benchmarks.attention --tune` makes rows for TPUs.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax.numpy as jnp
from absl import logging

from lm_jax.kernels.flash_attention.implementation import Call
from lm_jax.kernels.flash_attention.pallas_gpu_tiles import GpuBlocks
from lm_jax.kernels.flash_attention.pallas_tpu_backward import BackwardBlocks
from lm_jax.kernels.flash_attention.pallas_tpu_forward import ForwardBlocks
from lm_jax.sharding import device_kind


class Row(NamedTuple):
    """One line of the table.

    Attributes:
      chip: as JAX names it (`device_kind`).
      head_dim: up to which the row was tuned.
      dtype: what the matrix unit multiplies, `bfloat16` or `float32`.
      forward, backward: the blocks.
      measured: what chose them.
    """

    chip: str
    head_dim: int
    dtype: str
    forward: ForwardBlocks
    backward: BackwardBlocks
    measured: str


def _forward(block: int, chunk: int, sums_on_mxu: bool) -> ForwardBlocks:
    return ForwardBlocks(block, block, chunk, chunk, sums_on_mxu)


def _backward(q: int, kv: int, chunk: int, steps: int, transpose_ahead: bool) -> BackwardBlocks:
    return BackwardBlocks(q, kv, chunk, chunk, 256, steps, transpose_ahead)


# Counted: `python -m benchmarks.tpu_cycles` with libtpu 0.0.51 under jax 0.10.2; bundles (v5: or cycles of the matrix
# unit, where they are more) for an open tile of 1024 x 1024 scores, forward and backward; in thousands the kernel of
# a causal row of 8,192 positions, 8 heads on 2. None was timed on a chip yet.
TABLE = (
    Row(
        "TPU v6 lite", 128, "bfloat16", _forward(8192, 512, True), _backward(8192, 8192, 512, 8, False), "1782 and 3929"
    ),
    Row(
        "TPU v5 lite",
        128,
        "bfloat16",
        _forward(8192, 512, False),
        _backward(8192, 8192, 512, 8, True),
        "4096 and 10240",
    ),
    # Half the fast memory: backward, blocks of 8192 x 8192 and segment ids take 63 MiB of its 64. With blocks of 4096
    # 1183k and 2922k (v5p), 538k and 1095k (TPU7x): a start more, and gradients of queries in parts.
    Row(
        "TPU v5",
        128,
        "bfloat16",
        _forward(8192, 512, False),
        _backward(4096, 8192, 512, 8, True),
        "4096 and 10240; 1122k and 2813k",
    ),
    Row(
        "TPU7x",
        128,
        "bfloat16",
        _forward(8192, 512, True),
        _backward(4096, 8192, 512, 8, False),
        "1749 and 3566; 492k and 1037k",
    ),
    # With blocks of 4096 700k and 1593k (v6e), 2325k and 5770k (v5e).
    Row(
        "TPU v6 lite",
        256,
        "bfloat16",
        _forward(8192, 512, True),
        _backward(4096, 8192, 512, 8, False),
        "2257 and 5248; 639k and 1507k",
    ),
    Row(
        "TPU v5 lite",
        256,
        "bfloat16",
        _forward(8192, 512, False),
        _backward(4096, 8192, 512, 8, True),
        "8192 and 20480; 2220k and 5593k",
    ),
    Row("TPU v5", 256, "bfloat16", _forward(2048, 512, False), _backward(2048, 2048, 512, 8, True), "it fits"),
    Row("TPU7x", 256, "bfloat16", _forward(2048, 512, True), _backward(2048, 2048, 512, 8, False), "it fits"),
    # In float32 a product is six passes, and long bodies take minutes to compile (512 x 8: 219 s).
    Row(
        "TPU v6 lite",
        256,
        "float32",
        _forward(2048, 256, True),
        _backward(2048, 2048, 256, 2, False),
        "time to compile",
    ),
    Row(
        "TPU v5 lite",
        256,
        "float32",
        _forward(2048, 256, False),
        _backward(2048, 2048, 256, 2, True),
        "time to compile",
    ),
    Row("TPU v5", 256, "float32", _forward(1024, 256, False), _backward(1024, 1024, 256, 2, True), "time to compile"),
    Row("TPU7x", 256, "float32", _forward(1024, 256, True), _backward(1024, 1024, 256, 2, False), "time to compile"),
    # Interpreted, for tests: so small that short rows have chunks and blocks of every kind.
    Row(
        "cpu",
        128,
        "float32",
        ForwardBlocks(256, 256, 128, 128, sums_on_mxu=True),
        BackwardBlocks(256, 256, 128, 128, 128, 2, False),
        "nothing",
    ),
)


def forward_blocks(call: Call) -> ForwardBlocks:
    """The blocks of the forward kernel for a call, on the chip of the current mesh."""
    return _row(call).forward


def backward_blocks(call: Call) -> BackwardBlocks:
    """The blocks of the backward kernel for a call, on the chip of the current mesh."""
    return _row(call).backward


def _row(call: Call) -> Row:
    narrow = call.q_BTNH.dtype == jnp.bfloat16
    return row(device_kind(), call.q_BTNH.shape[3], "bfloat16" if narrow else "float32")


@functools.cache
def row(chip: str, head_dim: int, dtype: str) -> Row:
    """The row of that chip that fits best: of its dtype, for heads at least as wide, and of those the narrowest. For a
    chip without any, the nearest row of another chip, with one warning."""
    rows = [r for r in TABLE if r.chip == chip]
    if not rows:
        rows = [r for r in TABLE if r.chip != "cpu"]

    def distance(r: Row) -> tuple[bool, bool, int]:
        return r.dtype != dtype, r.head_dim < head_dim, abs(r.head_dim - head_dim)

    best = min(rows, key=distance)
    if best.chip != chip:
        logging.warning(
            "Attention has no tuned block sizes for %s: it uses those of %s, head dim %d, %s. "
            "`python -m benchmarks.attention --tune` finds its own.",
            chip,
            best.chip,
            best.head_dim,
            best.dtype,
        )
    return best


class GpuRow(NamedTuple):
    """One line of the table of GPUs.

    Attributes:
      chip: as JAX names it (`device_kind`).
      head_dim: of the row.
      segments: whether it is for masks with segment ids, which cost registers.
      blocks: the cut.
      measured: what chose it.
    """

    chip: str
    head_dim: int
    segments: bool
    blocks: GpuBlocks
    measured: str


# None was timed yet: these are the largest tiles of a few tried that the assembler compiles without spilling registers
# and that leave two stages in shared memory (`tests/aot/test_gpu_attention.py` holds them to it).
_UNTIMED = "not measured: it compiles without spills"
GPU_TABLE = (
    GpuRow("NVIDIA H200", 64, False, GpuBlocks(128, 2, 64, 2, 64, 2, 128, 2, True), _UNTIMED),
    GpuRow("NVIDIA H200", 64, True, GpuBlocks(128, 2, 64, 2, 64, 2, 128, 2, True), _UNTIMED),
    GpuRow("NVIDIA H200", 128, False, GpuBlocks(128, 2, 64, 2, 64, 2, 64, 2, False), _UNTIMED),
    GpuRow("NVIDIA H200", 128, True, GpuBlocks(64, 3, 64, 2, 64, 2, 64, 2, False), _UNTIMED),
)


def gpu_blocks(call: Call) -> GpuBlocks:
    """The cut of the Hopper kernels for a call; all Hopper chips share the H200's rows, as they share its
    multiprocessor."""
    wanted = call.q_BTNH.shape[3], call.mask.q_segment_ids is not None
    return next(r.blocks for r in GPU_TABLE if (r.head_dim, r.segments) == wanted)
