"""The TPU kernels go through the real compiler for every chip, forward and backward, without the chip."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding

from lm_jax.kernels.flash_attention import AttentionMask, LocalGlobal, Slopes, flash_attention
from lm_jax.sharding import partition
from tests.support.tpu import CHIPS, mesh_of_chips

HEADS = ("batch", "length", "heads", "head_dim")


def compiled(
    chip: str, options: str, dtype: Any, T: int, N: int, K: int, H: int, sizes: tuple[int, int, int, int] = (1, 1, 1, 1)
) -> Any:
    """Value and gradients of a call on a mesh of chips, of these sizes, as the compiler leaves them."""
    mesh = mesh_of_chips(CHIPS[chip], sizes)
    shapes = {"q": (2, T, N, H), "k": (2, T, K, H), "v": (2, T, K, H)}
    with jax.set_mesh(mesh):
        whole = NamedSharding(mesh, partition(*HEADS))
        arrays = {n: jax.ShapeDtypeStruct(s, dtype, sharding=whole) for n, s in shapes.items()}
        rows = NamedSharding(mesh, partition("batch", "length"))
        ids = jax.ShapeDtypeStruct((2, T), jnp.int32, sharding=rows)
        lengths = jax.ShapeDtypeStruct((2,), jnp.int32, sharding=NamedSharding(mesh, partition("batch")))

        def loss(a: dict[str, jax.Array], ids: jax.Array, lengths: jax.Array) -> jax.Array:
            more: dict[str, Any] = {}
            mask = AttentionMask()
            if options == "packed":
                mask = AttentionMask(q_segment_ids=ids, kv_segment_ids=ids)
            if options == "all":
                pattern = LocalGlobal(block=128, local=2)
                mask = AttentionMask(
                    window=300,
                    pattern=pattern,
                    prefix_length=lengths,
                    kv_length=lengths,
                    q_offset=lengths,
                    q_segment_ids=ids,
                    kv_segment_ids=ids,
                )
                more = {"soft_cap": 20.0, "position_bias": Slopes(jnp.ones(N)), "sinks_N": jnp.zeros(N)}
            out = flash_attention(a["q"], a["k"], a["v"], mask=mask, **more)
            return jnp.sum(jnp.square(out.astype(jnp.float32)))

        lowered = jax.jit(jax.grad(loss)).trace(arrays, ids, lengths).lower(lowering_platforms=("tpu",))
        return lowered.compile()


@pytest.mark.parametrize(
    ("chip", "options", "dtype", "T", "N", "K", "H"),
    [
        *[(chip, "packed", jnp.bfloat16, 2048, 2, 1, 128) for chip in CHIPS],
        ("v6e", "all", jnp.bfloat16, 1000, 4, 2, 64),
        ("v5e", "all", jnp.float32, 300, 2, 2, 80),
        *[
            pytest.param("v6e", "causal", dtype, 1100, 2, 1, H, marks=pytest.mark.slow)
            for dtype in (jnp.bfloat16, jnp.float16, jnp.float32)
            for H in (64, 80, 96, 128, 192, 256)
        ],
        *[
            pytest.param(chip, options, jnp.bfloat16, T, 2, 1, 128, marks=pytest.mark.slow)
            for chip in CHIPS
            for options in ("causal", "all")
            for T in (1, 100, 8192, 32768)
        ],
        *[
            pytest.param(chip, options, jnp.bfloat16, 8192, 4, 2, 256, marks=pytest.mark.slow)
            for chip in ("v5e", "v6e")
            for options in ("packed", "all")
        ],
    ],
)
def test_the_kernels_compile(chip: str, options: str, dtype: Any, T: int, N: int, K: int, H: int) -> None:
    check_program(compiled(chip, options, dtype, T, N, K, H), operands=2 * T * H * (2 * N + 2 * K) * 4)


def test_each_of_four_chips_computes_its_rows_and_heads() -> None:
    """Two of the rows' parts by two of the heads': the kernels see a quarter, and nothing is gathered."""
    T, N, K, H = 256, 8, 4, 128
    program = compiled("v6e", "packed", jnp.bfloat16, T, N, K, H, sizes=(2, 1, 1, 2))
    check_program(program, operands=T * H * (N + K) * 4)
    text = program.as_text()
    (forward,) = (line for line in text.splitlines() if "custom-call(" in line and "flash_attention_forward" in line)
    assert f"bf16[1,{N // 2},{T},{H}]" in forward.split("custom-call(")[0], forward[:300]
    assert "num_partitions=4" in text.splitlines()[0]
    assert not re.search(r"all-gather|all-to-all|collective-permute", text)


def check_program(program: Any, operands: int) -> None:
    """Both kernels are in it, and its memory is linear in length: nothing of T x T.

    Args:
      operands: bytes in float32 of a chip's queries, keys and values, each twice.
    """
    text = program.as_text()
    for kernel in ("flash_attention_forward", "flash_attention_backward"):
        assert kernel in text, f"{kernel} is not in the program"
    assert program.memory_analysis().temp_size_in_bytes < 4 * operands + 2**25
