"""The backward pass of attention on NVIDIA Hopper, two Pallas kernels in Mosaic GPU.

One sums the gradients of keys and values over the queries that see them, the other those of queries over their keys.
Each computes the probabilities anew from the log-sum-exp of the forward pass: 7 products of matrices in all, where one
kernel that adds the gradients of queries in global memory would need 5 (FlashAttention-3, Shah et al. 2024,
arXiv:2407.08608). For that no sum depends on which block runs first: results are the same, bit for bit, every time. The
query heads that share a key head follow one another inside of a block, so that their sums too stay in registers.

Shapes: B batch, T queries, S keys, N query heads, K key-value heads, H head dim, q and k queries and keys of a tile.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from lm_jax.kernels.flash_attention import pallas_gpu_machine as machines
from lm_jax.kernels.flash_attention import pallas_gpu_tiles as tiles
from lm_jax.kernels.flash_attention.implementation import Call
from lm_jax.kernels.flash_attention.pallas_gpu_machine import Machine
from lm_jax.kernels.flash_attention.pallas_gpu_tiles import LOG2E, LOWEST, ROWS, WARPGROUPS, GpuBlocks, Parts

Array = jax.Array
_BLOCK = WARPGROUPS * ROWS  # of what the gradients belong to


class _Plan(NamedTuple):
    """What a kernel knows when it is traced."""

    parts: Parts
    own: bool  # each row of the batch has lists of its own
    group: int
    tile: int  # the queries or keys that come in one after another
    stages: int
    H: int
    dtype: Any
    scale: float
    interpreted: bool

    @property
    def factor(self) -> float:
        return self.scale * LOG2E


class _Operands(NamedTuple):
    """Of both kernels."""

    q: Any
    k: Any
    v: Any
    d_out: Any
    lse2: Any  # [B, N, T]: to base 2
    delta: Any  # [B, N, T]
    counts: Any
    tiles: Any
    scalars: Any
    q_ids: Any
    k_ids: Any


class _KeyScratch(NamedTuple):
    """Where gradients of keys and values are summed."""

    k: Any  # [2, k, H]: each warpgroup's own, and in the end their gradients
    v: Any
    q: Any  # [stages, q, H]
    d_out: Any
    lse2: Any  # [stages, q]
    delta: Any
    keys_came: Any
    came: Any
    free: Any


class _QueryScratch(NamedTuple):
    """Where gradients of queries are summed."""

    q: Any  # [2, q, H]: each warpgroup's own, and in the end their gradients
    d_out: Any
    lse2: Any  # [2, q]
    delta: Any
    k: Any  # [stages, k, H]
    v: Any
    queries_came: Any
    k_came: Any
    v_came: Any
    free: Any


def backward(
    call: Call, lse: Array, delta: Array, d_out: Array, blocks: GpuBlocks, *, interpret: Any = None
) -> tuple[Array, Array, Array]:
    """The gradients of queries, keys and values, in their shapes and dtypes.

    Args:
      call: one that `pallas_gpu.refuses` lets pass.
      lse: `[B, T, N]` float32, `-inf` where a query sees nothing.
      delta: `[B, T, N]` float32, `sum(out * d_out) - d_lse`.
      d_out: `[B, T, N, H]` in the dtype of the queries.
      blocks: the cut.
      interpret: what `plgpu.kernel` takes to run on any machine, slowly; None: for the chip.
    """
    T, S = call.q_BTNH.shape[1], call.k_BSKH.shape[1]
    lse2 = jnp.where(lse == -jnp.inf, -LOWEST, lse * LOG2E)
    rows = {"lse2": jnp.swapaxes(lse2, 1, 2), "delta": jnp.swapaxes(delta, 1, 2)}
    d_k, d_v = _run(call, d_out, rows, blocks, for_keys=True, interpret=interpret)
    (d_q,) = _run(call, d_out, rows, blocks, for_keys=False, interpret=interpret)
    return d_q[:, :T], d_k[:, :S], d_v[:, :S]


def _run(
    call: Call, d_out: Array, rows: dict[str, Array], blocks: GpuBlocks, *, for_keys: bool, interpret: Any
) -> tuple[Array, ...]:
    """One of the two kernels."""
    B, T, N, H = call.q_BTNH.shape
    q_block, kv_block = (blocks.dkv_q, _BLOCK) if for_keys else (_BLOCK, blocks.dq_kv)
    T, S = tiles.up(T, q_block), tiles.up(call.k_BSKH.shape[1], kv_block)
    work = tiles.work_of(call, T, S, q_block, kv_block, for_keys=for_keys)
    plan = _Plan(
        parts=tiles.parts_of(call, S),
        own=work.counts.shape[0] > 1,
        group=call.group,
        tile=q_block if for_keys else kv_block,
        stages=blocks.dkv_stages if for_keys else blocks.dq_stages,
        H=H,
        dtype=call.q_BTNH.dtype,
        scale=call.scale,
        interpreted=interpret is not None,
    )
    q, d_out = (tiles.padded(x, T) for x in (call.q_BTNH, d_out))
    k, v = (tiles.padded(x, S) for x in (call.k_BSKH, call.v_BSKH))
    # A query that was added has no gradient to give, and no probabilities either.
    lse2, delta = tiles.padded(rows["lse2"], T, -LOWEST, dim=2), tiles.padded(rows["delta"], T, dim=2)
    results = (k, v) if for_keys else (q,)
    found: tuple[Array, ...] = plgpu.kernel(
        functools.partial(_keys_kernel if for_keys else _queries_kernel, plan=plan),
        out_type=tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in results),
        scratch_types=_key_scratch(plan) if for_keys else _query_scratch(plan),
        grid=(call.k_BSKH.shape[2], S // _BLOCK, B) if for_keys else (N, T // _BLOCK, B),
        grid_names=("head", "block", "row"),
        num_threads=machines.THREADS,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name=f"flash_attention_backward_{'keys' if for_keys else 'queries'}",
        **({} if interpret is None else {"interpret": interpret}),
    )(q, k, v, d_out, lse2, delta, *work)
    return found


def _scratch(plan: _Plan, **sums: tuple[int, int]) -> tuple[Any, ...]:
    """What both have: their own rows, a ring of tiles; then barriers."""
    width = 128 if plan.tile % 64 == 0 else 64  # a product sums over a tile, whose rows are 2 bytes a number
    own = machines.tiled(WARPGROUPS, ROWS, plan.H, dtype=plan.dtype, width=width)
    ring = machines.tiled(plan.stages, plan.tile, plan.H, dtype=plan.dtype, width=width)
    return own, ring, ([machines.sums_for_interpreter(**sums)] if plan.interpreted else [])


def _key_scratch(plan: _Plan) -> tuple[Any, ...]:
    tile, grads = (ROWS, plan.tile), (ROWS, plan.H)
    own, ring, sums = _scratch(plan, scores=tile, d_p=tile, d_k=grads, d_v=grads)
    numbers = plgpu.SMEM((plan.stages, plan.tile), jnp.float32)
    # All of a tile comes on one barrier: each array of barriers takes a register.
    came = plgpu.Barrier(num_barriers=plan.stages, num_arrivals=4)
    free = plgpu.Barrier(num_barriers=plan.stages, num_arrivals=WARPGROUPS)
    own_came = plgpu.Barrier(num_barriers=WARPGROUPS, num_arrivals=2)
    return (*_KeyScratch(own, own, ring, ring, numbers, numbers, own_came, came, free), *sums)


def _query_scratch(plan: _Plan) -> tuple[Any, ...]:
    tile = (ROWS, plan.tile)
    own, ring, sums = _scratch(plan, scores=tile, d_p=tile, d_q=(ROWS, plan.H))
    numbers = plgpu.SMEM((WARPGROUPS, ROWS), jnp.float32)
    came = plgpu.Barrier(num_barriers=plan.stages)
    free = plgpu.Barrier(num_barriers=plan.stages, num_arrivals=WARPGROUPS)
    own_came = plgpu.Barrier(num_barriers=WARPGROUPS, num_arrivals=4)
    return (*_QueryScratch(own, own, numbers, numbers, ring, ring, own_came, came, came, free), *sums)


def _listed(plan: _Plan, o: _Operands) -> tuple[tuple[Any, Any], Any, Any]:
    """Where this block's list stands, how many of it are partly open, and how many there are."""
    at = (jax.lax.axis_index("row") if plan.own else 0), jax.lax.axis_index("block")
    partly = o.counts[*at, 0]
    return at, partly, partly + o.counts[*at, 1]


