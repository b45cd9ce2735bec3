"""3b: the shape of Llama 3.2 3B with a vocabulary of 32,000.

28 layers of 3,072, 24 heads on 8 key-value heads, SwiGLU of 8,192, tied.

    parameters       2,917,051,392
    tokens           5.83e10, 20 a parameter
    training FLOPs   1.08e21

    python -m launch.train --config=configs/3b.py --config.data.source='TEXT/*.jsonl' --workdir=runs/3b

So many tokens want text of one's own: on the embedded default `data.max_epochs` refuses them, and a first try is
`--config.train.steps=50`.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.base import pretraining


def get_config() -> ConfigDict:
    config = pretraining(tokens=58_300_000_000)
    config.model.layers = 28
    config.model.embed = 3072
    config.model.heads = 24
    config.model.kv_heads = 8
    config.model.rope_base = 500_000.0
    config.model.tied = True
    config.mesh.data = 1
    config.mesh.fsdp = -1
    config.train.batch_size = 256
    config.optimizer.learning_rate = 3e-4
    return config
