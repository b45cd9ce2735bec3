"""A first language model: minutes on a laptop's CPU, from the source text of Python's own standard library.

4 layers of 192, 4 heads on 2 key-value heads, SwiGLU of 512, tied, a sentencepiece vocabulary of 4,096 trained on the
text on first use, packed rows of 256 tokens.

    parameters       2,410,176
    tokens           8.19e5
    training FLOPs   1.28e13

    python -m launch.train --config=configs/tiny.py --workdir=runs/tiny
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.base import base, vary


def adamw(config: ConfigDict) -> None:
    """One rule for all parameters, and two averages of each."""
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 3e-3


def adafactor(config: ConfigDict) -> None:
    """Optimizer state of a row and a column a matrix."""
    config.optimizer.name = "adafactor"


VARIANTS = {"adamw": adamw, "adafactor": adafactor}


def get_config(variant: str = "") -> ConfigDict:
    config = base()
    config.model.embed = 192
    config.model.kv_heads = 2
    config.model.tied = True
    config.train.steps = 200
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 0.01
    config.optimizer.momentum_warmup_steps = 60
    config.optimizer.warmup_steps = 20
    return vary(config, variant, VARIANTS)
