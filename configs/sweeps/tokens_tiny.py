"""Fixed models, varying tokens (Chinchilla's approach 1): each size trained to four lengths, and the lower edge of all
training curves.

    python -m launch.sweep --config=configs/sweeps/tokens_tiny.py --workdir=runs/tokens_tiny
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.sweeps.base import in_proportion, small
from lm_jax.scaling.sweep import Points, Sweep

REPORT = "law"


def get_config() -> ConfigDict:
    return small()


def sweep(s: Sweep) -> Points:
    lengths = s.each("train.tokens", (500_000, 1_000_000, 2_000_000, 4_000_000))
    return in_proportion(s, s.product(s.each("model.embed", (16, 24, 32, 48, 64, 80)), lengths))
