"""The few places in which the Hopper kernels touch the chip otherwise than its interpreter does.

Pallas' interpreter of GPU kernels (public from jax 0.12 on) has copies, barriers and threads, and no matrix unit that
reads registers, nor copies that add. There sums are kept in shared memory, and products and additions are plain ones;
all else is the kernel itself.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from lm_jax.kernels.flash_attention import pallas_gpu_tiles as tiles
from lm_jax.kernels.flash_attention.pallas_gpu_tiles import KV_LENGTH, PREFIX_LENGTH, Q_OFFSET, ROWS, WARPGROUPS, Parts

Array = jax.Array
# Of the 512 that a thread of each of the three warpgroups could have on average.
_COMPUTE_REGISTERS, _COPY_REGISTERS = 240, 24
_LOAD_TAKES_AN_INDEX = (
    "idx" in inspect.signature(plgpu.load).parameters
)  # it must until jax 0.10, and may not from 0.12


def tiled(*shape: int, dtype: Any) -> Any:
    """Shared memory as copies write it and the matrix unit reads it, in lines of 128 bytes, over multiples of which it
    sums."""
    numbers = 128 // jnp.dtype(dtype).itemsize
    transforms = (plgpu.TilingTransform((8, numbers)), plgpu.SwizzleTransform(128))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


class Machine:
    """Products and sums, on the chip or interpreted.

    Args:
      sums: where sums are kept interpreted, by name, one for each computing warpgroup; None on the chip.
      warpgroup: which of them this is.
    """

    def __init__(self, sums: dict[str, Any] | None, warpgroup: Any) -> None:
        self.sums = sums
        self.warpgroup = warpgroup

    def scoped(self, f: Callable[..., Any], **sums: tuple[int, int]) -> Any:
        """`f` of accumulators of these shapes, in the order given; they start with zeros."""
        if self.sums is None:
            return pl.run_scoped(f, *(plgpu.ACC(shape, jnp.float32) for shape in sums.values()))
        refs = [self.sums[name].at[self.warpgroup] for name in sums]
        for ref, shape in zip(refs, sums.values(), strict=True):
            ref[...] = jnp.zeros(shape, jnp.float32)
        return f(*refs)

    def add_product(self, sums: Any, a: Any, b: Any) -> None:
        """Begins `sums += a @ b`; `a` in shared memory or in registers, `b` in shared memory."""
        if self.sums is None:
            plgpu.wgmma(sums, a, b)
            return
        left = (a if isinstance(a, jax.Array) else a[...]).astype(jnp.float32)
        sums[...] = sums[...] + jnp.dot(left, b[...].astype(jnp.float32), precision="highest")

    def load(self, sums: Any, still_running: int) -> Array:
        """The sums, once all products but so many of the last are done."""
        if self.sums is None:
            return plgpu.wgmma_accumulator_load(sums, wait_n=still_running)
        return sums[...]

    def finish(self) -> None:
        """Waits for all products."""
        if self.sums is None:
            plgpu.wgmma_wait(0)

    def add_to_global(self, there: Any, here: Any) -> None:
        """Begins `there += here`, from shared memory, however many blocks do."""
        if self.sums is None:
            plgpu.copy_smem_to_gmem(here, there, reduction_op="add")
        else:
            there[...] = there[...] + here[...]


def sums_for_interpreter(**shapes: tuple[int, int]) -> dict[str, Any]:
    """The scratch for `Machine.sums`."""
    return {name: plgpu.SMEM((WARPGROUPS, *shape), jnp.float32) for name, shape in shapes.items()}


def roles(compute: Callable[[Any], None], copy: Callable[[], None]) -> None:
    """Two warpgroups compute, with most of the registers, and one copies."""
    warpgroup = jax.lax.axis_index("warpgroup")

    @pl.when(warpgroup < WARPGROUPS)
    def _() -> None:
        plgpu.set_max_registers(_COMPUTE_REGISTERS, action="increase")
        compute(warpgroup)

    @pl.when(warpgroup == WARPGROUPS)
    def _() -> None:
        plgpu.set_max_registers(_COPY_REGISTERS, action="decrease")
        copy()


def launch(
    body: Callable[..., None],
    operands: Any,
    out_type: tuple[jax.ShapeDtypeStruct, ...],
    scratch: Any,
    grid: tuple[int, int, int],
    name: str,
    *,
    interpret: Any,
    added: Array | None = None,
) -> tuple[Array, ...]:
    """Runs a kernel over `(head, block, row)` of a grid, in blocks of two warpgroups that compute and one that copies.

    Args:
      body: of a block, on references to `operands`, `added`, the results and the scratch, in that order.
      operands: a tree of arrays.
      out_type: of the results.
      scratch: a tree of types; None in it is None for `body`.
      interpret: what Pallas takes to run on any machine, slowly; None: for the chip.
      added: to which all blocks add; None: there is no such array. `plgpu.kernel` has no operand that changes, so this
        is built of its parts; it has no rule for `jax.vmap`.

    Returns:
      The results, and what became of `added`.
    """
    changing = [] if added is None else [jax.new_ref(added)]
    mesh = plgpu.Mesh(
        grid=grid,
        grid_names=("head", "block", "row"),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        kernel_name=name,
    )

    def block(*refs: Any) -> None:
        pl.run_scoped(functools.partial(body, *refs), scratch, collective_axes="warpgroup")

    results = pl.kernel(
        block,
        out_type=out_type,
        mesh=mesh,
        compiler_params=plgpu.CompilerParams(approx_math=True),
        name=name,
        **({} if interpret is None else {"interpret": interpret}),
    )(operands, *changing)
    return (*results, *(ref[...] for ref in changing))


def rows_of(block: Any, warpgroup: Any) -> Any:
    """The rows of a warpgroup in a block."""
    return pl.ds(block * (WARPGROUPS * ROWS) + warpgroup * ROWS, ROWS)


def load(ref: Any, layout: Any, optimized: bool = True) -> Array:
    """What a reference holds, in registers of that layout."""
    index: tuple[Any, ...] = ((),) if _LOAD_TAKES_AN_INDEX else ()
    return plgpu.load(ref, *index, layout=layout, optimized=optimized)


def visible(
    parts: Parts,
    scalars: Any,
    row: Any,
    queries: tuple[Any, Any],
    keys: tuple[Any, Any],
    shape: tuple[int, int],
    query_dim: int,
) -> Any:
    """Which scores of a tile count, None where all do (see `pallas_gpu_tiles.visible`).

    Args:
      scalars: `[B, 3]`; row: which of them.
      queries, keys: where the tile begins among them, and the reference of their ids.
      query_dim: which dimension of `shape` is the queries'.
    """
    layout = plgpu.Layout.WGMMA

    def positions(first: Any, dim: int) -> Array:
        return plgpu.broadcasted_iota(jnp.int32, shape, dim, layout=layout) + first

    def ids(first: Any, ref: Any, dim: int) -> Array:
        # Read from global memory: only few tiles of a row are on the edge of a document.
        one = load(ref.at[row, pl.ds(first, shape[dim])], layout.reduce(1 - dim), optimized=False)
        return jax.lax.broadcast_in_dim(one, shape, (dim,))

    key_dim = 1 - query_dim
    offset = scalars[row, Q_OFFSET] if parts.q_offset is None else parts.q_offset
    prefix = scalars[row, PREFIX_LENGTH] if parts.prefix else None
    length = scalars[row, KV_LENGTH] if parts.length is None else parts.length
    both = (ids(*queries, query_dim), ids(*keys, key_dim)) if parts.segments else None
    q_at, k_at = positions(queries[0] + offset, query_dim), positions(keys[0], key_dim)
    return tiles.visible(parts, prefix, length, q_at, k_at, both)
