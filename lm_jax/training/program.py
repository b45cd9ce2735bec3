"""What a config compiles to: the mesh's state, the step and the evaluation, for whoever runs, times or inspects
them."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lm_jax.errors import ConfigError
from lm_jax.evaluation.loss import EvalStep, make_eval_step
from lm_jax.models.transformer import transformer_specs
from lm_jax.objectives.objective import Objective
from lm_jax.params import Tree
from lm_jax.sharding import in_memory, lay_out
from lm_jax.training.optimizers import make_optimizer
from lm_jax.training.run import RunConfig
from lm_jax.training.schedules import learning_rate
from lm_jax.training.state import TrainState, abstract_state, init_state
from lm_jax.training.step import Metrics, make_train_step


@dataclasses.dataclass(frozen=True)
class Program:
    """A config on a mesh. The steps are jitted; the training step consumes the state that it is given.

    Attributes:
      abstract: the state as shapes, dtypes and shardings.
      train_step: `(state, batch) -> (state, metrics)`.
      eval_step: `(params, frozen, extra, batch) -> (sums, weights)`.
    """

    config: RunConfig
    mesh: jax.sharding.Mesh
    specs: Tree
    optimizer: optax.GradientTransformation
    abstract: TrainState
    train_step: Callable[[TrainState, Any], tuple[TrainState, Metrics]]
    eval_step: EvalStep

    def weights(self, state: TrainState) -> Tree:
        """What evaluation takes: the average of the weights where there is one, laid out as the weights are."""
        mesh = self.config.mesh
        if state.ema is None:
            return state.params
        if mesh.zero == 3 and not mesh.offload_optimizer:
            return state.ema
        return self._as_weights(state.ema)

    @functools.cached_property
    def _as_weights(self) -> Callable[[Tree], Tree]:
        drop = self.config.mesh.weights_drop
        return jax.jit(lambda average: lay_out(in_memory(average, host=False), self.specs, drop=drop))

    def starting_from(self, state: TrainState, params: Tree) -> TrainState:
        """A fresh state with other weights, which the average starts from as well."""
        if state.ema is None:
            return state.replace(params=params)
        shardings = jax.tree.map(lambda a: a.sharding, self.abstract.ema)
        copy = jax.jit(lambda tree: jax.tree.map(jnp.copy, lay_out(tree, self.specs)), out_shardings=shardings)
        return state.replace(params=params, ema=copy(params))

    def init(self) -> TrainState:
        """A fresh state of the config's seed."""
        config = self.config
        ema = config.optimizer.ema is not None
        return init_state(self.specs, self.optimizer, self.mesh, config.train.seed, ema=ema, config=config.mesh)


def make_program(config: RunConfig, mesh: jax.sharding.Mesh, objective: Objective) -> Program:
    """The program of a config whose vocabulary is known.

    Raises:
      ConfigError: where the mesh does not divide what is split over it.
    """
    config.check_layout(mesh.size)
    specs = transformer_specs(config.model)
    optimizer = make_optimizer(config.optimizer, specs, config.train.total_steps, config.model.scale)
    try:
        abstract = abstract_state(specs, optimizer, mesh, ema=config.optimizer.ema is not None, config=config.mesh)
    except ValueError as e:
        raise ConfigError("mesh", str(e)) from e
    step = make_train_step(
        objective,
        optimizer,
        learning_rate(config.optimizer, config.train.total_steps),
        microbatches=config.train.microbatches,
        clip_norm=config.optimizer.clip_norm,
        ema=config.optimizer.ema,
        specs=specs,
        mesh=config.mesh,
    )
    shardings = jax.tree.map(lambda a: a.sharding, abstract)
    train_step = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
    return Program(config, mesh, specs, optimizer, abstract, train_step, jax.jit(make_eval_step(objective)))
