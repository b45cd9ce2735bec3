"""Optimizers against independent formulas in numpy float64, and on a mesh against one device.

Run as a program, this file is the comparison on 8 simulated devices (they must be asked for before JAX starts).
"""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lm_jax.errors import ConfigError
from lm_jax.models.parametrization import Scale
from lm_jax.params import Normal, ParamSpec, is_spec, named, ones, path_name, stack, unstacked
from lm_jax.sharding import MeshConfig, abstract, make_mesh, on_mesh
from lm_jax.training.optimizers import (
    RULES,
    OptimizerConfig,
    ema_update,
    make_optimizer,
    multipliers,
    newton_schulz,
    orthogonalize,
    peak_rates,
)

N = Normal(0.3)
BLOCK = {
    "query": ParamSpec((8, 4, 6), ("embed", "heads", "head_dim"), N, (0,)),
    "out": ParamSpec((4, 6, 8), ("heads", "head_dim", "embed"), N, (0, 1)),
    "up": ParamSpec((8, 16), ("embed", "feed_forward"), N),
    "norm": ParamSpec((8,), ("norm",), ones, (), decay=False),
}
SPECS = {
    "table": ParamSpec((16, 8), ("vocab", "embed"), N, ()),
    "blocks": stack(BLOCK, 3),
    "lone": ParamSpec((8, 12), ("embed", "feed_forward"), N),
    "norm": ParamSpec((8,), ("norm",), ones, (), decay=False),
    "head": ParamSpec((8, 16), ("embed", "vocab"), N),
}
FACTORED = {"blocks": stack({"up": ParamSpec((128, 256), ("embed", "feed_forward"), N)}, 2), "head": SPECS["head"]}
LINEAR = {"schedule": "linear", "warmup_steps": 1, "final_fraction": 0.0}
FRACTIONS = (1 / 2, 1.0, 2 / 3)  # of LINEAR in a run of 4 steps


def values(specs: Any, seed: int) -> Any:
    """Parameters or gradients: normal numbers that a name and a seed give."""

    def one(path: tuple[Any, ...], spec: ParamSpec) -> jax.Array:
        rng = np.random.default_rng([seed, *path_name(path).encode()])
        return jnp.asarray(0.3 * rng.standard_normal(spec.shape, dtype=np.float32))

    return jax.tree_util.tree_map_with_path(one, specs, is_leaf=is_spec)


def flat(tree: Any) -> dict[str, np.ndarray]:
    return {path_name(p): np.asarray(x, np.float64) for p, x in jax.tree_util.tree_flatten_with_path(tree)[0]}


def train(config: OptimizerConfig, specs: Any) -> dict[str, np.ndarray]:
    """Parameters after three steps of a run of four."""
    optimizer = make_optimizer(config, specs, 4)
    params = values(specs, 0)
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for t in range(3):
        updates, state = update(values(specs, 10 + t), state, params)
        params = optax.apply_updates(params, updates)
    return flat(params)


# ------------------------------------------------------------------------------------------------ formulas in float64


def ref_adam(c: OptimizerConfig, spec: ParamSpec, g: np.ndarray, w: np.ndarray, s: dict, t: int) -> np.ndarray:
    s["m"] = c.b1 * s.get("m", 0) + (1 - c.b1) * g
    s["v"] = c.b2 * s.get("v", 0) + (1 - c.b2) * g**2
    return (s["m"] / (1 - c.b1 ** (t + 1))) / (np.sqrt(s["v"] / (1 - c.b2 ** (t + 1))) + c.eps)


def ref_lion(c: OptimizerConfig, spec: ParamSpec, g: np.ndarray, w: np.ndarray, s: dict, t: int) -> np.ndarray:
    m = s.get("m", 0)
    s["m"] = c.b2 * m + (1 - c.b2) * g
    return np.sign(c.b1 * m + (1 - c.b1) * g)


def ref_sgd(c: OptimizerConfig, spec: ParamSpec, g: np.ndarray, w: np.ndarray, s: dict, t: int) -> np.ndarray:
    s["m"] = c.momentum * s.get("m", 0) + g
    return s["m"]


