"""The lists of work of the TPU kernels against a plain loop over the mask's elements."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm_jax.kernels.flash_attention.mask import AttentionMask
from lm_jax.kernels.flash_attention.pallas_tpu_mask import pack
from lm_jax.kernels.flash_attention.pallas_tpu_work import two_lists

Pair = tuple[int, int]
CUTS: dict[str, tuple[int, int, Pair, Pair, Pair, int]] = {  # T, S, chunks, parts, chunks in a block, steps
    "squares": (64, 64, (16, 16), (8, 8), (2, 4), 4),
    "ragged": (75, 75, (16, 16), (8, 8), (3, 2), 2),
    "a part short": (40, 37, (32, 32), (8, 16), (2, 1), 1),  # keys end before the last part of their chunk
    "no parts": (64, 96, (16, 8), (16, 8), (4, 3), 3),
}
STATIC = {
    "causal": AttentionMask(),
    "full": AttentionMask(causal=False),
    "window": AttentionMask(window=20),
    "offset": AttentionMask(q_offset=11),
    "fewer keys": AttentionMask(causal=False, kv_length=29),
    "prefix": AttentionMask(prefix_length=21),
}


def by_elements(mask: AttentionMask, cut: str) -> dict[tuple[int, int, int], tuple[list[int], list[int]]]:
    """The parts and the chunks of each block."""
    T, S, chunk, part, per, steps = CUTS[cut]
    sees = np.asarray(mask.allowed(T, S))
    columns = S + -S % chunk[1]
    sees = np.pad(sees, ((0, 0), (0, 0), (0, columns - S)))
    block = chunk[0] * per[0], chunk[1] * per[1]
    lists = {}
    for b in range(len(sees)):
        for x in range(-(-T // block[0])):
            for y in range(-(-columns // block[1])):
                see = sees[b, x * block[0] : (x + 1) * block[0], y * block[1] : (y + 1) * block[1]].copy()
                whole = []
                for i in range(per[0]):
                    for j in range(per[1]):
                        tile = see[i * chunk[0] : (i + 1) * chunk[0], j * chunk[1] : (j + 1) * chunk[1]]
                        if tile.size and tile.all():
                            whole.append((i, j))
                whole = whole[: len(whole) // steps * steps]
                for i, j in whole:
                    see[i * chunk[0] : (i + 1) * chunk[0], j * chunk[1] : (j + 1) * chunk[1]] = False
                parts = []
                for i in range(block[0] // part[0]):
                    for j in range(block[1] // part[1]):
                        if see[i * part[0] : (i + 1) * part[0], j * part[1] : (j + 1) * part[1]].any():
                            parts.append(pack(i, j))
                lists[b, x, y] = parts, [pack(i, j) for i, j in whole]
    return lists


def check(work: Any, mask: AttentionMask, cut: str) -> None:
    _, _, chunk, part, per, _ = CUTS[cut]
    work = np.asarray(work)
    want = by_elements(mask, cut)
    parts_in_block = per[0] * per[1] * (chunk[0] // part[0]) * (chunk[1] // part[1])
    assert work.dtype == np.int32 and work.shape[3:] == (1, 2 + parts_in_block + per[0] * per[1])
    assert set(want) == set(np.ndindex(work.shape[:3]))
    for at, (parts, chunks) in want.items():
        counts, listed = work[at][0, :2], work[at][0, 2:]
        assert list(counts) == [len(parts), len(chunks)]
        assert list(listed[: len(parts)]) == parts
        assert list(listed[parts_in_block:][: len(chunks)]) == chunks


@pytest.mark.parametrize("cut", list(CUTS))
@pytest.mark.parametrize("name", list(STATIC))
def test_static_masks(name: str, cut: str) -> None:
    work = two_lists(STATIC[name], *CUTS[cut])
    assert isinstance(work, np.ndarray), "known without tracing"
    check(work, STATIC[name], cut)


@pytest.mark.parametrize("cut", list(CUTS))
@pytest.mark.parametrize("name", ["offset", "prefix", "fewer keys"])
def test_traced_numbers_give_the_same_lists(name: str, cut: str) -> None:
    static = STATIC[name]
    numbers = ("q_offset", "prefix_length", "kv_length")
    traced = {n: jnp.asarray(v) for n in numbers if isinstance(v := getattr(static, n), int)}
    got = jax.jit(lambda m: two_lists(m, *CUTS[cut]))(dataclasses.replace(static, **traced))
    np.testing.assert_array_equal(got, two_lists(static, *CUTS[cut]))


@pytest.mark.parametrize("cut", list(CUTS))
def test_segments(cut: str) -> None:
    T, S = CUTS[cut][:2]
    mask = AttentionMask(
        causal=False,
        q_segment_ids=jnp.stack([jnp.arange(T) * 3 // T, jnp.where(jnp.arange(T) < 20, 0, -1)]),
        kv_segment_ids=jnp.stack([jnp.arange(S) * 3 // S, jnp.where(jnp.arange(S) < 30, 0, -1)]),
    )
    check(jax.jit(lambda m: two_lists(m, *CUTS[cut]))(mask), mask, cut)


def test_the_device_computes_what_numpy_does_on_large_blocks() -> None:
    """Counts beyond what bfloat16 holds."""
    cut = 8192, 8192, (512, 512), (256, 256), (16, 16), 8
    got = jax.jit(lambda m: two_lists(m, *cut))(AttentionMask(q_offset=jnp.int32(0)))
    np.testing.assert_array_equal(got, two_lists(AttentionMask(), *cut))
