"""The forward pass of attention on TPU, one Pallas kernel.

Scores are kept as keys x queries (`S^T = K Q^T`), the output as `O^T = V^T P^T`, so that the probabilities are pushed
into the matrix unit as its weights and fill it. A grid step has a block of queries and one of keys in VMEM and works
through lists of the live chunks in it, in any order, with exact online softmax (Milakov and Gimelshein 2018,
arXiv:1805.02867; Dao 2023, arXiv:2307.08691): the state of every query stays in VMEM. The scores of a chunk
are computed while the softmax of the chunk before runs, and pass through VMEM; their maximum is taken as they leave the
matrix unit.

Shapes: B batch, T queries, S keys, N query heads, K key-value heads, H head dim; inside the kernel q queries and k keys
of a chunk.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lm_jax.kernels.flash_attention import pallas_tpu_mask as masks
from lm_jax.kernels.flash_attention.bias import Slopes
from lm_jax.kernels.flash_attention.implementation import Call
from lm_jax.kernels.flash_attention.pallas_tpu_mask import LANES, LOG2E, VMEM_BYTES
from lm_jax.kernels.flash_attention.pallas_tpu_work import two_lists

Array = jax.Array
_LOWEST = -1e38  # where the maximum starts: finite, so that `-inf` less it is `-inf`
_PART = 256  # the side of the squares that partly open chunks are cut into
# Chunks, or parts, in the bodies of the loops: a body fills and drains the matrix unit once, some 220 bundles (v6e,
# head dim 128, a tile of 1024 x 1024: 1,836 bundles in bodies of 8 chunks, 1,784 in bodies of 16).
_STEPS, _FEW_STEPS, _FEW_PARTS = 16, 4, 8
# The scores of a chunk are computed one ahead of its softmax. A part is too short to hide its latency behind one other
# (v6e, causal and window: 16 parts take 2,836 bundles two ahead, 2,343 three, 2,044 four, 1,983 six; but every head
# fills what is ahead anew). Slots divide the chunks in a body.
_CHUNK_SLOTS, _PART_SLOTS, _PARTS_AHEAD = 2, 8, 4
_PIECE = 4096  # queries whose result is written at once


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
    band: masks.Band | None
    group: int
    q_part: int
    kv_part: int
    q_steps: int  # of the grid
    kv_steps: int
    blocks: ForwardBlocks
    query_factor: float
    soft_cap: float | None
    slopes: bool
    sinks: bool
    dtype: Any


class _Slots(NamedTuple):
    """Scores on their way to the softmax, one chunk a slot."""

    scores: Any  # [slots, k, q]
    shift: Any  # [slots, 1, q]: the maximum to take from these scores
    shrink: Any  # [slots, 1, q]: what the sums before them shrink by


class _List(NamedTuple):
    """Chunks of one size to compute."""

    first: int  # where they stand in the work
    count: Any
    q: int  # of a chunk
    k: int
    slots: _Slots
    masked: bool


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
    band: Any  # its table, or None
    out: Any
    lse: Any
    # The state of the block's queries, and of a chunk of no queries behind them, see `_next`.
    highest: Any  # [1, queries]: the maximum so far, as far as scores are computed
    sums: Any  # [8, queries]: of the probabilities, where lanes add them up
    total: Any  # [H (+ sums), queries]: of probabilities times values
    chunks: _Slots
    parts: _Slots
    low: Any  # [slots, 1, q of a part]: the first key that a query sees
    high: Any  # the same: the end of those it sees, see `Bounds`
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
    chunks, parts = (blocks.q_chunk, blocks.kv_chunk), (plan.q_part, plan.kv_part)
    per = blocks.q // blocks.q_chunk, blocks.kv // blocks.kv_chunk
    work = jnp.asarray(two_lists(call.mask, T, S, chunks, parts, per, _FEW_STEPS))
    ids = masks.segment_rows(call.mask, plan.q_steps * blocks.q, plan.kv_steps * blocks.kv)
    band = () if plan.band is None else (plan.band.table(),)
    slopes = call.position_bias.slopes_N if isinstance(call.position_bias, Slopes) else jnp.zeros((1,))
    sinks = jnp.zeros((1,)) if call.sinks_N is None else call.sinks_N
    out, lse = pl.pallas_call(
        functools.partial(_kernel, plan=plan),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(B, N, plan.q_steps, plan.kv_steps),
            in_specs=_in_specs(plan, H, work.shape, band),
            out_specs=[
                pl.BlockSpec((None, None, blocks.q, H), lambda b, n, i, j, *_: (b, n, i, 0)),
                pl.BlockSpec((None, None, 1, blocks.q), lambda b, n, i, j, *_: (b, n, 0, i)),
            ],
            scratch_shapes=_scratch(plan, H),
        ),
        # In float32 for float16, which not every compiler can make inside of a kernel.
        out_shape=[_shape(q.shape, plan.dtype, q), _shape((B, N, 1, T), jnp.float32, q)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=VMEM_BYTES,
        ),
        interpret=pltpu.InterpretParams() if interpret else False,
        name="flash_attention_forward",
    )(
        masks.scalars_B3(call.mask, B, S),
        slopes.astype(jnp.float32),
        sinks.astype(jnp.float32),
        work,
        q,
        k,
        v,
        *ids,
        *band,
    )
    return jnp.swapaxes(out, 1, 2).astype(call.q_BTNH.dtype), jnp.swapaxes(lse[:, :, 0], 1, 2)


def _fit(blocks: ForwardBlocks, T: int, S: int) -> ForwardBlocks:
    """Chunks no longer than the lengths need, and blocks of whole chunks that share a length evenly."""
    q_chunk, kv_chunk = min(blocks.q_chunk, _up(T, LANES)), min(blocks.kv_chunk, _up(S, LANES))
    q = _up(pl.cdiv(T, pl.cdiv(T, max(blocks.q, q_chunk))), q_chunk)
    kv = _up(pl.cdiv(S, pl.cdiv(S, max(blocks.kv, kv_chunk))), kv_chunk)
    return dataclasses.replace(blocks, q=q, kv=kv, q_chunk=q_chunk, kv_chunk=kv_chunk)


def _up(n: int, multiple: int) -> int:
    return n + -n % multiple


def _plan(call: Call, blocks: ForwardBlocks) -> _Plan:
    T, S = call.q_BTNH.shape[1], call.k_BSKH.shape[1]
    narrow = all(a.dtype == jnp.bfloat16 for a in (call.q_BTNH, call.k_BSKH, call.v_BSKH))
    parts = masks.parts_of(call.mask, padded=S % blocks.kv_chunk != 0)
    kv_part = math.gcd(blocks.kv_chunk, _PART)
    return _Plan(
        parts=parts,
        band=masks.band_of(parts, kv_part, keys_down=True),
        group=call.group,
        q_part=math.gcd(blocks.q_chunk, _PART),
        kv_part=kv_part,
        q_steps=pl.cdiv(T, blocks.q),
        kv_steps=pl.cdiv(S, blocks.kv),
        blocks=blocks,
        query_factor=call.scale * LOG2E if call.soft_cap is None else call.scale / call.soft_cap,
        soft_cap=call.soft_cap,
        slopes=call.position_bias is not None,
        sinks=call.sinks_N is not None,
        dtype=jnp.bfloat16 if narrow else jnp.float32,
    )


def _in_specs(plan: _Plan, H: int, work_shape: tuple[int, ...], band: tuple[Array, ...]) -> list[pl.BlockSpec]:
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
    return [*specs, *(pl.BlockSpec(table.shape, lambda *_: (0, 0)) for table in band)]


def _scratch(plan: _Plan, H: int) -> list[Any]:
    q, k = plan.blocks.q_chunk, plan.blocks.kv_chunk
    f32, queries = jnp.float32, plan.blocks.q + q
    bound = pltpu.VMEM((_PART_SLOTS, 1, plan.q_part), jnp.int32)
    return [
        pltpu.VMEM((1, queries), f32),
        pltpu.VMEM((8, queries), f32),
        pltpu.VMEM((H + (8 if plan.blocks.sums_on_mxu else 0), queries), f32),
        _slots(_CHUNK_SLOTS, k, q),
        _slots(_PART_SLOTS, plan.kv_part, plan.q_part),
        bound,
        bound,
        pltpu.VMEM((k, LANES), jnp.int32),
    ]


def _slots(n: int, k: int, q: int) -> _Slots:
    return _Slots(*(pltpu.VMEM((n, rows, q), jnp.float32) for rows in (k, 1, 1)))


def _shape(shape: tuple[int, ...], dtype: Any, like: Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(like).manual_axis_type)


def _kernel(*refs: Any, plan: _Plan) -> None:
    ids = 2 if plan.parts.segments else 0
    band = [] if plan.band is not None else [None]
    r = _Refs._make([*refs[:7], refs[7 : 7 + ids], *band, *refs[7 + ids :]])
    kv_step = pl.program_id(3)
    if plan.kv_steps == 1:  # no condition: the stores of the start then stand beside the first scores
        _start(plan, r)
        _work(plan, r)
    else:
        pl.when(kv_step == 0)(lambda: _start(plan, r))
        pl.when(r.work[0, 0] + r.work[0, 1] > 0)(lambda: _work(plan, r))

    @pl.when(kv_step == plan.kv_steps - 1)
    def _() -> None:
        _in_pieces(plan, lambda at: _finish(plan, r, at))


def _in_pieces(plan: _Plan, do: Callable[[Any], None]) -> None:
    """Over the queries of a block."""
    piece = math.gcd(plan.blocks.q, _PIECE)
    jax.lax.fori_loop(0, plan.blocks.q // piece, lambda n, _: do(_chunk(n, piece)), None)


def _start(plan: _Plan, r: _Refs) -> None:
    r.k_at[...] = masks.columns(r.k_at.shape[0])
    n, H = plan.blocks.q, r.q.shape[1]
    lowest = jnp.maximum(r.sinks[pl.program_id(1)] * LOG2E, _LOWEST) if plan.sinks else _LOWEST
    r.highest[:, :n] = jnp.full((1, n), lowest, jnp.float32)
    r.total[:H, :n] = jnp.zeros((H, n), jnp.float32)
    one = 1.0 if plan.sinks else 0.0
    if plan.blocks.sums_on_mxu:
        r.total[H:, :n] = jnp.full((8, n), one, jnp.float32)
    else:
        r.sums[:, :n] = jnp.full((8, n), one / 8, jnp.float32)


def _work(plan: _Plan, r: _Refs) -> None:
    """All chunks of the lists.

    What fills the pipelines of both lists comes first and together: it waits for the matrix unit.
    """
    blocks = plan.blocks
    parts_in_block = (blocks.q // plan.q_part) * (blocks.kv // plan.kv_part)
    parts = _List(2, r.work[0, 0], plan.q_part, plan.kv_part, r.parts, True)
    chunks = _List(2 + parts_in_block, r.work[0, 1], blocks.q_chunk, blocks.kv_chunk, r.chunks, False)
    first = _next(plan, r, chunks, jnp.int32(0))
    r.chunks.shift[0] = _scores(plan, r, chunks, first, 0)  # moves the maximum when the parts have
    filled = tuple(_score(plan, r, parts, jnp.int32(n), n) for n in range(_PARTS_AHEAD))
    _pipelined(plan, r, parts, filled)
    _move_maximum(plan, r, chunks, first, 0, r.chunks.shift[0])
    _pipelined(plan, r, chunks, (first,))


def _next(plan: _Plan, r: _Refs, todo: _List, n: Any) -> Any:
    """The n-th chunk of a list. Behind the last one, to fill a body, stand queries behind the block's, whose sums
    nobody reads."""
    most = (plan.blocks.q // todo.q) * (plan.blocks.kv // todo.k)
    nobody = jnp.int32(masks.pack(plan.blocks.q // todo.q, 0))
    return jnp.where(n < todo.count, r.work[0, todo.first + jnp.minimum(n, most - 1)], nobody)


def _score(plan: _Plan, r: _Refs, todo: _List, n: Any, slot: int) -> Any:
    """The n-th chunk, whose scores are now in a slot."""
    work = _next(plan, r, todo, n)
    _move_maximum(plan, r, todo, work, slot, _scores(plan, r, todo, work, slot))
    return work


def _pipelined(plan: _Plan, r: _Refs, todo: _List, ahead: tuple[Any, ...]) -> None:
    """The softmax of each chunk beside the scores of a later one, in large bodies and then in small ones.

    Args:
      ahead: the first chunks, whose scores are in the first slots.
    """
    slots, few_steps = todo.slots.scores.shape[0], _FEW_PARTS if todo.masked else _FEW_STEPS

    def body(first: Any, steps: int, n: Any, ahead: tuple[Any, ...]) -> tuple[Any, ...]:
        for m in range(steps):
            work = _score(plan, r, todo, first + n * steps + m + len(ahead), (m + len(ahead)) % slots)
            _softmax(plan, r, todo, ahead[0], m % slots)
            ahead = (*ahead[1:], work)
        return ahead

    many = jax.lax.div(todo.count, jnp.int32(_STEPS))
    few = jax.lax.div(todo.count - many * _STEPS + (few_steps - 1), jnp.int32(few_steps))
    if (plan.blocks.q // todo.q) * (plan.blocks.kv // todo.k) >= _STEPS:
        ahead = jax.lax.fori_loop(0, many, functools.partial(body, 0, _STEPS), ahead)
    jax.lax.fori_loop(0, few, functools.partial(body, many * _STEPS, few_steps), ahead)


def _chunk(index: Any, length: int) -> Any:
    return pl.ds(pl.multiple_of(index * length, length), length)


def _dot(plan: _Plan, a: Array, b: Array, contract: int) -> Array:
    exact = jax.lax.Precision.HIGHEST if plan.dtype == jnp.float32 else None
    dims = (((1,), (contract,)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision=exact, preferred_element_type=jnp.float32)


def _scores(plan: _Plan, r: _Refs, todo: _List, work: Any, slot: int) -> Array:
    """The scores of a chunk, in powers of two, into a slot; their maximum for each query."""
    own, j = masks.unpack(work)
    i = jnp.minimum(own, plan.blocks.q // todo.q - 1)
    scores = _dot(plan, r.k[_chunk(j, todo.k)], r.q[_chunk(i, todo.q)], 1)
    if plan.soft_cap is not None:
        scores = (plan.soft_cap * LOG2E) * jnp.tanh(scores)
    scores = _with_positions(plan, r, todo, scores, i, j, slot)
    todo.slots.scores[slot] = scores
    return jnp.max(scores, axis=0, keepdims=True)


def _move_maximum(plan: _Plan, r: _Refs, todo: _List, work: Any, slot: int, maximum_1q: Array) -> None:
    """The maximum that is taken from the scores in a slot; softmaxes must follow in the order of these calls."""
    q_at = _chunk(masks.unpack(work)[0], todo.q)
    before = r.highest[:, q_at]
    highest = jnp.maximum(before, maximum_1q)
    r.highest[:, q_at] = highest
    todo.slots.shift[slot] = highest
    todo.slots.shrink[slot] = jnp.exp2(before - highest)


def _with_positions(plan: _Plan, r: _Refs, todo: _List, scores_kq: Array, i: Any, j: Any, slot: int) -> Array:
    """The bias added, and `-inf` where a query does not see a key."""
    blocks, b = plan.blocks, pl.program_id(0)
    q, k = todo.q, todo.k
    k_first = pl.program_id(3) * blocks.kv + j * k
    q_first = r.scalars[b, masks.Q_OFFSET] + pl.program_id(2) * blocks.q + i * q
    q_at, k_at = (q_first - k_first) + masks.row(q), masks.widen(r.k_at[:k], q)  # from the first key
    if plan.slopes:
        slope = r.slopes[pl.program_id(1)] * LOG2E
        scores_kq -= slope * jnp.abs(q_at - k_at).astype(jnp.float32)
    if not todo.masked:
        return scores_kq
    ids: tuple[Array, ...] = ()
    if plan.parts.segments:
        ids = r.ids[0][:, _chunk(i, q)], masks.widen(masks.row_as_columns(r.ids[1][:, _chunk(j, k)]), q)
    parts = plan.parts
    if plan.band is not None:
        parts = parts._replace(causal=False, window=None)
        columns = [r.band[pl.ds(plan.band.at(k_first - q_first - x), k)] for x in range(0, q, LANES)]
        scores_kq = jnp.minimum(scores_kq, jnp.concatenate(columns, axis=1))
    prefix, length = (r.scalars[b, n] - k_first for n in (masks.PREFIX_LENGTH, masks.KV_LENGTH))
    ends = masks.bounds(parts, prefix, length, q_at)
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


def _softmax(plan: _Plan, r: _Refs, todo: _List, work: Any, slot: int) -> None:
    """Probabilities of the scores in a slot, and what they add to the sums."""
    i, j = masks.unpack(work)
    q_at = _chunk(i, todo.q)
    shift, shrink = todo.slots.shift[slot], todo.slots.shrink[slot]
    p = jnp.exp2(todo.slots.scores[slot] - shift)
    v = jnp.transpose(r.v[_chunk(j, todo.k)])
    if plan.blocks.sums_on_mxu:
        v = jnp.concatenate([v, jnp.ones((16, v.shape[1]), v.dtype)], axis=0)  # a tile of bfloat16
    else:
        r.sums[:, q_at] = shrink * r.sums[:, q_at] + p.reshape(todo.k // 8, 8, todo.q).sum(0)
    rows = r.total.shape[0]
    r.total[:, q_at] = shrink * r.total[:, q_at] + _dot(plan, v, p.astype(plan.dtype), 0)[:rows]


def _finish(plan: _Plan, r: _Refs, at: Any) -> None:
    H = r.q.shape[1]
    sums = r.total[H : H + 1, at] if plan.blocks.sums_on_mxu else r.sums[:, at].sum(0, keepdims=True)
    some = sums != 0  # a NaN stays one
    inside = jnp.where(some, sums, 1)
    out = jnp.where(some, r.total[:H, at] * (1 / inside), 0)
    r.out[at] = jnp.transpose(out.astype(r.out.dtype))
    r.lse[:, at] = jnp.where(some, (r.highest[:, at] + jnp.log2(inside)) * (1 / LOG2E), -jnp.inf)
