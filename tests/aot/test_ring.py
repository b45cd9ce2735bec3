"""Ring attention through the TPU kernels goes through the real compiler for a mesh of TPUs, without the chips."""

from __future__ import annotations

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding

from lm_jax.kernels.flash_attention import AttentionMask, flash_attention
from lm_jax.sharding import partition
from tests.support.tpu import mesh_of_chips

N, K, H = 8, 2, 128
TOPOLOGIES = {4: "v5e:2x2", 16: "v5e:4x4"}


@functools.cache
def compiled(devices: int, T: int) -> Any:
    """Value and gradients of one row of length T on so many chips that share it."""
    mesh = mesh_of_chips(TOPOLOGIES[devices], (1, 1, devices, 1))
    with jax.set_mesh(mesh):

        def shape(heads: int, name: str) -> jax.ShapeDtypeStruct:
            layout = NamedSharding(mesh, partition("batch", "length", name, "head_dim"))
            return jax.ShapeDtypeStruct((1, T, heads, H), jnp.bfloat16, sharding=layout)

        def f(q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array) -> Any:
            def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
                return flash_attention(q, k, v, mask=AttentionMask(), implementation="pallas_tpu", context="ring")

            out, back = jax.vjp(attend, q, k, v)
            return out, back(g)

        q, k = shape(N, "heads"), shape(K, "kv_heads")
        return jax.jit(f).trace(q, k, k, q).lower(lowering_platforms=("tpu",)).compile()


# Measured: 151.9 MiB of temporaries on 16 chips and on 4.
@pytest.mark.slow  # minutes
def test_temporaries_do_not_grow_with_the_ring() -> None:
    few, many = compiled(4, 32768), compiled(16, 131072)
    sizes = [program.memory_analysis().temp_size_in_bytes for program in (few, many)]
    assert 0.97 < sizes[1] / sizes[0] < 1.03, sizes
    text = many.as_text()
    for kernel in ("flash_attention_forward", "flash_attention_backward"):
        assert kernel in text, f"{kernel} is not in the program"
    assert not re.search(r" all-(gather|to-all)", text)


@pytest.mark.slow
def test_keys_travel_while_the_kernels_compute() -> None:
    """In the scheduled program, kernels (or the loop over them) stand between a permute's start and its end."""
    text = compiled(16, 131072).as_text()
    assert "is_scheduled=true" in text
    hidden, kernels = 0, 0
    for line in text.splitlines():
        if " collective-permute-start(" in line:
            kernels = 0
        elif re.search(r"custom-call.*flash_attention_|\bwhile\(", line):
            kernels += 1
        elif " collective-permute-done(" in line:
            hidden += kernels > 0
    # Keys and values on the first step and in the loop forward; the same and their gradients in the loop backward.
    assert hidden >= 8, hidden
