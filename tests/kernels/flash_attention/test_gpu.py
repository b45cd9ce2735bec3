"""The Hopper kernels where there is no GPU: what they refuse, their arithmetic, that they lower, and, where Pallas'
interpreter of GPU kernels is public (jax 0.12), their values."""

from __future__ import annotations

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AbstractDevice, NamedSharding

from lm_jax.costs import abstract_mesh
from lm_jax.kernels.flash_attention import (
    IMPLEMENTATIONS,
    AttentionMask,
    DistanceTable,
    LocalGlobal,
    Slopes,
    api,
    block_sizes,
    flash_attention,
    pallas_gpu,
    pallas_gpu_tiles,
    reference,
)
from lm_jax.kernels.flash_attention.implementation import Call, Implementation, with_gradient
from lm_jax.kernels.flash_attention.pallas_gpu_tiles import LOG2E, LOWEST, GpuBlocks
from lm_jax.sharding import MeshConfig, partition
from tests.kernels.flash_attention.cases import MASKS, Shape

H200 = "NVIDIA H200"
CAUSAL = AttentionMask()
SERVED = (
    "causal",
    "full",
    "window",
    "window both ways",
    "prefix",
    "segments",
    "offsets a row",
    "keys a row",
    "decoding",
)


def a_call(mask: AttentionMask = CAUSAL, H: int = 64, dtype: Any = jnp.bfloat16, **more: Any) -> Call:
    q, k = jax.ShapeDtypeStruct((2, 300, 4, H), dtype), jax.ShapeDtypeStruct((2, 300, 2, H), dtype)
    given: dict[str, Any] = {"scale": 0.125} | more
    return Call(q, k, k, mask, **given)  # type: ignore[arg-type]


def on(monkeypatch: pytest.MonkeyPatch, platform: str, chip: str) -> None:
    monkeypatch.setattr(pallas_gpu, "platform", lambda: platform)
    monkeypatch.setattr(pallas_gpu, "device_kind", lambda: chip)


