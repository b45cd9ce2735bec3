"""What every decoder of this project keeps to, whatever its parts.

Shapes: B batch, T length, D embed, V vocabulary.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from lm_jax.errors import ConfigError
from lm_jax.kernels.flash_attention import xla
from lm_jax.models.transformer import REMAT, TransformerConfig, hidden, init_cache, logits, transformer_specs
from lm_jax.params import Tree, initialize, named
from lm_jax.sharding import one_device_mesh
from tests.support import tiny
from tests.support.tpu import mesh_of_chips

RANDOM = np.random.default_rng(0)
TOKENS = RANDOM.integers(0, 64, (2, 12)).astype(np.int32)
BATCH = tiny.batch(4, 12)
VARIANTS: list[dict[str, Any]] = [
    {},
    {"scan": False, "qk_norm": True, "logit_soft_cap": 8.0, "feed_forward": "squared_relu"},
    {"norm": "rms_no_gain", "position": "none", "kv_heads": 1},
    {"position": "alibi", "attention_soft_cap": 3.0, "attention_sinks": True},
]


def leaves(tree: Tree) -> dict[str, np.ndarray]:
    return dict(zip(named(tree), map(np.asarray, jax.tree.leaves(tree)), strict=True))


def close(a: Tree, b: Tree, tolerance: float) -> None:
    """Leaf by leaf, by the largest difference over the largest value."""
    for name, x in leaves(a).items():
        y = leaves(b)[name]
        assert np.abs(x - y).max() <= tolerance * np.abs(y).max(), name


def packed(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {"positions_BT": batch["positions"], "segment_ids_BT": batch["segment_ids"]}


# --- what sees what --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", VARIANTS)
@pytest.mark.parametrize("segments", [None, [[0, 0, 0, 1, 1, 1, 1, -1]]])
def test_causality_by_gradient(changes: dict[str, Any], segments: list | None) -> None:
    """Row t' of the embedding is read at position t' alone: what logits[t] take from it, they take from there."""
    c = tiny.config(**changes)
    params, T = tiny.parameters(c), 8
    direction_V = jnp.asarray(RANDOM.standard_normal(64), jnp.float32)
    ids_BT = None if segments is None else jnp.asarray(segments)

    def outputs(embedding: jax.Array) -> jax.Array:
        x, _ = hidden(params | {"embedding": embedding}, jnp.arange(T)[None], c=c, segment_ids_BT=ids_BT)
        return logits(params, x, c=c)[0] @ direction_V

    reads = np.abs(jax.jit(jax.jacrev(outputs))(params["embedding"])).sum(-1)  # [T, V]
    same = np.ones((T, T), bool) if segments is None else np.equal.outer(segments[0], segments[0])
    if segments is not None:
        same[-1] = [False] * (T - 1) + [True]  # padding sees nothing but, past attention, itself
    expected = np.tril(same)
    np.testing.assert_array_equal(reads[:, :T] > 0, expected)
    assert not reads[:, T:].any()


def test_a_window_ends_what_a_layer_reads() -> None:
    c = tiny.config(window=3, layers=1)
    params = tiny.parameters(c)

    def outputs(embedding: jax.Array) -> jax.Array:
        return hidden(params | {"embedding": embedding}, jnp.arange(8)[None], c=c)[0][0].sum(-1)

    reads = np.abs(jax.jacrev(outputs)(params["embedding"])).sum(-1)[:, :8] > 0  # [T, position]
    far = np.arange(8)[:, None] - np.arange(8)
    np.testing.assert_array_equal(reads, (far >= 0) & (far < 3))


def test_the_options_of_attention_reach_the_kernel() -> None:
    """Each changes the output, and the named kernel is the one that computes it."""
    tokens = jnp.arange(8)[None]

    def output(**changes: Any) -> np.ndarray:
        c = tiny.config(**changes)
        return np.asarray(hidden(tiny.parameters(c), tokens, c=c)[0])  # names decide what parameters start as

    plain = output()
    for changes in ({"attention_soft_cap": 0.01}, {"attention_sinks": True}, {"position": "alibi"}, {"window": 2}):
        assert np.abs(output(**changes) - plain).max() > 1e-3, changes
    np.testing.assert_allclose(output(attention_kernel="reference"), plain, atol=1e-5)
    with pytest.raises(ValueError, match="'cudnn' cannot serve this call"):
        output(attention_kernel="cudnn")


def test_packed_rows_equal_the_documents_alone() -> None:
    c = tiny.config()
    params = tiny.parameters(c)
    whole = tiny.full_logits(params, BATCH["tokens"], c, **packed(BATCH))
    documents = 0
    for row in range(4):
        for segment in (0, 1):
            (at,) = np.nonzero(BATCH["segment_ids"][row] == segment)
            if not at.size:
                continue
            alone = tiny.full_logits(params, np.pad(BATCH["tokens"][row, at], (0, 12 - at.size))[None], c)
            np.testing.assert_allclose(whole[row, at], alone[0, : at.size], atol=1e-5)
            documents += at[0] > 0
    assert documents >= 2  # some of them did stand behind another


def test_cache_takes_many_tokens_at_once() -> None:
    c = tiny.config()
    params = tiny.parameters(c)
    cache, seen = init_cache(c, 2, 16), []

    @jax.jit
    def step(tokens_BT: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        x, cache = hidden(params, tokens_BT, c=c, cache=cache)
        return logits(params, x, c=c), cache

    for part in np.split(TOKENS, [5, 6, 11], axis=1):
        z, cache = step(part, cache)
        seen.append(z)
    np.testing.assert_allclose(jnp.concatenate(seen, 1), tiny.full_logits(params, TOKENS, c), atol=1e-5)
    assert cache.length.tolist() == [[12, 12]] * 2


@pytest.mark.parametrize("wrong", [64, 10_000, -1])
def test_an_id_beyond_the_vocabulary_gives_nan(wrong: int) -> None:
    c = tiny.config()
    tokens = TOKENS.copy()
    tokens[1, 5] = wrong
    z = tiny.full_logits(tiny.parameters(c), tokens, c)
    assert np.isfinite(z[0]).all() and np.isnan(z[1, 5:]).all()


# --- one function, however it is computed ----------------------------------------------------------------------------


def loss_and_gradients(c: TransformerConfig, remat: str = "none") -> tuple[jax.Array, Tree]:
    weights_BTV = jnp.asarray(np.random.default_rng(1).standard_normal((4, 12, 64)), jnp.float32)

    def loss(params: Tree) -> jax.Array:
        x, _ = hidden(params, jnp.asarray(BATCH["tokens"]), c=c, remat=remat, **packed(BATCH))
        return jnp.mean(weights_BTV * logits(params, x, c=c))

    return jax.jit(jax.value_and_grad(loss))(tiny.parameters(c))


@pytest.fixture(scope="module")
def scanned() -> tuple[jax.Array, Tree]:
    return loss_and_gradients(tiny.config())


def test_unrolled_equals_scanned(scanned: tuple[jax.Array, Tree]) -> None:
    loss, gradients = loss_and_gradients(tiny.config(scan=False))
    np.testing.assert_allclose(loss, scanned[0], rtol=2e-6)
    close(gradients, scanned[1], 2e-6)


@pytest.mark.parametrize("remat", [name for name in REMAT if name != "none"])
def test_remat_changes_memory_alone(scanned: tuple[jax.Array, Tree], remat: str) -> None:
    loss, gradients = loss_and_gradients(tiny.config(), remat)
    np.testing.assert_allclose(loss, scanned[0], rtol=2e-6)
    close(gradients, scanned[1], 2e-6)


@pytest.mark.parametrize("scan", [True, False])
def test_remat_keeps_less(scan: bool) -> None:
    c = tiny.config(scan=scan)

    def kept(remat: str) -> int:
        def backward(params: Tree) -> Any:
            return jax.vjp(lambda p: hidden(p, jnp.asarray(TOKENS), c=c, remat=remat)[0], params)[1]

        return sum(a.size for a in jax.tree.leaves(jax.eval_shape(backward, tiny.parameters(c))))

    sizes = {remat: kept(remat) for remat in ("none", "dots", "attention", "full")}
    assert sizes["none"] > sizes["dots"] > sizes["attention"] > sizes["full"], sizes


def operations(jaxpr: Any) -> Iterator[Any]:
    """Those of a program whose results are read, and of the programs inside it; not those inside of a Pallas kernel."""
    read = {id(v) for equation in jaxpr.eqns for v in equation.invars} | {id(v) for v in jaxpr.outvars}
    for equation in jaxpr.eqns:
        # JAX never takes out a Pallas kernel that nobody reads. XLA does.
        if any(id(v) in read for v in equation.outvars):
            yield equation
        if equation.primitive.name != "pallas_call":
            for inside in jaxprs_in_params(equation.params):
                yield from operations(inside)


@pytest.mark.parametrize(
    ("kernel", "mesh"), [("xla", None), ("xla", one_device_mesh), ("pallas_tpu", lambda: mesh_of_chips("v6e:2x2"))]
)
def test_attention_that_is_kept_is_not_computed_again(kernel: str, mesh: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its forward pass is in the program of a gradient once, twice where a policy keeps less than it gives.

    It is known by the name of its kernel, or by the softmax's highest score: nothing else in this program
    takes a maximum. (`xla` keeps no probabilities here, as for long rows.)
    """
    monkeypatch.setattr(xla, "kept_probabilities", lambda call: 0)
    jax.clear_caches()
    c = tiny.config(attention_kernel=kernel)
    tokens = np.zeros((1, 300), np.int32)

    def is_forward(equation: Any) -> bool:
        if kernel == "xla":
            return equation.primitive.name == "reduce_max"
        return equation.params.get("name") == "flash_attention_forward"

    def forwards(remat: str) -> int:
        def loss(params: Tree) -> jax.Array:
            return jnp.sum(hidden(params, tokens, c=c, remat=remat)[0])

        with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh()):
            program = jax.make_jaxpr(jax.grad(loss))(jax.eval_shape(lambda: tiny.parameters(c)))
        return sum(map(is_forward, operations(program.jaxpr)))

    counts = {remat: forwards(remat) for remat in REMAT}
    jax.clear_caches()
    assert counts == {"none": 1, "dots": 2, "attention": 1, "full": 2, "offload": 2}


