"""350m: GPT-3's 350M (Brown et al. 2020, arXiv:2005.14165) as a Llama.

24 layers of 1,024, 16 heads, SwiGLU of 2,816, untied.

    parameters       373,867,520
    tokens           7.48e9, 20 a parameter
    training FLOPs   1.76e19

    python -m launch.train --config=configs/350m.py --config.data.source='TEXT/*.jsonl' --workdir=runs/350m

So many tokens want text of one's own: on the embedded default `data.max_epochs` refuses them, and a first try is
`--config.train.steps=100`.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.base import pretraining


def get_config() -> ConfigDict:
    config = pretraining(tokens=7_480_000_000)
    config.model.layers = 24
    config.model.embed = 1024
    config.model.heads = 16
    config.model.feed_forward_dim = 2816
    config.train.batch_size = 128
    config.optimizer.learning_rate = 3e-4
    return config
