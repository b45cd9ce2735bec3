"""The block schedule against the mask itself, element by element."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm_jax.kernels.flash_attention.mask import AttentionMask, LocalGlobal, Strided
from lm_jax.kernels.flash_attention.schedule import (
    DEAD,
    OPEN,
    PARTIAL,
    is_static,
    live_tiles,
    tile_kinds,
)
from tests.kernels.flash_attention.cases import MASKS, Shape

B = 2


def kinds_by_elements(mask: AttentionMask, T: int, S: int, q: int, kv: int) -> np.ndarray:
    see = np.asarray(mask.allowed(T, S))
    kinds = np.zeros((len(see), -(-T // q), -(-S // kv)), np.int32)
    for b, i, j in np.ndindex(kinds.shape):
        tile = see[b, i * q : (i + 1) * q, j * kv : (j + 1) * kv]
        kinds[b, i, j] = OPEN if tile.all() else PARTIAL if tile.any() else DEAD
    return kinds


@pytest.mark.parametrize("name", ["causal", "full", "window", "window both ways", "offset", "fewer keys", "strided"])
def test_static_masks_are_known_exactly(name: str) -> None:
    shape = Shape()
    mask = MASKS[name](shape)
    for blocks in ((32, 64), (128, 128), (100, 7)):
        got = tile_kinds(mask, shape.T, shape.S, *blocks)
        assert isinstance(got, np.ndarray), "known without tracing"
        np.testing.assert_array_equal(got, kinds_by_elements(mask, shape.T, shape.S, *blocks))


@pytest.mark.parametrize(
    "name", ["segments", "segments both ways", "all padding", "offsets a row", "keys a row", "prefix"]
)
def test_traced_masks_are_known_exactly_where_ids_rise(name: str) -> None:
    shape = Shape()
    mask = MASKS[name](shape)
    got = jax.jit(lambda m: tile_kinds(m, shape.T, shape.S, 32, 64))(mask)
    want = kinds_by_elements(mask, shape.T, shape.S, 32, 64)
    wrong = np.broadcast_to(got, want.shape) != want
    # A tile may be taken for partly open where every pair is shut by one rule or another, and no rule shuts all.
    assert (np.broadcast_to(got, want.shape)[wrong] == PARTIAL).all() and wrong.mean() < 0.05


numbers = st.one_of(st.integers(0, 60), st.lists(st.integers(0, 60), min_size=B, max_size=B))


@st.composite
def masks(draw: Any, T: int, S: int) -> AttentionMask:
    def number() -> Any:
        n = draw(numbers)
        return n if isinstance(n, int) else jnp.asarray(n)

    def ids(L: int) -> Any:
        return jnp.asarray(draw(st.lists(st.lists(st.integers(-1, 3), min_size=L, max_size=L), min_size=B, max_size=B)))

    small = st.integers(1, 9)
    pattern = draw(
        st.sampled_from(
            [
                None,
                Strided(block=draw(small), local=draw(small), stride=draw(small)),
                LocalGlobal(block=draw(small), local=draw(small), global_blocks=draw(small)),
            ]
        )
    )
    segments = {"q_segment_ids": ids(T), "kv_segment_ids": ids(S)} if draw(st.booleans()) else {}
    return AttentionMask(
        causal=draw(st.booleans()),
        window=draw(st.one_of(st.none(), st.integers(1, 60))),
        prefix_length=number() if draw(st.booleans()) else None,
        kv_length=number() if draw(st.booleans()) else None,
        q_offset=number(),
        pattern=pattern,
        **segments,
    )


# Few shapes, because every one is compiled.
@settings(max_examples=100, deadline=None)
@given(st.data(), st.sampled_from([(40, 40, 8, 8), (1, 33, 4, 16), (37, 21, 16, 5)]))
def test_dead_and_open_are_never_wrong(data: Any, sizes: tuple[int, int, int, int]) -> None:
    T, S, q, kv = sizes
    mask = data.draw(masks(T, S))
    got, want = np.asarray(tile_kinds(mask, T, S, q, kv)), kinds_by_elements(mask, T, S, q, kv)
    got, want = np.broadcast_arrays(got, want)
    assert ((got == want) | (got == PARTIAL)).all()


def test_live_tiles_are_listed_partly_open_ones_first() -> None:
    kinds = np.array([[[OPEN, DEAD, PARTIAL, OPEN], [DEAD, DEAD, DEAD, PARTIAL]]], np.int32)
    for given_kinds in (kinds, jnp.asarray(kinds)):
        counts, tiles = live_tiles(given_kinds)
        np.testing.assert_array_equal(counts, [[[1, 2], [1, 0]]])
        np.testing.assert_array_equal(tiles[0, 0, :3], [2, 0, 3])
        np.testing.assert_array_equal(tiles[0, 1, :1], [3])


def test_a_causal_mask_computes_its_triangle_of_tiles() -> None:
    def live(mask: AttentionMask) -> int:
        return int((tile_kinds(mask, 8192, 8192, 512, 512) != DEAD).sum())

    assert live(AttentionMask()) == 16 * 17 / 2
    assert live(AttentionMask(window=512)) == 16 + 15


def test_is_static() -> None:
    assert is_static(AttentionMask(window=3, q_offset=4, pattern=Strided()))
    assert not is_static(AttentionMask(q_offset=jnp.int32(4)))
