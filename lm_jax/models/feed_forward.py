"""The feed-forward layers, by name.

Shapes: B batch, T length, D embed, F feed-forward.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lm_jax.errors import ConfigError
from lm_jax.models.linear import flattens, linear, rows
from lm_jax.params import Initializer, ParamSpec, scaled_normal
from lm_jax.sharding import out_sharding

Array = jax.Array
Params = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeedForwardConfig:
    """A feed-forward layer.

    Attributes:
      embed: width of the residual stream.
      feed_forward: the kind: `swiglu` or `squared_relu`.
      feed_forward_dim: the width inside; None: the kind's usual multiple of `embed`.
    """

    embed: int = 256
    feed_forward: str = "swiglu"
    feed_forward_dim: int | None = None

    def __post_init__(self) -> None:
        if self.feed_forward not in FEED_FORWARDS:
            known = ", ".join(FEED_FORWARDS)
            raise ConfigError("model.feed_forward", f"unknown kind {self.feed_forward!r}", f"use one of {known}")
        if self.feed_forward_dim is None:
            object.__setattr__(self, "feed_forward_dim", FEED_FORWARDS[self.feed_forward].default_dim(self.embed))
        elif self.feed_forward_dim < 1:
            raise ConfigError(
                "model.feed_forward_dim", f"{self.feed_forward_dim} is too small", "use 1 or more, or leave it open"
            )

    @property
    def inner(self) -> int:
        """The width inside, as a plain int."""
        assert self.feed_forward_dim is not None  # __post_init__ has filled it
        return self.feed_forward_dim


class FeedForward(NamedTuple):
    """One kind: the names of its weights going in, `[B, T, F]` from what they give, and its usual width inside."""

    inputs: tuple[str, ...]
    activation: Callable[..., Array]
    default_dim: Callable[[int], int]


def feed_forward_specs(c: FeedForwardConfig, out: Initializer) -> dict[str, ParamSpec]:
    """The weights going in, by name, and `down`, which starts as `out` says."""
    into = ParamSpec((c.embed, c.inner), ("embed", "feed_forward"), scaled_normal(c.embed))
    specs = dict.fromkeys(FEED_FORWARDS[c.feed_forward].inputs, into)
    return specs | {"down": ParamSpec((c.inner, c.embed), ("feed_forward", "embed"), out)}


def feed_forward(params: Params, x_BTD: Array, *, c: FeedForwardConfig, length: str = "length") -> Array:
    """`[B, T, D]` -> `[B, T, D]`, its length laid out by the logical name `length`."""
    kind = FEED_FORWARDS[c.feed_forward]
    # As rows from end to end: the gradients of what is inside then have its shape, and can take its place in memory.
    flat = flattens(length)
    x = rows(x_BTD, "features") if flat else x_BTD
    inner = [linear(x, params[name], ("features",), ("feed_forward",)) for name in kind.inputs]
    y = linear(kind.activation(*inner), params["down"], ("feed_forward",), ("features",), length)
    return jax.lax.reshape(y, x_BTD.shape, out_sharding=out_sharding("batch", length, "features")) if flat else y


@jax.custom_vjp
def _swiglu(gate_BTF: Array, up_BTF: Array) -> Array:
    """`silu(gate) * up` (Shazeer 2020, arXiv:2002.05202). The backward pass keeps the two inputs and nothing else."""
    return jax.nn.silu(gate_BTF) * up_BTF


def _swiglu_backward(saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    gate, up = saved
    # Not the sigmoid of the forward pass: XLA would keep that one, and on CPU reading it costs more than this.
    s = 0.5 * jnp.tanh(0.5 * gate) + 0.5
    silu = gate * s
    return g * up * (s + silu * (1 - s)), g * silu


_swiglu.defvjp(lambda gate, up: (jax.nn.silu(gate) * up, (gate, up)), _swiglu_backward)


@jax.custom_vjp
def _squared_relu(x_BTF: Array) -> Array:
    """`max(x, 0)^2` (So et al. 2021, arXiv:2109.08668)."""
    return jnp.square(jax.nn.relu(x_BTF))


_squared_relu.defvjp(lambda x: (jnp.square(jax.nn.relu(x)), x), lambda x, g: (2 * g * jax.nn.relu(x),))


def _two_thirds_of_four(embed: int) -> int:
    """8/3 of the embedding, up to a multiple of 64: three matrices then cost what two of four times would."""
    return -(-8 * embed // 3 // 64) * 64


FEED_FORWARDS: dict[str, FeedForward] = {
    "swiglu": FeedForward(("gate", "up"), _swiglu, _two_thirds_of_four),
    "squared_relu": FeedForward(("up",), _squared_relu, lambda embed: 4 * embed),
}