def _slot(plan: _Plan, u: Any) -> Any:
    return jax.lax.rem(u, jnp.int32(plan.stages))


# --- the gradients of keys and values --------------------------------------------------------------------------------


def _keys_kernel(*refs: Any, plan: _Plan) -> None:
    n, m = len(_Operands._fields), len(_KeyScratch._fields)
    o, results, s, sums = _Operands._make(refs[:n]), refs[n : n + 2], refs[n + 2 : n + 2 + m], refs[n + 2 + m :]
    here = _KeyScratch._make(s)

    def compute(warpgroup: Any) -> None:
        machine = Machine(sums[0] if sums else None, warpgroup)
        grads = (ROWS, plan.H)
        machine.scoped(
            lambda d_k, d_v: _compute_keys(plan, o, results, here, machine, (d_k, d_v), warpgroup), d_k=grads, d_v=grads
        )

    machines.roles(compute, lambda: _copy_queries(plan, o, here))


def _copy_queries(plan: _Plan, o: _Operands, here: _KeyScratch) -> None:
    """For each query head of the group, the tiles of the list."""
    row, head = jax.lax.axis_index("row"), jax.lax.axis_index("head")
    at, _, count = _listed(plan, o)

    def one(g: Any, t: Any, nothing: None) -> None:
        u = g * count + t
        slot, n = _slot(plan, u), head * plan.group + g
        rows = pl.ds(o.tiles[*at, t] * plan.tile, plan.tile)

        @pl.when(u >= plan.stages)
        def _() -> None:
            plgpu.barrier_wait(here.free.at[slot])

        plgpu.copy_gmem_to_smem(o.q.at[row, rows, n], here.q.at[slot], here.came.at[slot])
        plgpu.copy_gmem_to_smem(o.lse2.at[row, n, rows], here.lse2.at[slot], here.came.at[slot])
        plgpu.copy_gmem_to_smem(o.d_out.at[row, rows, n], here.d_out.at[slot], here.came.at[slot])
        plgpu.copy_gmem_to_smem(o.delta.at[row, n, rows], here.delta.at[slot], here.came.at[slot])

    def head_of_group(g: Any, nothing: None) -> None:
        jax.lax.fori_loop(jnp.int32(0), count, functools.partial(one, g), None)

    jax.lax.fori_loop(jnp.int32(0), jnp.int32(plan.group), head_of_group, None)


