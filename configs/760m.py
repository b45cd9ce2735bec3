"""760m: GPT-3's 760M (Brown et al. 2020, arXiv:2005.14165) as a Llama.

24 layers of 1,536, 16 heads, SwiGLU of 4,096, untied.

    parameters       777,856,512
    tokens           1.56e10, 20 a parameter
    training FLOPs   7.53e19

    python -m launch.train --config=configs/760m.py --config.data.source='TEXT/*.jsonl' --workdir=runs/760m

So many tokens want text of one's own: on the embedded default `data.max_epochs` refuses them, and a first try is
`--config.train.steps=100`.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.base import pretraining


def get_config() -> ConfigDict:
    config = pretraining(tokens=15_600_000_000)
    config.model.layers = 24
    config.model.embed = 1536
    config.model.heads = 16
    config.train.batch_size = 128
    config.optimizer.learning_rate = 2.5e-4
    return config
