"""Everything that a step reads and writes, as one pytree."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from lm_jax.params import Tree, initialize
from lm_jax.sharding import MESH, MeshConfig, abstract, lay_out, on_host, on_mesh

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
    config: MeshConfig = MESH,
) -> TrainState:
    """The state as shapes, dtypes and shardings: the optimizer's state is laid out as the parameters would be if they
    were split over all that splits them, the parameters as the mesh's config says. The mesh may be one of devices that
    are not here."""
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        state = jax.eval_shape(
            lambda params: _state(specs, optimizer, jax.random.key(0), ema, config, params), abstract(specs, mesh)
        )
    state = on_mesh(mesh, state)
    if config.offload_optimizer:
        state = state.replace(opt_state=on_host(state.opt_state), ema=on_host(state.ema))
    return state


def init_state(
    specs: Tree,
    optimizer: optax.GradientTransformation,
    mesh: jax.sharding.Mesh,
    seed: int,
    *,
    ema: bool = False,
    config: MeshConfig = MESH,
) -> TrainState:
    """A fresh state, each leaf made where it will lie, in one compilation."""
    shardings = jax.tree.map(lambda a: a.sharding, abstract_state(specs, optimizer, mesh, ema=ema, config=config))

    def init(key: Array) -> TrainState:
        init_key, run_key = jax.random.split(key)
        return _state(specs, optimizer, run_key, ema, config, lay_out(initialize(specs, init_key), specs))

    with jax.set_mesh(mesh):
        return jax.jit(init, out_shardings=shardings)(jax.random.key(seed))


def _state(
    specs: Tree, optimizer: optax.GradientTransformation, key: Array, ema: bool, config: MeshConfig, params: Tree
) -> TrainState:
    zero = jnp.zeros((), jnp.int32)
    average = jax.tree.map(jnp.copy, params) if ema else None
    weights = lay_out(params, specs, drop=config.weights_drop)
    return TrainState(weights, {}, {}, optimizer.init(params), average, zero, zero, zero, key)
