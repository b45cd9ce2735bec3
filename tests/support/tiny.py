"""Models, parameters and batches small enough for a test."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm_jax.models.transformer import TransformerConfig, hidden, logits, transformer_specs
from lm_jax.params import ParamSpec, Tree, map_specs, role

Array = jax.Array


def config(**changes: Any) -> TransformerConfig:
    """Two layers of 32 with grouped heads, 64 ids, float32."""
    small: dict[str, Any] = dict(
        layers=2, embed=32, heads=4, kv_heads=2, head_dim=8, feed_forward_dim=48, vocab=64, dtype="float32"
    )
    return TransformerConfig(**(small | changes))


def parameters(c: TransformerConfig, seed: int = 0) -> Tree:
    """Values of a trained model's size, made without a compilation: gains are not one, projections are not small."""
    random = np.random.default_rng(seed)

    def one(s: ParamSpec) -> Array:
        noise = random.standard_normal(s.shape)
        if role(s) == "vector":
            return jnp.asarray(1 + 0.2 * noise, jnp.float32)
        return jnp.asarray(noise * max(1, math.prod(s.shape[d] for d in s.fan_in)) ** -0.5, jnp.float32)

    return map_specs(one, transformer_specs(c))


@functools.partial(jax.jit, static_argnames="c")
def full_logits(params: Tree, tokens_BT: Any, c: TransformerConfig, **arguments: Any) -> Array:
    """`[B, T, V]` from a forward pass over everything at once."""
    return logits(params, hidden(params, jnp.asarray(tokens_BT), c=c, **arguments)[0], c=c)


def batch(rows: int, length: int, vocab: int = 64, seed: int = 0) -> dict[str, np.ndarray]:
    """A batch of packed documents: two a row, of lengths that differ, with padding behind; row 1 is all padding."""
    random = np.random.default_rng(seed)
    tokens = random.integers(0, vocab, (rows, length + 1))
    segments, positions = np.full((rows, length), -1), np.zeros((rows, length), int)
    for row in range(rows):
        first, second = (0, 0) if row == 1 else sorted(random.integers(1, length + 1, 2))
        segments[row, :first], segments[row, first:second] = 0, 1
        positions[row, :first], positions[row, first:second] = np.arange(first), np.arange(second - first)
    whole = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "segment_ids": segments, "positions": positions}
    return {name: a.astype(np.int32) for name, a in whole.items()} | {"loss_mask": segments >= 0}
