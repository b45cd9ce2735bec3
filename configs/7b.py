"""7b: Llama 2 7B (Touvron et al. 2023, arXiv:2307.09288).

32 layers of 4,096, 32 heads, SwiGLU of 11,008, untied.

    parameters       6,738,415,616
    tokens           1.35e11, 20 a parameter
    training FLOPs   5.79e21

    python -m launch.train --config=configs/7b.py --config.data.source='TEXT/*.jsonl' --workdir=runs/7b

So many tokens want text of one's own: on the embedded default `data.max_epochs` refuses them, and a first try is
`--config.train.steps=5`.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.base import pretraining


def get_config() -> ConfigDict:
    config = pretraining(tokens=135_000_000_000)
    config.model.layers = 32
    config.model.embed = 4096
    config.model.heads = 32
    config.model.feed_forward_dim = 11008
    config.mesh.data = 1
    config.mesh.fsdp = -1
    config.train.batch_size = 1024
    config.train.length = 4096
    config.optimizer.learning_rate = 3e-4
    return config
