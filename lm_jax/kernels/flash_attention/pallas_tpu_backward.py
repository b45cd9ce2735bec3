"""The backward pass of attention on TPU, one fused Pallas kernel.

Scores are kept as queries x keys; the probabilities and the gradient of the scores are pushed into the matrix unit as
its weights, which fills it: `dV^T = dO^T P`, `dK^T = Q^T dS`, `dQ^T = K^T dS^T` (Dao 2023, arXiv:2307.08691, has the
algorithm). A grid step has a block of queries of one head and a block of keys in VMEM and works through a list of the
live chunks in it, in any order, for all sums stay in VMEM. `P` and `dS` of the next chunk are computed while those of
this chunk are multiplied. Gradients of keys and values are summed over the query heads that share them.

Shapes: B batch, T queries, S keys, N query heads, K key-value heads, G query heads a key head, H head dim; I and J
blocks of queries and of keys; inside the kernel q queries and k keys of a chunk.
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
from lm_jax.kernels.flash_attention.implementation import Call, Gradients
from lm_jax.kernels.flash_attention.pallas_tpu_mask import LANES, LOG2E, VMEM_BYTES
from lm_jax.kernels.flash_attention.pallas_tpu_work import two_lists

Array = jax.Array
_FAR = 1e30  # the `lse` of a query that sees nothing: finite, and all its probabilities are 0
_SUBLANES = 8
_PIECE = 2048  # what is transposed at once outside the loops: on v6e 655 bundles, and 197 for 512 (latency)


@dataclasses.dataclass(frozen=True)
class BackwardBlocks:
    """How the work is cut, in queries and keys.

    Attributes:
      q, kv: what one step of the grid holds in VMEM, at most.
      q_chunk, kv_chunk: what is computed at once where the mask is open; multiples of 128.
      part: the side of the squares that partly open chunks are cut into; a multiple of 128.
      steps: chunks, or parts, in the body of a loop; an even number.
      transpose_ahead: whether a block of queries is transposed as a whole before the work, or each chunk in passing,
        which costs nothing on v6e and later, but a fifth of the matrix unit's time on v5e and v5p.
    """

    q: int
    kv: int
    q_chunk: int
    kv_chunk: int
    part: int = 256
    steps: int = 8
    transpose_ahead: bool = False


class _Plan(NamedTuple):
    """What the kernel knows when it is traced."""

    parts: masks.Parts
    band: masks.Band | None
    group: int
    blocks: BackwardBlocks
    q_part: int
    kv_part: int
    q_steps: int  # of the grid
    kv_steps: int
    scale: float
    query_factor: float  # what the queries come multiplied with
    key_factor: float  # what is then left of the scale for the gradient of the keys
    soft_cap: float | None
    slopes: bool
    dtype: Any  # of what is multiplied


class _List(NamedTuple):
    """Chunks of one size to compute."""

    first: int  # where they stand in the work
    count: Any
    q: int  # of a chunk
    k: int
    masked: bool


class _Refs(NamedTuple):
    """The kernel's operands and scratch; `_kernel` has the order."""

    scalars: Any
    slopes: Any
    work: Any
    q: Any  # [queries, H], times the scores' factor
    d_out: Any
    lse: Any  # [1, queries], in powers of two
    delta: Any
    k: Any  # [keys, H]
    v: Any
    ids: tuple[Any, ...]  # [1, queries] and [1, keys], or nothing
    band: Any  # its table, or None
    dq: Any
    dk: Any
    dv: Any
    d_slope: Any  # [8, 128], to be summed, or None
    kT: Any  # [H, keys]
    vT: Any
    dqT: Any  # [H, queries], the sums
    dkT: Any
    dvT: Any
    p: Any  # [2, q, k]
    ds: Any
    lse_columns: Any  # [queries, 128], the same in every column
    delta_columns: Any
    id_columns: Any  # or None
    qT: Any  # [H, queries], or None
    d_outT: Any