REFUSED: dict[str, tuple[Call, str]] = {
    "float32": (a_call(dtype=jnp.float32), "it needs bfloat16 or float16, and the queries are float32"),
    "head dim": (a_call(H=96), "it has head dims 64 and 128, and this is 96"),
    "scale": (a_call(scale=0.0), "it needs a scale above 0, and this is 0.0"),
    "pattern": (a_call(AttentionMask(pattern=LocalGlobal())), "it has no pattern"),
    "cap and bias": (
        a_call(soft_cap=2.0, position_bias=Slopes(jnp.ones(4))),
        "it has no soft cap, no position bias",
    ),
    "table": (a_call(position_bias=DistanceTable(jnp.ones((4, 5)))), "it has no position bias"),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_what_it_cannot_serve_is_said(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    on(monkeypatch, "gpu", H200)
    call, why = REFUSED[name]
    assert pallas_gpu.refuses(call) == why


@pytest.mark.parametrize(
    ("platform", "chip"), [("cpu", "cpu"), ("tpu", "TPU v5"), ("gpu", "NVIDIA A100"), ("gpu", "AMD")]
)
def test_other_chips_are_refused(monkeypatch: pytest.MonkeyPatch, platform: str, chip: str) -> None:
    on(monkeypatch, platform, chip)
    assert pallas_gpu.refuses(a_call()) == f"it needs an NVIDIA Hopper GPU (H100, H200), and this is {chip}"


def test_a_faulty_assembler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, "gpu", "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr("importlib.metadata.version", lambda name: "12.8.93")
    assert (pallas_gpu.refuses(a_call()) or "").startswith("CUDA 12.8.93 miscompiles it")
    for good in ("12.9.1", "12.6.85"):
        monkeypatch.setattr("importlib.metadata.version", lambda name, good=good: good)
        assert pallas_gpu.refuses(a_call()) is None


def test_it_is_used_only_where_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "pallas_gpu" in IMPLEMENTATIONS
    assert all("pallas_gpu" not in order for order in (*api.DEFAULTS.values(), api._ELSEWHERE))
    with pytest.raises(ValueError, match="'pallas_gpu' cannot serve this call: it needs an NVIDIA Hopper GPU"):
        jax.eval_shape(
            lambda q: flash_attention(q, q, q, mask=AttentionMask(), implementation="pallas_gpu"), a_call()[0]
        )
    on(monkeypatch, "gpu", H200)
    assert api.choose(a_call(), "pallas_gpu").name == "pallas_gpu"


@pytest.mark.parametrize(
    ("name", "H"),
    [
        ("prefix", 64),
        ("segments", 128),
        *[pytest.param(name, H, marks=pytest.mark.slow) for name in SERVED for H in (64, 128)],
    ],
)
@pytest.mark.parametrize(
    ("implementation", "kernels"),
    [
        (pallas_gpu.IMPLEMENTATION, ("backward",)),
        (pallas_gpu.DETERMINISTIC, ("backward_keys", "backward_queries")),
    ],
    ids=["one kernel", "two kernels"],
)
def test_value_and_gradient_lower_for_cuda(
    name: str, H: int, implementation: Implementation, kernels: tuple[str, ...]
) -> None:
    mask = MASKS[name](Shape(B=2, T=300, S=300))
    dtype = jnp.float16 if name == "prefix" else jnp.bfloat16
    call = a_call(mask, H, dtype, sinks_N=jnp.zeros(4) if name == "prefix" else None)

    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        out, lse = implementation.attend(call._replace(q_BTNH=q, k_BSKH=k, v_BSKH=v))
        return out.astype(jnp.float32).sum() + lse.sum()

    program = jax.export.export(jax.jit(jax.grad(loss, argnums=(0, 1, 2))), platforms=["cuda"])(*call[:3])
    found = re.findall(r"flash_attention_(forward|backward(?:_keys|_queries)?)", program.mlir_module())
    assert set(found) == {"forward", *kernels}


@pytest.mark.parametrize(
    "layout",
    [
        MeshConfig(data=1),  # a training step has a mesh on one GPU too
        MeshConfig(data=2, fsdp=2, tensor=2),
        MeshConfig(data=2, sequence=2, tensor=2, context="ring"),
        pytest.param(MeshConfig(data=1, sequence=2, tensor=2), marks=pytest.mark.slow),
        pytest.param(MeshConfig(data=1, fsdp=2, sequence=4, context="all_to_all"), marks=pytest.mark.slow),
    ],
    ids=["one", "rows and heads", "ring", "gather", "all_to_all"],
)
def test_it_lowers_on_meshes(layout: MeshConfig) -> None:
    """Packed rows, whose lists of tiles are made on each device of its own rows; key heads are split over `tensor`."""
    devices = layout.data * layout.fsdp * layout.sequence * layout.tensor
    mesh = abstract_mesh(layout, devices, AbstractDevice(H200, 1, "gpu"))

    def array(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        names = ("batch", "length", "heads", "head_dim")[: len(shape)]
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, partition(*names)))

    def loss(q: jax.Array, k: jax.Array, v: jax.Array, sinks: jax.Array, ids: jax.Array) -> jax.Array:
        mask = AttentionMask(q_segment_ids=ids, kv_segment_ids=ids)
        given: dict[str, Any] = {"implementation": "pallas_gpu", "context": layout.context}
        return flash_attention(q, k, v, mask=mask, sinks_N=sinks, **given).astype(jnp.float32).sum()

    sinks = jax.ShapeDtypeStruct((8,), jnp.float32, sharding=NamedSharding(mesh, partition("heads")))
    arrays = [array(jnp.bfloat16, 4, 512, n, 64) for n in (8, 4, 4)] + [sinks, array(jnp.int32, 4, 512)]
    with jax.sharding.use_abstract_mesh(mesh):
        lowered = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3))).trace(*arrays).lower(lowering_platforms=("cuda",))
    heads = layout.tensor * (layout.sequence if layout.context == "all_to_all" else 1)
    rows, length = 4 // (layout.data * layout.fsdp), 512 // (layout.sequence if heads == layout.tensor else 1)
    if layout.context == "ring":
        length //= 2  # a part of the ring's is a chunk of two
    queries = f"tensor<{rows}x{length}x{8 // heads}x64xbf16>"
    kernels = [line for line in lowered.as_text().splitlines() if "mosaic_gpu" in line and "custom_call" in line]
    assert len(kernels) >= 2 and any(queries in line for line in kernels), queries


