"""Learning rates by width, standard parametrisation beside muP: with muP the best rate stays where it is.

python -m launch.sweep --config=configs/sweeps/mup_tiny.py --workdir=runs/mup_tiny
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.sweeps.base import in_proportion, small
from lm_jax.scaling.sweep import Points, Sweep

REPORT = "rates"


def get_config() -> ConfigDict:
    config = small()
    config.train.steps = 120
    config.train.length = 64
    config.evaluation.batches = 128
    return config


def sweep(s: Sweep) -> Points:
    standard = {"model.base_embed": None, "model.base_head_dim": None}
    kinds = s.conditional(
        s.each("model.parametrization", ("standard", "mup")),
        lambda c: standard if c.model.parametrization == "standard" else None,
    )
    rates = s.each("optimizer.learning_rate", [2.0 ** (-k / 2) for k in range(12, 20)])  # a factor of 1.41 apart
    return in_proportion(s, s.product(kinds, s.each("model.embed", (64, 256)), rates, s.seeds(3)))
