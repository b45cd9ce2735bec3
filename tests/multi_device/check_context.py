"""Attention whose length is split over devices, by a ring and by all-to-alls, against one device: values and gradients;
and what of it goes over the wires. Its argument: `some` or `all` of the values, or `wires`."""

from __future__ import annotations

import collections
import dataclasses
import math
import re
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxprs_in_params
from jax.sharding import NamedSharding

from lm_jax import sharding
from lm_jax.kernels.flash_attention import AttentionMask, DistanceTable, Slopes, flash_attention
from lm_jax.kernels.flash_attention.ring import ring_order
from lm_jax.sharding import MeshConfig, constrain, partition
from tests.multi_device import layouts

Arrays = dict[str, Any]
QUERIES, KEYS = ("batch", "length", "heads", "head_dim"), ("batch", "length", "kv_heads", "head_dim")
NAMES: dict[str, tuple[str | None, ...]] = {
    "q": QUERIES,
    "k": KEYS,
    "v": KEYS,
    "g": QUERIES,
    "g_lse": QUERIES[:3],
    "ids": QUERIES[:2],
    "sinks": ("heads",),
    "slopes": ("heads",),
    "table": ("heads", None),
}
LAYOUTS = (
    MeshConfig(data=1, sequence=8),
    MeshConfig(data=1, sequence=4, tensor=2),
    MeshConfig(data=2, sequence=4),
)


@dataclasses.dataclass(frozen=True)
class Case:
    causal: bool = True
    window: int | None = None
    segments: bool = False
    bias: str | None = None
    sinks: bool = False
    soft_cap: float | None = None
    N: int = 8
    K: int = 4
    implementation: str | None = None


CASES = {
    "causal": Case(),
    "segments, sinks, slopes": Case(segments=True, sinks=True, bias="slopes"),
    "table, soft cap, few key heads": Case(bias="table", soft_cap=1.5, K=2),
    "narrow window": Case(window=20, segments=True, sinks=True),
    "wide window": Case(window=150, bias="slopes"),
    "not causal": Case(causal=False, segments=True, bias="table"),
    "window both ways": Case(causal=False, window=70),
    "by the formula": Case(segments=True, sinks=True, bias="slopes", implementation="reference"),
}
B, T, H = 2, 192, 8


def arguments(c: Case, dtype: Any, K: int) -> Arrays:
    random = np.random.default_rng(0)
    shapes = {"q": (B, T, c.N, H), "k": (B, T, K, H), "v": (B, T, K, H), "g": (B, T, c.N, H), "g_lse": (B, T, c.N)}
    a = {name: random.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}
    if c.sinks:
        a["sinks"] = random.standard_normal(c.N).astype(dtype)
    if c.bias == "slopes":
        a["slopes"] = (random.random(c.N) * 0.1).astype(dtype)
    if c.bias == "table":
        a["table"] = random.standard_normal((c.N, 120)).astype(dtype)
    if c.segments:
        ids = np.sort(random.integers(0, 4, (B, T)), -1).astype(np.int32)
        ids[:, T - 17 :] = -1
        ids[1, 50:60] = -1  # and padding in the midst
        a["ids"] = ids
    return a


def value_and_gradients(a: Arrays, c: Case, context: str) -> Arrays:
    a = {name: constrain(x, *NAMES[name]) for name, x in a.items()}
    ids = a.get("ids")
    mask = AttentionMask(c.causal, c.window, q_segment_ids=ids, kv_segment_ids=ids)

    def f(a: Arrays) -> Any:
        bias: Any = Slopes(a["slopes"]) if "slopes" in a else None
        bias = DistanceTable(a["table"], first=-9) if "table" in a else bias
        return flash_attention(
            a["q"],
            a["k"],
            a["v"],
            mask=mask,
            soft_cap=c.soft_cap,
            position_bias=bias,
            sinks_N=a.get("sinks"),
            return_lse=True,
            implementation=c.implementation,
            context=context,
        )

    moving = {name: x for name, x in a.items() if name not in ("g", "g_lse", "ids")}
    (out, lse), back = jax.vjp(f, moving)
    # Merging parts sends NaN for the lse of what sees nothing.
    g_lse = jnp.where(lse == -jnp.inf, jnp.nan, a["g_lse"].astype(lse.dtype))
    return {"out": out, "lse": lse} | {f"d {n}": x for n, x in back((a["g"], g_lse))[0].items()}


def along_length(arrays: Arrays, order: np.ndarray) -> Arrays:
    return {n: x[:, order] if x.ndim > 1 and x.shape[1] == T else x for n, x in arrays.items()}


def run(config: MeshConfig, arrays: Arrays, c: Case, context: str) -> dict[str, np.ndarray]:
    order = np.arange(T)
    if context == "ring":
        order = ring_order(T, config.sequence, c.window, c.causal)
    with jax.set_mesh(layouts.mesh_of(config)):
        compute = jax.jit(value_and_gradients, static_argnums=(1, 2))
        got = {n: np.asarray(x) for n, x in compute(along_length(arrays, order), c, context).items()}
    return along_length(got, np.argsort(order))


