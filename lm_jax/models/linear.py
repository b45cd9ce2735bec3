"""The one contraction with a weight.

Every product of an activation and a weight goes through `linear`: the layout that the backend likes is decided here,
and so will adapters, quantised weights and width multipliers be.

Shapes: B batch, T length.
"""

import math

import jax

from lm_jax.sharding import axis_size, constrain, out_sharding

Array = jax.Array


def linear(x: Array, w: Array, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> Array:
    """`x` times `w`, over the dimensions named in `inputs`.

    Rows and features are flattened around the product wherever the length is not split: a weight's gradient then
    contracts one dimension, and no compiler has to copy a transposed activation to get it (on CPU, plain JAX loses a
    third of its speed to such copies). Only the first of `inputs` and of `outputs` may be split over the mesh.

    Args:
      x: `[B, T, *inputs]`.
      w: `[*inputs, *outputs]`, in the dtype of compute and whole over fsdp.
      inputs: the logical names of the dimensions that are summed over.
      outputs: the logical names of the dimensions that come out.

    Returns:
      `[B, T, *outputs]` in the dtype of `x`.
    """
    (B, T), sizes_in, sizes_out = x.shape[:2], w.shape[: len(inputs)], w.shape[len(inputs) :]
    result = out_sharding("batch", "length", *outputs)
    if axis_size("sequence") > 1:  # batch and length are both split: no one axis would describe flattened rows
        over = (tuple(range(2, x.ndim)), tuple(range(len(inputs))))
        return jax.lax.dot_general(x, w, (over, ((), ())), out_sharding=result)
    x = constrain(x, "batch", None, *inputs)
    x2 = jax.lax.reshape(x, (B * T, math.prod(sizes_in)), out_sharding=out_sharding("batch", inputs[0]))
    w2 = jax.lax.reshape(
        w, (math.prod(sizes_in), math.prod(sizes_out)), out_sharding=out_sharding(inputs[0], outputs[0])
    )
    y2 = jax.lax.dot_general(x2, w2, (((1,), (0,)), ((), ())), out_sharding=out_sharding("batch", outputs[0]))
    return jax.lax.reshape(y2, (B, T, *sizes_out), out_sharding=result)