def backward(
    call: Call,
    out_BTNH: Array,
    lse_BTN: Array,
    d_out_BTNH: Array,
    d_lse_BTN: Array,
    blocks: BackwardBlocks,
    *,
    interpret: bool,
) -> Gradients:
    """Gradients of attention and of the logarithm of its sums.

    bf16 arrays are multiplied in bf16; anything else in float32 at the highest precision (float16 too, which the matrix
    unit does not know).

    Args:
      call: its bias is `Slopes` or None.
      blocks: cut to the lengths of the call, which need not be multiples of anything.
      interpret: run on any machine, slowly.
    """
    seen_BTN = lse_BTN != -jnp.inf  # a NaN stays one
    delta_BTN = (out_BTNH.astype(jnp.float32) * d_out_BTNH.astype(jnp.float32)).sum(-1) - d_lse_BTN
    delta_BTN = jnp.where(seen_BTN, delta_BTN, 0)
    powers_BTN = jnp.where(seen_BTN, lse_BTN * LOG2E, _FAR)
    dq, dk, dv, *d_slope = _call_kernel(call, d_out_BTNH, powers_BTN, delta_BTN, blocks, interpret)
    T, S = call.q_BTNH.shape[1], call.k_BSKH.shape[1]
    d_bias = d_sinks = None
    if isinstance(call.position_bias, Slopes):
        d_bias = d_slope[0].sum((0, 1, 3, 4, 5)).astype(call.position_bias.slopes_N.dtype)
    if call.sinks_N is not None:
        p_sink_BTN = jnp.where(seen_BTN, jnp.exp(call.sinks_N.astype(jnp.float32) - lse_BTN), 0)
        d_sinks = -(p_sink_BTN * delta_BTN).sum((0, 1)).astype(call.sinks_N.dtype)
    return Gradients(
        jnp.swapaxes(dq[0] if len(dq) == 1 else dq.sum(0), 1, 2)[:, :T].astype(call.q_BTNH.dtype),
        jnp.swapaxes(dk, 1, 2)[:, :S].astype(call.k_BSKH.dtype),
        jnp.swapaxes(dv, 1, 2)[:, :S].astype(call.v_BSKH.dtype),
        d_bias,
        d_sinks,
    )


def _call_kernel(
    call: Call, d_out_BTNH: Array, lse_BTN: Array, delta_BTN: Array, blocks: BackwardBlocks, interpret: bool
) -> Any:
    (B, T, N, H), (S, K) = call.q_BTNH.shape, call.k_BSKH.shape[1:3]
    plan = _plan(call, blocks)
    blocks = plan.blocks
    q = _heads_first(call.q_BTNH.astype(jnp.float32) * plan.query_factor, blocks.q_chunk, plan.dtype)
    d_out = _heads_first(d_out_BTNH, blocks.q_chunk, plan.dtype)
    fill = ((0, 0), (0, -T % blocks.q_chunk), (0, 0))
    lse_BTN = jnp.pad(lse_BTN, fill, constant_values=_FAR)  # what is added behind the queries sees nothing
    lse, delta = (_heads_first(a[..., None], blocks.q_chunk, jnp.float32) for a in (lse_BTN, delta_BTN))
    lse, delta = (jnp.swapaxes(a, 2, 3) for a in (lse, delta))
    k, v = (_heads_first(a, blocks.kv_chunk, plan.dtype) for a in (call.k_BSKH, call.v_BSKH))
    per = blocks.q // blocks.q_chunk, blocks.kv // blocks.kv_chunk
    chunks, parts = (blocks.q_chunk, blocks.kv_chunk), (plan.q_part, plan.kv_part)
    work = jnp.asarray(two_lists(call.mask, T, S, chunks, parts, per, blocks.steps))
    ids = masks.segment_rows(call.mask, plan.q_steps * blocks.q, plan.kv_steps * blocks.kv)
    band = () if plan.band is None else (plan.band.table(),)
    slopes = call.position_bias.slopes_N if isinstance(call.position_bias, Slopes) else jnp.zeros((1,))
    partial = jnp.float32 if plan.kv_steps > 1 else plan.dtype
    shapes = [
        _shape((plan.kv_steps, *q.shape), partial, q),
        _shape(k.shape, plan.dtype, q),
        _shape(k.shape, plan.dtype, q),
    ]
    if plan.slopes:
        shapes.append(_shape((plan.kv_steps, B, N, plan.q_steps, _SUBLANES, LANES), jnp.float32, q))
    return pl.pallas_call(
        functools.partial(_kernel, plan=plan),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(B, K, plan.kv_steps, plan.group, plan.q_steps),
            in_specs=_in_specs(plan, H, work.shape, band),
            out_specs=_out_specs(plan, H),
            scratch_shapes=_scratch(plan, H),
        ),
        out_shape=shapes,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=VMEM_BYTES,
        ),
        interpret=pltpu.InterpretParams() if interpret else False,
        name="flash_attention_backward",
    )(masks.scalars_B3(call.mask, B, S), slopes.astype(jnp.float32), work, q, d_out, lse, delta, k, v, *ids, *band)


