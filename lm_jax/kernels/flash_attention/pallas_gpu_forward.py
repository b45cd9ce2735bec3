"""The forward pass of attention on NVIDIA Hopper, one Pallas kernel in Mosaic GPU.

After FlashAttention-3 (Shah et al. 2024, arXiv:2407.08608): one warpgroup copies keys and values into shared memory by
TMA, two compute, 64 queries each. A computing warpgroup has two products under way at once, the scores of this tile and
the values of the tile before, and takes the matrix unit in turn with the other, so that the softmax of the one runs
beside the products of the other. The probabilities stay in registers. Which tiles a block of queries visits stands in a
list (`schedule.live_tiles`): dead tiles are not in it, and open ones meet no mask.

Shapes: B batch, T queries, S keys, N query heads, K key-value heads, H head dim, q and k queries and keys of a tile.
"""

from __future__ import annotations

import functools
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


class _Plan(NamedTuple):
    """What the kernel knows when it is traced."""

    parts: Parts
    own: bool  # each row of the batch has lists of its own
    group: int
    kv: int
    stages: int
    q_blocks: int
    H: int
    dtype: Any
    factor: float
    interpreted: bool


class _Refs(NamedTuple):
    """The kernel's operands, results and scratch."""

    q: Any
    k: Any
    v: Any
    counts: Any
    tiles: Any
    scalars: Any
    q_ids: Any
    k_ids: Any
    out: Any
    lse: Any
    q_here: Any  # [2, q, H]: each warpgroup's queries, and in the end its output
    k_here: Any  # [stages, k, H]
    v_here: Any
    lse_here: Any  # [2, q]
    q_came: Any
    k_came: Any
    v_came: Any
    k_free: Any
    v_free: Any
    turn: Any  # of a warpgroup to begin products


def forward(call: Call, blocks: GpuBlocks, *, interpret: Any = None) -> tuple[Array, Array]:
    """Attention and the logarithm of its sums, without sinks.

    Args:
      call: one that `pallas_gpu.refuses` lets pass.
      blocks: the cut.
      interpret: what `plgpu.kernel` takes to run on any machine, slowly; None: for the chip.

    Returns:
      `[B, T, N, H]` in the dtype of the queries and `[B, T, N]` float32, `-inf` where a query sees nothing.
    """
    B, T, N, H = call.q_BTNH.shape
    q_block = WARPGROUPS * ROWS
    T_up, S_up = tiles.up(T, q_block), tiles.up(call.k_BSKH.shape[1], blocks.forward_kv)
    work = tiles.work_of(call, T_up, S_up, q_block, blocks.forward_kv, for_keys=False)
    plan = _Plan(
        parts=tiles.parts_of(call, S_up),
        own=work.counts.shape[0] > 1,
        group=call.group,
        kv=blocks.forward_kv,
        stages=min(blocks.forward_stages, S_up // blocks.forward_kv),
        q_blocks=T_up // q_block,
        H=H,
        dtype=call.q_BTNH.dtype,
        factor=call.scale * LOG2E,
        interpreted=interpret is not None,
    )
    q = tiles.padded(call.q_BTNH, T_up)
    k, v = (tiles.padded(x, S_up) for x in (call.k_BSKH, call.v_BSKH))
    out, lse = machines.launch(
        functools.partial(_kernel, plan=plan),
        (q, k, v, *work),
        (jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((B, N, T_up), jnp.float32)),
        _scratch(plan),
        (N, plan.q_blocks, B),
        "flash_attention_forward",
        interpret=interpret,
    )
    return out[:, :T], jnp.swapaxes(lse, 1, 2)[:, :T]


def _scratch(plan: _Plan) -> tuple[Any, ...]:
    keys = machines.tiled(plan.stages, plan.kv, plan.H, dtype=plan.dtype)
    came = plgpu.Barrier(num_barriers=plan.stages)
    free = plgpu.Barrier(num_barriers=plan.stages, num_arrivals=WARPGROUPS)
    each = plgpu.Barrier(num_barriers=WARPGROUPS)
    sums = machines.sums_for_interpreter(scores=(ROWS, plan.kv), out=(ROWS, plan.H)) if plan.interpreted else None
    return (
        machines.tiled(WARPGROUPS, ROWS, plan.H, dtype=plan.dtype),
        keys,
        keys,
        plgpu.SMEM((WARPGROUPS, ROWS), jnp.float32),
        each,
        came,
        came,
        free,
        free,
        each,
        sums,
    )


def _kernel(operands: Any, out: Any, lse: Any, scratch: Any, *, plan: _Plan) -> None:
    *here, sums = scratch
    r = _Refs._make((*operands, out, lse, *here))
    # The blocks that see most of a causal mask come first, so that short ones fill up the end.
    block = plan.q_blocks - 1 - jax.lax.axis_index("block")
    listed = (jax.lax.axis_index("row") if plan.own else 0), block
    partly, opened = r.counts[*listed, 0], r.counts[*listed, 1]
    # A query block that sees nothing still visits one tile, which its mask shuts, and so finds its zeros.
    count = jnp.maximum(partly + opened, 1)

    def compute(warpgroup: Any) -> None:
        machine = Machine(sums, warpgroup)
        machine.scoped(
            lambda out: _compute(plan, r, machine, out, warpgroup, block, partly, count),
            out=(ROWS, plan.H),
        )

    machines.roles(compute, lambda: _copy(plan, r, listed, count))


def _copy(plan: _Plan, r: _Refs, listed: tuple[Any, Any], count: Any) -> None:
    """Brings the tiles of the list, as far ahead as there is room."""
    row, head = jax.lax.axis_index("row"), jax.lax.div(jax.lax.axis_index("head"), jnp.int32(plan.group))

    def one(t: Any, _: None) -> None:
        slot = jax.lax.rem(t, jnp.int32(plan.stages))
        at = row, pl.ds(r.tiles[*listed, t] * plan.kv, plan.kv), head
        for source, here, came, free in ((r.k, r.k_here, r.k_came, r.k_free), (r.v, r.v_here, r.v_came, r.v_free)):

            @pl.when(t >= plan.stages)
            def _(free: Any = free) -> None:
                plgpu.barrier_wait(free.at[slot])

            plgpu.copy_gmem_to_smem(source.at[at], here.at[slot], came.at[slot])

    jax.lax.fori_loop(jnp.int32(0), count, one, None)


def _compute(
    plan: _Plan, r: _Refs, machine: Machine, out: Any, warpgroup: Any, block: Any, partly: Any, count: Any
) -> None:
    """The queries of one warpgroup; `out` are the sums of probabilities times values."""
    row, head = jax.lax.axis_index("row"), jax.lax.axis_index("head")
    q_rows = machines.rows_of(block, warpgroup)
    q = r.q_here.at[warpgroup]
    plgpu.copy_gmem_to_smem(r.q.at[row, q_rows, head], q, r.q_came.at[warpgroup])

    @pl.when(warpgroup == 1)
    def _() -> None:
        plgpu.barrier_arrive(r.turn.at[0])  # the other begins

    step = functools.partial(_step, plan, r, machine, out, warpgroup, block)
    plgpu.barrier_wait(r.q_came.at[warpgroup])
    state = _first(plan, r, machine, warpgroup, block)
    masked = jnp.minimum(jnp.maximum(partly, 1), count)
    state = jax.lax.fori_loop(jnp.int32(1), masked, functools.partial(step, masked=True), state)
    highest, total, p = jax.lax.fori_loop(masked, count, functools.partial(step, masked=False), state)
    last = jax.lax.rem(count - 1, jnp.int32(plan.stages))
    plgpu.barrier_wait(r.v_came.at[last])
    machine.add_product(out, p, r.v_here.at[last])
    found = machine.load(out, still_running=0)
    nothing = total == 0.0
    whole = jnp.where(nothing, 1.0, total)
    q[...] = (found * tiles.along(1.0 / whole, found, 0)).astype(plan.dtype)
    lse = r.lse_here.at[warpgroup]
    lse[...] = jnp.where(nothing, -jnp.inf, highest * (1 / LOG2E) + jnp.log(whole))
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(q, r.out.at[row, q_rows, head])
    plgpu.copy_smem_to_gmem(lse, r.lse.at[row, head, q_rows])
    plgpu.wait_smem_to_gmem(0)


def _first(plan: _Plan, r: _Refs, machine: Machine, warpgroup: Any, block: Any) -> tuple[Array, Array, Array]:
    """The scores of the first tile of the list; there are no values to add yet."""

    def scores(sums: Any) -> Array:
        machine.add_product(sums, r.q_here.at[warpgroup], r.k_here.at[0].T)
        return machine.load(sums, still_running=0)

    plgpu.barrier_wait(r.k_came.at[0])
    found = machine.scoped(scores, scores=(ROWS, plan.kv))
    plgpu.barrier_arrive(r.k_free.at[0])
    rows = plgpu.Layout.WGMMA.reduce(1)
    highest = plgpu.layout_cast(jnp.full((ROWS,), LOWEST, jnp.float32), rows)
    total = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), rows)
    see = _visible(plan, r, warpgroup, block, 0)
    p, highest, total, _ = tiles.softmax_step(found, see, plan.factor, highest, total)
    return highest, total, p.astype(plan.dtype)


