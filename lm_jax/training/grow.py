"""A model whose vocabulary has grown: rows of new ids begin as the mean of those that spelt them before."""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from lm_jax.data.tokenizers import Tokenizer
from lm_jax.models.transformer import TransformerConfig, transformer_specs
from lm_jax.params import Tree
from lm_jax.sharding import abstract
from lm_jax.training.checkpoint import CheckpointConfig, Checkpointer


def grown(
    params: Tree, c: TransformerConfig, first: int, spelt: Sequence[Sequence[int]], mesh: jax.sharding.Mesh
) -> tuple[Tree, TransformerConfig]:
    """Weights, and their config, with rows for further ids; all other rows are as they were.

    Args:
      params: of `transformer_specs(c)`.
      c: the config of the model.
      first: the first new id. Rows that the model has from there on were of no id, and are used.
      spelt: for each new id, the ids below `first` that spelt it.
      mesh: that the new weights are laid out on.
    """
    size = max(c.ids, first + len(spelt))

    def with_rows(table_VD: np.ndarray) -> np.ndarray:
        out_VD = np.zeros((size, table_VD.shape[1]), table_VD.dtype)
        out_VD[: len(table_VD)] = table_VD
        for i, ids in enumerate(spelt, start=first):
            out_VD[i] = table_VD[ids].mean(axis=0)
        return out_VD

    new = dict(params) | {"embedding": with_rows(np.asarray(params["embedding"]))}
    if not c.tied:
        new["output"] = with_rows(np.asarray(params["output"]).T).T
    config = dataclasses.replace(c, vocab=size)
    places = abstract(transformer_specs(config), mesh)
    return jax.tree.map(lambda leaf, like: jax.device_put(leaf, like.sharding), new, places), config


def save_grown(
    directory: epath.Path, metadata: dict[str, Any], params: Tree, c: TransformerConfig, tokenizer: Tokenizer, name: str
) -> None:
    """Writes a checkpoint that holds weights alone, for `train.init_from`, generation and evaluation.

    Args:
      directory: of the new run.
      metadata: of the checkpoint that the weights come from.
      params: the grown weights.
      c: their config.
      tokenizer: the extended one.
      name: where it lies, for the config.

    Raises:
      StorageError: where it cannot be written.
    """
    config = metadata["config"]
    config = config | {"model": config["model"] | {"vocab": c.vocab}, "data": config["data"] | {"tokenizer": name}}
    files = {file: base64.b64encode(content).decode() for file, content in tokenizer.files().items()}
    identity = metadata["identity"] | {"tokenizer": tokenizer.fingerprint}
    checkpoints = Checkpointer(directory / "checkpoints", CheckpointConfig())
    try:
        checkpoints.save(
            metadata["step"],
            {"params": params},
            metadata | {"config": config, "tokenizer": files, "identity": identity},
            force=True,
        )
    finally:
        checkpoints.close()
