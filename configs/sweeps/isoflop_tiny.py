"""IsoFLOP profiles (Chinchilla's approach 2)."""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.base import base
from lm_jax.scaling.sweep import Points, Sweep

REPORT = "isoflop"


def get_config() -> ConfigDict:
    config = base()
    config.model.layers = 3
    config.model.head_dim = 16
    config.model.feed_forward = "squared_relu"
    config.model.qk_norm = True
    config.model.scan = False
    config.data.tokenizer = "bytes"
    config.train.batch_size = 16
    config.train.length = 128
    config.optimizer.learning_rate = 4e-3
    config.evaluation.batches = 64
    config.evaluation.prompt = None
    return config


def warm_up(config: ConfigDict) -> dict[str, int]:
    steps = config.train.tokens // (config.train.batch_size * config.train.length)
    return {"optimizer.warmup_steps": steps // 10, "checkpoint.every": steps}


def sweep(s: Sweep) -> Points:
    def sizes(*widths: int) -> Points:
        return s.zip(s.each("model.embed", widths), [p for p in s.each("model.heads", [w // 16 for w in widths])])

    return s.conditional(s.chain(
        s.budget([2e10], sizes(32, 48, 64)),
    ), warm_up)