def test_every_parameter_has_a_gradient(scanned: tuple[jax.Array, Tree]) -> None:
    assert [name for name, g in leaves(scanned[1]).items() if not np.abs(g).max() > 0] == []


def test_with_a_mesh_and_without(scanned: tuple[jax.Array, Tree], mesh: jax.sharding.Mesh) -> None:
    loss, gradients = loss_and_gradients(tiny.config())
    np.testing.assert_allclose(loss, scanned[0], rtol=2e-6)
    close(gradients, scanned[1], 2e-6)


def test_computes_in_bfloat16(scanned: tuple[jax.Array, Tree]) -> None:
    c = tiny.config(dtype="bfloat16")
    params = tiny.parameters(c)
    assert jax.eval_shape(lambda p: hidden(p, TOKENS, c=c)[0], params).dtype == jnp.bfloat16
    exact, rounded = tiny.full_logits(params, TOKENS, tiny.config()), tiny.full_logits(params, TOKENS, c)
    assert rounded.dtype == jnp.float32
    difference = np.linalg.norm(rounded - exact) / np.linalg.norm(exact)
    assert 1e-4 < difference < 0.05  # rounded, and no more than that
    gradients = loss_and_gradients(c)[1]
    assert {a.dtype for a in jax.tree.leaves(gradients)} == {jnp.dtype("float32")}
    for name, g in leaves(gradients).items():
        assert np.linalg.norm(g - leaves(scanned[1])[name]) < 0.1 * np.linalg.norm(g), name


