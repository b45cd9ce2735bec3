"""The test base that every implementation of attention passes: a grid of masks and options, and one comparison.

Shapes: B batch, T queries, S keys, N query heads, K key-value heads, H head dim.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm_jax.kernels.flash_attention import AttentionMask, DistanceTable, LocalGlobal, Slopes, Strided, flash_attention


@dataclasses.dataclass(frozen=True)
class Shape:
    B: int = 2
    T: int = 300
    S: int = 300
    N: int = 4
    K: int = 2
    H: int = 16

    def replace(self, **changes: int) -> Shape:
        return dataclasses.replace(self, **changes)


def packed(shape: Shape, seed: int = 0, padding: bool = True) -> AttentionMask:
    """Rows packed with documents of uneven length, the last of each row padded; keys cut the same way."""
    random = np.random.default_rng(seed)
    ids = []
    for L in (shape.T, shape.S):
        starts = random.random((shape.B, L)) < 6 / max(L, 12)
        row = np.cumsum(starts, 1).astype(np.int32)
        if padding:
            row[:, L - L // 8 :] = -1
        ids.append(row)
    if shape.T == shape.S:
        ids[1] = ids[0]
    return AttentionMask(q_segment_ids=jnp.asarray(ids[0]), kv_segment_ids=jnp.asarray(ids[1]))


def joined(a: AttentionMask, **changes: Any) -> AttentionMask:
    return dataclasses.replace(a, **changes)


Mask = Callable[[Shape], AttentionMask]
MASKS: dict[str, Mask] = {
    "causal": lambda s: AttentionMask(),
    "full": lambda s: AttentionMask(causal=False),
    "window": lambda s: AttentionMask(window=70),
    "window of one": lambda s: AttentionMask(window=1),
    "window both ways": lambda s: AttentionMask(causal=False, window=70),
    "prefix": lambda s: AttentionMask(prefix_length=jnp.arange(s.B) * 37 + 5),
    "prefix everywhere alike": lambda s: AttentionMask(prefix_length=140, window=40),
    "segments": packed,
    "segments both ways": lambda s: joined(packed(s), causal=False),
    "segments without order": lambda s: joined(
        AttentionMask(causal=False),
        q_segment_ids=jnp.asarray(np.random.default_rng(1).integers(-1, 3, (s.B, s.T)), jnp.int32),
        kv_segment_ids=jnp.asarray(np.random.default_rng(2).integers(-1, 3, (s.B, s.S)), jnp.int32),
    ),
    "all padding": lambda s: AttentionMask(
        q_segment_ids=jnp.full((s.B, s.T), -1).at[0].set(0), kv_segment_ids=jnp.full((s.B, s.S), -1).at[0].set(0)
    ),
    "offset": lambda s: AttentionMask(q_offset=33),
    "offsets a row": lambda s: AttentionMask(q_offset=jnp.arange(s.B) * 50 + 1, window=90),
    "keys a row": lambda s: AttentionMask(causal=False, kv_length=jnp.arange(s.B) * (s.S // 2)),
    "fewer keys": lambda s: AttentionMask(kv_length=s.S // 2 + 3),
    "decoding": lambda s: AttentionMask(q_offset=jnp.arange(s.B) * 9 + 40, kv_length=jnp.arange(s.B) * 9 + 40 + s.T),
    "strided": lambda s: AttentionMask(pattern=Strided(block=32, local=2, stride=3)),
    "local and global": lambda s: AttentionMask(causal=False, pattern=LocalGlobal(block=32, local=1, global_blocks=1)),
    "pattern moved": lambda s: AttentionMask(pattern=LocalGlobal(block=32, local=2), q_offset=jnp.arange(s.B) * 11),
    "all parts": lambda s: joined(
        packed(s),
        window=120,
        prefix_length=jnp.arange(s.B) * 30 + 20,
        kv_length=jnp.full(s.B, s.S - 7),
        pattern=Strided(block=16, local=3, stride=4),
        q_offset=5,
    ),
}

SHAPES: dict[str, Shape] = {
    "one query": Shape(T=1),
    "one key": Shape(S=1),
    "tiny": Shape(T=3, S=5),
    "odd": Shape(T=131, S=131),
    "more keys": Shape(T=70, S=301),
    "more queries": Shape(T=301, S=70),
    "a head a head": Shape(N=2, K=2),
    "one key head": Shape(N=8, K=1),
    "three a head": Shape(N=6, K=2),
}


@dataclasses.dataclass(frozen=True)
class Options:
    soft_cap: float | None = None
    bias: str | None = None
    sinks: bool = False
    scale: float | None = None


OPTIONS: dict[str, Options] = {
    "plain": Options(),
    "scale": Options(scale=0.7),
    "scale of zero": Options(scale=0.0),
    "soft cap": Options(soft_cap=1.5),
    "slopes": Options(bias="slopes"),
    "table": Options(bias="table"),
    "sinks": Options(sinks=True),
    "all": Options(soft_cap=2.0, bias="slopes", sinks=True, scale=0.3),
}


def arguments(shape: Shape, options: Options = Options(), size: float = 1.0, seed: int = 0) -> dict[str, np.ndarray]:
    """Random arrays in float64: q, k, v, and what the options add; `g` and `g_lse` are the gradients that arrive."""
    random = np.random.default_rng(seed)
    s = shape
    a = {name: size * random.standard_normal((s.B, s.T, s.N, s.H)) for name in ("q", "g")}
    a |= {name: random.standard_normal((s.B, s.S, s.K, s.H)) for name in ("k", "v")}
    a["g_lse"] = random.standard_normal((s.B, s.T, s.N))
    if options.bias == "slopes":
        a["bias"] = random.random(s.N) * 0.2 - 0.1
        a["bias"][0] = -0.6  # a head that looks far
    if options.bias == "table":
        a["bias"] = random.standard_normal((s.N, 40))
    if options.sinks:
        a["sinks"] = random.standard_normal(s.N)
    return a


def value_and_gradients(
    implementation: str | None, a: dict[str, Any], mask: AttentionMask, options: Options
) -> dict[str, np.ndarray]:
    """`out`, `lse` and the gradient of every argument, as one jitted program."""
    moving = {name: jnp.asarray(x) for name, x in a.items() if name not in ("g", "g_lse")}

    def f(moving: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        bias: Any = None
        if "bias" in moving:
            bias = Slopes(moving["bias"]) if options.bias == "slopes" else DistanceTable(moving["bias"], first=-9)
        return flash_attention(
            moving["q"],
            moving["k"],
            moving["v"],
            mask=mask,
            scale=options.scale,
            soft_cap=options.soft_cap,
            position_bias=bias,
            sinks_N=moving.get("sinks"),
            return_lse=True,
            implementation=implementation,
        )

    def both(moving: dict[str, jax.Array], g: Any) -> dict[str, jax.Array]:
        (out, lse), back = jax.vjp(f, moving)
        # The derivative of what a caller does with -inf is often NaN; the reference is spared it.
        g_lse = jnp.where(lse == -jnp.inf, 0 if implementation == "reference" else jnp.nan, g[1]).astype(lse.dtype)
        (grads,) = back((g[0].astype(out.dtype), g_lse))
        return {"out": out, "lse": lse} | {f"d {name}": d for name, d in grads.items()}

    got = jax.jit(both)(moving, (jnp.asarray(a["g"]), jnp.asarray(a["g_lse"])))
    return {name: np.asarray(x.astype(jnp.promote_types(x.dtype, jnp.float32))) for name, x in got.items()}


def expected(a: dict[str, np.ndarray], mask: AttentionMask, options: Options) -> dict[str, np.ndarray]:
    """The reference in float64, on the same numbers."""
    with jax.enable_x64(True):
        return value_and_gradients("reference", {n: np.asarray(x, np.float64) for n, x in a.items()}, mask, options)


def check(
    implementation: str | None,
    shape: Shape,
    mask: Mask,
    options: Options = Options(),
    dtype: Any = np.float64,
    tolerance: float = 1e-12,
    size: float = 1.0,
) -> None:
    """Value, log-sum-exp and every gradient against the reference in float64; by relative norm, a row's zeros exactly.

    Args:
      dtype: of q, k, v; the reference sees the same rounded numbers.
      tolerance: of the norm of the difference over the norm.
    """
    made = arguments(shape, options, size)
    kept = {n: dtype if n in "qkvg" or dtype == np.float64 else np.float32 for n in made}
    a = {n: x.astype(kept[n]) for n, x in made.items()}  # numpy knows bfloat16 where jax is imported
    want = expected({n: np.asarray(x, np.float64) for n, x in a.items()}, mask(shape), options)
    with jax.enable_x64(dtype == np.float64):
        got = value_and_gradients(implementation, a, mask(shape), options)
    assert set(got) == set(want)
    blind = np.isneginf(want["lse"])
    np.testing.assert_array_equal(np.isneginf(got["lse"]), blind)
    assert not got["out"][blind].any() and not got["d q"][blind].any()
    for name, x in got.items():
        y = want[name]
        if name == "lse":
            x, y = np.where(blind, 0, x), np.where(blind, 0, y)
        difference = np.linalg.norm(x.astype(np.float64) - y)
        # Where the true gradient is zero there is no norm to compare with: then the arguments' own scale counts.
        scale = max(np.linalg.norm(y), 1e-3 * np.sqrt(y.size))
        assert difference <= tolerance * scale, f"{name}: {difference / scale:.2e} of the norm"
