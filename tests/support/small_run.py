"""A config whose run takes seconds and still does all that a run does: `--config=tests/support/small_run.py`.

The text is the test's own: give it as `data.source`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from configs.base import base

WORDS = [
    "the",
    "cat",
    "and",
    "one",
    "old",
    "dog",
    "ran",
    "over",
    "green",
    "hills",
    "while",
    "rain",
    "fell",
    "今日",
    "naïve",
]


def get_config() -> ConfigDict:
    """Two layers of 32 on bytes; 80 steps, evaluated every 20 and saved every 7."""
    config = base()
    config.model.layers = 2
    config.model.embed = 32
    config.model.heads = 4
    config.model.kv_heads = 2
    config.model.head_dim = 8
    config.model.feed_forward_dim = 48
    config.model.tied = True
    config.data.tokenizer = "bytes"
    config.train.steps = 80
    config.train.batch_size = 4
    config.train.length = 32
    config.optimizer.learning_rate = 1e-2
    config.optimizer.warmup_steps = 10
    config.optimizer.ema = 0.9
    config.checkpoint.every = 7
    config.checkpoint.keep = 2
    config.checkpoint.keep_every = 28
    config.evaluation.every = 20
    config.evaluation.prompt = None
    return config


def write_text(folder: Path, documents: int = 30, seed: int = 0) -> Path:
    """Writes documents of some 60 words each, a file each. Returns the folder."""
    random = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(documents):
        words = random.choice(WORDS, random.integers(20, 100))
        (folder / f"{i:03}.txt").write_text(" ".join(words) + "\n", "utf-8")
    return folder
