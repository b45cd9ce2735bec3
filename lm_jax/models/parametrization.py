"""How a model's initial values, multipliers and learning rates follow its size, by name.

`standard`: every weight matrix starts at `fan_in^-0.5`, one learning rate serves all. The best learning rate then
changes with the width.

`mup`: the maximal-update parametrisation (Yang et al. 2022, arXiv:2203.03466), in the form of their table 8, which
serves a tied table too. With `m = embed / base_embed`: the output's initial size stays that of the base width and
logits are divided by `m`; the learning rates of weight matrices follow `m` by the optimizer's rule
(`training/optimizers.py`); everything else stays. At `m = 1` it is the standard parametrisation, bit for bit. With
`base_head_dim`, attention scores are divided by the head's width instead of its root, for heads that grow.

`completep`: the same, and for depth (Dey et al. 2025, arXiv:2505.01618, alpha = 1): what a block adds to the residual
stream is multiplied by `base_layers / layers`, and its output projections start as those of `base_layers` layers.
"""

import dataclasses
from typing import NamedTuple

from lm_jax.errors import ConfigError

# The base sizes that each needs; it refuses the others, but for `base_head_dim`, which all but `standard` may have.
PARAMETRIZATIONS: dict[str, tuple[str, ...]] = {
    "standard": (),
    "mup": ("base_embed",),
    "completep": ("base_embed", "base_layers"),
}


class Scale(NamedTuple):
    """How many times as wide and as deep as its base a model is; 1 and 1 under the standard parametrisation."""

    width: float = 1.0
    depth: float = 1.0


STANDARD = Scale()


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParametrizationConfig:
    """What a model's hyperparameters were found at.

    Attributes:
      parametrization: how initial values, multipliers and learning rates follow the model's size: `standard`; `mup`,
        which carries a learning rate over widths (Yang et al. 2022, arXiv:2203.03466); `completep`, over widths and
        depths (Dey et al. 2025, arXiv:2505.01618).
      base_embed: the width at which mup is the standard parametrisation: where the learning rate was found.
      base_layers: the same of the depth, with completep.
      base_head_dim: the same of a head's width, where heads grow with the model: scores are then multiplied by
        `sqrt(base_head_dim) / head_dim`. None: heads stay as wide as they are and become more.
    """

    parametrization: str = "standard"
    base_embed: int | None = None
    base_layers: int | None = None
    base_head_dim: int | None = None

    def __post_init__(self) -> None:
        name = self.parametrization
        if name not in PARAMETRIZATIONS:
            known = ", ".join(PARAMETRIZATIONS)
            raise ConfigError("model.parametrization", f"unknown {name!r}", f"use one of {known}")
        for key in ("base_embed", "base_layers", "base_head_dim"):
            value, needed = getattr(self, key), key in PARAMETRIZATIONS[name]
            if value is None and needed:
                problem = f"is not given, and {name} needs it"
                raise ConfigError(f"model.{key}", problem, "give the size at which the learning rate was found")
            if value is not None and not needed and (name == "standard" or key != "base_head_dim"):
                with_it = " or ".join(n for n, needs in PARAMETRIZATIONS.items() if needs and _takes(n, key))
                raise ConfigError(
                    f"model.{key}", f"{name} has no base size of that kind", f"leave it None, or use {with_it}"
                )
            if value is not None and value < 1:
                raise ConfigError(f"model.{key}", f"{value} is too small", "use 1 or more")

    def attention_scale(self, head_dim: int) -> float | None:
        """What scores are multiplied by; None: `head_dim^-0.5`."""
        base = self.base_head_dim
        return None if base in (None, head_dim) else base**0.5 / head_dim


def _takes(name: str, key: str) -> bool:
    return key == "base_head_dim" or key in PARAMETRIZATIONS[name]