def _plan(call: Call, blocks: BackwardBlocks) -> _Plan:
    T, S = call.q_BTNH.shape[1], call.k_BSKH.shape[1]
    q_chunk, kv_chunk = min(blocks.q_chunk, _up(T, LANES)), min(blocks.kv_chunk, _up(S, LANES))
    q, kv = _share(T, blocks.q, q_chunk), _share(S, blocks.kv, kv_chunk)
    narrow = all(a.dtype == jnp.bfloat16 for a in (call.q_BTNH, call.k_BSKH, call.v_BSKH))
    parts, q_part = masks.parts_of(call.mask, padded=S % kv_chunk != 0), math.gcd(q_chunk, blocks.part)
    return _Plan(
        parts=parts,
        band=masks.band_of(parts, q_part, keys_down=False),
        group=call.group,
        blocks=dataclasses.replace(blocks, q=q, kv=kv, q_chunk=q_chunk, kv_chunk=kv_chunk),
        q_part=q_part,
        kv_part=math.gcd(kv_chunk, blocks.part),
        q_steps=pl.cdiv(T, q),
        kv_steps=pl.cdiv(S, kv),
        scale=call.scale,
        query_factor=call.scale * LOG2E if call.soft_cap is None else call.scale / call.soft_cap,
        key_factor=1 / LOG2E if call.soft_cap is None else call.soft_cap,
        soft_cap=call.soft_cap,
        slopes=isinstance(call.position_bias, Slopes),
        dtype=jnp.bfloat16 if narrow else jnp.float32,
    )


def _share(length: int, block: int, chunk: int) -> int:
    """Blocks of whole chunks, at most `block` long, that share a length evenly."""
    return _up(pl.cdiv(length, pl.cdiv(length, max(block, chunk))), chunk)


def _up(n: int, multiple: int) -> int:
    return n + -n % multiple


def _heads_first(x_BTNH: Array, chunk: int, dtype: Any) -> Array:
    """`[B, N, T, H]`, padded with zeros to whole chunks."""
    x = jnp.swapaxes(x_BTNH.astype(dtype), 1, 2)
    return jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % chunk), (0, 0)))


def _shape(shape: tuple[int, ...], dtype: Any, like: Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(like).manual_axis_type)


def _in_specs(plan: _Plan, H: int, work_shape: tuple[int, ...], band: tuple[Array, ...]) -> list[pl.BlockSpec]:
    blocks, group = plan.blocks, plan.group
    own = work_shape[0] > 1  # each row of the batch has a list
    queries = pl.BlockSpec((None, None, blocks.q, H), lambda b, h, j, g, i, *_: (b, h * group + g, i, 0))
    row = pl.BlockSpec((None, None, 1, blocks.q), lambda b, h, j, g, i, *_: (b, h * group + g, 0, i))
    keys = pl.BlockSpec((None, None, blocks.kv, H), lambda b, h, j, g, i, *_: (b, h, j, 0))
    work = pl.BlockSpec(
        (None, None, None, *work_shape[3:]),
        lambda b, h, j, g, i, *_: (b if own else 0, i, j, 0, 0),
        memory_space=pltpu.SMEM,
    )
    specs = [work, queries, queries, row, row, keys, keys]
    if plan.parts.segments:
        specs += [
            pl.BlockSpec((None, 1, blocks.q), lambda b, h, j, g, i, *_: (b, 0, i)),
            pl.BlockSpec((None, 1, blocks.kv), lambda b, h, j, g, i, *_: (b, 0, j)),
        ]
    return [*specs, *(pl.BlockSpec(table.shape, lambda *_: (0, 0)) for table in band)]