def ref_adafactor(c: OptimizerConfig, spec: ParamSpec, g: np.ndarray, w: np.ndarray, s: dict, t: int) -> np.ndarray:
    keep = 1 - (t + 1) ** -0.8
    if min(spec.shape[-2:]) >= 128:  # row and column means, a layer at a time
        s["r"] = keep * s.get("r", 0) + (1 - keep) * (g**2).mean(-1, keepdims=True)
        s["c"] = keep * s.get("c", 0) + (1 - keep) * (g**2).mean(-2, keepdims=True)
        u = g / np.sqrt(s["r"] * s["c"] / s["r"].mean(-2, keepdims=True))
    else:
        s["v"] = keep * s.get("v", 0) + (1 - keep) * g**2
        u = g / np.sqrt(s["v"])
    layers = range(len(u)) if spec.axes[0] == "layers" else [...]
    out = np.empty_like(u)
    for i in layers:
        rms_u, rms_w = np.sqrt(np.mean(u[i] ** 2)), np.sqrt(np.mean(w[i] ** 2))
        out[i] = u[i] / max(1, rms_u) * max(1e-3, rms_w)
    return out


def polynomial(sigma: np.ndarray, steps: int = 5) -> np.ndarray:
    """What Newton-Schulz makes of singular values."""
    for _ in range(steps):
        sigma = 3.4445 * sigma - 4.7750 * sigma**3 + 2.0315 * sigma**5
    return sigma


def ref_orthogonal(m: np.ndarray) -> np.ndarray:
    """Newton-Schulz by way of the SVD, and Muon's scale; m: [fan-in, fan-out]."""
    U, sigma, Vt = np.linalg.svd(m, full_matrices=False)
    scale = np.sqrt(max(1, m.shape[1] / m.shape[0]))
    return scale * (U * polynomial(sigma / np.linalg.norm(sigma))) @ Vt


def ref_muon(c: OptimizerConfig, spec: ParamSpec, g: np.ndarray, w: np.ndarray, s: dict, t: int) -> np.ndarray:
    one = unstacked(spec)
    if len(one.shape) < 2 or "vocab" in one.axes:
        return ref_adam(c, spec, g, w, s, t)
    mu = 0.85 + (c.momentum - 0.85) * (min(1, t / c.momentum_warmup_steps) if c.momentum_warmup_steps else 1)
    s["m"] = mu * s.get("m", 0) + (1 - mu) * g
    u = mu * s["m"] + (1 - mu) * g
    rows = int(np.prod([one.shape[d] for d in one.fan_in]))
    layers = u if spec.axes[0] == "layers" else u[None]
    # fan-in comes first in every spec here, so that a layer's matrix is a plain reshape
    return np.stack([ref_orthogonal(m.reshape(rows, -1)) for m in layers]).reshape(u.shape)


REFERENCES = {"adamw": ref_adam, "lion": ref_lion, "sgd": ref_sgd, "adafactor": ref_adafactor, "muon": ref_muon}


def by_formula(config: OptimizerConfig, specs: Any) -> dict[str, np.ndarray]:
    params = flat(values(specs, 0))
    grads = [flat(values(specs, 10 + t)) for t in range(3)]
    rates = flat(peak_rates(config, specs))
    for name, spec in named(specs).items():
        state: dict = {}
        for t in range(3):
            u = REFERENCES[config.name](config, spec, grads[t][name], params[name], state, t)
            decay = config.weight_decay if spec.decay else 0.0
            params[name] = params[name] - rates[name] * FRACTIONS[t] * (u + decay * params[name])
    return params


def assert_close(got: dict[str, np.ndarray], want: dict[str, np.ndarray], tolerance: float) -> None:
    assert got.keys() == want.keys()
    for name in want:
        error = np.linalg.norm(got[name] - want[name]) / np.linalg.norm(want[name])
        assert error < tolerance, f"{name}: {error}"