# --- the arithmetic, as the kernels call it ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["window both ways", "prefix", "keys a row", "decoding", "fewer keys", "segments without order"]
)
def test_tiles_see_what_the_mask_says(name: str) -> None:
    """The lists of tiles and the mask on each make the whole mask, also transposed."""
    T, q_block, kv_block = 300, 128, 64
    mask = MASKS[name](Shape(B=2, T=T, S=T))
    call = a_call(mask)
    T_up, S_up = (pallas_gpu_tiles.up(T, n) for n in (q_block, kv_block))
    parts = pallas_gpu_tiles.parts_of(call, S_up)
    want = np.broadcast_to(mask.allowed(T, T), (2, T, T))
    for for_keys in (False, True):
        work = pallas_gpu_tiles.work_of(call, T_up, S_up, q_block, kv_block, for_keys=for_keys)
        got = np.zeros((2, T_up, S_up), bool)
        for b in range(2):
            row = b % work.counts.shape[0]
            offset, prefix, length = (int(x) for x in work.scalars_B3[b])
            for x in range(work.counts.shape[1]):
                partly, opened = (int(n) for n in work.counts[row, x])
                for t in range(partly + opened):
                    y = int(work.tiles[row, x, t])
                    i, j = (y, x) if for_keys else (x, y)
                    q, k = i * q_block + np.arange(q_block)[:, None], j * kv_block + np.arange(kv_block)[None]
                    q, k = np.broadcast_arrays(q, k)
                    ids = (work.q_ids[b][q], work.k_ids[b][k]) if parts.segments else None
                    see = pallas_gpu_tiles.visible(parts, prefix, length, q + offset, k, ids) if t < partly else None
                    got[b, q, k] = True if see is None else np.asarray(see)
        np.testing.assert_array_equal(got[:, :T, :T], want)
        assert not got[:, :T, T:].any()


