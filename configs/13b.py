"""13b: Llama 2 13B (Touvron et al. 2023, arXiv:2307.09288).

40 layers of 5,120, 40 heads, SwiGLU of 13,824, untied.

    parameters       13,015,864,320
    tokens           2.6e11, 20 a parameter
    training FLOPs   2.14e22

    python -m launch.train --config=configs/13b.py --config.data.source='TEXT/*.jsonl' --workdir=runs/13b

So many tokens want text of one's own: on the embedded default `data.max_epochs` refuses them, and a first try is
`--config.train.steps=5`.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.base import pretraining


def get_config() -> ConfigDict:
    config = pretraining(tokens=260_000_000_000)
    config.model.layers = 40
    config.model.embed = 5120
    config.model.heads = 40
    config.model.feed_forward_dim = 13824
    config.mesh.data = 1
    config.mesh.fsdp = -1
    config.train.batch_size = 1024
    config.train.length = 4096
    config.optimizer.learning_rate = 3e-4
    return config
