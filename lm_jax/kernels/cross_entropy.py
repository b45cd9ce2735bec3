"""Cross-entropy of a linear output layer, a chunk of rows at a time.

The `B x T x V` array of logits never exists: a chunk's logits are made, used for the loss and, where gradients are
wanted, for the gradients of the hidden states and of the output weight at once, and forgotten. So the backward pass
computes nothing again, and the three products are all there is.

It runs as one `shard_map` over the whole mesh: each device sums over its own rows and its own part of the vocabulary,
and the sums cross the mesh once, behind the last chunk.

Shapes: B batch, T length, D embed, V vocabulary (on a device: v), R rows of a chunk.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lm_jax.kernels.products import over_rows
from lm_jax.sharding import axis_size, partition, platform

Array = jax.Array
# Of float32 logits a device; large enough to keep a matrix unit busy, small beside a model. Each chunk reads and writes
# the sum of the weight's gradients: on an H200 that takes longer than its product where a chunk has less than 900 rows
# (configs/1b.py compiled for an H200, 8 x 2,048 tokens: a step moves 209 GB with 2,048 rows, 228 with 512).
_CHUNK_BYTES, _CHUNK_BYTES_OF_A_GPU = 2**26, 2**28


def chunk_bytes() -> int:
    """Of float32 logits that a device of the current mesh makes at a time."""
    return _CHUNK_BYTES_OF_A_GPU if platform() in ("gpu", "cuda") else _CHUNK_BYTES


class Sums(NamedTuple):
    """Sums over the rows that count: `total` = `cross_entropy` + z_loss * `log_z_squared`. Only `total` has a
    gradient."""

    total: Array
    cross_entropy: Array
    log_z_squared: Array


class _Static(NamedTuple):
    z_loss: float
    soft_cap: float | None
    chunk: int | None
    vocab_axis: str | None  # the mesh axis that the vocabulary is split over
    row_axes: tuple[str, ...]  # the mesh axes that rows are split over
    transposed: bool  # whether the weight's gradient is made as [v, D]


def cross_entropy(
    x_BTD: Array,
    w_DV: Array,
    targets_BT: Array,
    mask_BT: Array,
    *,
    z_loss: float = 0.0,
    soft_cap: float | None = None,
    chunk: int | None = None,
    transposed: bool = False,
) -> Sums:
    """Sums of `-log softmax(x w)[target]` over the rows where the mask is True.

    Args:
      x_BTD: hidden states, in the dtype of compute.
      w_DV: the output weight, in the dtype of compute.
      targets_BT: the id that each row should give.
      mask_BT: which rows count.
      z_loss: weight of `log(Z)^2` in the total (Chowdhery et al. 2022, arXiv:2204.02311, section 5).
      soft_cap: logits become `cap * tanh(logits / cap)`.
      chunk: rows a chunk; None: as many as `chunk_bytes` of logits hold.
      transposed: whether `w_DV` is the transpose of what is stored, as of a tied table: its gradient is then made as
        `[V, D]`, and nothing has to turn it around.

    Returns:
      `Sums` of float32 scalars.
    """
    vocab_axis = "tensor" if axis_size("tensor") > 1 else None
    row_axes = tuple(axis for axis in ("data", "fsdp", "sequence") if axis_size(axis) > 1)
    static = _Static(z_loss, soft_cap, chunk, vocab_axis, row_axes, transposed)
    total, aux = _total(static, x_BTD, w_DV, targets_BT, mask_BT)
    ce, zz = (jax.lax.stop_gradient(a) for a in aux)
    return Sums(total, ce, zz)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _total(static: _Static, x: Array, w: Array, targets: Array, mask: Array) -> tuple[Array, tuple[Array, Array]]:
    ce, zz = _on_mesh(functools.partial(_local_sums, static), 0, x, w, targets, mask)
    return ce + static.z_loss * zz, (ce, zz)


def _total_forward(
    static: _Static, x: Array, w: Array, targets: Array, mask: Array
) -> tuple[tuple, tuple[Array, Array]]:
    ce, zz, dx, dw = _on_mesh(functools.partial(_local_gradients, static), 2, x, w, targets, mask)
    return (ce + static.z_loss * zz, (ce, zz)), (dx, dw)


def _total_backward(static: _Static, saved: tuple[Array, Array], g: tuple[Array, tuple]) -> tuple:
    del static
    dx, dw = saved
    return (dx * g[0].astype(dx.dtype)), (dw * g[0].astype(dw.dtype)), None, None


_total.defvjp(_total_forward, _total_backward)


def _on_mesh(f: functools.partial, gradients: int, *arrays: Array) -> tuple[Array, ...]:
    """`f` on every device's part of (x, w, targets, mask); it gives two sums, and the gradients of x and w if asked."""
    if jax.sharding.get_abstract_mesh().empty:
        return f(*arrays)
    x, w, rows = partition("batch", "length", None), partition(None, "vocab"), partition("batch", "length")
    out = (partition(), partition(), x, w)[: 2 + gradients]
    # Sums over the vocabulary are made equal on its parts by psum, and those over rows likewise, in the functions
    # below.
    return jax.shard_map(f, in_specs=(x, w, rows, rows), out_specs=out, check_vma=False)(*arrays)


