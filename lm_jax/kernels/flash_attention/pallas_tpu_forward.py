"""The forward pass of attention on TPU, one Pallas kernel.

Scores are kept as keys x queries (`S^T = K Q^T`), the output as `O^T = V^T P^T`, so that the probabilities are pushed
into the matrix unit as its weights and fill it. A grid step has a block of queries and one of keys in VMEM and works
through a list of the live chunks in it, in any order, with exact online softmax (Milakov and Gimelshein 2018,
arXiv:1805.02867; Dao 2023, arXiv:2307.08691): the state of every chunk of queries stays in VMEM. The scores of a chunk
are computed while the softmax of the chunk before runs, and pass through VMEM; their maximum is taken as they leave the
matrix unit.

Shapes: B batch, T queries, S keys, N query heads, K key-value heads, H head dim; inside the kernel q queries and k keys
of a chunk, i chunks of queries in a block.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lm_jax.kernels.flash_attention import pallas_tpu_mask as masks
from lm_jax.kernels.flash_attention.bias import Slopes
from lm_jax.kernels.flash_attention.implementation import Call
from lm_jax.kernels.flash_attention.pallas_tpu_mask import LANES, LOG2E

Array = jax.Array
_LOWEST = -1e38  # where the maximum starts: finite, so that `-inf` less it is `-inf`
# Chunks in the body of the loop over open chunks: a body fills and drains the matrix unit once, some 220 bundles (v6e,
# head dim 128, a tile of 1024 x 1024: 1,836 bundles in bodies of 8 chunks, 1,781 in bodies of 16).
_OPEN_STEPS = 16
_MASKED_STEPS = 8  # and over those that are masked


@dataclasses.dataclass(frozen=True)
class ForwardBlocks:
    """How the work is cut, in queries and keys.

    Attributes:
      q, kv: what one step of the grid holds in VMEM, at most.
      q_chunk, kv_chunk: what is computed at once; multiples of 128.
      sums_on_mxu: whether the matrix unit adds up the rows of probabilities (it has room for it on v6e), or the lanes.
    """

    q: int
    kv: int
    q_chunk: int
    kv_chunk: int
    sums_on_mxu: bool


class _Plan(NamedTuple):
    """What the kernel knows when it is traced."""

    parts: masks.Parts
    group: int
    q_chunks: int  # in a block
    kv_steps: int  # of the grid
    most_chunks: int  # that a step of the grid can have to compute
    blocks: ForwardBlocks
    query_factor: float
    soft_cap: float | None
    slopes: bool
    sinks: bool
    dtype: Any


class _Refs(NamedTuple):
    """The kernel's operands and scratch."""

    scalars: Any
    slopes: Any
    sinks: Any
    work: Any
    q: Any
    k: Any
    v: Any
    ids: tuple[Any, ...]
    out: Any
    lse: Any
    highest: Any  # [i, 1, q]: the maximum so far, as far as scores are computed
    sums: Any  # [i, 8, q]: of the probabilities, where lanes add them up
    total: Any  # [i, H (+ sums), q]: of probabilities times values
    scores: Any  # [2, k, q]
    shift: Any  # [2, 1, q]: the maximum to take from these scores
    shrink: Any  # [2, 1, q]: what the sums before them shrink by
    low: Any  # [2, 1, q]: the first key that a query sees
    high: Any  # [2, 1, q]: the end of those it sees, see `Bounds`
    k_at: Any  # [k, 128]: the positions of a chunk's keys, from 0


