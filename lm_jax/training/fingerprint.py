"""A fingerprint of an array's exact bits, the same on every mesh.

`sum(word[i] * weight[i]) mod 2**32` over the array's bits taken as unsigned words, with a pseudo-random odd weight for
each place. An odd number times any change of one bit is not 0 modulo 2**32, so every single flipped bit is found; other
damage escapes with probability 2**-32. Integer sums do not depend on their order, hence not on how the array is split.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from lm_jax.sharding import in_memory

Array = jax.Array


def fingerprint(x: Array) -> Array:
    """The fingerprint of one array of any numeric or boolean dtype: uint32, a scalar. Pure; nothing is gathered."""
    words = _words(in_memory(x, host=False))  # what lies on the host is brought over
    place = jnp.zeros(words.shape, jnp.uint32)
    stride = 1
    for d in reversed(range(words.ndim)):
        place += jax.lax.broadcasted_iota(jnp.uint32, words.shape, d) * jnp.uint32(stride % 2**32)
        stride *= words.shape[d]
    # Neighbouring places must not have neighbouring weights, or exchanged blocks would often go unseen.
    mixed = place * jnp.uint32(0x9E3779B1)
    weight = (mixed ^ (mixed >> 15)) | 1
    return jnp.sum(words * weight, dtype=jnp.uint32)


def _words(x: Array) -> Array:
    """The bits of each element as one unsigned number, or as two in a last dimension where it has more than 32."""
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        x = jnp.stack([x.real, x.imag], axis=-1)
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    if jnp.issubdtype(x.dtype, jnp.integer) and jnp.iinfo(x.dtype).bits < 8:
        x = x.astype(jnp.int8)
    word = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
    return jax.lax.bitcast_convert_type(x, word).astype(jnp.uint32)


@jax.jit
def _fingerprints(leaves: list[Array]) -> list[Array]:
    return [fingerprint(x) for x in leaves]


def fingerprints(leaves: Mapping[str, Array]) -> dict[str, int]:
    """The fingerprints of named arrays on one mesh (or one device). Waits for them; every process gets all of them."""
    values = jax.device_get(_fingerprints(list(leaves.values())))
    return {name: int(value) for name, value in zip(leaves, values, strict=True)}