@pytest.mark.parametrize("name", RULES)
def test_three_steps_equal_the_formula(name: str) -> None:
    config = OptimizerConfig(name=name, learning_rate=0.03, weight_decay=0.2, momentum_warmup_steps=2, **LINEAR)
    assert_close(train(config, SPECS), by_formula(config, SPECS), 2e-6)


def test_adafactor_factors_large_matrices_a_layer_at_a_time() -> None:
    config = OptimizerConfig(name="adafactor", learning_rate=0.03, **LINEAR)
    assert_close(train(config, FACTORED), by_formula(config, FACTORED), 2e-6)
    state = make_optimizer(config, FACTORED, 4).init(values(FACTORED, 0))
    assert sum(x.size for x in jax.tree.leaves(state)) < 2 * (128 + 256) + 8 * 16 + 20


# ------------------------------------------------------------------------------------------------- all of them alike


@pytest.mark.parametrize("name", RULES)
def test_decay_takes_only_what_specs_allow(name: str) -> None:
    config = OptimizerConfig(name=name, learning_rate=0.1, weight_decay=0.5, schedule="constant", warmup_steps=0)
    optimizer = make_optimizer(config, SPECS, 4)
    params = values(SPECS, 0)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(optimizer.update)(zeros, optimizer.init(params), params)
    got, weights, rates = flat(updates), flat(params), flat(peak_rates(config, SPECS))
    for path, spec in named(SPECS).items():
        want = -rates[path] * 0.5 * weights[path] if spec.decay else 0.0 * weights[path]
        np.testing.assert_allclose(got[path], want, rtol=1e-6, err_msg=path)


@pytest.mark.parametrize("name", RULES)
def test_state_is_fp32_and_its_structure_does_not_depend_on_numbers(name: str) -> None:
    params = values(SPECS, 0)
    states = [
        make_optimizer(OptimizerConfig(name=name, **keys), SPECS, steps).init(params)
        for keys, steps in (
            ({"weight_decay": 0.0, "schedule": "wsd"}, 10),
            ({"weight_decay": 0.1, "learning_rate": 1.0}, 99),
        )
    ]
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
    assert {str(x.dtype) for x in jax.tree.leaves(states[0])} <= {"float32", "int32"}


def test_one_compiled_update_serves_every_step() -> None:
    optimizer = make_optimizer(OptimizerConfig(name="muon"), SPECS, 4)
    params = values(SPECS, 0)
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for _ in range(3):
        updates, state = update(params, state, params)
        params = optax.apply_updates(params, updates)
    assert update._cache_size() == 1


def test_rates_of_muons_adam_groups() -> None:
    rates = flat(peak_rates(OptimizerConfig(name="muon", learning_rate=0.06), SPECS))
    assert rates["blocks/query"] == rates["lone"] == rates["table"] == 0.06
    np.testing.assert_allclose([rates["head"], rates["norm"], rates["blocks/norm"]], [0.02, 0.01, 0.01])
    given = OptimizerConfig(name="muon", learning_rate=0.06, embedding_rate=0.3, head_rate=0.2, vector_rate=0.1)
    rates = flat(peak_rates(given, SPECS))
    assert [rates[n] for n in ("lone", "table", "head", "norm")] == [0.06, 0.3, 0.2, 0.1]
    assert set(jax.tree.leaves(peak_rates(OptimizerConfig(name="adamw", learning_rate=0.06), SPECS))) == {0.06}


# ------------------------------------------------------------------------------------------------- width and depth

# What a direction is multiplied by for a model four times as wide and three times as deep as its base: of a matrix in a
# block, a matrix outside of them, the table, the head, a vector in a block, a vector outside.
SIZED = {
    "adamw": (1 / 4, 1 / 4, 1, 1, 1, 1),
    "lion": (1 / 4, 1 / 4, 1, 1, 1, 1),
    "adafactor": (1 / 2, 1 / 2, 1, 1, 1, 1),
    "sgd": (3, 1, 4, 4, 12, 4),
    "muon": (1, 1, 1, 1, 1, 1),
}
LEAVES = ("blocks/out", "lone", "table", "head", "blocks/norm", "norm")


