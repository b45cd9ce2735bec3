"""How often each loop of the TPU kernels runs for a mask: what `tpu_cycles` multiplies their bodies with.

The loops are listed in the order of the kernels' text; a loop that would run once is none, the compiler's text has its
body in line. Batch 1.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from lm_jax.kernels.flash_attention import pallas_tpu_backward, pallas_tpu_forward
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
    shape = jnp.zeros((1, T, N, 128), jnp.bfloat16)
    plan = kernel._plan(Call(shape, shape, shape, mask, 1.0), b)
    per = b.q // b.q_chunk, b.kv // b.kv_chunk
    lists = two_lists(mask, T, T, (b.q_chunk, b.kv_chunk), (plan.q_part, plan.kv_part), per, kernel._FEW_STEPS)
    work = np.asarray(lists)[0, :, :, 0]
    parts, chunks = work[..., 0], work[..., 1]
    pieces = b.q // int(np.gcd(b.q, kernel._PIECE))
    starts = N * plan.q_steps * pieces
    loops = []
    area = {"masked": plan.q_part * plan.kv_part, "open": b.q_chunk * b.kv_chunk}
    for (name, size), n in zip(area.items(), (parts, chunks), strict=True):
        if b.q * b.kv // size >= kernel._STEPS:
            loops.append((name, N * int((n // kernel._STEPS).sum())))
        few = kernel._FEW_PARTS if name == "masked" else kernel._FEW_STEPS
        loops.append((f"few {name}", N * int((-(-(n % kernel._STEPS) // few)).sum())))
    if pieces > 1:
        loops.append(("finish", starts))
    return Trips(loops, N * parts.size, {name: (name, kernel._STEPS * size / 2**20) for name, size in area.items()})


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
        *([("start ids", pieces(b.q), per_keys if plan.q_steps == 1 else per_queries)] if plan.parts.segments else []),
        ("single", 0, N * int((parts % b.steps).sum())),
        ("masked", 0, N * int((parts // b.steps).sum())),
        ("open", 0, N * int((chunks // b.steps).sum())),
        ("finish queries", pieces(b.q), per_queries),
        ("finish keys", pieces(b.kv), per_keys),
    ]
    kept = [(name, times * max(n, 1)) for name, n, times in loops if n != 1]
    area = {"open": b.q_chunk * b.kv_chunk, "masked": plan.q_part * plan.kv_part}
    return Trips(kept, per_queries, {name: (name, b.steps * a / 2**20) for name, a in area.items()})
