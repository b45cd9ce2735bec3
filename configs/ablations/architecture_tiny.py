"""One change of the model at a time, against a base, over four seeds.

python -m launch.sweep --config=configs/ablations/architecture_tiny.py --workdir=runs/architecture_tiny
"""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from configs.sweeps.base import in_proportion, small
from lm_jax.scaling.sweep import Points, Sweep

REPORT = "ablation"

CHANGES: dict[str, dict[str, Any]] = {
    "norms without gain": {"model.norm": "rms_no_gain"},
    "SwiGLU of 8/3": {"model.feed_forward": "swiglu", "model.feed_forward_dim": 171},  # as many weights
    "no QK-norm": {"model.qk_norm": False},
    "tied output": {"model.tied": True},
    "ALiBi": {"model.position": "alibi"},
    "no positions": {"model.position": "none"},
    "outputs start at zero": {"model.output_init": "zero"},
}


def get_config() -> ConfigDict:
    config = small()
    config.train.steps = 400
    return config


def sweep(s: Sweep) -> Points:
    changes = s.chain(s.change("base"), *(s.change(name, values) for name, values in CHANGES.items()))
    return in_proportion(s, s.product(changes, s.seeds(4)))