# --- the parts that a config names -----------------------------------------------------------------------------------


def test_a_tied_output_is_the_embedding() -> None:
    params = tiny.parameters(tiny.config(tied=True))
    untied = params | {"output": params["embedding"].T}
    tied = tiny.full_logits(params, TOKENS, tiny.config(tied=True))
    np.testing.assert_allclose(tied, tiny.full_logits(untied, TOKENS, tiny.config()), atol=1e-5)
    assert "output" not in transformer_specs(tiny.config(tied=True))


def test_the_soft_cap_bounds_logits() -> None:
    params = tiny.parameters(tiny.config())
    plain = np.asarray(tiny.full_logits(params, TOKENS, tiny.config()))
    capped = tiny.full_logits(params, TOKENS, tiny.config(logit_soft_cap=0.5))
    assert np.abs(plain).max() > 1
    np.testing.assert_allclose(capped, 0.5 * np.tanh(plain / 0.5), atol=1e-5)


@pytest.mark.parametrize("qk_norm", [True, False])
def test_normalised_queries_and_keys_have_no_size(qk_norm: bool) -> None:
    c = tiny.config(qk_norm=qk_norm)
    params = tiny.parameters(c)
    larger = jax.tree_util.tree_map_with_path(lambda path, a: a * 5 if path[-1].key in ("query", "key") else a, params)
    same = np.allclose(tiny.full_logits(params, TOKENS, c), tiny.full_logits(larger, TOKENS, c), atol=1e-3)
    assert same == qk_norm


