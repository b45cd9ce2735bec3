"""IsoFLOP profiles (Chinchilla's approach 2): several sizes at each of four budgets, from which the law is fitted.

The largest budget is held out: the law of the others predicts its loss.

    python -m launch.sweep --config=configs/sweeps/isoflop_tiny.py --workdir=runs/isoflop_tiny
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.sweeps.base import in_proportion, small
from lm_jax.scaling.sweep import Points, Sweep

REPORT = "law"


def get_config() -> ConfigDict:
    return small()


def sweep(s: Sweep) -> Points:
    profiles = s.chain(
        s.budget([6e11], s.each("model.embed", (24, 32, 40, 48, 64))),
        s.budget([1.2e12], s.each("model.embed", (32, 40, 48, 64, 80))),
        s.budget([2.4e12], s.each("model.embed", (40, 48, 64, 80, 96))),
        s.budget([6e12], s.each("model.embed", (48, 64, 80, 96, 128))),
    )
    return in_proportion(s, profiles)
