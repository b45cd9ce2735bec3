"""Everything that a step reads and writes, as one pytree."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from lm_jax.params import Tree, initialize
from lm_jax.sharding import abstract, on_mesh

Array = jax.Array


class TrainState(flax.struct.PyTreeNode):
    """The state of a run.

    Attributes:
      params: what is trained, float32.
      frozen: what is not (a base under adapters, a reference model).
      extra: what the forward pass updates without a gradient.
      opt_state: the optimizer's.
      ema: the running average of `params`, or None where none is kept.
      step: int32 scalar, steps done.
      applied: int32 scalar, how many of them changed the parameters; what the schedule counts.
      bad_steps: int32 scalar, how many of the last steps in a row were refused because loss or gradient was not finite.
      key: the key that a step folds its number into.
    """

    params: Tree
    frozen: Any
    extra: Any
    opt_state: Any
    ema: Tree | None
    step: Array
    applied: Array
    bad_steps: Array
    key: Array


def abstract_state(
    specs: Tree,
    optimizer: optax.GradientTransformation,
    mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh,
    *,
    ema: bool = False,
) -> TrainState:
    """The state as shapes, dtypes and shardings: the optimizer's state is laid out as the parameters that it is made
    from. The mesh may be one of devices that are not here."""
    params = abstract(specs, mesh)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        state = jax.eval_shape(lambda p: _state(p, optimizer, jax.random.key(0), ema), params)
    return on_mesh(mesh, state)


def init_state(
    specs: Tree, optimizer: optax.GradientTransformation, mesh: jax.sharding.Mesh, seed: int, *, ema: bool = False
) -> TrainState:
    """A fresh state, each leaf made where it will lie, in one compilation."""
    shardings = jax.tree.map(lambda a: a.sharding, abstract_state(specs, optimizer, mesh, ema=ema))

    def init(key: Array) -> TrainState:
        init_key, run_key = jax.random.split(key)
        params = jax.tree.map(jax.sharding.reshard, initialize(specs, init_key), specs_shardings)
        return _state(params, optimizer, run_key, ema)

    specs_shardings = jax.tree.map(lambda a: a.sharding.spec, abstract(specs, mesh))
    with jax.set_mesh(mesh):
        return jax.jit(init, out_shardings=shardings)(jax.random.key(seed))


def _state(params: Tree, optimizer: optax.GradientTransformation, key: Array, ema: bool) -> TrainState:
    zero = jnp.zeros((), jnp.int32)
    average = jax.tree.map(jnp.copy, params) if ema else None
    return TrainState(params, {}, {}, optimizer.init(params), average, zero, zero, zero, key)
