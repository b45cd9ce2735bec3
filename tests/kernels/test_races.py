"""The race detector that the tests of the TPU kernels trust: it is on, and it sees a race that is there."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from tests.support.races import assert_no_races, detected


def double(x: jax.Array, own_block: bool, params: Any = None) -> jax.Array:
    """A kernel whose two steps may run at the same time, each with a block of the result for itself, or both with
    the first."""

    def kernel(x_ref: Any, y_ref: Any) -> None:
        y_ref[...] = 2 * x_ref[...]

    call = pl.pallas_call(
        kernel,
        grid=(2,),
        in_specs=[pl.BlockSpec((8, 128), lambda i: (i, 0))],
        out_specs=pl.BlockSpec((8, 128), lambda i: (i if own_block else 0, 0)),
        out_shape=jax.ShapeDtypeStruct((16, 128), jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=params or pltpu.InterpretParams(),
    )
    return call(x)


X = jnp.ones((16, 128))


def test_a_kernel_without_a_race_passes() -> None:
    with detected() as seen:
        np.testing.assert_array_equal(double(X, own_block=True), 2 * X)
    assert_no_races(seen, kernels=1)


def test_a_race_is_found_also_in_the_first_of_two_kernels(capsys: pytest.CaptureFixture[str]) -> None:
    with detected() as seen:
        jax.block_until_ready(double(X, own_block=False))
        jax.block_until_ready(double(X, own_block=True))
    with pytest.raises(AssertionError, match="kernel 0 has a race"):
        assert_no_races(seen, kernels=2)
    assert "RACE DETECTED" in capsys.readouterr().out


def test_a_kernel_that_is_not_watched_does_not_pass() -> None:
    unwatched = pltpu.InterpretParams()
    with detected() as seen:
        jax.block_until_ready(double(X, own_block=True, params=unwatched))
    with pytest.raises(AssertionError, match="kernel 0 ran without the race detector"):
        assert_no_races(seen, kernels=1)
    with pytest.raises(AssertionError, match="1 kernels ran in the interpreter, not 2"):
        assert_no_races(seen, kernels=2)