def _chunks(static: _Static, x: Array, v: int, targets: Array, mask: Array) -> tuple[Array, Array, Array]:
    """Rows in chunks: `[C, R, D]`, `[C, R]`, `[C, R]`; the last chunk is filled up with rows that do not count."""
    rows = targets.size
    size = min(rows, static.chunk or max(1, chunk_bytes() // (4 * v)))
    size = -(-rows // (-(-rows // size)))  # the same number of chunks, evenly filled
    pad = -rows % size

    def split(a: Array) -> Array:
        a = a.reshape(rows, *a.shape[2:])
        return jnp.pad(a, ((0, pad),) + ((0, 0),) * (a.ndim - 1)).reshape(-1, size, *a.shape[1:])

    return split(x), split(targets), split(mask)


class _Chunk(NamedTuple):
    """A chunk of rows, in float32.

    Attributes:
      z: `[R, v]` logits behind the soft cap.
      log_z: `[R, 1]`.
      hit: `[R, v]`, where the target's logit is.
      weights, inverse: `[R, v]` and `[R, 1]`, whose product is the softmax. (Weights are kept because a second `exp`
        costs more than reading them.)
    """

    z: Array
    log_z: Array
    hit: Array
    weights: Array
    inverse: Array


def _logits(static: _Static, x_RD: Array, w_Dv: Array, targets_R: Array) -> _Chunk:
    z = jnp.dot(x_RD, w_Dv, preferred_element_type=jnp.float32)
    if static.soft_cap is not None:
        z = static.soft_cap * jnp.tanh(z / static.soft_cap)
    highest = jnp.max(z, -1, keepdims=True)
    first = jnp.int32(0)
    if static.vocab_axis:
        highest = jax.lax.pmax(highest, static.vocab_axis)
        first = jax.lax.axis_index(static.vocab_axis) * w_Dv.shape[1]
    weights = jnp.exp(z - highest)
    total = _over_vocab(static, jnp.sum(weights, -1, keepdims=True))
    ids = first + jax.lax.broadcasted_iota(jnp.int32, z.shape, 1)
    return _Chunk(z, highest + jnp.log(total), ids == targets_R[:, None], weights, 1 / total)


def _over_vocab(static: _Static, a: Array) -> Array:
    return jax.lax.psum(a, static.vocab_axis) if static.vocab_axis else a


def _chunk_sums(static: _Static, c: _Chunk, mask_R: Array) -> tuple[Array, Array]:
    target = _over_vocab(static, jnp.sum(jnp.where(c.hit, c.z, 0.0), -1))
    log_z = c.log_z[:, 0]
    return jnp.sum(jnp.where(mask_R, log_z - target, 0.0)), jnp.sum(jnp.where(mask_R, jnp.square(log_z), 0.0))


def _local_sums(static: _Static, x: Array, w: Array, targets: Array, mask: Array) -> tuple[Array, Array]:
    def body(sums: tuple[Array, Array], rows: tuple[Array, Array, Array]) -> tuple[tuple[Array, Array], None]:
        x_RD, targets_R, mask_R = rows
        ce, zz = _chunk_sums(static, _logits(static, x_RD, w, targets_R), mask_R)
        return (sums[0] + ce, sums[1] + zz), None

    zero = jnp.zeros((), jnp.float32)
    (ce, zz), _ = jax.lax.scan(body, (zero, zero), _chunks(static, x, w.shape[1], targets, mask))
    return _over_rows(static, ce), _over_rows(static, zz)


def _over_rows(static: _Static, a: Array) -> Array:
    return jax.lax.psum(a, static.row_axes) if static.row_axes else a


def _local_gradients(static: _Static, x: Array, w: Array, targets: Array, mask: Array) -> tuple[Array, ...]:
    """The two sums, and the gradients of their total for x (in its dtype) and w."""

    def body(sums: tuple[Array, Array, Array], rows: tuple[Array, Array, Array]) -> tuple[Any, Array]:
        x_RD, targets_R, mask_R = rows
        c = _logits(static, x_RD, w, targets_R)
        ce, zz = _chunk_sums(static, c, mask_R)
        p = c.weights * c.inverse
        dz = p * (1 + 2 * static.z_loss * c.log_z) - c.hit if static.z_loss else p - c.hit
        if static.soft_cap is not None:
            dz = dz * (1 - jnp.square(c.z / static.soft_cap))
        dz = jnp.where(mask_R[:, None], dz, 0.0).astype(x_RD.dtype)
        dx = jnp.dot(dz, w.T, preferred_element_type=jnp.float32)
        left, right = (dz, x_RD) if static.transposed else (x_RD, dz)
        dw = over_rows(left, right, dtype=jnp.float32)
        # Rounded before the sum over the vocabulary's parts, as every other sum over tensor: half the bytes move.
        return (sums[0] + ce, sums[1] + zz, sums[2] + dw), _over_vocab(static, dx.astype(x.dtype))

    zero = jnp.zeros((), jnp.float32)
    start = (zero, zero, jnp.zeros(w.shape[::-1] if static.transposed else w.shape, jnp.float32))
    (ce, zz, dw), dx = jax.lax.scan(body, start, _chunks(static, x, w.shape[1], targets, mask))
    dx = dx.reshape(-1, x.shape[-1])[: targets.size].reshape(x.shape)
    dw = _over_rows(static, dw).astype(w.dtype)
    return _over_rows(static, ce), _over_rows(static, zz), dx, dw.T if static.transposed else dw
