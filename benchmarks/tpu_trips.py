"""How often each loop of the TPU kernels runs for a mask: what `tpu_cycles` multiplies their bodies with.

The loops are listed in the order of the kernels' text; a loop that would run once is none, the compiler's text has its
body in line. Batch 1.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from lm_jax.kernels.flash_attention import pallas_tpu_backward, pallas_tpu_forward
from lm_jax.kernels.flash_attention import pallas_tpu_mask as masks
from lm_jax.kernels.flash_attention.implementation import Call
from lm_jax.kernels.flash_attention.mask import AttentionMask
from lm_jax.kernels.flash_attention.pallas_tpu_work import two_lists


class Trips(NamedTuple):
    """Attributes:
    loops: name and trips of each loop inside the grid.
    grid_steps: how often the code between them runs.
    tiles: by `open` and `masked`, the loop that computes such chunks, and how many tiles of 1024 x 1024 one trip is.
    """

    loops: list[tuple[str, int]]
    grid_steps: int
    tiles: dict[str, tuple[str, float]]


def of_forward(mask: AttentionMask, blocks: Any, T: int, N: int, K: int) -> Trips:
    del K
    kernel = pallas_tpu_forward
    b = kernel._fit(blocks, T, T)
    i, j = b.q // b.q_chunk, b.kv // b.kv_chunk
    work = np.asarray(masks.work_lists(mask, T, T, (b.q_chunk, b.kv_chunk), (i, j)))[0, :, :, 0]
    partial, opened = work[..., 0], work[..., 1]
    masked = partial + opened % kernel._OPEN_STEPS
    starts = N * work.shape[0] * i
    loops = [("start", starts)] if i > 1 else []
    loops.append(("single", N * int((masked % 2).sum())))
    if i * j >= 2:
        loops.append(("pair", N * int((masked % kernel._MASKED_STEPS // 2).sum())))
    if i * j >= kernel._MASKED_STEPS:
        loops.append(("masked", N * int((masked // kernel._MASKED_STEPS).sum())))
    if i * j >= kernel._OPEN_STEPS:
        loops.append(("open", N * int((opened // kernel._OPEN_STEPS).sum())))
    if i > 2:
        loops.append(("finish", starts // 2))
    area = b.q_chunk * b.kv_chunk / 2**20
    tiles = {"open": ("open", area * kernel._OPEN_STEPS), "masked": ("masked", area * kernel._MASKED_STEPS)}
    return Trips(loops, N * partial.size, tiles)


def of_backward(mask: AttentionMask, blocks: Any, T: int, N: int, K: int) -> Trips:
    kernel = pallas_tpu_backward
    shape = jnp.zeros((1, T, N, 128), jnp.bfloat16), jnp.zeros((1, T, K, 128), jnp.bfloat16)
    plan = kernel._plan(Call(shape[0], shape[1], shape[1], mask, 1.0), blocks)
    b = plan.blocks
    per = b.q // b.q_chunk, b.kv // b.kv_chunk
    lists = two_lists(mask, T, T, (b.q_chunk, b.kv_chunk), (plan.q_part, plan.kv_part), per, b.steps)
    work = np.asarray(lists)[0, :, :, 0]
    parts, chunks = work[..., 0], work[..., 1]
    per_queries, per_keys = N * plan.q_steps * plan.kv_steps, K * plan.kv_steps

    def pieces(length: int) -> int:
        return length // int(np.gcd(length, kernel._PIECE))

    loops = [
        ("start keys", pieces(b.kv), per_keys),
        ("start queries", pieces(b.q), per_queries),
        ("single", 0, N * int((parts % b.steps).sum())),
        ("masked", 0, N * int((parts // b.steps).sum())),
        ("open", 0, N * int((chunks // b.steps).sum())),
        ("finish queries", pieces(b.q), per_queries),
        ("finish keys", pieces(b.kv), per_keys),
    ]
    kept = [(name, times * max(n, 1)) for name, n, times in loops if n != 1]
    area = {"open": b.q_chunk * b.kv_chunk, "masked": plan.q_part * plan.kv_part}
    return Trips(kept, per_queries, {name: (name, b.steps * a / 2**20) for name, a in area.items()})
