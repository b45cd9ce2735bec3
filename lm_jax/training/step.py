"""The training step: gradients, accumulation, clipping, guard, update. One jitted, donated function for every
objective."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lm_jax.data.loader import batch_hash
from lm_jax.objectives.objective import Objective
from lm_jax.sharding import MESH, MeshConfig, in_memory, lay_out, parts_of_layers, split_dim, twofold_layers
from lm_jax.training.optimizers import ema_update
from lm_jax.training.state import TrainState

Array = jax.Array
Metrics = dict[str, Array]
_OFFLOADED = ("opt_state", "ema")


def make_train_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    microbatches: int = 1,
    clip_norm: float | None = None,
    ema: float | None = None,
    specs: Any = None,
    mesh: MeshConfig = MESH,
) -> Callable[[TrainState, Any], tuple[TrainState, Metrics]]:
    """`(state, batch) -> (state, metrics)`, to be jitted with the state donated.

    The gradient is that of the sum of the objective's terms, each over its weight in the whole batch; micro-batches
    change memory and nothing else. A step whose loss or gradient is not finite changes neither parameters nor optimizer
    state, bit for bit, and is counted in `bad_steps`.

    Args:
      objective: what is minimised.
      optimizer: what turns gradients into updates.
      schedule: the learning rate by the number of updates so far, as the optimizer has it, to be told.
      microbatches: into how many parts the batch is cut; each row block of the mesh must divide into them.
      clip_norm: largest global norm of the gradient; None: any.
      ema: decay of the running average of the parameters; None: none is kept.
      specs: of the parameters; needed where `mesh.zero` is below 3.
      mesh: what of the state is split over fsdp, and where it lies between steps.
    """

    def split(tree: Any) -> Any:
        """Gradients or parameters in the layout of the optimizer's state."""
        return tree if mesh.zero == 3 else lay_out(tree, specs)

    def train_step(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        weights = objective.weights(batch)
        key = jax.random.fold_in(state.key, state.step)
        if mesh.zero == 2:
            parts = parts_of_layers(state.params, specs)
            whole = functools.partial(twofold_layers, params=state.params, specs=specs)
            sums, extra, gradients = _gradients(
                objective, state, parts, batch, weights, key, microbatches, of=whole, each=split
            )
        else:
            sums, extra, gradients = _gradients(objective, state, state.params, batch, weights, key, microbatches)
        gradients = split(gradients)
        terms = {name: sums[name] / jnp.maximum(weights[name], 1e-9) for name in sums}
        loss = sum(terms.values(), start=jnp.zeros((), jnp.float32))
        norm = optax.tree.norm(gradients)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        if clip_norm is not None:
            scale = jnp.minimum(1.0, clip_norm / (norm + 1e-6))
            gradients = jax.tree.map(lambda g: g * scale, gradients)
        old = _changing(state)
        old["params"] = split(old["params"])
        if mesh.offload_optimizer:
            old |= in_memory({name: old[name] for name in _OFFLOADED}, host=False)
        updates, opt_state = optimizer.update(gradients, old["opt_state"], old["params"])
        params = optax.apply_updates(old["params"], updates)
        average = None if ema is None else ema_update(old["ema"], params, ema, state.applied)
        new = {"params": params, "opt_state": opt_state, "extra": extra, "ema": average}
        new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)
        if mesh.zero < 3:
            new["params"] = lay_out(new["params"], specs, drop=mesh.weights_drop)
        if mesh.offload_optimizer:
            new |= in_memory({name: new[name] for name in _OFFLOADED}, host=True)
        metrics = {
            "loss": loss,
            "grad_norm": norm,
            "learning_rate": jnp.asarray(schedule(state.applied), jnp.float32),
            "targets": next(iter(weights.values())),
            "batch_hash": batch_hash(batch),
        }
        state = state.replace(
            **new,
            step=state.step + 1,
            applied=state.applied + finite,
            bad_steps=jnp.where(finite, 0, state.bad_steps + 1),
        )
        return state, metrics | {"bad_steps": state.bad_steps} | (terms if len(terms) > 1 else {})

    return train_step


def _changing(state: TrainState) -> dict[str, Any]:
    return {"params": state.params, "opt_state": state.opt_state, "extra": state.extra, "ema": state.ema}


def _as_it_is(tree: Any) -> Any:
    return tree


def _gradients(
    objective: Objective,
    state: TrainState,
    moving: Any,
    batch: Any,
    weights: dict[str, Array],
    key: Array,
    microbatches: int,
    *,
    of: Callable[[Any], Any] = _as_it_is,
    each: Callable[[Any], Any] = _as_it_is,
) -> tuple[dict[str, Array], Any, Any]:
    """The sums of the terms over the batch, the new `extra`, and the gradient of the loss.

    Args:
      moving: what the gradient is taken of.
      of: makes parameters of that.
      each: lays out the gradient of a micro-batch before it is added to the others.
    """

    def loss(params: Any, extra: Any, rows: Any, key: Array) -> tuple[Array, tuple[dict[str, Array], Any]]:
        sums, extra = objective.terms(of(params), state.frozen, extra, rows, key)
        total = sum((sums[n] / jnp.maximum(weights[n], 1e-9) for n in sums), start=jnp.zeros((), jnp.float32))
        return total, (sums, extra)

    gradient = jax.grad(loss, has_aux=True)
    if microbatches == 1:
        gradients, (sums, extra) = gradient(moving, state.extra, batch, key)
        return sums, extra, each(gradients)

    def body(carry: tuple, xs: tuple) -> tuple[tuple, None]:
        sums, extra, gradients = carry
        i, rows = xs
        more, (more_sums, extra) = gradient(moving, extra, rows, jax.random.fold_in(key, i))
        return (jax.tree.map(jnp.add, sums, more_sums), extra, jax.tree.map(jnp.add, gradients, each(more))), None

    zero_sums = {name: jnp.zeros((), jnp.float32) for name in weights}
    start = (zero_sums, state.extra, each(jax.tree.map(jnp.zeros_like, moving)))
    parts = jax.tree.map(lambda a: _split_rows(a, microbatches), batch)
    (sums, extra, gradients), _ = jax.lax.scan(body, start, (jnp.arange(microbatches), parts))
    return sums, extra, gradients


def _split_rows(a: Array, parts: int) -> Array:
    """`[B, ...]` -> `[parts, B / parts, ...]`, taking every parts-th row: no row leaves its device."""
    return jnp.moveaxis(split_dim(a, 0, a.shape[0] // parts, parts), 1, 0)
