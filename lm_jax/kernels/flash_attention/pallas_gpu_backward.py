"""The backward pass of attention on NVIDIA Hopper, in Pallas Mosaic GPU: one kernel, or two that are deterministic.

A block of keys sums the gradients of its keys and values in registers, over the queries that see them; the query heads
that share a key head follow one another there. From the same probabilities, computed anew from the log-sum-exp of the
forward pass, come the gradients of the queries, which each block adds to those of the others in global memory, by TMA:
5 products of matrices (FlashAttention-3, Shah et al. 2024, arXiv:2407.08608). Which block adds first is left to the
chip, so the last bits of the queries' gradients differ from run to run.

Where they must not, the first kernel leaves them out and a second one sums them over the keys of each block of queries:
7 products, and results that are the same, bit for bit, every time.

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
_SHARE = 64  # numbers of a row of queries' gradients that a warpgroup adds: a tile's are 8,192, 64 x 64 for each


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
    fused: bool  # gradients of queries are added up beside those of keys and values
    one_loop: bool  # over tiles and query heads
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
    d_s: Any  # [stages, 2, k, q]: gradients of scores; only fused, as d_q and both
    d_q: Any  # [2, 64, 64]: each warpgroup's share of a tile's
    keys_came: Any
    came: Any
    free: Any
    both: Any  # warpgroups have come to the same place


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
    call: Call,
    lse: Array,
    delta: Array,
    d_out: Array,
    blocks: GpuBlocks,
    *,
    deterministic: bool,
    interpret: Any = None,
) -> tuple[Array, Array, Array]:
    """The gradients of queries, keys and values, in their shapes and dtypes.

    Args:
      call: one that `pallas_gpu.refuses` lets pass.
      lse: `[B, T, N]` float32, `-inf` where a query sees nothing.
      delta: `[B, T, N]` float32, `sum(out * d_out) - d_lse`.
      d_out: `[B, T, N, H]` in the dtype of the queries.
      blocks: the cut.
      deterministic: by two kernels, each of whose sums has one order.
      interpret: what `plgpu.kernel` takes to run on any machine, slowly; None: for the chip.
    """
    T, S = call.q_BTNH.shape[1], call.k_BSKH.shape[1]
    lse2 = jnp.where(lse == -jnp.inf, -LOWEST, lse * LOG2E)
    rows = {"lse2": jnp.swapaxes(lse2, 1, 2), "delta": jnp.swapaxes(delta, 1, 2)}
    if deterministic:
        d_k, d_v = _run(call, d_out, rows, blocks, "keys", interpret)
        (d_q,) = _run(call, d_out, rows, blocks, "queries", interpret)
    else:
        d_k, d_v, sums = _run(call, d_out, rows, blocks, "fused", interpret)
        d_q = (sums * call.scale).astype(call.q_BTNH.dtype)
    return d_q[:, :T], d_k[:, :S], d_v[:, :S]


def _run(
    call: Call, d_out: Array, rows: dict[str, Array], blocks: GpuBlocks, kind: str, interpret: Any
) -> tuple[Array, ...]:
    """One of the kernels: `fused`, `keys` or `queries`."""
    B, T, N, H = call.q_BTNH.shape
    for_keys = kind != "queries"
    tile = {"fused": blocks.fused_q, "keys": blocks.dkv_q, "queries": blocks.dq_kv}[kind]
    q_block, kv_block = (tile, _BLOCK) if for_keys else (_BLOCK, tile)
    T, S = tiles.up(T, q_block), tiles.up(call.k_BSKH.shape[1], kv_block)
    work = tiles.work_of(call, T, S, q_block, kv_block, for_keys=for_keys)
    work = tiles.marked(work) if for_keys else work
    plan = _Plan(
        parts=tiles.parts_of(call, S),
        own=work.counts.shape[0] > 1,
        group=call.group,
        tile=tile,
        stages={"fused": blocks.fused_stages, "keys": blocks.dkv_stages, "queries": blocks.dq_stages}[kind],
        H=H,
        dtype=call.q_BTNH.dtype,
        scale=call.scale,
        fused=kind == "fused",
        one_loop=kind == "keys" or blocks.fused_one_loop,
        interpreted=interpret is not None,
    )
    q, d_out = (tiles.padded(x, T) for x in (call.q_BTNH, d_out))
    k, v = (tiles.padded(x, S) for x in (call.k_BSKH, call.v_BSKH))
    # A query that was added has no gradient to give, and no probabilities either.
    lse2, delta = tiles.padded(rows["lse2"], T, -LOWEST, dim=2), tiles.padded(rows["delta"], T, dim=2)
    results = (k, v) if for_keys else (q,)
    return machines.launch(
        functools.partial(_keys_kernel if for_keys else _queries_kernel, plan=plan),
        _Operands(q, k, v, d_out, lse2, delta, *work),
        tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in results),
        _key_scratch(plan) if for_keys else _query_scratch(plan),
        (call.k_BSKH.shape[2], S // _BLOCK, B) if for_keys else (N, T // _BLOCK, B),
        "flash_attention_backward" + ("" if plan.fused else f"_{kind}"),
        interpret=interpret,
        added=jnp.zeros((B, T, N, H), jnp.float32) if plan.fused else None,
    )


def _ring(plan: _Plan) -> tuple[Any, Any]:
    """Scratch of both: the rows of each warpgroup, and the tiles that come in."""
    own = machines.tiled(WARPGROUPS, ROWS, plan.H, dtype=plan.dtype)
    return own, machines.tiled(plan.stages, plan.tile, plan.H, dtype=plan.dtype)


def _key_scratch(plan: _Plan) -> tuple[Any, ...]:
    own, ring = _ring(plan)
    numbers = plgpu.SMEM((plan.stages, plan.tile), jnp.float32)
    here = _KeyScratch(
        k=own,
        v=own,
        q=ring,
        d_out=ring,
        lse2=numbers,
        delta=numbers,
        d_s=machines.tiled(plan.stages, WARPGROUPS, ROWS, plan.tile, dtype=plan.dtype) if plan.fused else None,
        d_q=machines.tiled(WARPGROUPS, ROWS, _SHARE, dtype=jnp.float32) if plan.fused else None,
        keys_came=plgpu.Barrier(num_barriers=WARPGROUPS, num_arrivals=2),
        # All of a tile comes on one barrier: each array of barriers takes a register.
        came=plgpu.Barrier(num_barriers=plan.stages, num_arrivals=4),
        free=plgpu.Barrier(num_barriers=plan.stages, num_arrivals=WARPGROUPS),
        both=plgpu.Barrier(num_arrivals=WARPGROUPS) if plan.fused else None,
    )
    tile, grads, share = (ROWS, plan.tile), (ROWS, plan.H), (ROWS, _SHARE)
    sums = machines.sums_for_interpreter(scores=tile, d_p=tile, d_k=grads, d_v=grads, d_q=share)
    return here, sums if plan.interpreted else None


def _query_scratch(plan: _Plan) -> tuple[Any, ...]:
    own, ring = _ring(plan)
    numbers = plgpu.SMEM((WARPGROUPS, ROWS), jnp.float32)
    came = plgpu.Barrier(num_barriers=plan.stages)
    here = _QueryScratch(
        q=own,
        d_out=own,
        lse2=numbers,
        delta=numbers,
        k=ring,
        v=ring,
        queries_came=plgpu.Barrier(num_barriers=WARPGROUPS, num_arrivals=4),
        k_came=came,
        v_came=came,
        free=plgpu.Barrier(num_barriers=plan.stages, num_arrivals=WARPGROUPS),
    )
    tile = (ROWS, plan.tile)
    sums = machines.sums_for_interpreter(scores=tile, d_p=tile, d_q=(ROWS, plan.H))
    return here, sums if plan.interpreted else None


def _listed(plan: _Plan, o: _Operands) -> tuple[tuple[Any, Any], Any, Any]:
    """Where this block's list stands, how many of it are partly open, and how many there are."""
    at = (jax.lax.axis_index("row") if plan.own else 0), jax.lax.axis_index("block")
    partly = o.counts[*at, 0]
    return at, partly, partly + o.counts[*at, 1]


