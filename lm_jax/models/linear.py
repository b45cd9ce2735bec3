"""The one contraction with a weight.

Every product of an activation and a weight goes through `linear` (or `linears`, several weights of one activation): the
layout that the backend likes is decided here, and so will adapters, quantised weights and width multipliers be.

Shapes: B batch, T length, R rows (of batch and length together), I inputs, O outputs.
"""

import functools
import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lm_jax.kernels.products import over_rows
from lm_jax.sharding import axis_size, constrain, out_sharding

Array = jax.Array
PRODUCT = "product"  # the name by which remat policies know what comes out of here
Names = tuple[str | None, ...]


def flattens(length: str = "length") -> bool:
    """Whether `linear` to an outcome of this length flattens rows: not where batch and length are both split, since no
    one axis would describe flattened rows."""
    return axis_size("sequence") == 1 and (length == "length" or axis_size("tensor") == 1)


def rows(x_BTI: Array, name: str | None) -> Array:
    """`[B, T, I]`, I of a logical name, as the rows `[R, I]` of a product; `linear` takes and gives rows too."""
    B, T, inputs = x_BTI.shape
    x_BTI = constrain(x_BTI, "batch", None, name)
    return jax.lax.reshape(x_BTI, (B * T, inputs), out_sharding=out_sharding("batch", name))


def linear(x: Array, w: Array, inputs: Names, outputs: Names, length: str = "length") -> Array:
    """`x` times `w`, over the dimensions named in `inputs`.

    Rows and features are flattened around the product wherever the length is not split: a weight's gradient then
    contracts one dimension, and no compiler has to copy a transposed activation to get it (on CPU, plain JAX loses a
    third of its speed to such copies). Only the first of `inputs` and of `outputs` may be split over the mesh.

    Args:
      x: `[B, T, *inputs]`; or rows `[R, I]`, where there is one input and one output.
      w: `[*inputs, *outputs]`, in the dtype of compute and whole over fsdp.
      inputs: the logical names of the dimensions that are summed over.
      outputs: the logical names of the dimensions that come out.
      length: the logical name of the outcome's length; what comes in is laid out as `length`.

    Returns:
      `[B, T, *outputs]`, or `[R, O]`, in the dtype of `x`.
    """
    if x.ndim == 2:
        return checkpoint_name(_product(x, w, inputs[0], outputs[0]), PRODUCT)
    (B, T), sizes_in, sizes_out = x.shape[:2], w.shape[: len(inputs)], w.shape[len(inputs) :]
    result = out_sharding("batch", length, *outputs)
    if not flattens(length):
        over = (tuple(range(2, x.ndim)), tuple(range(len(inputs))))
        return checkpoint_name(jax.lax.dot_general(x, w, (over, ((), ())), out_sharding=result), PRODUCT)
    x = constrain(x, "batch", None, *inputs)
    x_RI = jax.lax.reshape(x, (B * T, math.prod(sizes_in)), out_sharding=out_sharding("batch", inputs[0]))
    w_IO = jax.lax.reshape(
        w, (math.prod(sizes_in), math.prod(sizes_out)), out_sharding=out_sharding(inputs[0], outputs[0])
    )
    y_RO = checkpoint_name(_product(x_RI, w_IO, inputs[0], outputs[0]), PRODUCT)
    return jax.lax.reshape(y_RO, (B, T, *sizes_out), out_sharding=result)


def linears(x: Array, ws: Sequence[Array], inputs: Names, outputs: Sequence[Names]) -> list[Array]:
    """`linear` of one `x` with several weights: as one product where their outputs are not split over the mesh."""
    if len(ws) == 1 or axis_size("tensor") > 1 or axis_size("sequence") > 1:
        return [linear(x, w, inputs, names) for w, names in zip(ws, outputs, strict=True)]
    sizes = [math.prod(w.shape[len(inputs) :]) for w in ws]
    flat = [
        jax.lax.reshape(w, (*w.shape[: len(inputs)], n), out_sharding=out_sharding(*inputs, None))
        for w, n in zip(ws, sizes, strict=True)
    ]
    joined = jnp.concatenate(flat, -1)
    parts = jnp.split(linear(x, joined, inputs, (None,)), list(itertools.accumulate(sizes[:-1])), -1)
    shapes = [(*x.shape[:2], *w.shape[len(inputs) :]) for w in ws]
    return [
        jax.lax.reshape(part, shape, out_sharding=out_sharding("batch", "length", *names))
        for part, shape, names in zip(parts, shapes, outputs, strict=True)
    ]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _product(x_RI: Array, w_IO: Array, into: str | None, out: str | None) -> Array:
    """Rows by a weight. JAX's own transpose gives the weight's gradient transposed, to be copied once more behind the
    sum over devices."""
    return jax.lax.dot_general(x_RI, w_IO, (((1,), (0,)), ((), ())), out_sharding=out_sharding("batch", out))


def _product_forward(x_RI: Array, w_IO: Array, into: str | None, out: str | None) -> tuple[Array, tuple[Array, Array]]:
    return _product(x_RI, w_IO, into, out), (x_RI, w_IO)


def _product_backward(
    into: str | None, out: str | None, saved: tuple[Array, Array], g_RO: Array
) -> tuple[Array, Array]:
    x_RI, w_IO = saved
    dx_RI = jax.lax.dot_general(g_RO, w_IO, (((1,), (1,)), ((), ())), out_sharding=out_sharding("batch", into))
    return dx_RI, over_rows(x_RI, g_RO, names=(into, out))


_product.defvjp(_product_forward, _product_backward)