def test_zero_output_projections_make_identity_blocks() -> None:
    c = tiny.config(output_init="zero")
    params = initialize(transformer_specs(c), jax.random.key(0))
    assert not params["output"].any()
    embedded = np.asarray(params["embedding"])[TOKENS]
    normalised = embedded / np.sqrt(np.square(embedded).mean(-1, keepdims=True) + 1e-6)
    z = tiny.full_logits(params | {"output": jnp.eye(32, 64)}, TOKENS, c)
    np.testing.assert_allclose(z[..., :32], normalised, rtol=1e-5)


@pytest.mark.parametrize(
    "wrong",
    [
        {"layers": 0},
        {"vocab": 1},
        {"logit_soft_cap": 0.0},
        {"embedding_std": float("nan")},
        {"dtype": "float16"},
        {"output_init": "ones"},
        {"norm": "layer"},
        {"norm_epsilon": 0.0},
        {"position": "sinusoid"},
        {"window": 0},
        {"attention_soft_cap": 0.0},
        {"attention_kernel": "flash"},
        {"rope_base": 1.0},
        {"feed_forward": "relu"},
        {"feed_forward_dim": 0},
        {"kv_heads": 3},
        {"heads": 0},
        {"head_dim": 7},
        {"embed": 0},
        {"heads": 5, "kv_heads": None, "head_dim": None},
    ],
)
def test_wrong_configs_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as error:
        tiny.config(**wrong)
    assert error.value.key == f"model.{next(iter(wrong))}"
    assert len(str(error.value).splitlines()) <= 3


# --- initial values --------------------------------------------------------------------------------------------------


@functools.cache
def initial(**changes: Any) -> dict[str, np.ndarray]:
    return leaves(initialize(transformer_specs(tiny.config(**changes)), jax.random.key(0)))


def test_an_added_parameter_leaves_the_others() -> None:
    before, after = initial(tied=True), initial(tied=False, qk_norm=True)
    added = {"output", "blocks/attention/query_norm/gain", "blocks/attention/key_norm/gain"}
    assert set(after) - set(before) == added
    for name, a in before.items():
        np.testing.assert_array_equal(after[name], a, err_msg=name)


def test_more_layers_leave_the_first_as_they_were() -> None:
    few, many = initial(layers=2), initial(layers=5)
    for name, a in few.items():
        first = many[name][:2] if name.startswith("blocks/") else many[name]
        if name in ("blocks/attention/out", "blocks/feed_forward/down"):  # smaller, the more layers add up
            np.testing.assert_allclose(first * (5 / 2) ** 0.5, a, rtol=1e-6, err_msg=name)
        else:
            np.testing.assert_array_equal(first, a, err_msg=name)


def test_no_two_layers_start_alike() -> None:
    assert [
        n for n, a in initial().items() if n.startswith("blocks/") and "gain" not in n and (a[0] == a[1]).any()
    ] == []
