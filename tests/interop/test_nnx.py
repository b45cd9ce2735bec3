"""A model in Flax's hands is the same model."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from lm_jax.interop.nnx import FunctionalModule, to_params, transformer_module
from tests.support import tiny

TOKENS = np.random.default_rng(0).integers(0, 64, (2, 10))


@nnx.jit
def run(module: FunctionalModule, *args: Any, **kwargs: Any) -> jax.Array:
    return module(*args, **kwargs)


@nnx.jit
def gradient(module: FunctionalModule) -> nnx.State:
    return nnx.grad(lambda m: jnp.mean(jnp.square(m(TOKENS))))(module)


@pytest.fixture(scope="module")
def model() -> tuple:
    c = tiny.config()
    params = tiny.parameters(c)
    return c, params, transformer_module(params, c)


def same(a: object, b: object) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_logits_and_parameters(model: tuple) -> None:
    c, params, module = model
    np.testing.assert_allclose(run(module, TOKENS), tiny.full_logits(params, TOKENS, c), atol=1e-6)
    segments = np.repeat([[0, 1]], 5, 1).repeat(2, 0)
    z = run(module, TOKENS, segment_ids_BT=segments)
    np.testing.assert_allclose(z, tiny.full_logits(params, TOKENS, c, segment_ids_BT=segments), atol=1e-6)
    same(to_params(module), params)
    names = {path for path, _ in nnx.to_flat_state(nnx.state(module.params, nnx.Param))}
    assert ("blocks", "attention", "query") in names and len(names) == len(jax.tree.leaves(params))


def test_a_norm_without_gains_stays_in_the_tree() -> None:
    c = tiny.config(norm="rms_no_gain")
    params = tiny.parameters(c)
    assert params["final_norm"] == {}
    same(to_params(transformer_module(params, c)), params)


def test_gradients(model: tuple) -> None:
    c, params, module = model

    def loss(params: dict) -> jax.Array:
        return jnp.mean(jnp.square(tiny.full_logits(params, TOKENS, c)))

    plain = jax.jit(jax.grad(loss))(params)
    leaves = {tuple(path[1:]): v for path, v in nnx.to_flat_state(gradient(module))}
    for path, g in jax.tree_util.tree_flatten_with_path(plain)[0]:
        np.testing.assert_allclose(leaves[tuple(k.key for k in path)][...], g, atol=1e-6 * float(jnp.abs(g).max()))


def test_split_and_merge(model: tuple) -> None:
    _, params, module = model
    again = nnx.merge(*nnx.split(module))
    same(to_params(again), params)
    np.testing.assert_array_equal(run(again, TOKENS), run(module, TOKENS))


def test_an_optimizer_changes_it() -> None:
    c = tiny.config()
    params = tiny.parameters(c)
    module = transformer_module(params, c)
    optimizer = nnx.Optimizer(module, optax.sgd(0.1), wrt=nnx.Param)
    optimizer.update(module, gradient(module))
    changed = to_params(module)
    assert not np.array_equal(changed["blocks"]["attention"]["out"], params["blocks"]["attention"]["out"])
    np.testing.assert_allclose(run(module, TOKENS), tiny.full_logits(changed, TOKENS, c), atol=1e-5)


def test_any_function_of_parameters() -> None:
    module = FunctionalModule({"a": {"w": jnp.array(2.0)}}, lambda params, x: params["a"]["w"] * x)
    assert module(3.0) == 6.0


def test_a_name_that_flax_needs_is_refused() -> None:
    with pytest.raises(ValueError, match="'train'"):
        FunctionalModule({"train": jnp.zeros(2)}, lambda params: params)
