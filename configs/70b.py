"""70b: Llama 2 70B (Touvron et al. 2023, arXiv:2307.09288).

80 layers of 8,192, 64 heads on 8 key-value heads, SwiGLU of 28,672, untied.

    parameters       68,976,648,192
    tokens           1.38e12, 20 a parameter
    training FLOPs   5.91e23

    python -m launch.train --config=configs/70b.py --config.data.source='TEXT/*.jsonl' --workdir=runs/70b

So many tokens want text of one's own: on the embedded default `data.max_epochs` refuses them, and a first try is
`--config.train.steps=5`.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.base import pretraining


def get_config() -> ConfigDict:
    config = pretraining(tokens=1_380_000_000_000)
    config.model.layers = 80
    config.model.embed = 8192
    config.model.heads = 64
    config.model.kv_heads = 8
    config.model.feed_forward_dim = 28672
    config.mesh.data = 1
    config.mesh.fsdp = -1
    config.train.batch_size = 1024
    config.train.length = 4096
    config.optimizer.learning_rate = 1.5e-4
    return config
