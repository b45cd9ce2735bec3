"""Characters of Shakespeare in nanoGPT's smallest budget: 2,000 steps of 12 rows of 64 characters.

4 layers of 128, 4 heads with normalised queries and keys, squared ReLU of 512, untied. The blocks' matrices are trained
by Muon, the rest by Adam, without weight decay or clipping. Every block starts as the identity.

    parameters       803,072, at the 65 characters of the text
    tokens           1.54e6
    training FLOPs   7.63e12

    python -m launch.train --config=configs/shakespeare_char.py --config.data.source=FILE --workdir=runs/shakespeare
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.base import base


def get_config() -> ConfigDict:
    config = base()
    config.model.embed = 128
    config.model.feed_forward = "squared_relu"
    config.model.norm = "rms_no_gain"
    config.model.qk_norm = True
    config.model.rope_base = 1000.0
    config.model.embedding_std = 1.0
    config.model.output_init = "zero"
    config.model.scan = False
    config.data.tokenizer = "characters"
    config.data.boundary = False
    config.train.steps = 2000
    config.train.batch_size = 12
    config.train.length = 64
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 0.03
    config.optimizer.vector_rate = 0.005
    config.optimizer.head_rate = 0.01
    config.optimizer.embedding_rate = 0.03
    config.optimizer.eps = 1e-10
    config.optimizer.schedule = "linear"
    config.optimizer.warmup_steps = 20
    config.optimizer.final_fraction = 0.0
    config.optimizer.weight_decay = 0.0
    config.optimizer.clip_norm = None
    config.evaluation.every = 500
    return config