@pytest.mark.parametrize("name", RULES)
def test_steps_of_a_larger_model(name: str) -> None:
    """Directions are multiplied as the table says, decay is not, and the state has the same leaves."""
    config = OptimizerConfig(name=name, weight_decay=0.5, schedule="constant", warmup_steps=0, eps=1e-12)
    found = flat(multipliers(config, SPECS, Scale(4.0, 3.0)))
    assert tuple(found[leaf] for leaf in LEAVES) == SIZED[name]
    params, gradients = values(SPECS, 0), values(SPECS, 1)

    def step(scale: Scale, decay: float) -> tuple[dict[str, np.ndarray], Any]:
        optimizer = make_optimizer(dataclasses.replace(config, weight_decay=decay), SPECS, 4, scale)
        updates, state = jax.jit(optimizer.update)(gradients, optimizer.init(params), params)
        return flat(updates), jax.tree.structure(state)

    plain, structure = step(Scale(), 0.0)
    decayed = step(Scale(), 0.5)[0]
    got, structure_sized = step(Scale(4.0, 3.0), 0.5)
    assert structure_sized == structure
    for path in plain:
        want = found[path] * plain[path] + (decayed[path] - plain[path])
        np.testing.assert_allclose(got[path], want, rtol=1e-4, atol=1e-7, err_msg=path)


def test_adam_s_epsilon_shrinks_with_the_gradients() -> None:
    config = OptimizerConfig(eps=1e-3, weight_decay=0.0, schedule="constant", warmup_steps=0)
    params, gradients = values(SPECS, 0), values(SPECS, 1)

    def step(scale: Scale) -> dict[str, np.ndarray]:
        optimizer = make_optimizer(config, SPECS, 4, scale)
        smaller = jax.tree.map(lambda g: g / (scale.width * scale.depth), gradients)
        return flat(jax.jit(optimizer.update)(smaller, optimizer.init(params), params)[0])

    base, wide = step(Scale()), step(Scale(4.0, 2.0))
    np.testing.assert_allclose(wide["head"], base["head"], rtol=1e-5)
    np.testing.assert_allclose(wide["lone"], base["lone"] / 4, rtol=1e-5)


# ------------------------------------------------------------------------------------------------------------- Muon


