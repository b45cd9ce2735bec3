"""The next token from logits: greedy, temperature, top-k, nucleus.

Shapes: B batch, V vocabulary.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from lm_jax.errors import ConfigError

Array = jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How a token is drawn. The parts apply in this order, each to what the one before it has left.

    Attributes:
      temperature: logits are divided by it; 0: always the most probable token (of equal ones the lowest id).
      top_k: only the k most probable tokens can be drawn, and those exactly as probable as the k-th; None: all
        (Fan et al. 2018, arXiv:1805.04833).
      top_p: only the nucleus can be drawn: the most probable tokens, taken in order until their probabilities add up to
        p or more, and those exactly as probable as the last of them; None: all (Holtzman et al. 2019,
        arXiv:1904.09751).
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ConfigError(
                "temperature", f"{self.temperature} is out of range", "use 0 (greedy) or a number such as 0.8"
            )
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError("top_k", f"{self.top_k} is too small", "use 1 or more, or leave it out")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError("top_p", f"{self.top_p} is out of range", "use a number above 0, up to 1")


def sample(logits_BV: Array, keys_B: Array, config: SamplingConfig) -> Array:
    """A token id a row, `[B]` int32.

    Args:
      logits_BV: float32, whole over the vocabulary.
      keys_B: a key a row, so that what a row draws is its own affair; not read where the temperature is 0.
      config: how to draw.
    """
    if config.temperature == 0:
        return jnp.argmax(logits_BV, -1).astype(jnp.int32)
    logits_BV = allowed(logits_BV, config)
    return jax.vmap(jax.random.categorical)(keys_B, logits_BV).astype(jnp.int32)


def allowed(logits_BV: Array, config: SamplingConfig) -> Array:
    """Logits over the temperature (above 0), -inf for the tokens that top-k and top-p rule out."""
    z = logits_BV / config.temperature
    if config.top_k is not None and config.top_k < z.shape[-1]:
        kth = jax.lax.top_k(z, config.top_k)[0][:, -1:]
        z = jnp.where(z < kth, -jnp.inf, z)
    if config.top_p is not None and config.top_p < 1:
        ordered = jnp.sort(z, axis=-1, descending=True)
        p = jax.nn.softmax(ordered, -1)
        inside = jnp.cumsum(p, -1) - p < config.top_p  # the sum before a token has not reached p yet
        last = jnp.min(jnp.where(inside, ordered, jnp.inf), -1, keepdims=True)
        z = jnp.where(z < last, -jnp.inf, z)
    return z
