"""Models, parameters and batches small enough for a test."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm_jax.models.transformer import TransformerConfig, hidden, logits, transformer_specs
from lm_jax.params import Tree, initialize

Array = jax.Array


def config(**changes: Any) -> TransformerConfig:
    """Two layers of 32 with grouped heads, 64 ids, float32."""
    small: dict[str, Any] = dict(
        layers=2, embed=32, heads=4, kv_heads=2, head_dim=8, feed_forward_dim=48, vocab=64, dtype="float32"
    )
    return TransformerConfig(**(small | changes))


def parameters(c: TransformerConfig, seed: int = 0) -> Tree:
    """Initial values with noise on top, so that gains are not one and logits differ by more than rounding."""

    def make(key: Array) -> Tree:
        params = initialize(transformer_specs(c), key)
        leaves, structure = jax.tree.flatten(params)
        keys = jax.random.split(jax.random.fold_in(key, 1), len(leaves))
        noisy = [a + 0.2 * jax.random.normal(k, a.shape) for a, k in zip(leaves, keys, strict=True)]
        return jax.tree.unflatten(structure, noisy)

    return jax.jit(make)(jax.random.key(seed))


def full_logits(params: Tree, tokens: Any, c: TransformerConfig, **arguments: Any) -> Array:
    """`[B, T, V]` from a forward pass over everything at once."""

    def forward(params: Tree, tokens: Array, arguments: dict[str, Array]) -> Array:
        return logits(params, hidden(params, tokens, c=c, **arguments)[0], c=c)

    arrays = {name: jnp.asarray(value) for name, value in arguments.items()}
    return jax.jit(forward)(params, jnp.asarray(tokens), arrays)


def batch(rows: int, length: int, vocab: int = 64, seed: int = 0) -> dict[str, np.ndarray]:
    """A batch of packed documents: two a row, of lengths that differ by row, with padding behind; row 1 is all padding."""
    random = np.random.default_rng(seed)
    tokens = random.integers(0, vocab, (rows, length + 1))
    segments, positions = np.full((rows, length), -1), np.zeros((rows, length), int)
    for row in range(rows):
        first, second = (0, 0) if row == 1 else sorted(random.integers(1, length + 1, 2))
        segments[row, :first], segments[row, first:second] = 0, 1
        positions[row, :first], positions[row, first:second] = np.arange(first), np.arange(second - first)
    whole = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "segment_ids": segments, "positions": positions}
    return {name: a.astype(np.int32) for name, a in whole.items()} | {"loss_mask": segments >= 0}
