"""What every config starts from, and how a config declares variants."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ml_collections import ConfigDict

from lm_jax.config import defaults
from lm_jax.errors import UserError
from lm_jax.training.run import RunConfig


def base() -> ConfigDict:
    """All keys at the defaults of their dataclasses. Locked: a config sets keys, and adds none."""
    return defaults(RunConfig)


def pretraining(tokens: int) -> ConfigDict:
    """`base` with what the pre-training of a model of 100 million parameters or more has in common.

    Llama's vocabulary size and epsilon (Touvron et al. 2023, arXiv:2302.13971); each block is computed again in the
    backward pass, because what is between its weights would otherwise be kept for every layer.
    """
    config = base()
    config.model.vocab = 32_000
    config.model.norm_epsilon = 1e-5
    config.data.vocab_size = 32_000
    config.train.steps = None
    config.train.tokens = tokens
    config.train.length = 2048
    config.train.remat = "full"
    config.optimizer.warmup_steps = 2000
    config.checkpoint.every = 1000
    config.evaluation.every = 1000
    config.evaluation.batches = 32
    return config


def vary(config: ConfigDict, variant: str, variants: Mapping[str, Callable[[ConfigDict], None]]) -> ConfigDict:
    """`config` changed by the variant of that name; as it is for the empty name.

    Raises:
      UserError: there is no such variant; names those that are declared.
    """
    if not variant:
        return config
    if variant not in variants:
        raise UserError(f"--config: there is no variant {variant!r}\ndeclared are: {', '.join(variants)}")
    variants[variant](config)
    return config