def test_the_softmax_and_its_gradient_in_tiles() -> None:
    """Tiles of one row of queries, put together, are the reference's value and gradients."""
    random = np.random.default_rng(0)
    q, k, v, g = (jnp.asarray(random.standard_normal((64, 32)), jnp.float32) for _ in range(4))
    g_lse = jnp.asarray(random.standard_normal(64), jnp.float32)
    see = jnp.asarray(random.random((64, 64)) < 0.6).at[7].set(False)
    factor = 32**-0.5 * LOG2E
    highest, total, out = jnp.full(64, LOWEST), jnp.zeros(64), jnp.zeros((64, 32))
    for j in range(0, 64, 16):
        s, seen = q @ k[j : j + 16].T, see[:, j : j + 16]
        p, highest, total, shrink = pallas_gpu_tiles.softmax_step(s, seen, factor, highest, total)
        out = out * shrink[:, None] + p @ v[j : j + 16]
    out = out / jnp.where(total == 0, 1, total)[:, None]
    lse = jnp.where(total == 0, -jnp.inf, highest / LOG2E + jnp.log(total))

    def plain(q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
        s = jnp.where(see, q @ k.T * 32**-0.5, -1e30)
        p = jnp.where(see, jax.nn.softmax(s), 0)
        return p @ v, jnp.where(see.any(1), jax.nn.logsumexp(s, -1), -jnp.inf)

    (want, want_lse), pull = jax.vjp(plain, q, k, v)
    np.testing.assert_allclose(out, want, atol=2e-6)
    np.testing.assert_allclose(lse, want_lse, atol=2e-6)
    g_lse = jnp.where(lse == -jnp.inf, 0, g_lse)
    lse2, delta = jnp.where(lse == -jnp.inf, -LOWEST, lse * LOG2E), (out * g).sum(1) - g_lse
    p = pallas_gpu_tiles.probabilities(q @ k.T, see, factor, lse2, 0)
    d_s = pallas_gpu_tiles.score_gradient(p, g @ v.T, delta, 0) * 32**-0.5
    turned = pallas_gpu_tiles.probabilities(k @ q.T, see.T, factor, lse2, 1)
    np.testing.assert_allclose(pallas_gpu_tiles.score_gradient(turned, v @ g.T, delta, 1) * 32**-0.5, d_s.T, atol=2e-6)
    for x, y in zip((d_s @ k, d_s.T @ q, p.T @ g), pull((g, g_lse)), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)


# --- the kernels themselves, interpreted ------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(plgpu, "InterpretGPUParams"), reason="needs the interpreter of GPU kernels of jax 0.12")
@pytest.mark.parametrize("deterministic", [False, True], ids=["one kernel", "two kernels"])
@pytest.mark.parametrize(("name", "H"), [("causal", 128), ("segments", 64), ("decoding", 64), ("sinks", 64)])
def test_values_and_gradients_interpreted(
    monkeypatch: pytest.MonkeyPatch, name: str, H: int, deterministic: bool
) -> None:
    monkeypatch.setattr(
        block_sizes,
        "gpu_blocks",
        lambda call: GpuBlocks(64, 2, 64, 2, 64, 2, 8192 // call.q_BTNH.shape[3], 2, name != "causal"),
    )
    mask = MASKS["causal" if name == "sinks" else name](Shape(B=2, T=150, S=150))
    random = np.random.default_rng(0)
    q, k, v, g = (jnp.asarray(random.standard_normal((2, 150, n, H)), jnp.bfloat16) for n in (2, 1, 1, 2))
    sinks = jnp.asarray([0.5, -1.0]) if name == "sinks" else None
    call = Call(q, k, v, mask, 0.125, sinks_N=sinks)
    params = plgpu.InterpretGPUParams()
    ours = with_gradient(
        functools.partial(pallas_gpu.forward, interpret=params),
        functools.partial(pallas_gpu.backward, deterministic=deterministic, interpret=params),
    )

    def run(attend: Any, dtype: Any) -> list[np.ndarray]:
        moving = [x.astype(dtype) for x in (q, k, v)] + ([] if sinks is None else [sinks])
        (out, lse), pull = jax.vjp(
            lambda q, k, v, *s: attend(call._replace(q_BTNH=q, k_BSKH=k, v_BSKH=v, sinks_N=s[0] if s else None)),
            *moving,
        )
        g_lse = jnp.where(lse == -jnp.inf, 0, 1.0)
        found = [out, jnp.where(lse == -jnp.inf, 0, lse), *pull((g.astype(out.dtype), g_lse))]
        return [np.asarray(x, np.float32) for x in found]

    for got, want in zip(run(ours, jnp.bfloat16), run(reference.attend, jnp.float32), strict=True):
        assert np.linalg.norm(got - want) <= 6e-3 * np.linalg.norm(want)


def test_every_row_of_the_table_fits_shared_memory() -> None:
    for r in block_sizes.GPU_TABLE:
        b, H = r.blocks, r.head_dim
        assert b.forward_kv % 64 == b.dq_kv % 64 == b.dkv_q % 64 == 0, "lines of 128 bytes"
        ring = max(b.forward_stages * b.forward_kv - 64, b.dq_stages * b.dq_kv, b.dkv_stages * b.dkv_q)
        assert (256 + 2 * ring) * H * 2 <= 220 * 1024
        assert b.fused_q * H == 8192
        fused = (256 + 2 * b.fused_stages * b.fused_q) * H * 2 + b.fused_stages * b.fused_q * (128 * 2 + 2 * 4)
        assert fused + 2 * 64 * 64 * 4 <= 220 * 1024
        assert r.measured
