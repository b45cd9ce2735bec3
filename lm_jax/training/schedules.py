"""Learning-rate schedules: the rate at step t as a fraction of its peak.

Each schedule is a function of the config and of the run's number of steps N, and gives an `optax.Schedule`: step
(0-based, the number of updates made so far) -> fraction in [0, 1]. Fractions, because groups of parameters may have
peak rates of their own and share one schedule.

All of them warm up over the first W = `warmup_steps` steps along (t + 1) / (W + 1): above zero at step 0, the peak at
step W. W may exceed N: the run then ends on that slope. After the warm-up, with f = `final_fraction`, each is as its
function says; those that end at f would reach it at t = N, one step after the last update.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

if TYPE_CHECKING:
    from lm_jax.training.optimizers import OptimizerConfig


def _warm_up(config: OptimizerConfig, after: optax.Schedule) -> optax.Schedule:
    """The warm-up, and `after` from step W on."""
    W = float(config.warmup_steps)  # a Python int may be beyond int32

    def fraction(count: ArrayLike) -> ArrayLike:
        t = jnp.asarray(count, jnp.float32)
        return jnp.where(t < W, (t + 1) / (W + 1), after(t))

    return fraction


def _remaining(start: float, steps: int) -> optax.Schedule:
    """1 up to step `start`, then linear to 0 at step `steps`."""
    length = max(steps - start, 1e-6)  # a run that ends before `start` never sees the division
    return lambda t: jnp.clip((steps - t) / length, 0.0, 1.0)


def constant(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """1."""
    del steps
    return _warm_up(config, jnp.ones_like)


def linear(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """f + (1 - f) (N - t) / (N - W)."""
    f = config.final_fraction
    left = _remaining(config.warmup_steps, steps)
    return _warm_up(config, lambda t: f + (1 - f) * left(t))


def cosine(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """f + (1 - f) (1 + cos(pi p)) / 2 with p = (t - W) / (N - W) (Loshchilov and Hutter 2017, without restarts)."""
    f = config.final_fraction
    left = _remaining(config.warmup_steps, steps)
    return _warm_up(config, lambda t: f + (1 - f) * (0.5 - 0.5 * jnp.cos(jnp.pi * left(t))))


def inverse_sqrt(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """sqrt((W + 1) / (t + 1)) (Vaswani et al. 2017). It depends on no N and has no f."""
    del steps
    W = float(config.warmup_steps)
    return _warm_up(config, lambda t: jnp.sqrt((W + 1) / jnp.maximum(t + 1, W + 1)))


def wsd(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Warmup-stable-decay (Hu et al. 2024): 1, then linear to f over the last `decay_fraction` of the N steps.

    The decay starts at step max(W, (1 - decay_fraction) N).
    """
    f = config.final_fraction
    left = _remaining(max(config.warmup_steps, (1 - config.decay_fraction) * steps), steps)
    return _warm_up(config, lambda t: f + (1 - f) * left(t))


SCHEDULES: dict[str, Callable[[OptimizerConfig, int], optax.Schedule]] = {
    "constant": constant,
    "linear": linear,
    "cosine": cosine,
    "inverse_sqrt": inverse_sqrt,
    "wsd": wsd,
}


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """The rate itself at each step: what a run logs. (Groups with a peak rate of their own share the fractions.)"""
    fraction = SCHEDULES[config.schedule](config, steps)
    return lambda count: config.learning_rate * fraction(count)
