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
