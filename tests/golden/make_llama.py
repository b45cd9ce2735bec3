"""Makes `llama_*.npz`: the logits of tiny random Llamas of the `transformers` library, with their weights and tokens.

    python tests/golden/make_llama.py

It needs torch and transformers; the test that reads the arrays (`tests/models/test_llama_golden.py`) needs neither.
Weights keep the library's names. `settings` and `versions` are JSON.
"""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

SETTINGS = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rope_theta": 10_000.0,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.15,  # large, so that attention is far from uniform and a wrong detail shows
}
ROWS, LENGTH = 2, 24


def make(tied: bool) -> dict[str, Any]:
    """Everything that one file holds."""
    torch.manual_seed(1 if tied else 0)
    config = LlamaConfig(**SETTINGS, tie_word_embeddings=tied, attn_implementation="eager", use_cache=False)
    model = LlamaForCausalLM(config).to(torch.float32).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:  # gains start at one, and would not be seen
                p.add_(0.3 * torch.randn_like(p))
        tokens = torch.randint(SETTINGS["vocab_size"], (ROWS, LENGTH))
        logits = model(tokens).logits
    weights = {name: w.numpy() for name, w in model.state_dict().items() if not (tied and name == "lm_head.weight")}
    versions = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    settings = SETTINGS | {"tie_word_embeddings": tied}
    return {
        **weights,
        "tokens": tokens.numpy().astype(np.int32),
        "logits": logits.numpy(),
        "settings": np.array(json.dumps(settings)),
        "versions": np.array(json.dumps(versions)),
    }


if __name__ == "__main__":
    for tied in (False, True):
        file = Path(__file__).parent / f"llama_{'tied' if tied else 'untied'}.npz"
        np.savez_compressed(file, **make(tied))
        print(f"{file}: {file.stat().st_size} bytes")
