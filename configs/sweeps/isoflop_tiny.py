"""IsoFLOP profiles (Chinchilla's approach 2): four sizes at each of four budgets, from which the law is fitted.

Three seeds of each, as runs this small scatter by about half a percent. The blocks' matrices are trained with Muon:
for as many FLOPs it ends lower than AdamW, and scatters less. The largest budget is held out: the law of the others
predicts its loss.

    python -m launch.sweep --config=configs/sweeps/isoflop_tiny.py --workdir=runs/isoflop_tiny
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.sweeps.base import in_proportion, small
from lm_jax.scaling.sweep import Points, Sweep

REPORT = "law"


def get_config() -> ConfigDict:
    config = small()
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 2e-2
    return config


def sweep(s: Sweep) -> Points:
    profiles = s.chain(
        s.budget([3e11], s.each("model.embed", (24, 32, 40, 48))),
        s.budget([6e11], s.each("model.embed", (32, 40, 48, 64))),
        s.budget([1.2e12], s.each("model.embed", (40, 48, 64, 80))),
        s.budget([3e12], s.each("model.embed", (48, 64, 80, 96))),
    )
    return in_proportion(s, s.product(profiles, s.seeds(3)))
