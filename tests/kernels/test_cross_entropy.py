"""The chunked cross-entropy against the plain formula, with derivatives by hand, in float64.

Shapes: B batch, T length, D embed, V vocabulary.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from lm_jax.kernels import cross_entropy as kernel
from lm_jax.kernels.cross_entropy import cross_entropy
from lm_jax.sharding import constrain

B, T, D, V = 3, 7, 8, 40
RANDOM = np.random.default_rng(0)
X, W = RANDOM.standard_normal((B, T, D)), RANDOM.standard_normal((D, V))
TARGETS, MASK = RANDOM.integers(0, V, (B, T)), RANDOM.random((B, T)) < 0.7
MASK[1] = False


def plain(z_loss: float = 0.0, soft_cap: float | None = None) -> dict[str, Any]:
    """Sums, and the gradients of the total, with all logits at once."""
    raw = X @ W
    z = raw if soft_cap is None else soft_cap * np.tanh(raw / soft_cap)
    log_z = np.log(np.exp(z).sum(-1))
    one_hot = np.eye(V)[TARGETS]
    ce = (MASK * (log_z - (z * one_hot).sum(-1))).sum()
    zz = (MASK * log_z**2).sum()
    p = np.exp(z - log_z[..., None])
    dz = MASK[..., None] * (p - one_hot + 2 * z_loss * log_z[..., None] * p)
    if soft_cap is not None:
        dz = dz * (1 - (z / soft_cap) ** 2)
    dw = np.einsum("btd,btv->dv", X, dz)
    return {"ce": ce, "zz": zz, "total": ce + z_loss * zz, "dx": dz @ W.T, "dw": dw}


def ours(dtype: Any = jnp.float32, **settings: Any) -> dict[str, Any]:
    def total(x: jax.Array, w: jax.Array) -> tuple[jax.Array, Any]:
        targets, mask = (constrain(jnp.asarray(a), "batch", "length") for a in (TARGETS, MASK))
        sums = cross_entropy(
            constrain(x, "batch", "length", None), constrain(w, None, "vocab"), targets, mask, **settings
        )
        return sums.total, sums

    gradient = jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))
    (_, sums), (dx, dw) = gradient(jnp.asarray(X, dtype), jnp.asarray(W, dtype))
    return {"ce": sums.cross_entropy, "zz": sums.log_z_squared, "total": sums.total, "dx": dx, "dw": dw}


def compare(got: dict[str, Any], expected: dict[str, Any], tolerance: float = 1e-6) -> None:
    for name, b in expected.items():
        a = np.asarray(got[name], np.float64)
        assert np.abs(a - b).max() <= tolerance * max(1.0, np.abs(b).max()), name


@pytest.mark.parametrize("chunk", [None, 1, 4, 7, 21, 1000])
def test_chunks_change_nothing(chunk: int | None) -> None:
    compare(ours(chunk=chunk, z_loss=0.1), plain(z_loss=0.1))


@pytest.mark.parametrize("settings", [{}, {"z_loss": 0.3}, {"soft_cap": 2.0}, {"z_loss": 0.3, "soft_cap": 2.0}])
def test_value_and_gradients(settings: dict[str, Any]) -> None:
    compare(ours(chunk=5, **settings), plain(**settings))


def test_on_a_mesh_of_one_device(mesh: jax.sharding.Mesh) -> None:
    compare(ours(chunk=5, z_loss=0.3, soft_cap=2.0), plain(z_loss=0.3, soft_cap=2.0))


def test_without_gradients() -> None:
    args = jnp.asarray(X, jnp.float32), jnp.asarray(W, jnp.float32), jnp.asarray(TARGETS), jnp.asarray(MASK)
    sums = jax.jit(lambda *a: cross_entropy(*a, z_loss=0.1, chunk=4))(*args)
    expected = plain(z_loss=0.1)
    np.testing.assert_allclose(sums, [expected["total"], expected["ce"], expected["zz"]], rtol=1e-6)


def test_a_gradient_from_above_scales_both() -> None:
    args = jnp.asarray(X, jnp.float32), jnp.asarray(W, jnp.float32)

    def loss(x: jax.Array, w: jax.Array) -> jax.Array:
        return -3 * cross_entropy(x, w, jnp.asarray(TARGETS), jnp.asarray(MASK)).total

    dx, dw = jax.grad(loss, argnums=(0, 1))(*args)
    expected = plain()
    compare({"dx": dx, "dw": dw}, {"dx": -3 * expected["dx"], "dw": -3 * expected["dw"]})


def test_rows_that_do_not_count_may_hold_anything() -> None:
    x = np.where(MASK[..., None], X, 1e4)
    targets = np.where(MASK, TARGETS, -100)

    def loss(x: jax.Array, w: jax.Array) -> jax.Array:
        return cross_entropy(x, w, jnp.asarray(targets), jnp.asarray(MASK), chunk=4).total

    total, (dx, dw) = jax.value_and_grad(loss, argnums=(0, 1))(jnp.asarray(x, jnp.float32), jnp.asarray(W, jnp.float32))
    expected = plain()
    compare({"total": total, "dw": dw, "dx": dx}, {name: expected[name] for name in ("total", "dw", "dx")})


def test_bfloat16_accumulates_in_float32() -> None:
    got = ours(dtype=jnp.bfloat16, chunk=4, z_loss=0.1)
    assert got["dx"].dtype == got["dw"].dtype == jnp.bfloat16 and got["total"].dtype == jnp.float32
    compare(got, plain(z_loss=0.1), tolerance=0.03)


def arrays(jaxpr: Any) -> Iterator[Any]:
    """The shapes of everything that a program computes, inner programs included."""
    for equation in jaxpr.eqns:
        yield from (v.aval.shape for v in equation.outvars if hasattr(v.aval, "shape"))
        for inner in jaxprs_in_params(equation.params):
            yield from arrays(inner)


def largest(**settings: Any) -> int:
    rows, vocab = 64, 512
    x, w = jnp.zeros((2, rows // 2, 4)), jnp.zeros((4, vocab))
    targets = jnp.zeros((2, rows // 2), jnp.int32)
    f = jax.value_and_grad(lambda x, w: cross_entropy(x, w, targets, targets == 0, **settings).total, argnums=(0, 1))
    return max(int(np.prod(shape)) for shape in arrays(jax.make_jaxpr(f)(x, w).jaxpr)) // vocab


def test_no_array_of_all_logits() -> None:
    assert largest(chunk=8) == 8
    assert largest(chunk=64) == 64  # the measure sees it where it is there


def test_the_usual_chunk_fits_its_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "_CHUNK_BYTES", 16 * 512 * 4)
    assert largest() == 16
    monkeypatch.setattr(kernel, "_CHUNK_BYTES_OF_A_GPU", 32 * 512 * 4)
    monkeypatch.setattr(kernel, "platform", lambda: "gpu")
    assert largest() == 32
