"""A training step compiled for GPUs that are not here, with our kernels for Hopper in it."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from pathlib import Path

import pytest

from lm_jax import costs, hlo
from lm_jax.models.transformer import TransformerConfig
from lm_jax.preflight.chips import target_of
from lm_jax.preflight.compiling import compile_step
from lm_jax.preflight.verdict import preflight
from lm_jax.sharding import MeshConfig
from lm_jax.training.run import RunConfig, TrainConfig

pytestmark = pytest.mark.skipif(
    not any(map(importlib.util.find_spec, ("jax_cuda12_plugin", "jax_cuda13_plugin"))),
    reason="compiling for GPUs needs jax's CUDA plugin",
)
LAYERS = 5  # of four or fewer XLA puts gradients together in another way, and copies moments to do so
MODEL = TransformerConfig(
    layers=LAYERS, embed=512, heads=8, kv_heads=4, vocab=8192, feed_forward_dim=1024, tied=True, scan=False
)
KERNEL = 'custom_call_target="mosaic_gpu'


def run(length: int, mesh: MeshConfig, kernel: str | None = "pallas_gpu") -> RunConfig:
    train = TrainConfig(batch_size=4, length=length, remat="none", tokens=10**9, steps=None)
    return RunConfig(model=dataclasses.replace(MODEL, attention_kernel=kernel), mesh=mesh, train=train)


def test_an_unrolled_step_moves_nothing_around() -> None:
    """On one GPU: the state is updated in its place, and no array as large as a layer's smallest weight is only copied
    or turned. Rows of several documents, as the training loop has them."""
    text = compile_step(run(512, MeshConfig(data=1)), target_of("h200:1")).dump.program
    program = hlo.parse(text)
    entry = next(c for c in program.values() if c.entry)
    assert text.count(KERNEL) >= 2 * LAYERS
    weights = len(re.findall(r"alias\)", text.splitlines()[0]))
    assert weights >= 3 * 11  # parameters and two moments of each
    small = 2 * 512 * 256

    def only_moves(op: hlo.Op) -> bool:
        if op.code == "fusion":
            inner = program[hlo.called(op, "calls")[0]]
            return {o.code for o in inner.ops.values()} <= {"parameter", "copy", "transpose", "bitcast"}
        return op.code in ("copy", "transpose")

    moved = [op for op in entry.ops.values() if only_moves(op) and hlo.type_bytes(op.type) >= small]
    assert [f"{op.code} {op.type}" for op in moved] == []


def test_kernels_of_attention_count_on_several_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows and heads split. What kernels multiply is in no program's text, and attention is a third of this."""
    monkeypatch.setenv("LM_JAX_CACHE", str(tmp_path))
    found = preflight(run(4096, MeshConfig(data=2, tensor=2)), target_of("h200:4"))
    peak = costs.peak_flops("NVIDIA H200")
    assert found["fits"] and peak is not None
    attention = 3 * costs.attention_flops(MODEL, 4096) * 4 * 4096 / 4
    assert attention > 0.3 * found["flops_per_device"]
    assert found["step"]["compute_seconds"] > found["flops_per_device"] / peak
