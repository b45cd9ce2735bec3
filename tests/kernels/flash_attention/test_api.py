"""The one function: what it refuses, whom it chooses and what it says; and that every kernel here is ours."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm_jax.kernels.flash_attention import (
    IMPLEMENTATIONS,
    AttentionMask,
    DistanceTable,
    LocalGlobal,
    Slopes,
    Strided,
    api,
    flash_attention,
)
from lm_jax.sharding import one_device_mesh

ROOT = Path(__file__).resolve().parents[3]
B, T, S, N, K, H = 2, 6, 8, 4, 2, 8


def inputs(dtype: Any = jnp.float32) -> dict[str, Any]:
    random = np.random.default_rng(0)
    shapes = {"q_BTNH": (B, T, N, H), "k_BSKH": (B, S, K, H), "v_BSKH": (B, S, K, H)}
    return {name: jnp.asarray(random.standard_normal(shape), dtype) for name, shape in shapes.items()}


def ids(*shape: int) -> jax.Array:
    return jnp.zeros(shape, jnp.int32)


CAUSAL = AttentionMask()
MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "rank": ({"q_BTNH": jnp.ones((T, N, H))}, "q_BTNH has shape (6, 4, 8): it must have 4 dimensions, B, T, N, H"),
    "integers": ({"k_BSKH": ids(B, S, K, H)}, "k_BSKH is int32: use one of bfloat16, float16, float32, float64"),
    "two dtypes": ({"v_BSKH": jnp.ones((B, S, K, H), jnp.bfloat16)}, "v_BSKH is bfloat16 and q_BTNH is float32"),
    "nothing": ({"q_BTNH": jnp.ones((B, 0, N, H))}, "no dimension may be 0"),
    "values": ({"v_BSKH": jnp.ones((B, S - 1, K, H))}, "k_BSKH has shape (2, 8, 2, 8) and v_BSKH (2, 7, 2, 8)"),
    "rows": ({"q_BTNH": jnp.ones((3, T, N, H))}, "k_BSKH has 2 rows and q_BTNH 3"),
    "head dim": ({"q_BTNH": jnp.ones((B, T, N, 16))}, "k_BSKH has head dim 8 and q_BTNH 16"),
    "heads": ({"q_BTNH": jnp.ones((B, T, 3, H))}, "k_BSKH has 2 heads, which 3 query heads of q_BTNH cannot share"),
    "scale": ({"scale": float("nan")}, "scale is nan: it must be finite"),
    "soft cap": ({"soft_cap": -1.0}, "soft_cap is -1.0: it must be above 0"),
    "sinks": ({"sinks_N": jnp.ones(3)}, "sinks_N has shape (3,): with these query heads it must be (4,)"),
    "integer sinks": ({"sinks_N": ids(4)}, "sinks_N is int32: it must be floating"),
    "slopes": ({"position_bias": Slopes(jnp.ones(2))}, "position_bias.slopes_N has shape (2,)"),
    "table": ({"position_bias": DistanceTable(jnp.ones((3, 5)))}, "position_bias.table_NR has shape (3, 5)"),
    "empty table": ({"position_bias": DistanceTable(jnp.ones((4, 0)))}, "it needs an entry at least"),
    "bias": ({"position_bias": jnp.ones((4, T, S))}, "position_bias is a ArrayImpl: use Slopes or DistanceTable"),
    "query ids": (
        {"mask": AttentionMask(q_segment_ids=ids(B, S), kv_segment_ids=ids(B, S))},
        "mask.q_segment_ids has shape (2, 8): it must be (2, 6)",
    ),
    "key ids": (
        {"mask": AttentionMask(q_segment_ids=ids(B, T), kv_segment_ids=ids(B, T))},
        "mask.kv_segment_ids has shape (2, 6): it must be (2, 8)",
    ),
    "ids that wrap around": (
        {
            "mask": AttentionMask(
                q_segment_ids=jnp.zeros((B, T), jnp.uint32), kv_segment_ids=jnp.zeros((B, S), jnp.uint32)
            )
        },
        "mask.q_segment_ids is uint32: use int32",
    ),
    "offset": ({"mask": AttentionMask(q_offset=-3)}, "mask.q_offset is -3: it counts positions"),
    "lengths": ({"mask": AttentionMask(kv_length=jnp.array([1, 2, 3]))}, "mask.kv_length has shape (3,)"),
    "float offset": ({"mask": AttentionMask(q_offset=2.0)}, "mask.q_offset is 2.0: use an integer or an array of"),  # type: ignore[arg-type]
    "a list": ({"mask": AttentionMask(kv_length=[20, 20])}, "mask.kv_length is [20, 20]: use an integer or an array"),  # type: ignore[arg-type]
    "true": ({"mask": AttentionMask(kv_length=True)}, "mask.kv_length is True: use an integer"),
    "float window": ({"mask": AttentionMask(window=10.5)}, "mask.window is 10.5: use an integer"),  # type: ignore[arg-type]
    "float prefix": ({"mask": AttentionMask(prefix_length=jnp.ones(B))}, "mask.prefix_length is float32"),
    "name": (
        {"implementation": "flash"},
        "implementation is 'flash': use one of reference, xla, pallas_tpu, pallas_gpu, pallas_gpu_deterministic, cudnn",
    ),
    "a GPU's": ({"implementation": "cudnn"}, "implementation 'cudnn' cannot serve this call: it needs an NVIDIA GPU"),
    "a table on a TPU": (
        {"implementation": "pallas_tpu", "position_bias": DistanceTable(jnp.ones((4, 5)))},
        "implementation 'pallas_tpu' cannot serve this call: it has no DistanceTable",
    ),
}


@pytest.mark.parametrize("name", list(MISTAKES))
def test_mistakes_are_named_when_tracing(name: str) -> None:
    changes, message = MISTAKES[name]
    arguments = {**inputs(), "mask": CAUSAL, **changes}
    with pytest.raises(ValueError, match=re.escape(message)):
        jax.eval_shape(lambda: flash_attention(**arguments))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AttentionMask(q_segment_ids=ids(B, T)), "q_segment_ids and kv_segment_ids go together"),
        (lambda: AttentionMask(window=0), "window is 0: a query sees at least itself"),
        (lambda: Strided(stride=0), "Strided.stride is 0: use 1 or more"),
        (lambda: LocalGlobal(block=-1), "LocalGlobal.block is -1: use 1 or more"),
    ],
)
def test_masks_check_themselves(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_numbers_of_numpy_are_numbers() -> None:
    """They are known when tracing, as Python's are: a schedule can be made of them."""
    a = inputs()
    offset, length = np.int64(2), np.array(7)
    got = flash_attention(**a, mask=AttentionMask(q_offset=offset, kv_length=length))  # type: ignore[arg-type]
    want = flash_attention(**a, mask=AttentionMask(q_offset=2, kv_length=7), implementation="reference")
    np.testing.assert_allclose(got, want, atol=1e-6)
    rows = flash_attention(**a, mask=AttentionMask(q_offset=np.array([2, 2])))  # type: ignore[arg-type]
    np.testing.assert_allclose(rows, flash_attention(**a, mask=AttentionMask(q_offset=2)), atol=1e-6)


