"""Optimizers and schedules, one at a time, against AdamW with a cosine, over four seeds.

An optimizer is as good as its learning rate, so each comes with two, a factor of two apart; AdamW with half and twice
the base's.

    python -m launch.sweep --config=configs/ablations/optimizers_tiny.py --workdir=runs/optimizers_tiny
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.sweeps.base import in_proportion, small
from lm_jax.scaling.sweep import Points, Sweep

REPORT = "ablation"

RATES = {"adamw": (4e-3, 1.6e-2), "muon": (1e-2, 2e-2), "lion": (1e-3, 2e-3), "adafactor": (3e-2, 6e-2)}
SCHEDULES = ("linear", "wsd", "inverse_sqrt", "constant")


def get_config() -> ConfigDict:
    config = small()
    config.train.steps = 400
    config.optimizer.momentum_warmup_steps = 100
    return config


def sweep(s: Sweep) -> Points:
    changes = s.change("base")
    for name, rates in RATES.items():
        for rate in rates:
            changes += s.change(f"{name} at {rate:g}", {"optimizer.name": name, "optimizer.learning_rate": rate})
    for name in SCHEDULES:
        changes += s.change(f"{name} schedule", {"optimizer.schedule": name})
    return in_proportion(s, s.product(changes, s.seeds(4)))