def _slot(plan: _Plan, u: Any) -> Any:
    return jax.lax.rem(u, jnp.int32(plan.stages))


# --- the gradients of keys and values, and fused those of queries ----------------------------------------------------


def _keys_kernel(o: _Operands, *refs: Any, plan: _Plan) -> None:
    *added, d_k, d_v, (here, sums) = refs

    def compute(warpgroup: Any) -> None:
        machine = Machine(sums, warpgroup)
        block = _Block(plan, o, here, machine, warpgroup, *added)
        grads = (ROWS, plan.H)
        machine.scoped(lambda *sums: _compute_keys(block, sums, (d_k, d_v)), d_k=grads, d_v=grads)

    machines.roles(compute, lambda: _copy_queries(plan, o, here))


class _Block(NamedTuple):
    """What a computing warpgroup works with in one block of keys."""

    plan: _Plan
    o: _Operands
    here: _KeyScratch
    machine: Machine
    warpgroup: Any
    added: Any = None  # [B, T, N, H]: where fused gradients of queries are added


def _copy_queries(plan: _Plan, o: _Operands, here: _KeyScratch) -> None:
    """For each query head of the group, the tiles of the list."""
    row, head = jax.lax.axis_index("row"), jax.lax.axis_index("head")
    at, _, count = _listed(plan, o)

    def one(u: Any, nothing: None) -> None:
        g = jax.lax.div(u, count)
        slot, n = _slot(plan, u), head * plan.group + g
        rows = pl.ds(tiles.unmarked(o.tiles[*at, u - g * count]) * plan.tile, plan.tile)

        @pl.when(u >= plan.stages)
        def _() -> None:
            plgpu.barrier_wait(here.free.at[slot])

        plgpu.copy_gmem_to_smem(o.q.at[row, rows, n], here.q.at[slot], here.came.at[slot])
        plgpu.copy_gmem_to_smem(o.lse2.at[row, n, rows], here.lse2.at[slot], here.came.at[slot])
        plgpu.copy_gmem_to_smem(o.d_out.at[row, rows, n], here.d_out.at[slot], here.came.at[slot])
        plgpu.copy_gmem_to_smem(o.delta.at[row, n, rows], here.delta.at[slot], here.came.at[slot])

    jax.lax.fori_loop(jnp.int32(0), plan.group * count, one, None)