def forward(call: Call, blocks: ForwardBlocks, *, interpret: bool) -> tuple[Array, Array]:
    """Attention and the logarithm of its sums.

    Three bf16 arrays are multiplied in bf16; anything else in float32 at the highest precision (float16 too, which the
    matrix unit does not know).

    Args:
      call: its bias is `Slopes` or None.
      blocks: cut to the lengths of the call, which need not be multiples of anything.
      interpret: run on any machine, slowly.

    Returns:
      `[B, T, N, H]` in the dtype of the queries and `[B, T, N]` float32, `-inf` where a query sees nothing.
    """
    (B, T, N, H), S = call.q_BTNH.shape, call.k_BSKH.shape[1]
    blocks = _fit(blocks, T, S)
    plan = _plan(call, blocks)
    q = jnp.swapaxes((call.q_BTNH.astype(jnp.float32) * plan.query_factor).astype(plan.dtype), 1, 2)
    k = jnp.swapaxes(call.k_BSKH.astype(plan.dtype), 1, 2)
    fill = -S % blocks.kv_chunk
    v = jnp.pad(jnp.transpose(call.v_BSKH.astype(plan.dtype), (0, 2, 1, 3)), ((0, 0), (0, 0), (0, fill), (0, 0)))
    work = masks.work_lists(
        call.mask, T, S, (blocks.q_chunk, blocks.kv_chunk), (plan.q_chunks, blocks.kv // blocks.kv_chunk)
    )
    work = jnp.asarray(work)
    grid = (B, N, work.shape[1], plan.kv_steps)
    ids = masks.segment_rows(call.mask, grid[2] * blocks.q, grid[3] * blocks.kv)
    slopes = call.position_bias.slopes_N if isinstance(call.position_bias, Slopes) else jnp.zeros((1,))
    sinks = jnp.zeros((1,)) if call.sinks_N is None else call.sinks_N
    out, lse = pl.pallas_call(
        functools.partial(_kernel, plan=plan),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=grid,
            in_specs=_in_specs(plan, H, work.shape),
            out_specs=[
                pl.BlockSpec((None, None, blocks.q, H), lambda b, n, i, j, *_: (b, n, i, 0)),
                pl.BlockSpec((None, None, 1, blocks.q), lambda b, n, i, j, *_: (b, n, 0, i)),
            ],
            scratch_shapes=_scratch(plan, H),
        ),
        out_shape=[_shape(q.shape, call.q_BTNH.dtype, q), _shape((B, N, 1, T), jnp.float32, q)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=100 * 2**20,
        ),
        interpret=pltpu.InterpretParams() if interpret else False,
        name="flash_attention_forward",
    )(masks.scalars_B3(call.mask, B, S), slopes.astype(jnp.float32), sinks.astype(jnp.float32), work, q, k, v, *ids)
    return jnp.swapaxes(out, 1, 2), jnp.swapaxes(lse[:, :, 0], 1, 2)


def _fit(blocks: ForwardBlocks, T: int, S: int) -> ForwardBlocks:
    """Chunks no longer than the lengths need, and blocks of whole chunks that share a length evenly."""
    q_chunk, kv_chunk = min(blocks.q_chunk, _up(T, LANES)), min(blocks.kv_chunk, _up(S, LANES))
    q = _up(pl.cdiv(T, pl.cdiv(T, max(blocks.q, q_chunk))), q_chunk)
    kv = _up(pl.cdiv(S, pl.cdiv(S, max(blocks.kv, kv_chunk))), kv_chunk)
    return ForwardBlocks(q, kv, q_chunk, kv_chunk, blocks.sums_on_mxu)


def _up(n: int, multiple: int) -> int:
    return n + -n % multiple


