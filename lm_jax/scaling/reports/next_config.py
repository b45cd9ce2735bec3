"""The next config to train: the model of a larger budget that a fitted law expects the most of, as a file."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lm_jax import costs
from lm_jax.config import defaults, flatten, to_dict
from lm_jax.models.feed_forward import FEED_FORWARDS
from lm_jax.models.transformer import TransformerConfig
from lm_jax.scaling.laws import Estimate, Law, estimate
from lm_jax.training.run import RunConfig

_WIDEST = 16  # times the widest model of the sweep
_FINE = 2000  # sizes between the family's, for the interval of the best


@dataclass(frozen=True)
class Next:
    """A model and how long to train it.

    Attributes:
      config: of the run.
      flops: of its training.
      parameters: in the law's counting.
      tokens: to train on.
      loss: expected of it.
      best: the interval of the best size, by the law's draws.
    """

    config: RunConfig
    flops: float
    parameters: float
    tokens: float
    loss: Estimate
    best: Estimate


def family(configs: Sequence[RunConfig]) -> list[TransformerConfig]:
    """Models that go on as those of a sweep grow: depth along the trend of theirs; heads of the same width that become
    more, or, where all of theirs have as many, heads that become wider."""
    known = {c.model.embed: c.model for c in configs}
    widest = known[max(known)]
    x = np.log(np.array(list(known), float))
    y = np.log(np.array([model.layers for model in known.values()], float))
    slope = float(np.polyfit(x, y, 1)[0]) if len(known) > 1 and np.ptp(y) > 0 else 0.0
    wider = len({m.heads for m in known.values()}) == 1 and len({m.head_size for m in known.values()}) > 1
    group = widest.heads // widest.key_heads
    step = 2 * widest.heads if wider else group * widest.head_size  # 2: rotary positions turn pairs
    usual = FEED_FORWARDS[widest.feed_forward].default_dim
    models = []
    for embed in range(max(1, min(known) // step) * step, _WIDEST * widest.embed + 1, step):
        heads = widest.heads if wider else embed // widest.head_size
        inner = None if widest.inner == usual(widest.embed) else round(widest.inner * embed / widest.embed)
        models.append(
            dataclasses.replace(
                widest,
                embed=embed,
                layers=max(1, round(widest.layers * (embed / widest.embed) ** slope)),
                heads=heads,
                kv_heads=heads // group,
                head_dim=embed // heads if wider else widest.head_size,
                feed_forward_dim=inner,
            )
        )
    return models


def choose(law: Law, configs: Sequence[RunConfig], flops: float, counted: str) -> Next | None:
    """The model of the family with the lowest loss at a budget, its FLOPs counted exactly; None where it would be the
    largest of the family or the smallest, so that the law does not say.

    Args:
      law: fitted.
      configs: of the sweep's runs, their vocabulary given.
      flops: the budget.
      counted: which of `costs.parameters` the law's N is.
    """
    largest = max(configs, key=lambda c: c.model.embed)
    models = family(configs)
    length = largest.train.length
    sizes = np.array([costs.parameters(m)[counted] for m in models], float)
    tokens = flops / np.array([costs.flops_per_token(m, length) for m in models])
    losses = law.loss(sizes, tokens)
    i = int(np.argmin(losses))
    if i in (0, len(models) - 1):
        return None
    fine = np.geomspace(sizes[0], sizes[-1], _FINE)
    fine_tokens = np.exp(np.interp(np.log(fine), np.log(sizes), np.log(tokens)))
    drawn = np.array([fine[np.argmin(_loss(draw, fine, fine_tokens))] for draw in law.draws])
    train = largest.train
    steps = max(1, round(tokens[i] / train.tokens_per_step))
    warm = largest.optimizer.warmup_steps / train.total_steps
    config = dataclasses.replace(
        largest,
        model=models[i],
        train=dataclasses.replace(train, steps=None, tokens=steps * train.tokens_per_step),
        optimizer=dataclasses.replace(
            largest.optimizer, learning_rate=_rate(configs, flops), warmup_steps=math.ceil(warm * steps)
        ),
        checkpoint=dataclasses.replace(largest.checkpoint, every=max(1, steps // 10), keep_every=None),
    )
    best = estimate(float(sizes[i]), drawn)
    return Next(config, flops, float(sizes[i]), float(tokens[i]), law.predict(float(sizes[i]), float(tokens[i])), best)


def _rate(configs: Sequence[RunConfig], flops: float) -> float:
    """The learning rate at a budget, along the trend of theirs over budgets."""
    rates = np.array([c.optimizer.learning_rate for c in configs])
    if np.ptp(rates) == 0:
        return float(rates[0])
    budgets = [
        costs.training_flops(c.model, c.train.length, c.train.total_steps * c.train.tokens_per_step) for c in configs
    ]
    slope, at_one = np.polyfit(np.log(budgets), np.log(rates), 1)
    return float(f"{np.exp(at_one + slope * math.log(flops)):.3g}")


def _loss(constants: np.ndarray, N: np.ndarray, D: np.ndarray) -> np.ndarray:
    E, A, B, alpha, beta = constants
    return E + np.exp(np.log(A) - alpha * np.log(N)) + np.exp(np.log(B) - beta * np.log(D))


def as_file(chosen: Next, *, source: str) -> str:
    """A config file with every key of the run that is not at its default.

    Args:
      chosen: the run.
      source: what made it, for the docstring.
    """
    usual = flatten(defaults(RunConfig).to_dict())
    lines = []
    for key, value in flatten(to_dict(chosen.config)).items():
        value = tuple(value) if isinstance(value, list) else value
        if key not in usual or usual[key] != value:
            lines.append(f"    config.{key} = {value!r}")
    return f'''"""The compute-optimal model for {chosen.flops:.3g} training FLOPs, by the law of a sweep.

    parameters       {chosen.parameters:,.0f} (95% of the draws: {chosen.best.low:,.0f} to {chosen.best.high:,.0f})
    tokens           {chosen.tokens:,.0f}
    expected loss    {chosen.loss.value:.4f} nats a token ({chosen.loss.low:.4f} to {chosen.loss.high:.4f})

Made by {source}
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.base import base


def get_config() -> ConfigDict:
    config = base()
{chr(10).join(lines)}
    return config
'''
