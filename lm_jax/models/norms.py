"""Root-mean-square normalisation (Zhang and Sennrich 2019, arXiv:1910.07467), with a gain or without.

Both run in float32 and return the dtype that they were given. The backward pass is written by hand: it keeps the input
and one number a row, where the traced one keeps several arrays of the input's size.

Shapes: D embed.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from lm_jax.errors import ConfigError
from lm_jax.params import ParamSpec, ones

Array = jax.Array
Params = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormConfig:
    """The norms of a model.

    Attributes:
      norm: the kind: `rms`, or `rms_no_gain` without parameters.
      norm_epsilon: what is added to the mean square.
    """

    norm: Literal["rms", "rms_no_gain"] = "rms"
    norm_epsilon: float = 1e-6

    def __post_init__(self) -> None:
        if self.norm not in ("rms", "rms_no_gain"):
            raise ConfigError("model.norm", f"unknown norm {self.norm!r}", "use rms or rms_no_gain")
        if not 0 < self.norm_epsilon < 1:
            raise ConfigError(
                "model.norm_epsilon", f"{self.norm_epsilon} is out of range", "use a small number such as 1e-6"
            )


def norm_specs(c: NormConfig, size: int) -> dict[str, ParamSpec]:
    """The gains of a norm over `size` features (none for `rms_no_gain`)."""
    return {"gain": ParamSpec((size,), ("norm",), ones, fan_in=(), decay=False)} if c.norm == "rms" else {}


def norm(params: Params, x: Array, *, c: NormConfig) -> Array:
    """`x / sqrt(mean(x^2) + epsilon)` over the last dimension, times the gain where there is one."""
    if c.norm == "rms":
        return _rms_gain(x, params["gain"], c.norm_epsilon)
    return _rms(x, c.norm_epsilon)


def _inverse_rms(x: Array, epsilon: float) -> Array:
    return jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + epsilon)


@jax.custom_vjp
def _rms(x: Array, epsilon: float) -> Array:
    return _rms_forward(x, epsilon)[0]


def _rms_forward(x: Array, epsilon: float) -> tuple[Array, tuple[Array, Array]]:
    x32 = x.astype(jnp.float32)
    r = _inverse_rms(x32, epsilon)
    return (x32 * r).astype(x.dtype), (x, r)


def _input_gradient(x: Array, r: Array, g: Array) -> Array:
    """The gradient for x of `x * r(x)`, given that of the result; all in float32."""
    return r * g - x * (r**3 * jnp.mean(g * x, -1, keepdims=True))


def _rms_backward(saved: tuple[Array, Array], g: Array) -> tuple[Array, None]:
    x, r = saved
    return _input_gradient(x.astype(jnp.float32), r, g.astype(jnp.float32)).astype(x.dtype), None


_rms.defvjp(_rms_forward, _rms_backward)


@jax.custom_vjp
def _rms_gain(x: Array, gain: Array, epsilon: float) -> Array:
    return _rms_gain_forward(x, gain, epsilon)[0]


def _rms_gain_forward(x: Array, gain: Array, epsilon: float) -> tuple[Array, tuple[Array, Array, Array]]:
    x32 = x.astype(jnp.float32)
    r = _inverse_rms(x32, epsilon)
    return (x32 * r * gain.astype(jnp.float32)).astype(x.dtype), (x, r, gain)


def _rms_gain_backward(saved: tuple[Array, Array, Array], g: Array) -> tuple[Array, Array, None]:
    x, r, gain = saved
    x32, g32 = x.astype(jnp.float32), g.astype(jnp.float32)
    d_gain = jnp.sum(g32 * x32 * r, axis=tuple(range(x.ndim - 1)))
    return _input_gradient(x32, r, g32 * gain.astype(jnp.float32)).astype(x.dtype), d_gain.astype(gain.dtype), None


_rms_gain.defvjp(_rms_gain_forward, _rms_gain_backward)
