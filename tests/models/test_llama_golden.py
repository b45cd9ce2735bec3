"""Our logits equal those of the `transformers` library's Llama with the same random weights.

`tests/golden/make_llama.py` makes the arrays.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm_jax.models.transformer import TransformerConfig, hidden, logits, transformer_specs
from lm_jax.params import describe, path_name

GOLDEN = Path(__file__).parent.parent / "golden"


def config_of(settings: dict[str, Any], **changes: Any) -> TransformerConfig:
    return TransformerConfig(
        layers=settings["num_hidden_layers"],
        embed=settings["hidden_size"],
        heads=settings["num_attention_heads"],
        kv_heads=settings["num_key_value_heads"],
        feed_forward_dim=settings["intermediate_size"],
        vocab=settings["vocab_size"],
        tied=settings["tie_word_embeddings"],
        rope_base=settings["rope_theta"],
        norm_epsilon=settings["rms_norm_eps"],
        dtype="float32",
        **changes,
    )


def params_of(weights: Any, c: TransformerConfig) -> dict[str, Any]:
    """Our parameters from Llama's weights `[out, in]` by the library's names."""

    def layers(name: str, *shape: int) -> np.ndarray:
        """All layers' weights, each as `[in, out]` and then in this shape."""
        each = [weights[f"model.layers.{i}.{name}.weight"] for i in range(c.layers)]
        return np.stack([w.T.reshape(shape or w.T.shape) for w in each])

    D, N, K, H = c.embed, c.heads, c.key_heads, c.head_size
    params = {
        "embedding": weights["model.embed_tokens.weight"],
        "blocks": {
            "attention_norm": {"gain": layers("input_layernorm")},
            "attention": {
                "query": layers("self_attn.q_proj", D, N, H),
                "key": layers("self_attn.k_proj", D, K, H),
                "value": layers("self_attn.v_proj", D, K, H),
                "out": layers("self_attn.o_proj", N, H, D),
            },
            "feed_forward_norm": {"gain": layers("post_attention_layernorm")},
            "feed_forward": {name: layers(f"mlp.{name}_proj") for name in ("gate", "up", "down")},
        },
        "final_norm": {"gain": weights["model.norm.weight"]},
    }
    if not c.tied:
        params["output"] = weights["lm_head.weight"].T
    return jax.tree.map(jnp.asarray, params)


@pytest.mark.parametrize("scan", [True, False], ids=["scanned", "unrolled"])
@pytest.mark.parametrize("file", ["llama_untied", "llama_tied"])
def test_logits_equal_llamas(file: str, scan: bool, mesh: jax.sharding.Mesh) -> None:
    del mesh  # entered
    with np.load(GOLDEN / f"{file}.npz", allow_pickle=False) as golden:
        c = config_of(json.loads(str(golden["settings"])), scan=scan)
        params = params_of(golden, c)
        tokens, want = golden["tokens"], golden["logits"]
    shapes = {path_name(p): list(w.shape) for p, w in jax.tree_util.tree_flatten_with_path(params)[0]}
    assert shapes == {name: spec["shape"] for name, spec in describe(transformer_specs(c)).items()}

    @jax.jit
    def run(params: Any, tokens: jax.Array) -> jax.Array:
        return logits(params, hidden(params, tokens, c=c)[0], c=c)

    with jax.default_matmul_precision("highest"):
        got = np.asarray(run(params, jnp.asarray(tokens)))
    assert np.std(want) > 0.5  # far from zero: the tolerance means something
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_golden_files_are_small() -> None:
    files = sorted(GOLDEN.glob("llama_*.npz"))
    assert [f.stem for f in files] == ["llama_tied", "llama_untied"]
    assert all(f.stat().st_size < 300_000 for f in files)
