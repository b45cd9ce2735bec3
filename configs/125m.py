"""125m: GPT-3's 125M (Brown et al. 2020, arXiv:2005.14165) as a Llama.

12 layers of 768, 12 heads, SwiGLU of 2,048, untied.

    parameters       134,105,856
    tokens           2.68e9, 20 a parameter
    training FLOPs   2.06e18

    python -m launch.train --config=configs/125m.py --config.data.source='TEXT/*.jsonl' --workdir=runs/125m

So many tokens want text of one's own: on the embedded default `data.max_epochs` refuses them, and a first try is
`--config.train.steps=100`.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.base import pretraining


def get_config() -> ConfigDict:
    config = pretraining(tokens=2_680_000_000)
    config.model.layers = 12
    config.model.embed = 768
    config.model.heads = 12
    config.train.batch_size = 128
    config.optimizer.learning_rate = 6e-4
    return config
