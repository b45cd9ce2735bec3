"""A trained model out of a run's folder, for whoever generates, evaluates or exports."""

import base64
from typing import NamedTuple

import jax
from etils import epath

from lm_jax.config import build
from lm_jax.data import tokenizers
from lm_jax.data.tokenizers import Tokenizer
from lm_jax.errors import UserError
from lm_jax.models.transformer import transformer_specs
from lm_jax.params import Tree
from lm_jax.sharding import abstract
from lm_jax.training.checkpoint_reader import CheckpointReader
from lm_jax.training.run import RunConfig


class Trained(NamedTuple):
    """A run's config, its tokenizer, its weights (the averaged ones where the run keeps them), the steps behind them,
    and what its text was."""

    config: RunConfig
    tokenizer: Tokenizer
    params: Tree
    step: int
    data: str


def load_trained(directory: epath.Path, mesh: jax.sharding.Mesh, *, step: int | None = None) -> Trained:
    """The newest good checkpoint of a run, or that of a step, verified. Nothing else of the run is needed: no source,
    no cache.

    Raises:
      UserError: where there is none.
    """
    if not (directory / "checkpoints").exists():
        raise UserError(
            f"--workdir: {directory} is no run's folder\ngive the workdir of a run that has saved a checkpoint"
        )
    reader = CheckpointReader(directory / "checkpoints")
    metadata = reader.read_metadata(step)
    config = build(RunConfig, metadata["config"])
    tokenizer = tokenizers.from_files({n: base64.b64decode(text) for n, text in metadata["tokenizer"].items()})
    restored = reader.restore_params(abstract(transformer_specs(config.model), mesh), ema=True, step=step)
    return Trained(config, tokenizer, restored.tree, restored.step, metadata["identity"]["data"])