def _compute_keys(
    plan: _Plan, o: _Operands, results: Any, here: _KeyScratch, machine: Machine, sums: Any, warpgroup: Any
) -> None:
    """The keys of one warpgroup."""
    row, head, block = (jax.lax.axis_index(name) for name in ("row", "head", "block"))
    at, partly, count = _listed(plan, o)
    own = machines.rows_of(block, warpgroup)
    k, v, came = here.k.at[warpgroup], here.v.at[warpgroup], here.keys_came.at[warpgroup]
    plgpu.copy_gmem_to_smem(o.k.at[row, own, head], k, came)
    plgpu.copy_gmem_to_smem(o.v.at[row, own, head], v, came)
    plgpu.barrier_wait(came)

    def see(t: Any) -> Any:
        queries = o.tiles[*at, t] * plan.tile, o.q_ids
        return machines.visible(plan.parts, o.scalars, row, queries, (own.start, o.k_ids), (ROWS, plan.tile), 1)

    def step(g: Any, masked: bool, t: Any, _: None) -> None:
        slot = _slot(plan, g * count + t)
        _keys_step(plan, here, machine, sums, (k, v), slot, (lambda: see(t)) if masked else lambda: None)

    def head_of_group(g: Any, nothing: None) -> None:
        jax.lax.fori_loop(jnp.int32(0), partly, functools.partial(step, g, True), None)
        jax.lax.fori_loop(partly, count, functools.partial(step, g, False), None)

    jax.lax.fori_loop(jnp.int32(0), jnp.int32(plan.group), head_of_group, None)
    k[...] = (machine.load(sums[0], still_running=0) * plan.scale).astype(plan.dtype)
    v[...] = machine.load(sums[1], still_running=0).astype(plan.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(k, results[0].at[row, own, head])
    plgpu.copy_smem_to_gmem(v, results[1].at[row, own, head])
    plgpu.wait_smem_to_gmem(0)


def _keys_step(
    plan: _Plan, here: _KeyScratch, machine: Machine, sums: Any, own: Any, slot: Any, see: Callable[[], Any]
) -> None:
    """One tile of queries; scores stand as keys x queries."""
    (d_k, d_v), (k, v) = sums, own
    q, d_out = here.q.at[slot], here.d_out.at[slot]
    columns = plgpu.Layout.WGMMA.reduce(0)

    def scored(scores: Any) -> Array:
        machine.add_product(scores, k, q.T)
        lse2 = machines.load(here.lse2.at[slot], columns)
        return tiles.probabilities(machine.load(scores, still_running=0), see(), plan.factor, lse2, 1)

    def differentiated(d_p: Any) -> Array:
        machine.add_product(d_p, v, d_out.T)
        found = machine.load(d_p, still_running=0)
        delta = machines.load(here.delta.at[slot], columns)
        return tiles.score_gradient(p, found, delta, 1).astype(plan.dtype)

    # One after the other, as all at once would not fit into registers; the other warpgroup's products run beside.
    plgpu.barrier_wait(here.came.at[slot])
    p = machine.scoped(scored, scores=(ROWS, plan.tile))
    machine.add_product(d_v, p.astype(plan.dtype), d_out)
    machine.finish()
    machine.add_product(d_k, machine.scoped(differentiated, d_p=(ROWS, plan.tile)), q)
    machine.finish()
    plgpu.barrier_arrive(here.free.at[slot])


# --- the gradients of queries ----------------------------------------------------------------------------------------


def _queries_kernel(*refs: Any, plan: _Plan) -> None:
    n, m = len(_Operands._fields), len(_QueryScratch._fields)
    o, result, s, sums = _Operands._make(refs[:n]), refs[n], refs[n + 1 : n + 1 + m], refs[n + 1 + m :]
    here = _QueryScratch._make(s)

    def compute(warpgroup: Any) -> None:
        machine = Machine(sums[0] if sums else None, warpgroup)
        machine.scoped(lambda d_q: _compute_queries(plan, o, result, here, machine, d_q, warpgroup), d_q=(ROWS, plan.H))

    machines.roles(compute, lambda: _copy_keys(plan, o, here))


def _copy_keys(plan: _Plan, o: _Operands, here: _QueryScratch) -> None:
    row, head = jax.lax.axis_index("row"), jax.lax.div(jax.lax.axis_index("head"), jnp.int32(plan.group))
    at, _, count = _listed(plan, o)

    def one(t: Any, nothing: None) -> None:
        slot = _slot(plan, t)
        rows = pl.ds(o.tiles[*at, t] * plan.tile, plan.tile)

        @pl.when(t >= plan.stages)
        def _() -> None:
            plgpu.barrier_wait(here.free.at[slot])

        plgpu.copy_gmem_to_smem(o.k.at[row, rows, head], here.k.at[slot], here.k_came.at[slot])
        plgpu.copy_gmem_to_smem(o.v.at[row, rows, head], here.v.at[slot], here.v_came.at[slot])

    jax.lax.fori_loop(jnp.int32(0), count, one, None)


def _compute_queries(
    plan: _Plan, o: _Operands, result: Any, here: _QueryScratch, machine: Machine, d_q: Any, warpgroup: Any
) -> None:
    """The queries of one warpgroup."""
    row, head, block = (jax.lax.axis_index(name) for name in ("row", "head", "block"))
    at, partly, count = _listed(plan, o)
    own = machines.rows_of(block, warpgroup)
    q, came = here.q.at[warpgroup], here.queries_came.at[warpgroup]
    plgpu.copy_gmem_to_smem(o.q.at[row, own, head], q, came)
    plgpu.copy_gmem_to_smem(o.d_out.at[row, own, head], here.d_out.at[warpgroup], came)
    plgpu.copy_gmem_to_smem(o.lse2.at[row, head, own], here.lse2.at[warpgroup], came)
    plgpu.copy_gmem_to_smem(o.delta.at[row, head, own], here.delta.at[warpgroup], came)
    plgpu.barrier_wait(came)
    lines = plgpu.Layout.WGMMA.reduce(1)
    numbers = machines.load(here.lse2.at[warpgroup], lines), machines.load(here.delta.at[warpgroup], lines)

    def see(t: Any) -> Any:
        keys = o.tiles[*at, t] * plan.tile, o.k_ids
        return machines.visible(plan.parts, o.scalars, row, (own.start, o.q_ids), keys, (ROWS, plan.tile), 0)

    def step(masked: bool, t: Any, _: None) -> None:
        slot = _slot(plan, t)
        own_refs = q, here.d_out.at[warpgroup]
        _queries_step(plan, here, machine, d_q, own_refs, numbers, slot, (lambda: see(t)) if masked else lambda: None)

    jax.lax.fori_loop(jnp.int32(0), partly, functools.partial(step, True), None)
    jax.lax.fori_loop(partly, count, functools.partial(step, False), None)
    q[...] = (machine.load(d_q, still_running=0) * plan.scale).astype(plan.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(q, result.at[row, own, head])
    plgpu.wait_smem_to_gmem(0)


def _queries_step(
    plan: _Plan,
    here: _QueryScratch,
    machine: Machine,
    d_q: Any,
    own: Any,
    numbers: tuple[Array, Array],
    slot: Any,
    see: Callable[[], Any],
) -> None:
    """One tile of keys; scores stand as queries x keys."""
    (q, d_out), (lse2, delta) = own, numbers
    k, v = here.k.at[slot], here.v.at[slot]

    def products(scores: Any, d_p: Any) -> None:
        machine.add_product(scores, q, k.T)
        machine.add_product(d_p, d_out, v.T)
        p = tiles.probabilities(machine.load(scores, still_running=1), see(), plan.factor, lse2, 0)
        d_s = tiles.score_gradient(p, machine.load(d_p, still_running=0), delta, 0)
        machine.add_product(d_q, d_s.astype(plan.dtype), k)
        machine.finish()

    plgpu.barrier_wait(here.k_came.at[slot])
    plgpu.barrier_wait(here.v_came.at[slot])
    machine.scoped(products, scores=(ROWS, plan.tile), d_p=(ROWS, plan.tile))
    plgpu.barrier_arrive(here.free.at[slot])