def check(c: Case, contexts: tuple[str, ...], dtype: Any, tolerance: float, configs: Any = LAYOUTS) -> None:
    arrays = arguments(c, dtype, c.K)
    want = run(layouts.ONE, arrays, c, "gather")
    blind = np.isneginf(want["lse"])
    for config in configs:
        for context in contexts:
            got, worst = run(config, arrays, c, context), (0.0, "")
            np.testing.assert_array_equal(np.isneginf(got["lse"]), blind)
            for name, x in got.items():
                assert not (blind.any() and name in ("out", "d q") and x[blind].any()), (config, context, name)
                x, y = (np.where(blind, 0, a) if name == "lse" else a for a in (x, want[name]))
                worst = max(worst, (layouts.relative(x, y), name))
                assert layouts.relative(x, y) < tolerance, (c, config, context, name, layouts.relative(x, y))
            print(" ".join(f"{a}={n}" for a, n in dataclasses.asdict(config).items()), context, worst, flush=True)


BOTH = ("ring", "all_to_all")


def some() -> None:
    """A case a layout, each with much in it."""
    check(CASES["segments, sinks, slopes"], BOTH, np.float32, 2e-6, LAYOUTS[:1])
    check(CASES["table, soft cap, few key heads"], BOTH, np.float32, 2e-6, LAYOUTS[1:2])
    check(CASES["narrow window"], ("ring",), np.float32, 2e-6, LAYOUTS[2:])
    with jax.enable_x64(True):
        check(CASES["segments, sinks, slopes"], BOTH, np.float64, 1e-12, LAYOUTS[1:2])
    sharding.platform = lambda: "gpu"  # where the types inside of `shard_map` are not checked
    jax.clear_caches()
    check(CASES["segments, sinks, slopes"], BOTH, np.float32, 2e-6, LAYOUTS[1:2])


def everything() -> None:
    for name, c in CASES.items():
        print(name)
        check(c, BOTH, np.float32, 2e-6, LAYOUTS if c.implementation is None else LAYOUTS[1:2])
    with jax.enable_x64(True):
        check(CASES["narrow window"], ("ring",), np.float64, 1e-12, LAYOUTS[1:2])
        check(CASES["not causal"], ("ring",), np.float64, 1e-12, LAYOUTS[1:2])


# --- what goes over the wires ----------------------------------------------------------------------------------------


def permutes(jaxpr: Any, times: int = 1) -> list[tuple[int, int, int]]:
    """`(how often, bytes, rank)` of every ppermute, those in loops as often as the loop goes round."""
    found = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "ppermute":
            found += [(times, v.aval.size * v.aval.dtype.itemsize, v.aval.ndim) for v in eqn.invars]
        inner = times * eqn.params["length"] if eqn.primitive.name == "scan" else times
        for sub in jaxprs_in_params(eqn.params):
            found += permutes(sub, inner)
    return found


def compiled(config: MeshConfig, c: Case, context: str) -> tuple[Any, str]:
    """The jaxpr of value and gradients, and the text of the compiled program."""
    mesh = layouts.mesh_of(config)
    with jax.set_mesh(mesh):
        arrays = arguments(c, np.float32, c.K)
        placed = {n: jax.device_put(x, NamedSharding(mesh, partition(*NAMES[n]))) for n, x in arrays.items()}
        traced = jax.jit(value_and_gradients, static_argnums=(1, 2)).trace(placed, c, context)
        return traced.jaxpr.jaxpr, traced.lower().compile().as_text()


def check_ring(config: MeshConfig, c: Case, steps: int) -> None:
    """Forward, keys and values go `steps - 1` times; backward as often again, and their gradients once more."""
    jaxpr, program = compiled(config, c, "ring")
    keys = B * T * c.K * H * 4 // (config.data * config.sequence * config.tensor)
    want = collections.Counter({(4, keys): 2 * (steps - 1) * 2 + 2 * steps})
    if c.segments:
        want[2, B * T * 4 // (config.data * config.sequence)] = 2 * (steps - 1)
    got: collections.Counter[tuple[int, int]] = collections.Counter()
    for times, size, rank in permutes(jaxpr):
        got[rank, size] += times
    assert got == want, (config, c, got, want)
    assert not re.search(r"all-gather|all-to-all", program), (config, c)


def check_all_to_all(config: MeshConfig, c: Case) -> None:
    """Queries, keys, values and the outcome go once, and so do their gradients; nothing of their size is gathered."""
    _, program = compiled(config, c, "all_to_all")
    moved = [line for line in program.splitlines() if re.search(r" all-to-all(-start)?\(", line)]
    whole = [line for line in moved if re.search(rf",{H}\]", line)]
    assert len(whole) == 8 and len(moved) == 10, (config, c, moved)  # the others: the log-sum-exp and its gradient
    for shape in re.findall(r"= \(?\w+\[([\d,]*)\]\S* all-gather", program):
        size = math.prod(int(d) for d in shape.split(","))
        assert size < B * T * H, f"{config}: gathers {shape}"  # segment ids, the table's gradient


def wires() -> None:
    check_ring(LAYOUTS[0], CASES["causal"], 8)
    check_ring(LAYOUTS[1], Case(segments=True), 4)
    check_ring(LAYOUTS[2], CASES["narrow window"], 2)
    check_all_to_all(LAYOUTS[1], CASES["segments, sinks, slopes"])
    check_all_to_all(LAYOUTS[0], CASES["table, soft cap, few key heads"])


if __name__ == "__main__":
    assert len(jax.devices()) == 8
    {"some": some, "all": everything, "wires": wires}[sys.argv[1]]()