@pytest.mark.parametrize("shape", [(8, 8), (8, 12), (8, 40), (40, 8), (3, 16, 64), (2, 3, 64, 16)])
def test_newton_schulz_brings_singular_values_near_one(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    U, _, Vt = np.linalg.svd(rng.standard_normal(shape), full_matrices=False)
    sigma = np.geomspace(1.0, 0.05, min(shape[-2:])) * 1e-3  # the size of the input does not matter
    got = np.float64(jax.jit(newton_schulz, static_argnums=1)(((U * sigma) @ Vt).astype(np.float32), 5))
    inner = np.swapaxes(U, -1, -2) @ got @ np.swapaxes(Vt, -1, -2)
    diagonal = np.diagonal(inner, axis1=-2, axis2=-1)
    np.testing.assert_allclose(inner, diagonal[..., None] * np.eye(len(sigma)), atol=2e-5)
    assert diagonal.min() > 0.67 and diagonal.max() < 1.14


@pytest.mark.parametrize("shape", [(16, 16), (16, 64)])
def test_newton_schulz_bears_rank_deficient_and_zero_matrices(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    low = rng.standard_normal((shape[0], 2)) @ rng.standard_normal((2, shape[1]))
    apply = jax.jit(newton_schulz, static_argnums=1)
    got = np.asarray(apply(low.astype(np.float32), 5))
    U, sigma, Vt = np.linalg.svd(low, full_matrices=False)
    want = (U * polynomial(sigma / np.linalg.norm(sigma))) @ Vt
    np.testing.assert_allclose(got, want, atol=2e-4)
    assert not np.asarray(apply(jnp.zeros(shape), 5)).any()


@pytest.mark.parametrize("name", ["query", "out", "up"])
def test_stacked_equals_layer_by_layer_and_heads_equal_the_flat_matrix(name: str) -> None:
    spec = stack(BLOCK, 3)[name]
    one = unstacked(spec)
    rows = int(np.prod([one.shape[d] for d in one.fan_in]))
    columns = int(np.prod(one.shape)) // rows
    matrix = ParamSpec((rows, columns), ("embed", "feed_forward"), N)
    x = values({"w": spec}, 1)["w"]
    apply = jax.jit(orthogonalize, static_argnums=(1, 2))
    together = apply(x, spec, 5)
    for i in range(3):
        np.testing.assert_allclose(together[i], apply(x[i], one, 5), atol=1e-5)
        flat_matrix = x[i].reshape(rows, columns)
        np.testing.assert_allclose(together[i].reshape(rows, columns), apply(flat_matrix, matrix, 5), atol=1e-5)
        np.testing.assert_allclose(
            together[i].reshape(rows, columns), ref_orthogonal(np.float64(flat_matrix)), atol=2e-5
        )


def test_experts_are_a_batch_and_fan_in_may_stand_anywhere() -> None:
    spec = ParamSpec((2, 6, 3, 4), ("layers", "heads", "experts", "embed"), N, (3,))
    x = values({"w": spec}, 1)["w"]
    got = jax.jit(orthogonalize, static_argnums=(1, 2))(x, spec, 5)
    for layer in range(2):
        for expert in range(3):
            want = ref_orthogonal(np.float64(x[layer, :, expert]).T).T
            np.testing.assert_allclose(np.asarray(got)[layer, :, expert], want, atol=1e-5)


@pytest.mark.parametrize("shape", [(8, 24), (24, 8), (8, 8)])
def test_first_step_equals_optax_muon_on_a_plain_matrix(shape: tuple[int, int]) -> None:
    specs = {"w": ParamSpec(shape, ("embed", "feed_forward"), N)}
    config = OptimizerConfig(name="muon", learning_rate=0.03, weight_decay=0.1, schedule="constant", warmup_steps=0)
    params, grads = values(specs, 0), values(specs, 1)
    ours, theirs = make_optimizer(config, specs, 4), optax.contrib.muon(0.03, weight_decay=0.1)
    got, _ = jax.jit(ours.update)(grads, ours.init(params), params)
    want, _ = jax.jit(theirs.update)(grads, theirs.init(params), params)
    np.testing.assert_allclose(got["w"], want["w"], atol=1e-6)


# ---------------------------------------------------------------------------------------------------- average, config


def test_ema_starts_quickly_and_then_keeps_its_decay() -> None:
    ema = {"w": jnp.array([1.0, 2.0])}
    params = {"w": jnp.array([3.0, 6.0])}
    for step, d in ((0, 0.1), (8, 0.5), (10**6, 0.99)):
        got = jax.jit(ema_update, static_argnums=2)(ema, params, 0.99, step)["w"]
        np.testing.assert_allclose(got, d * np.array([1.0, 2.0]) + (1 - d) * np.array([3.0, 6.0]), rtol=1e-5)


NAN, INF = float("nan"), float("inf")
BAD = {
    "name": ["adam", ""],
    "schedule": ["cos"],
    "learning_rate": [0.0, -1e-3, NAN, INF],
    "warmup_steps": [-1],
    "final_fraction": [-0.1, 1.1, NAN],
    "decay_fraction": [0.0, 1.1, NAN],
    "weight_decay": [-0.1, NAN, INF],
    "clip_norm": [0.0, -1.0, NAN, INF],
    "ema": [0.0, 1.0, -1.0, NAN],
    "b1": [1.0, -0.1, NAN],
    "b2": [1.0, 2.0, NAN],
    "eps": [0.0, -1e-8, NAN],
    "momentum": [1.0, -0.1, NAN],
    "momentum_warmup_steps": [-1],
    "newton_schulz_steps": [0],
    "embedding_rate": [0.0, NAN],
    "head_rate": [-1.0],
    "vector_rate": [INF],
}


@pytest.mark.parametrize(("key", "value"), [(k, v) for k, vs in BAD.items() for v in vs])
def test_nonsense_is_refused_by_its_key(key: str, value: Any) -> None:
    keys = {"name": "muon", key: value}
    with pytest.raises(ConfigError) as error:
        OptimizerConfig(**keys)
    assert error.value.key == f"optimizer.{key}"
    assert str(value) in str(error.value) and len(str(error.value).splitlines()) == 2


def test_muons_rates_are_refused_elsewhere() -> None:
    with pytest.raises(ConfigError, match=r"optimizer\.head_rate: only muon"):
        OptimizerConfig(name="adamw", head_rate=0.1)


# ------------------------------------------------------------------------------------------------------------- a mesh


@pytest.mark.parametrize("names", ["adamw muon", pytest.param("adafactor lion sgd", marks=pytest.mark.slow)])
def test_on_a_mesh_equals_one_device_with_state_split_like_parameters(names: str) -> None:
    root = Path(__file__).parents[2]
    path = os.pathsep.join(p for p in (str(root), os.environ.get("PYTHONPATH")) if p)
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, __file__, *names.split()], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert "rematerialization" not in done.stderr, done.stderr[-4000:]


def run_on_mesh(config: OptimizerConfig, specs: Any, mesh: Any, runs: list[Any]) -> tuple[Any, Any]:
    """The updates of every step and the last state; `runs`: parameters, then gradients step by step, as numpy."""
    with jax.set_mesh(mesh):
        put = lambda tree: jax.tree.map(lambda x, a: jax.device_put(x, a.sharding), tree, abstract(specs, mesh))  # noqa: E731
        params, *grads = map(put, runs)
        optimizer = make_optimizer(config, specs, 4)
        layout = on_mesh(mesh, jax.eval_shape(optimizer.init, abstract(specs, mesh)))
        state = jax.jit(optimizer.init, out_shardings=jax.tree.map(lambda a: a.sharding, layout))(params)
        update = jax.jit(optimizer.update)
        updates = []
        for g in grads:
            u, state = update(g, state, params)
            updates.append(jax.tree.map(np.asarray, u))
        for leaf, want in zip(jax.tree.leaves(state), jax.tree.leaves(layout), strict=True):
            assert leaf.sharding.is_equivalent_to(want.sharding, leaf.ndim), (leaf.shape, leaf.sharding, want.sharding)
        return updates, state


def check_split(state: Any, specs: Any, mesh: Any) -> None:
    """Every leaf of the state that is shaped as its parameter is laid out as it."""
    like = dict(zip(named(specs), jax.tree.leaves(abstract(specs, mesh)), strict=True))
    found = set()
    for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        for name, a in like.items():
            if path_name(path).endswith("/" + name) and leaf.shape == a.shape:
                assert leaf.sharding.is_equivalent_to(a.sharding, leaf.ndim), (name, leaf.sharding, a.sharding)
                found.add(name)
    assert found >= {"table", "lone", "blocks/query", "blocks/out", "head"}, found


def main(names: list[str]) -> None:
    block = {name: spec for name, spec in SPECS["blocks"].items() if name != "up"}
    specs = SPECS | {"blocks": block, "wide": FACTORED["blocks"]["up"]}
    runs = [jax.tree.map(np.asarray, values(specs, seed)) for seed in range(3)]
    eight = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    one = make_mesh(MeshConfig(), jax.devices()[:1])
    for name in names:
        config = OptimizerConfig(name=name, **LINEAR)
        want, _ = run_on_mesh(config, specs, one, runs)
        got, state = run_on_mesh(config, specs, eight, runs)
        check_split(state, specs, eight)
        assert_close(flat(got), flat(want), 1e-3 if name == "muon" else 1e-4)


if __name__ == "__main__":
    main(sys.argv[1:])