def _step(
    plan: _Plan,
    r: _Refs,
    machine: Machine,
    out: Any,
    warpgroup: Any,
    block: Any,
    t: Any,
    state: tuple[Array, Array, Array],
    *,
    masked: bool,
) -> tuple[Array, Array, Array]:
    """The scores of tile `t` and the values of tile `t - 1`, and then the softmax of tile `t`."""
    highest, total, p_before = state
    slot, before = (jax.lax.rem(x, jnp.int32(plan.stages)) for x in (t, t - 1))

    def scores(sums: Any) -> Array:
        machine.add_product(sums, r.q_here.at[warpgroup], r.k_here.at[slot].T)
        machine.add_product(out, p_before, r.v_here.at[before])
        plgpu.barrier_arrive(r.turn.at[1 - warpgroup])
        return machine.load(sums, still_running=1)

    plgpu.barrier_wait(r.k_came.at[slot])
    plgpu.barrier_wait(r.v_came.at[before])
    plgpu.barrier_wait(r.turn.at[warpgroup])
    found = machine.scoped(scores, scores=(ROWS, plan.kv))
    plgpu.barrier_arrive(r.k_free.at[slot])
    if masked and plan.parts.segments:
        machine.finish()  # the ids of the keys take the registers of the probabilities (else a few are spilled)
    see = _visible(plan, r, warpgroup, block, t) if masked else None
    p, highest, total, shrink = tiles.softmax_step(found, see, plan.factor, highest, total)
    sums = machine.load(out, still_running=0)
    plgpu.barrier_arrive(r.v_free.at[before])
    out[...] = sums * tiles.along(shrink, sums, 0)
    return highest, total, p.astype(plan.dtype)


def _visible(plan: _Plan, r: _Refs, warpgroup: Any, block: Any, t: Any) -> Any:
    row = jax.lax.axis_index("row")
    tile = r.tiles[row if plan.own else 0, block, t]
    queries = machines.rows_of(block, warpgroup).start, r.q_ids
    return machines.visible(plan.parts, r.scalars, row, queries, (tile * plan.kv, r.k_ids), (ROWS, plan.kv), 0)