@pytest.mark.parametrize("implementation", ["xla", "pallas_tpu"])
def test_lengths_in_small_integers_are_lengths(implementation: str) -> None:
    """300 keys do not fit into the dtype of these lengths."""
    random = np.random.default_rng(0)
    q, k, v = (jnp.asarray(random.standard_normal((2, 300, 1, 8)), jnp.float32) for _ in range(3))
    small, whole = (AttentionMask(causal=False, kv_length=jnp.asarray([100, 120], d)) for d in (jnp.uint8, jnp.int32))
    want = flash_attention(q, k, v, mask=whole, implementation="reference")
    np.testing.assert_allclose(flash_attention(q, k, v, mask=small, implementation=implementation), want, atol=1e-5)


def test_parts_over_keys_merge_exactly() -> None:
    """What `return_lse` is for: two halves of the keys, weighed by their log-sum-exp, give the whole, and gradients."""
    a = inputs()

    def half(q: jax.Array, k: jax.Array, v: jax.Array, sinks: Any, keys: slice) -> Any:
        mask = AttentionMask(causal=False)
        return flash_attention(q, k[:, keys], v[:, keys], mask=mask, sinks_N=sinks, return_lse=True)

    def merged(q: jax.Array, k: jax.Array, v: jax.Array, sinks: jax.Array) -> jax.Array:
        (x, lse_x), (y, lse_y) = half(q, k, v, sinks, slice(0, 3)), half(q, k, v, None, slice(3, S))
        total = jnp.logaddexp(lse_x, lse_y)
        return x * jnp.exp(lse_x - total)[..., None] + y * jnp.exp(lse_y - total)[..., None]

    def whole(q: jax.Array, k: jax.Array, v: jax.Array, sinks: jax.Array) -> jax.Array:
        return half(q, k, v, sinks, slice(0, S))[0]

    arguments = (*a.values(), jnp.linspace(-1, 1, N))
    g = jnp.asarray(np.random.default_rng(1).standard_normal((B, T, N, H)), jnp.float32)
    (y, back), (y_whole, back_whole) = jax.vjp(merged, *arguments), jax.vjp(whole, *arguments)
    np.testing.assert_allclose(y, y_whole, atol=1e-6)
    for one, other in zip(back(g), back_whole(g), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-6)


