"""Fingerprints: every flipped bit is found, whatever the dtype."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm_jax.training.fingerprint import fingerprint, fingerprints

DTYPES = ("float32", "bfloat16", "float16", "float8_e4m3fn", "int32", "uint8", "int16", "bool", "complex64", "int4")


def _values(dtype: str) -> jax.Array:
    numbers = 8 * np.random.default_rng(0).standard_normal((4, 3, 5))
    return jnp.asarray(numbers > 0) if dtype == "bool" else jnp.asarray(numbers, jnp.float32).astype(dtype)


def _flipped(x: np.ndarray, bits: int) -> np.ndarray:
    """Copies of `x` with one bit flipped, in the low `bits` of a byte, in every 7th byte."""
    copies = []
    for i in range(0, x.nbytes, 7):
        for bit in range(bits):
            raw = np.frombuffer(x.tobytes(), np.uint8).copy()
            raw[i] ^= 1 << bit
            copies.append(raw.view(x.dtype).reshape(x.shape))
    return np.stack(copies)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_flipped_bit_is_found(dtype: str) -> None:
    x = np.asarray(_values(dtype))
    others = _flipped(x, {"bool": 1, "int4": 4}.get(dtype, 8))
    marks = jax.jit(jax.vmap(fingerprint))(jnp.asarray(np.concatenate([x[None], others])))
    assert not np.any(np.asarray(marks[1:]) == np.asarray(marks[0]))


@pytest.mark.parametrize("dtype", ["float64", "int64"])
def test_every_flipped_bit_of_64_is_found(dtype: str) -> None:
    x = np.arange(6).astype(dtype)
    with jax.enable_x64(True):
        marks = jax.vmap(fingerprint)(jnp.asarray(np.concatenate([x[None], _flipped(x, 8)])))
        assert marks.dtype == jnp.uint32
    assert not np.any(np.asarray(marks[1:]) == np.asarray(marks[0]))


def test_order_and_shape_count() -> None:
    x = jnp.arange(1, 1 + 64 * 1024, dtype=jnp.uint16).reshape(2, -1)
    marks = fingerprints({"x": x, "rows": x[::-1], "columns": x[:, ::-1], "rolled": jnp.roll(x, 1, 1), "zero": 0 * x})
    assert len(set(marks.values())) == 5
    assert marks["zero"] == 0


def test_values_are_fixed() -> None:
    """Checkpoints of earlier versions are verified with today's code: the function may never change."""
    x = jnp.arange(12, dtype=jnp.float32).reshape(3, 4)
    leaves = {"a": x, "b": x.astype(jnp.bfloat16), "c": jnp.int32(7), "d": x > 3}
    assert fingerprints(leaves) == {"a": 2300575744, "b": 3931539744, "c": 7, "d": 352309880}
