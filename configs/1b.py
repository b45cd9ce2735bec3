"""1b: the shape of Llama 3.2 1B with a vocabulary of 32,000.

16 layers of 2,048, 32 heads on 8 key-value heads, SwiGLU of 8,192, tied.

    parameters       1,038,682,112
    tokens           2.08e10, 20 a parameter
    training FLOPs   1.38e20

    python -m launch.train --config=configs/1b.py --config.data.source='TEXT/*.jsonl' --workdir=runs/1b

So many tokens want text of one's own: on the embedded default `data.max_epochs` refuses them, and a first try is
`--config.train.steps=100`.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.base import pretraining


def get_config() -> ConfigDict:
    config = pretraining(tokens=20_800_000_000)
    config.model.layers = 16
    config.model.embed = 2048
    config.model.heads = 32
    config.model.kv_heads = 8
    config.model.feed_forward_dim = 8192
    config.model.rope_base = 500_000.0
    config.model.tied = True
    config.mesh.data = 1
    config.mesh.fsdp = -1
    config.train.batch_size = 128
    config.optimizer.learning_rate = 3e-4
    return config