def _plan(call: Call, blocks: ForwardBlocks) -> _Plan:
    S = call.k_BSKH.shape[1]
    narrow = all(a.dtype == jnp.bfloat16 for a in (call.q_BTNH, call.k_BSKH, call.v_BSKH))
    return _Plan(
        parts=masks.parts_of(call.mask, padded=S % blocks.kv_chunk != 0),
        group=call.group,
        q_chunks=blocks.q // blocks.q_chunk,
        kv_steps=pl.cdiv(S, blocks.kv),
        most_chunks=(blocks.q // blocks.q_chunk) * (blocks.kv // blocks.kv_chunk),
        blocks=blocks,
        query_factor=call.scale * LOG2E if call.soft_cap is None else call.scale / call.soft_cap,
        soft_cap=call.soft_cap,
        slopes=call.position_bias is not None,
        sinks=call.sinks_N is not None,
        dtype=jnp.bfloat16 if narrow else jnp.float32,
    )


def _in_specs(plan: _Plan, H: int, work_shape: tuple[int, ...]) -> list[pl.BlockSpec]:
    blocks, group = plan.blocks, plan.group
    own = work_shape[0] > 1  # each row of the batch has a list
    specs = [
        pl.BlockSpec(
            (None, None, None, *work_shape[3:]),
            lambda b, n, i, j, *_: (b if own else 0, i, j, 0, 0),
            memory_space=pltpu.SMEM,
        ),
        pl.BlockSpec((None, None, blocks.q, H), lambda b, n, i, j, *_: (b, n, i, 0)),
        pl.BlockSpec((None, None, blocks.kv, H), lambda b, n, i, j, *_: (b, jax.lax.div(n, group), j, 0)),
        pl.BlockSpec((None, None, blocks.kv, H), lambda b, n, i, j, *_: (b, jax.lax.div(n, group), j, 0)),
    ]
    if plan.parts.segments:
        specs += [
            pl.BlockSpec((None, 1, blocks.q), lambda b, n, i, j, *_: (b, 0, i)),
            pl.BlockSpec((None, 1, blocks.kv), lambda b, n, i, j, *_: (b, 0, j)),
        ]
    return specs


def _scratch(plan: _Plan, H: int) -> list[Any]:
    blocks = plan.blocks
    i, q, k = plan.q_chunks, blocks.q_chunk, blocks.kv_chunk
    f32 = jnp.float32
    return [
        pltpu.VMEM((i, 1, q), f32),
        pltpu.VMEM((i, 8, q), f32),
        pltpu.VMEM((i, H + _sum_rows(plan), q), f32),
        pltpu.VMEM((2, k, q), f32),
        pltpu.VMEM((2, 1, q), f32),
        pltpu.VMEM((2, 1, q), f32),
        pltpu.VMEM((2, 1, q), jnp.int32),
        pltpu.VMEM((2, 1, q), jnp.int32),
        pltpu.VMEM((k, LANES), jnp.int32),
    ]


def _sum_rows(plan: _Plan) -> int:
    """Rows of ones below the values, a whole tile of them."""
    if not plan.blocks.sums_on_mxu:
        return 0
    return 16 if plan.dtype == jnp.bfloat16 else 8


def _shape(shape: tuple[int, ...], dtype: Any, like: Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(like).manual_axis_type)


def _kernel(*refs: Any, plan: _Plan) -> None:
    ids = 2 if plan.parts.segments else 0
    r = _Refs._make([*refs[:7], refs[7 : 7 + ids], *refs[7 + ids :]])
    kv_step = pl.program_id(3)

    @pl.when(kv_step == 0)
    def _() -> None:
        r.k_at[...] = masks.columns(r.k_at.shape[0])
        jax.lax.fori_loop(0, plan.q_chunks, lambda i, _: _start(plan, r, i), None)

    _work(plan, r)

    @pl.when(kv_step == plan.kv_steps - 1)
    def _() -> None:
        jax.lax.fori_loop(0, plan.q_chunks, lambda i, _: _finish(plan, r, i), None, unroll=2)


def _work(plan: _Plan, r: _Refs) -> None:
    """All chunks of the list: open ones in whole bodies from its end; the few left over go with the masked ones."""
    partial, opened = r.work[0, 0], r.work[0, 1]
    count = partial + opened
    masked = partial + jax.lax.rem(opened, _OPEN_STEPS)
    singles = jax.lax.rem(masked, 2)
    pairs = singles + jax.lax.rem(masked - singles, _MASKED_STEPS)
    jax.lax.fori_loop(0, singles, lambda n, _: _single(plan, r, n), None)

    @pl.when(count > singles)
    def _() -> None:
        r.scores[1] = jnp.full(r.scores.shape[1:], -jnp.inf, jnp.float32)
        r.shift[1] = jnp.zeros(r.shift.shape[1:], jnp.float32)
        r.shrink[1] = jnp.ones(r.shrink.shape[1:], jnp.float32)
        before, first = jnp.int32(0), singles
        for steps, end, mask in ((2, pairs, True), (_MASKED_STEPS, masked, True), (_OPEN_STEPS, count, False)):
            body = functools.partial(_steps, plan, r, first, steps, mask)
            if steps <= plan.most_chunks:
                before = jax.lax.fori_loop(0, jax.lax.div(end - first, steps), body, before)
            first = end
        _softmax(plan, r, before, 1)


def _start(plan: _Plan, r: _Refs, i: Any) -> None:
    lowest = jnp.maximum(r.sinks[pl.program_id(1)] * LOG2E, _LOWEST) if plan.sinks else _LOWEST
    r.highest[i] = jnp.full(r.highest.shape[1:], lowest, jnp.float32)
    H, sum_rows = r.q.shape[1], _sum_rows(plan)
    r.total[i] = jnp.zeros(r.total.shape[1:], jnp.float32)
    one = 1.0 if plan.sinks else 0.0
    if sum_rows:
        r.total[i, pl.ds(H, sum_rows)] = jnp.full((sum_rows, r.total.shape[2]), one, jnp.float32)
    else:
        r.sums[i] = jnp.full(r.sums.shape[1:], one / 8, jnp.float32)


def _steps(plan: _Plan, r: _Refs, first: Any, steps: int, masked: bool, body: Any, before: Any) -> Any:
    """Scores of some chunks of the list, each followed by the softmax of the chunk before, which is handed on."""
    for n in range(steps):
        work = r.work[0, 2 + first + body * steps + n]
        _scores(plan, r, work, n % 2, masked)
        _softmax(plan, r, before, (n + 1) % 2)
        before = work
    return before


def _single(plan: _Plan, r: _Refs, n: Any) -> None:
    work = r.work[0, 2 + n]
    _scores(plan, r, work, 0, True)
    _softmax(plan, r, work, 0)


def _chunk(index: Any, length: int) -> Any:
    return pl.ds(pl.multiple_of(index * length, length), length)


def _dot(plan: _Plan, a: Array, b: Array, contract: int) -> Array:
    exact = jax.lax.Precision.HIGHEST if plan.dtype == jnp.float32 else None
    dims = (((1,), (contract,)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision=exact, preferred_element_type=jnp.float32)


def _scores(plan: _Plan, r: _Refs, work: Any, slot: int, masked: bool) -> None:
    """The scores of a chunk, in powers of two, and the maximum they move."""
    i, j = masks.unpack(work)
    k_at, q_at = _chunk(j, plan.blocks.kv_chunk), _chunk(i, plan.blocks.q_chunk)
    scores = _dot(plan, r.k[k_at], r.q[q_at], 1)
    if plan.soft_cap is not None:
        scores = (plan.soft_cap * LOG2E) * jnp.tanh(scores)
    scores = _with_positions(plan, r, scores, i, j, masked, slot)
    r.scores[slot] = scores
    before = r.highest[i]
    highest = jnp.maximum(before, jnp.max(scores, axis=0, keepdims=True))
    r.highest[i] = highest
    r.shift[slot] = highest
    r.shrink[slot] = jnp.exp2(before - highest)


def _with_positions(plan: _Plan, r: _Refs, scores_kq: Array, i: Any, j: Any, masked: bool, slot: int) -> Array:
    """The bias added, and `-inf` where a query does not see a key."""
    blocks, b = plan.blocks, pl.program_id(0)
    k, q = scores_kq.shape
    k_first = pl.program_id(3) * blocks.kv + j * k
    q_first = r.scalars[b, masks.Q_OFFSET] + pl.program_id(2) * blocks.q + i * q
    q_at, k_at = (q_first - k_first) + masks.row(q), masks.widen(r.k_at[...], q)  # from the first key
    if plan.slopes:
        slope = r.slopes[pl.program_id(1)] * LOG2E
        scores_kq -= slope * jnp.abs(q_at - k_at).astype(jnp.float32)
    if not masked:
        return scores_kq
    ids: tuple[Array, ...] = ()
    if plan.parts.segments:
        ids = r.ids[0][:, _chunk(i, q)], masks.widen(masks.row_as_columns(r.ids[1][:, _chunk(j, k)]), q)
    prefix, length = (r.scalars[b, n] - k_first for n in (masks.PREFIX_LENGTH, masks.KV_LENGTH))
    ends = masks.bounds(plan.parts, prefix, length, q_at)
    ends = ends._replace(low=_kept(r.low, slot, ends.low), high=_kept(r.high, slot, ends.high))
    pattern = plan.parts.pattern
    blocks_seen = None if pattern is None else masks.pattern_sees(pattern, k_first + q_at, k_first + k_at)
    see = masks.visible(ends, blocks_seen, k_at, ids)
    return scores_kq if see is None else jnp.where(see, scores_kq, -jnp.inf)


def _kept(ref: Any, slot: int, row: Array | None) -> Array | None:
    """The same, by way of VMEM: loads are free, while the compiler would compute the row anew for each score."""
    if row is None:
        return None
    ref[slot] = row
    return ref[slot]


def _softmax(plan: _Plan, r: _Refs, work: Any, slot: int) -> None:
    """Probabilities of the scores in a slot, and what they add to the sums."""
    i, j = masks.unpack(work)
    shrink = r.shrink[slot]
    p = jnp.exp2(r.scores[slot] - r.shift[slot])
    v = jnp.transpose(r.v[_chunk(j, plan.blocks.kv_chunk)])
    if plan.blocks.sums_on_mxu:
        v = jnp.concatenate([v, jnp.ones((_sum_rows(plan), v.shape[1]), v.dtype)], axis=0)
    else:
        r.sums[i] = shrink * r.sums[i] + p.reshape(p.shape[0] // 8, 8, p.shape[1]).sum(0)
    r.total[i] = shrink * r.total[i] + _dot(plan, v, p.astype(plan.dtype), 0)


def _finish(plan: _Plan, r: _Refs, i: Any) -> None:
    at = _chunk(i, plan.blocks.q_chunk)
    H = r.q.shape[1]
    total = r.total[i]
    sums = total[H : H + 1] if plan.blocks.sums_on_mxu else r.sums[i].sum(0, keepdims=True)
    some = sums != 0  # a NaN stays one
    inside = jnp.where(some, sums, 1)
    out = jnp.where(some, total[:H] / inside, 0)
    r.out[at] = jnp.transpose(out).astype(r.out.dtype)
    r.lse[:, at] = jnp.where(some, (r.highest[i] + jnp.log2(inside)) * (1 / LOG2E), -jnp.inf)
