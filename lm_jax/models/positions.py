"""Position encodings, by name.

A position encoding is a `PositionEncoding`: what it prepares once for a forward pass from the positions, and how it
turns a layer's queries and keys with that, or what it adds to their scores.

Shapes: B batch, T length, N heads, H head dim.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm_jax.errors import ConfigError
from lm_jax.kernels.flash_attention import PositionBias, Slopes
from lm_jax.sharding import constrain

Array = jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class PositionConfig:
    """How a model knows where a token stands.

    Attributes:
      position: the encoding: `rope`, `alibi` or `none`.
      rope_base: base of the rotary wavelengths; the longest is `2 pi * base` tokens.
    """

    position: str = "rope"
    rope_base: float = 10_000.0

    def __post_init__(self) -> None:
        if self.position not in POSITIONS:
            raise ConfigError(
                "model.position", f"unknown encoding {self.position!r}", f"use one of {', '.join(POSITIONS)}"
            )
        if not self.rope_base > 1:
            raise ConfigError(
                "model.rope_base", f"{self.rope_base} is out of range", "use a number above 1, such as 10000"
            )


class PositionEncoding(NamedTuple):
    """Hooks of an encoding: `prepare(positions_BT, head_dim, c) -> state`; `rotate(x_BTNH, state) -> x_BTNH`; `bias`,
    which gives what so many heads add to their scores, or None."""

    prepare: Callable[[Array, int, PositionConfig], Any]
    rotate: Callable[[Array, Any], Array]
    bias: Callable[[int], PositionBias | None]


def _rope_prepare(positions_BT: Array, head_dim: int, c: PositionConfig) -> tuple[Array, Array]:
    """Cosines and sines `[B, T, 1, H / 2]`, float32: once a forward pass, for all layers."""
    half = head_dim // 2
    frequency = c.rope_base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = constrain(positions_BT, "batch", "length").astype(jnp.float32)[:, :, None, None] * frequency
    # In a loop, which XLA does not fuse into what follows: on CPU it would compute them again in every layer.
    cos, sin = jax.lax.map(lambda i: jnp.where(i == 0, jnp.cos(angle), jnp.sin(angle)), jnp.arange(2))
    return cos, sin


def _turn(x: Array, cos: Array, sin: Array) -> Array:
    half = x.shape[-1] // 2
    a, b = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


@jax.custom_vjp
def _rope_rotate(x_BTNH: Array, state: tuple[Array, Array]) -> Array:
    """RoPE (Su et al. 2021, arXiv:2104.09864), first half against second half as in Llama's published weights."""
    return _turn(x_BTNH, *state)


def _rope_forward(x_BTNH: Array, state: tuple[Array, Array]) -> tuple[Array, tuple[Array, Array]]:
    return _turn(x_BTNH, *state), state


def _rope_backward(state: tuple[Array, Array], g_BTNH: Array) -> tuple[Array, None]:
    cos, sin = state
    return _turn(g_BTNH, cos, -sin), None  # the gradient turns back


_rope_rotate.defvjp(_rope_forward, _rope_backward)


def alibi_slopes(heads: int) -> np.ndarray:
    """`[N]`: how fast each head's attention falls with distance (Press et al. 2022, arXiv:2108.12409): `2^(-8 i / N)`
    for the powers of two; for other counts the largest power below, then every second slope of the next one."""
    power = 2 ** (heads.bit_length() - 1)
    slopes = 2.0 ** (-8.0 * np.arange(1, power + 1) / power)
    between = 2.0 ** (-4.0 * np.arange(1, 2 * power + 1, 2) / power)
    return np.concatenate([slopes, between[: heads - power]]).astype(np.float32)


def _nothing(positions_BT: Array, head_dim: int, c: PositionConfig) -> None:
    return None


def _as_it_is(x_BTNH: Array, state: None) -> Array:
    return x_BTNH


def _no_bias(heads: int) -> None:
    return None


POSITIONS: dict[str, PositionEncoding] = {
    "rope": PositionEncoding(_rope_prepare, _rope_rotate, _no_bias),
    "alibi": PositionEncoding(_nothing, _as_it_is, lambda heads: Slopes(jnp.asarray(alibi_slopes(heads)))),
    "none": PositionEncoding(_nothing, _as_it_is, _no_bias),
}