def _compute_keys(b: _Block, sums: Any, results: Any) -> None:
    """The keys of one warpgroup."""
    plan, o, here = b.plan, b.o, b.here
    row, head, block = (jax.lax.axis_index(name) for name in ("row", "head", "block"))
    at, _, count = _listed(plan, o)
    own = machines.rows_of(block, b.warpgroup)
    k, v, came = here.k.at[b.warpgroup], here.v.at[b.warpgroup], here.keys_came.at[b.warpgroup]
    plgpu.copy_gmem_to_smem(o.k.at[row, own, head], k, came)
    plgpu.copy_gmem_to_smem(o.v.at[row, own, head], v, came)
    plgpu.barrier_wait(came)

    def step(g: Any, t: Any, u: Any, again: Callable[[], tuple[Any, Any]] | None = None) -> None:
        slot, tile = _slot(plan, u), o.tiles[*at, t]
        first = tiles.unmarked(tile) * plan.tile

        def shut(p: Array) -> Array:
            queries = first, o.q_ids
            see = machines.visible(plan.parts, o.scalars, row, queries, (own.start, o.k_ids), (ROWS, plan.tile), 1)
            return p if see is None else jnp.where(see, p, jnp.zeros_like(p))

        # One loop with a branch in it: two loops would keep the addresses of both in registers.
        d_s = _keys_step(b, sums, (k, v), slot, lambda p: jax.lax.cond(tile < 0, shut, lambda p: p, p))
        if plan.fused:
            late_g, there = (g, first) if again is None else again()
            _add_queries(b, d_s, slot, (row, there, head * plan.group + late_g))
        b.machine.finish()
        plgpu.barrier_arrive(here.free.at[slot])

    def divided(u: Any) -> tuple[Any, Any]:
        g = jax.lax.div(u, count)
        return g, u - g * count

    def one_of_all(u: Any, _: None) -> None:
        def again() -> tuple[Any, Any]:
            g, t = divided(jax.lax.optimization_barrier(u))
            return g, tiles.unmarked(o.tiles[*at, t]) * plan.tile

        step(*divided(u), u, again)

    def head_of_group(g: Any, _: None) -> None:
        jax.lax.fori_loop(jnp.int32(0), count, lambda t, _: step(g, t, g * count + t), None)

    # Which of the two takes fewer registers differs by size: two loops keep where they are, one computes it again.
    if plan.one_loop:
        jax.lax.fori_loop(jnp.int32(0), plan.group * count, one_of_all, None)
    else:
        jax.lax.fori_loop(jnp.int32(0), jnp.int32(plan.group), head_of_group, None)
    if plan.fused:
        _meet(here.both)  # the other's last gradients of queries are made of these keys too
    k[...] = (b.machine.load(sums[0], still_running=0) * plan.scale).astype(plan.dtype)
    v[...] = b.machine.load(sums[1], still_running=0).astype(plan.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(k, results[0].at[row, own, head])
    plgpu.copy_smem_to_gmem(v, results[1].at[row, own, head])
    plgpu.wait_smem_to_gmem(0)


def _keys_step(b: _Block, sums: Any, own: Any, slot: Any, masked: Callable[[Array], Array]) -> Array:
    """One tile of queries; scores stand as keys x queries. Gives their gradients; a product with them still runs."""
    plan, here, machine, (d_k, d_v), (k, v) = b.plan, b.here, b.machine, sums, own
    q, d_out = here.q.at[slot], here.d_out.at[slot]
    columns = plgpu.Layout.WGMMA.reduce(0)

    def scored(scores: Any) -> Array:
        machine.add_product(scores, k, q.T)
        lse2 = machines.load(here.lse2.at[slot], columns)
        p = tiles.probabilities(machine.load(scores, still_running=0), None, plan.factor, lse2, 1)
        return masked(p.astype(plan.dtype))  # also for gradients: in float32 they would not stay in registers

    def differentiated(d_p: Any) -> Array:
        machine.add_product(d_p, v, d_out.T)
        found = machine.load(d_p, still_running=0)
        delta = machines.load(here.delta.at[slot], columns)
        return tiles.score_gradient(p.astype(jnp.float32), found, delta, 1).astype(plan.dtype)

    # One after the other, as all at once would not fit into registers; the other warpgroup's products run beside.
    plgpu.barrier_wait(here.came.at[slot])
    p = machine.scoped(scored, scores=(ROWS, plan.tile))
    machine.add_product(d_v, p, d_out)
    machine.finish()
    d_s = machine.scoped(differentiated, d_p=(ROWS, plan.tile))
    machine.add_product(d_k, d_s, q)
    return d_s


def _add_queries(b: _Block, d_s: Array, slot: Any, at: tuple[Any, Any, Any]) -> None:
    """Adds a tile's gradients of queries to what other blocks of keys add: each warpgroup half of them, made of the
    keys of both. `at` is the row of the batch, the first query, the query head."""
    plan, here, machine = b.plan, b.here, b.machine
    row, first, head = at
    # As many as tiles: to have met for one says that the other has read all of the one before.
    d_s_here = here.d_s.at[slot]
    # The barrier keeps the compiler from computing addresses ahead of the loop, which registers would then hold.
    mine = jax.lax.optimization_barrier(b.warpgroup)
    d_s_here.at[mine][...] = d_s
    plgpu.commit_smem()
    _meet(here.both)
    by_queries = plan.tile > ROWS  # else each has half of the numbers of all queries
    queries = pl.ds(mine * ROWS if by_queries else 0, ROWS)
    numbers = pl.ds(0 if by_queries else mine * _SHARE, _SHARE)

    def product(d_q: Any) -> Array:
        for w in range(WARPGROUPS):
            machine.add_product(d_q, d_s_here.at[w, :, queries].T, here.k.at[w, :, numbers])
        return machine.load(d_q, still_running=0)

    found = machine.scoped(product, d_q=(ROWS, _SHARE))
    ready = here.d_q.at[mine]
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # of the tile before
    ready[...] = found
    plgpu.commit_smem()
    machine.add_to_global(b.added.at[row, pl.ds(first + queries.start, ROWS), head, numbers], ready)


def _meet(both: Any) -> None:
    plgpu.barrier_arrive(both)
    plgpu.barrier_wait(both)


# --- the gradients of queries ----------------------------------------------------------------------------------------


def _queries_kernel(o: _Operands, result: Any, scratch: Any, *, plan: _Plan) -> None:
    here, sums = scratch

    def compute(warpgroup: Any) -> None:
        machine = Machine(sums, warpgroup)
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
