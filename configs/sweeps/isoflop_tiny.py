"""IsoFLOP profiles (Chinchilla's approach 2): several sizes at each of four budgets, from which the law is fitted.

The largest budget is held out: the law of the others predicts its loss.

    python -m launch.sweep --config=configs/sweeps/isoflop_tiny.py --workdir=runs/isoflop_tiny
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.sweeps.base import in_proportion, small, widths
from lm_jax.scaling.sweep import Points, Sweep

REPORT = "law"


def get_config() -> ConfigDict:
    return small()


def sweep(s: Sweep) -> Points:
    profiles = s.chain(
        s.budget([4e11], widths(s, (32, 48, 64, 80, 96))),
        s.budget([8e11], widths(s, (32, 48, 64, 80, 96, 112))),
        s.budget([1.6e12], widths(s, (48, 64, 80, 96, 128))),
        s.budget([4e12], widths(s, (64, 80, 96, 128, 160))),
    )
    return in_proportion(s, profiles)