def test_the_default_says_once_who_serves_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(api.logging, "info", lambda text, *a: said.append(text % a))
    api._tell.cache_clear()
    for _ in range(2):
        flash_attention(**inputs(), mask=CAUSAL)
    assert said == ["Attention on cpu is computed by xla (the first choice there)."]
    monkeypatch.setattr(api, "platform", lambda: "tpu")
    table = DistanceTable(jnp.ones((N, 5)))
    with_table = flash_attention(**inputs(), mask=CAUSAL, position_bias=table)
    assert said[1:] == ["Attention on tpu is computed by xla (pallas_tpu cannot: it has no DistanceTable)."]
    np.testing.assert_allclose(
        with_table, flash_attention(**inputs(), mask=CAUSAL, position_bias=table, implementation="reference"), atol=1e-6
    )


def test_without_the_lse_there_is_one_result() -> None:
    out = flash_attention(**inputs(jnp.bfloat16), mask=CAUSAL)
    assert (out.shape, out.dtype) == ((B, T, N, H), jnp.bfloat16)
    out, lse = flash_attention(**inputs(jnp.bfloat16), mask=CAUSAL, return_lse=True)
    assert (lse.shape, lse.dtype) == ((B, T, N), jnp.float32)


def test_on_a_mesh_of_one_device_it_is_the_same() -> None:
    plain = jax.jit(lambda a: flash_attention(**a, mask=CAUSAL))(inputs())
    with jax.set_mesh(one_device_mesh()):
        np.testing.assert_array_equal(jax.jit(lambda a: flash_attention(**a, mask=CAUSAL))(inputs()), plain)


@pytest.mark.parametrize(("T", "offset", "other"), [(40, 0, 0), (500, [3, 1], [0, 7])])  # short and long for xla
def test_without_a_jit_a_call_compiles_once(T: int, offset: Any, other: Any, caplog: pytest.LogCaptureFixture) -> None:
    """For its shapes and what of it is known when tracing: other values of an array compile nothing, nor does the
    gradient the second time."""
    a = {name: jnp.ones((B, T, N, H)) for name in ("q_BTNH", "k_BSKH", "v_BSKH")}

    def compiled(offset: Any) -> int:
        caplog.clear()
        mask = AttentionMask(q_offset=offset if isinstance(offset, int) else jnp.array(offset))
        with jax.log_compiles():
            out, pull = jax.vjp(lambda q: flash_attention(**a | {"q_BTNH": q}, mask=mask), a["q_BTNH"])
            pull(out)
        return sum(record.message.startswith("Compiling") for record in caplog.records)

    jax.clear_caches()
    assert compiled(offset) >= 2
    assert compiled(offset) == 0
    assert compiled(other) == 0
    assert compiled(5) >= 2, "the offset is known when tracing"


FOREIGN = re.compile(
    r"(^|\.)pallas\.ops(\.|$)|splash_attention|flash_attention_jax|tokamax|maxtext|ejkernel|flash_attn|transformer_engine"
    r"|cudnn\.fused|cudnn_fused",
    re.IGNORECASE,
)


def foreign_imports(source: str) -> list[str]:
    """The dotted names of others' attention that a file imports, `from a import b` being `a.b`, also by a call of
    `import_module` or `__import__` with the name in it."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [f"{node.module or ''}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            names += [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
    return [name for name in names if FOREIGN.search(name)]


def test_every_kernel_is_ours() -> None:
    """No file outside `benchmarks/` imports another project's attention."""
    files = [p for room in ("lm_jax", "launch", "configs", "tests") for p in (ROOT / room).rglob("*.py")]
    assert len(files) > 100
    found = {str(path.relative_to(ROOT)): foreign_imports(path.read_text()) for path in files}
    assert {path: names for path, names in found.items() if names} == {}


@pytest.mark.parametrize(
    "source",
    [
        "from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel",
        "from jax.experimental.pallas import ops",
        "from jax.experimental.pallas import (\n    BlockSpec,\n    ops as theirs,\n)",
        "import jax.experimental.pallas.ops.gpu.attention as a",
        "def f():\n    if True:\n        from jax._src.cudnn.fused_attention_stablehlo import dot_product_attention",
        "from jax._src.cudnn import \\\n    fused_attention_stablehlo",
        "import numpy, tokamax",
        "importlib.import_module('flash_attn.flash_attn_interface')",
        "__import__('transformer_engine')",
    ],
)
def test_a_planted_import_of_theirs_is_seen(source: str) -> None:
    assert len(foreign_imports(source)) == 1


@pytest.mark.parametrize(
    "source",
    [
        "from jax.experimental import pallas as pl",
        "from jax.experimental.pallas import tpu as pltpu",
        "from lm_jax.kernels.flash_attention import cudnn, flash_attention",
        "'import tokamax'  # from jax.experimental.pallas import ops",
        "from project.pallas.opsets import x",
    ],
)
def test_an_import_of_ours_is_not_seen(source: str) -> None:
    assert foreign_imports(source) == []


def test_names() -> None:
    assert [i.name for i in IMPLEMENTATIONS.values()] == list(IMPLEMENTATIONS)
    for order in api.DEFAULTS.values():
        assert set(order) <= set(IMPLEMENTATIONS) and order[-1] == "xla", "xla refuses nothing"
