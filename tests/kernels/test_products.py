"""Products for the CPU's library: right, and never given a sum over rows."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm_jax.kernels.cross_entropy import cross_entropy
from lm_jax.kernels.flash_attention import AttentionMask, flash_attention
from lm_jax.kernels.products import over_rows, turned
from lm_jax.models.linear import linear


@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(40, 3, 7), (40, 70, 7), (2, 70, 7), (1, 1, 1)])
def test_a_sum_over_rows_is_that(rows: int, inputs: int, outputs: int) -> None:
    rng = np.random.default_rng(0)
    x, g = (rng.integers(-9, 9, (rows, n)).astype(np.float32) for n in (inputs, outputs))
    np.testing.assert_array_equal(over_rows(jnp.asarray(x), jnp.asarray(g)), x.T @ g)  # small integers: exact
    np.testing.assert_array_equal(turned(jnp.asarray(x)), x.T)


def test_it_sums_in_the_dtype_that_is_asked_for() -> None:
    x = jnp.full((300, 1), 1, jnp.bfloat16)
    assert over_rows(x, x, dtype=jnp.float32) == 300  # which bfloat16 has no number for
    assert over_rows(x, x).dtype == jnp.bfloat16


def attend(q: jax.Array) -> jax.Array:
    return jnp.sum(flash_attention(q, q, q, mask=AttentionMask(), implementation="xla") ** 2)


def project(arrays: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
    x, into, out = arrays
    y = linear(x, into, ("features",), ("vocab",))
    return jnp.sum(linear(y, out, ("vocab",), ("features",)) ** 2)


def lose(arrays: tuple[jax.Array, jax.Array]) -> jax.Array:
    x, table = arrays
    rows = jnp.ones(x.shape[:2], jnp.int32)
    return cross_entropy(x, table.T, rows, rows > 0, transposed=True).total


X, W = jnp.ones((2, 32, 16)), jnp.ones((48, 16))


@pytest.mark.parametrize(
    ("function", "at", "products"),
    [
        (attend, jnp.ones((2, 64, 2, 16)), 6),  # scores and outcome, and four of the gradient
        (project, (X, W.T, W), 6),
        (lose, (X, W), 3),
    ],
)
def test_none_in_a_gradient_sums_over_rows(function: Callable[[Any], jax.Array], at: Any, products: int) -> None:
    """XLA would fold transposes into such products, and has no fast one for them."""
    lines = re.findall(r" dot\(.*", jax.jit(jax.grad(function)).lower(at).compile().as_text())
    summed = [int(re.findall(r"lhs_contracting_dims={(\d+)}", line)[0]) for line in lines]
    assert summed == [3 if "lhs_batch_dims" in line else 1 for line in lines], "not the last dimension"
    assert len(lines) == products
