"""Models for Flax code: any model as a `flax.nnx.Module` with the same parameters.

module = transformer_module(params, c)
logits = module(tokens_BT)
optimizer = nnx.Optimizer(module, optax.adamw(1e-3), wrt=nnx.Param)
params = to_params(module)
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from lm_jax.models.transformer import TransformerConfig, hidden, logits
from lm_jax.params import Tree

Array = jax.Array


class ParamTree(nnx.Module):
    """A nested dict of arrays as nested modules: each name an attribute, each array an `nnx.Param`."""

    def __init__(self, tree: Tree) -> None:
        """Args: a nested dict of arrays.

        Raises:
          ValueError: a name that a module has for its own use.
        """
        self.names: tuple[str, ...] = ()
        for name, value in tree.items():
            if hasattr(self, name):
                raise ValueError(f"a parameter named {name!r} cannot be an attribute of an nnx.Module: it has one")
            setattr(self, name, ParamTree(value) if isinstance(value, dict) else nnx.Param(value))
        self.names = tuple(tree)

    def tree(self) -> Tree:
        """The nested dict of arrays."""
        # nnx.to_pure_dict would leave out what is empty, such as a norm without gains.
        values = {name: getattr(self, name) for name in self.names}
        return {name: v.tree() if isinstance(v, ParamTree) else v[...] for name, v in values.items()}


class FunctionalModule(nnx.Module):
    """A function of parameters and inputs as a module: calling it calls `apply(params, *args, **kwargs)`."""

    def __init__(self, params: Tree, apply: Callable[..., Any]) -> None:
        """Args: a nested dict of arrays, and the function that takes it first."""
        self.params = ParamTree(params)
        self.apply = apply

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.apply(to_params(self), *args, **kwargs)


def to_params(module: FunctionalModule) -> Tree:
    """The nested dict of arrays that the module holds now: what every other part of this project takes."""
    return module.params.tree()


def transformer_module(params: Tree, c: TransformerConfig) -> FunctionalModule:
    """The decoder as a module: `module(tokens_BT, positions_BT=None, segment_ids_BT=None)` gives `[B, T, V]` logits.

    Args:
      params: of `transformer_specs(c)`.
      c: the model's config.
    """

    return FunctionalModule(params, _Forward(c))


@dataclasses.dataclass(frozen=True)
class _Forward:
    """Compares by its config, so that a second module of the same model finds the first one's functions compiled."""

    c: TransformerConfig

    def __call__(
        self, params: Tree, tokens_BT: Array, positions_BT: Array | None = None, segment_ids_BT: Array | None = None
    ) -> Array:
        x_BTD, _ = hidden(params, tokens_BT, c=self.c, positions_BT=positions_BT, segment_ids_BT=segment_ids_BT)
        return logits(params, x_BTD, c=self.c)
