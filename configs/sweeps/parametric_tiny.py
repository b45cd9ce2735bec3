"""A grid of sizes and of tokens a parameter, for the parametric fit (Chinchilla's approach 3).

python -m launch.sweep --config=configs/sweeps/parametric_tiny.py --workdir=runs/parametric_tiny
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.sweeps.base import in_proportion, small
from lm_jax.scaling.sweep import Points, Sweep

REPORT = "law"


def get_config() -> ConfigDict:
    return small()


def sweep(s: Sweep) -> Points:
    def lengths(config: ConfigDict) -> Points:
        model = config.model
        weights = 12 * model.layers * model.embed**2  # of the blocks
        return s.each("train.tokens", [ratio * weights for ratio in (5, 10, 20, 40, 80)])

    return in_proportion(s, s.conditional(s.each("model.embed", (16, 24, 32, 40, 48, 56)), lengths))
