"""Learning rate x batch size x width, all trained on as many tokens.

python -m launch.sweep --config=configs/sweeps/rates_tiny.py --workdir=runs/rates_tiny
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.sweeps.base import in_proportion, small
from lm_jax.scaling.sweep import Points, Sweep

REPORT = "rates"


def get_config() -> ConfigDict:
    config = small()
    config.train.steps = None
    config.train.tokens = 500_000
    return config


def sweep(s: Sweep) -> Points:
    rates = s.each("optimizer.learning_rate", [2.0**-k for k in (9, 8, 7, 6, 5)])
    return in_proportion(
        s, s.product(s.each("model.embed", (32, 64)), s.each("train.batch_size", (4, 8, 16, 32)), rates)
    )
