"""The Hopper kernels go through the real assembler for sm_90a, forward and backward, without a GPU."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys

import pytest

from lm_jax.kernels.flash_attention.block_sizes import GPU_TABLE

pytestmark = pytest.mark.skipif(
    not any(map(importlib.util.find_spec, ("jax_cuda12_plugin", "jax_cuda13_plugin"))),
    reason="compiling for GPUs needs jax's CUDA plugin",
)
MASKS = ("causal", "plain", "window", "packed")
# Pallas names a kernel with an operand that changes (the fused backward pass) after a function of its own.
KERNELS = {
    "IMPLEMENTATION": {"flash_attention_forward", "new_body"},
    "DETERMINISTIC": {f"flash_attention_{name}" for name in ("forward", "backward_keys", "backward_queries")},
}
# In a process of its own, because the assembler reports on standard error and only where this is set before it starts.
PROGRAM = """
import sys
import jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from lm_jax.kernels.flash_attention import AttentionMask, pallas_gpu
from lm_jax.kernels.flash_attention.implementation import Call

target, name, kind, H, T = *sys.argv[1:4], int(sys.argv[4]), 1000
chip = topologies.get_topology_desc(platform="cuda", topology="1x1x1", target_config=target).devices[0]
shapes = [((2, T, n, H), jnp.bfloat16) for n in (4, 2, 2)] + [((2, T), jnp.int32)]
arrays = [jax.ShapeDtypeStruct(s, d, sharding=SingleDeviceSharding(chip)) for s, d in shapes]

def loss(q, k, v, ids):
    masks = {
        "causal": AttentionMask(),
        "plain": AttentionMask(causal=False),
        "window": AttentionMask(window=300),
        "packed": AttentionMask(q_segment_ids=ids, kv_segment_ids=ids),
    }
    out, lse = getattr(pallas_gpu, name).attend(Call(q, k, v, masks[kind], H**-0.5))
    return jnp.sum(out.astype(jnp.float32)) + jnp.sum(jnp.where(lse > 0, lse, 0))

step = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(*arrays).lower(lowering_platforms=("cuda",))
step.compile(compiler_options={"xla_gpu_autotune_level": 0})
print("compiled")
"""


def report(name: str, kind: str, H: int) -> str:
    """What the assembler says of a value and its gradients."""
    from lm_jax.preflight.chips import target_of
    from lm_jax.preflight.compiling import _gpu

    environment = os.environ | {"MOSAIC_GPU_DUMP_PTXAS": "1", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", PROGRAM, _gpu(target_of("h200:1")), name, kind, str(H)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert "compiled" in done.stdout, done.stderr[-2000:]
    return done.stdout + done.stderr


def spills(text: str) -> dict[str, int]:
    """Bytes that each kernel keeps in local memory for want of registers, by the assembler's report."""
    found = re.findall(r"Function properties for (\w+?)_mosaic_gpu_kernel\s+(\d+) bytes stack frame, (\d+) bytes", text)
    return {name: int(frame) + int(stored) for name, frame, stored in found}


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("H", sorted({r.head_dim for r in GPU_TABLE}))
def test_no_register_is_spilled(name: str, kind: str, H: int) -> None:
    said = report(name, kind, H)
    assert spills(said) == dict.fromkeys(KERNELS[name], 0)
    assert "sm_90a" in said
    assert "wgmma" not in said.lower(), "the assembler warns that it waits after every product"