def _out_specs(plan: _Plan, H: int) -> list[pl.BlockSpec]:
    blocks, group = plan.blocks, plan.group
    keys = pl.BlockSpec((None, None, blocks.kv, H), lambda b, h, j, g, i, *_: (b, h, j, 0))
    specs = [
        pl.BlockSpec((None, None, None, blocks.q, H), lambda b, h, j, g, i, *_: (j, b, h * group + g, i, 0)),
        keys,
        keys,
    ]
    if plan.slopes:
        shape = (None, None, None, None, _SUBLANES, LANES)
        specs.append(pl.BlockSpec(shape, lambda b, h, j, g, i, *_: (j, b, h * group + g, i, 0, 0)))
    return specs


def _scratch(plan: _Plan, H: int) -> list[Any]:
    b = plan.blocks
    scratch = [
        *[pltpu.VMEM((H, b.kv), plan.dtype)] * 2,
        pltpu.VMEM((H, b.q), jnp.float32),
        *[pltpu.VMEM((H, b.kv), jnp.float32)] * 2,
        *[pltpu.VMEM((2, b.q_chunk, b.kv_chunk), plan.dtype)] * 2,
        *[pltpu.VMEM((b.q, LANES), jnp.float32)] * 2,
    ]
    if plan.parts.segments:
        scratch.append(pltpu.VMEM((b.q, LANES), jnp.int32))
    if b.transpose_ahead:
        scratch += [pltpu.VMEM((H, b.q), plan.dtype)] * 2
    return scratch


def _kernel(*refs: Any, plan: _Plan) -> None:
    r = _named(plan, refs)
    q, kv = plan.blocks.q, plan.blocks.kv
    head, q_step = pl.program_id(3), pl.program_id(4)

    @pl.when((head == 0) & (q_step == 0))
    def _() -> None:
        _in_pieces(kv, lambda at: _start_keys(plan, r, at))

    _in_pieces(q, lambda at: _start_queries(plan, r, at))
    if plan.parts.segments:  # the next head finds them where a block is the whole length
        pl.when((head == 0) | (plan.q_steps > 1))(lambda: _in_pieces(q, lambda at: _start_ids(r, at)))
    if plan.slopes:
        r.d_slope[...] = jnp.zeros_like(r.d_slope)

    _work(plan, r)
    _in_pieces(q, lambda at: _finish_queries(plan, r, at))

    @pl.when((head == plan.group - 1) & (q_step == plan.q_steps - 1))
    def _() -> None:
        _in_pieces(kv, lambda at: _finish_keys(plan, r, at))


def _named(plan: _Plan, refs: tuple[Any, ...]) -> _Refs:
    rest = iter(refs)

    def take(n: int, given: bool = True) -> list[Any]:
        return [next(rest) if given else None for _ in range(n)]

    head, segments = take(9), plan.parts.segments
    ids, band = tuple(take(2)) if segments else (), take(1, plan.band is not None)
    outputs = [*take(3), *take(1, plan.slopes)]
    scratch = [*take(9), *take(1, segments), *take(2, plan.blocks.transpose_ahead)]
    return _Refs._make([*head, ids, *band, *outputs, *scratch])


