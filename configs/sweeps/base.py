"""What the shipped sweeps have in common: small models of bytes, a family in which the width alone grows.

Two layers, four heads that grow with the width (models this small lose by fewer; widths are multiples of 8, so that a
head's is even), squared ReLU of four times the width, normalised queries and keys. muP, with the width of 64 as its
base, so that one learning rate serves all widths. Rows of 128 bytes of the source text of Python's own standard
library, which is on every machine that runs this.
"""

from __future__ import annotations

from collections.abc import Mapping

from ml_collections import ConfigDict

from configs.base import base
from lm_jax.scaling.sweep import Points, Sweep


def small() -> ConfigDict:
    config = base()
    config.model.layers = 2
    config.model.embed = 64
    config.model.feed_forward = "squared_relu"
    config.model.qk_norm = True
    config.model.scan = False
    config.model.parametrization = "mup"
    config.model.base_embed = 64
    config.model.base_head_dim = 16
    config.data.tokenizer = "bytes"
    config.train.batch_size = 8
    config.train.length = 128
    config.optimizer.learning_rate = 8e-3
    config.evaluation.batches = 256
    config.evaluation.prompt = None
    return config


def in_proportion(s: Sweep, points: Points) -> Points:
    """Warm-up for a tenth of each run's steps, and one checkpoint, at its end."""

    def steps(config: ConfigDict) -> Mapping[str, int]:
        train = config.train
        total = train.steps or -(-train.tokens // (train.batch_size * train.length))
        return {"optimizer.warmup_steps": max(1, total // 10), "checkpoint.every": total}

    return s.conditional(points, steps)