def _in_pieces(length: int, do: Callable[[Any], None]) -> None:
    """Over a whole block, by pieces that are long enough to hide the latency of transposing."""
    piece = math.gcd(length, _PIECE)
    jax.lax.fori_loop(0, length // piece, lambda n, _: do(_chunk(n, piece)), None)


def _start_keys(plan: _Plan, r: _Refs, at: Any) -> None:
    r.kT[:, at], r.vT[:, at] = jnp.transpose(r.k[at]), jnp.transpose(r.v[at])
    r.dkT[:, at] = r.dvT[:, at] = jnp.zeros((r.dkT.shape[0], at.size), jnp.float32)


def _finish_keys(plan: _Plan, r: _Refs, at: Any) -> None:
    r.dk[at] = jnp.transpose((r.dkT[:, at] * plan.key_factor).astype(r.dk.dtype))
    r.dv[at] = jnp.transpose(r.dvT[:, at].astype(r.dv.dtype))


def _start_queries(plan: _Plan, r: _Refs, at: Any) -> None:
    r.dqT[:, at] = jnp.zeros((r.dqT.shape[0], at.size), jnp.float32)
    r.lse_columns[at] = masks.row_as_columns(r.lse[:, at])
    r.delta_columns[at] = masks.row_as_columns(r.delta[:, at])
    if plan.blocks.transpose_ahead:
        r.qT[:, at], r.d_outT[:, at] = jnp.transpose(r.q[at]), jnp.transpose(r.d_out[at])


def _start_ids(r: _Refs, at: Any) -> None:
    r.id_columns[at] = masks.row_as_columns(r.ids[0][:, at])


def _finish_queries(plan: _Plan, r: _Refs, at: Any) -> None:
    r.dq[at] = jnp.transpose((r.dqT[:, at] * plan.scale).astype(r.dq.dtype))


def _work(plan: _Plan, r: _Refs) -> None:
    """All chunks of the lists; a few parts by themselves, so that the rest fill whole bodies."""
    blocks = plan.blocks
    parts_in_block = (blocks.q // plan.q_part) * (blocks.kv // plan.kv_part)
    parts = _List(2, r.work[0, 0], plan.q_part, plan.kv_part, True)
    chunks = _List(2 + parts_in_block, r.work[0, 1], blocks.q_chunk, blocks.kv_chunk, False)

    def single(n: Any, _: Any) -> None:
        _scores(plan, r, parts, n, 0)
        _products(plan, r, parts, n, 0)

    singles = jax.lax.rem(parts.count, jnp.int32(blocks.steps))
    jax.lax.fori_loop(0, singles, single, None)
    _pipelined(plan, r, parts, singles)
    _pipelined(plan, r, chunks, jnp.int32(0))


def _pipelined(plan: _Plan, r: _Refs, todo: _List, first: Any) -> None:
    """From the first on, a multiple of `steps`: each chunk's products beside the scores of the one after it."""
    steps = plan.blocks.steps

    def body(n: Any, _: Any) -> None:
        for m in range(steps):
            at = first + n * steps + m
            _scores(plan, r, todo, at + 1, (m + 1) % 2)
            _products(plan, r, todo, at, m % 2)

    @pl.when(todo.count > first)
    def _() -> None:
        _scores(plan, r, todo, first, 0)
        jax.lax.fori_loop(0, jax.lax.div(todo.count - first, jnp.int32(steps)), body, None)


def _chunk(index: Any, length: int) -> Any:
    return pl.ds(pl.multiple_of(index * length, length), length)


def _dot(plan: _Plan, a: Array, b: Array, contract: tuple[int, int]) -> Array:
    exact = jax.lax.Precision.HIGHEST if plan.dtype == jnp.float32 else None
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision=exact, preferred_element_type=jnp.float32)


def _scores(plan: _Plan, r: _Refs, todo: _List, n: Any, slot: int) -> None:
    """The probabilities of the n-th chunk and the gradient of its scores, into a slot; behind the end those of the last
    again, which nobody reads."""
    i, j = masks.unpack(r.work[0, todo.first + jnp.minimum(n, todo.count - 1)])
    q_at, k_at = _chunk(i, todo.q), _chunk(j, todo.k)
    scores = _dot(plan, r.q[q_at], r.kT[:, k_at], (1, 0))
    slope_of_cap = None
    if plan.soft_cap is not None:
        t = jnp.tanh(scores)
        scores, slope_of_cap = (plan.soft_cap * LOG2E) * t, 1 - t * t
    distance = _distance(plan, r, todo, i, j) if plan.slopes else None
    if distance is not None:
        scores -= (r.slopes[pl.program_id(1) * plan.group + pl.program_id(3)] * LOG2E) * distance
    scores -= masks.widen(r.lse_columns[q_at], todo.k)
    p = jnp.exp2(_masked(plan, r, todo, scores, i, j) if todo.masked else scores)
    dp = _dot(plan, r.d_out[q_at], r.vT[:, k_at], (1, 0)) - masks.widen(r.delta_columns[q_at], todo.k)
    ds = p * dp
    if distance is not None:
        r.d_slope[...] -= jnp.where(n < todo.count, _folded(ds * distance), 0)
    r.p[slot, : todo.q, : todo.k] = p.astype(plan.dtype)
    ds = ds if slope_of_cap is None else ds * slope_of_cap
    r.ds[slot, : todo.q, : todo.k] = ds.astype(plan.dtype)


def _products(plan: _Plan, r: _Refs, todo: _List, n: Any, slot: int) -> None:
    """What the n-th chunk, which is in a slot, adds to the gradients."""
    i, j = masks.unpack(r.work[0, todo.first + n])
    q_at, k_at = _chunk(i, todo.q), _chunk(j, todo.k)
    p, ds = r.p[slot, : todo.q, : todo.k], r.ds[slot, : todo.q, : todo.k]
    if plan.blocks.transpose_ahead:
        r.dvT[:, k_at] += _dot(plan, r.d_outT[:, q_at], p, (1, 0))
        r.dkT[:, k_at] += _dot(plan, r.qT[:, q_at], ds, (1, 0))
    else:
        r.dvT[:, k_at] += _dot(plan, r.d_out[q_at], p, (0, 0))
        r.dkT[:, k_at] += _dot(plan, r.q[q_at], ds, (0, 0))
    r.dqT[:, q_at] += _dot(plan, r.kT[:, k_at], ds, (1, 1))


def _folded(x_qk: Array) -> Array:
    """`[q, k]` -> `[8, 128]` with the same sum."""
    q, k = x_qk.shape
    rows = x_qk.reshape(q // _SUBLANES, _SUBLANES, k).sum(0)
    return rows.reshape(_SUBLANES, k // LANES, LANES).sum(1)


def _distance(plan: _Plan, r: _Refs, todo: _List, i: Any, j: Any) -> Array:
    """`[q, k]` float32: how far a query stands from a key."""
    q_first, k_first = _firsts(plan, r, todo, i, j)
    between = masks.columns(todo.q) + (q_first - k_first)
    pieces = [jnp.abs(between - (x + masks.row(LANES))) for x in range(0, todo.k, LANES)]
    return jnp.concatenate(pieces, axis=1).astype(jnp.float32)


def _firsts(plan: _Plan, r: _Refs, todo: _List, i: Any, j: Any) -> tuple[Any, Any]:
    """The positions of a chunk's first query and first key."""
    q_first = pl.program_id(4) * plan.blocks.q + i * todo.q
    k_first = pl.program_id(2) * plan.blocks.kv + j * todo.k
    return r.scalars[pl.program_id(0), masks.Q_OFFSET] + q_first, k_first


def _masked(plan: _Plan, r: _Refs, todo: _List, scores_qk: Array, i: Any, j: Any) -> Array:
    """`-inf` where a query does not see a key; by pieces of 128 keys, which share all that depends on the query alone.

    Where there is no table, keys are counted from their query: that is a constant, and the bounds are scalars.
    """
    q, k = todo.q, todo.k
    q_first, k_first = _firsts(plan, r, todo, i, j)
    parts = plan.parts if plan.band is None else plan.parts._replace(causal=False, window=None)
    start = masks.columns(q) if parts.causal or parts.window is not None else 0
    prefix, length = (r.scalars[pl.program_id(0), x] - k_first for x in (masks.PREFIX_LENGTH, masks.KV_LENGTH))
    if plan.parts.prefix or plan.parts.length:
        prefix, length = prefix - start, length - start
    ends = masks.bounds(parts, prefix, length, q_first - k_first)
    pieces = []
    for x in range(0, k, LANES):
        k_at = x + masks.row(LANES)
        ids: tuple[Array, ...] = ()
        pattern = None
        if plan.parts.segments:
            ids = r.id_columns[_chunk(i, q)], r.ids[1][:, pl.ds(pl.multiple_of(j * k + x, LANES), LANES)]
        if plan.parts.pattern is not None:
            pattern = masks.pattern_sees(plan.parts.pattern, q_first + masks.columns(q), k_first + k_at)
        see = masks.visible(ends, pattern, k_at - start, ids)
        scores = scores_qk[:, x : x + LANES]
        if plan.band is not None:
            scores = jnp.minimum(scores, r.band[pl.ds(plan.band.at(q_first - k_first - x), q)])
        pieces.append(scores if see is None else jnp.where(see, scores, -jnp.inf))
    return jnp.concatenate(pieces, axis=1)
