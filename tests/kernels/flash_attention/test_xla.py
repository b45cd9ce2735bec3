"""What is special to attention in blocks for XLA: its blocks, what it keeps, its memory, what it does not compute."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm_jax.kernels.flash_attention import AttentionMask, reference, xla
from lm_jax.kernels.flash_attention.bias import DistanceTable
from lm_jax.kernels.flash_attention.implementation import Call, Implementation
from lm_jax.kernels.flash_attention.xla_tiles import from_band, to_band

H = 16


def call_of(
    T: int, S: int | None = None, N: int = 2, K: int = 2, mask: AttentionMask | None = None, H: int = H
) -> Call:
    q, k = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((1, T, N, H), (1, S or T, K, H)))
    return Call(q, k, k, mask or AttentionMask(), 0.25)


def spans(mask: AttentionMask, T: int, S: int) -> list[tuple[int, int, int, int]]:
    return [(p.queries.start, p.queries.stop, p.keys.start, p.keys.stop) for p in xla.pieces(mask, T, S)]


def test_a_block_of_a_short_call_meets_the_keys_that_it_may_see_and_no_others() -> None:
    assert spans(AttentionMask(), 300, 300) == [(0, 128, 0, 128), (128, 256, 0, 256), (256, 300, 0, 300)]
    assert spans(AttentionMask(window=100), 300, 300) == [(0, 128, 0, 128), (128, 256, 0, 256), (256, 300, 128, 300)]
    assert spans(AttentionMask(q_offset=100), 256, 400) == [(0, 128, 0, 256), (128, 256, 0, 384)]
    assert spans(AttentionMask(kv_length=100), 256, 400) == [(0, 256, 0, 128)]
    ids = jnp.zeros((1, 300), jnp.int32)
    assert spans(AttentionMask(q_segment_ids=ids, kv_segment_ids=ids), 300, 300) == spans(AttentionMask(), 300, 300)


def test_blocks_of_the_same_keys_are_one() -> None:
    assert spans(AttentionMask(causal=False), 300, 300) == [(0, 300, 0, 300)]
    assert spans(AttentionMask(q_offset=jnp.int32(0)), 300, 300) == [(0, 300, 0, 300)]
    assert spans(AttentionMask(prefix_length=jnp.int32(5)), 300, 300) == [(0, 300, 0, 300)]


def test_only_what_is_surely_open_is_not_masked() -> None:
    def are_open(mask: AttentionMask) -> list[bool]:
        return [piece.open for piece in xla.pieces(mask, 256, 256)]

    assert are_open(AttentionMask(causal=False)) == [True]
    assert are_open(AttentionMask(q_offset=128)) == [False, True]
    assert are_open(AttentionMask(causal=False, kv_length=jnp.int32(256))) == [False]
    ids = jnp.zeros((1, 256), jnp.int32)
    assert are_open(AttentionMask(causal=False, q_segment_ids=ids, kv_segment_ids=ids)) == [False]


def test_probabilities_are_kept_up_to_the_size_of_the_operands_and_their_gradients() -> None:
    open = AttentionMask(causal=False)
    for h in (16, 64):  # narrow heads keep what heads of 64 do
        just = xla.kept_probabilities(call_of(512, mask=open, H=h))
        assert just == 2 * 512 * 512 == 4 * (2 * 512 + 2 * 512) * 64
        assert xla.kept_probabilities(call_of(528, mask=open, H=h)) == 0
    assert xla.kept_probabilities(call_of(528, mask=open, H=80)) == 2 * 528 * 528
    decoding = AttentionMask(q_offset=jnp.zeros(1, jnp.int32), kv_length=jnp.ones(1, jnp.int32))
    assert xla.kept_probabilities(call_of(1, 100_000, N=8, mask=decoding)) == 8 * 100_000  # one block, however long
    assert xla.kept_probabilities(call_of(512, mask=open)._replace(soft_cap=2.0)) == 0  # twice as many
    assert xla.kept_probabilities(call_of(256, mask=open)._replace(soft_cap=2.0)) == 2 * 2 * 256 * 256


def test_decoding_is_one_block_for_a_row() -> None:
    mask = AttentionMask(q_offset=jnp.zeros(1, jnp.int32), kv_length=jnp.ones(1, jnp.int32))
    assert spans(mask, 1, 1000) == [(0, 1, 0, 1000)]


def rows_of(B: int, T: int, N: int) -> int:
    q = jax.ShapeDtypeStruct((B, T, N, H), jnp.float32)
    return xla.rows_together(Call(q, q, q, AttentionMask(causal=False), 0.25))


def test_rows_go_together_as_far_as_a_cache_holds_their_scores() -> None:
    assert rows_of(12, 64, 4) == 12
    assert rows_of(1000, 64, 4) == 125  # of the 128 that there is room for, what divides them
    assert rows_of(7, 512, 2) == 1
    assert rows_of(3, 4096, 2) == 1  # not even one


@pytest.mark.parametrize("room", [1, 2, 4])
def test_it_is_the_same_however_many_rows_go_together(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row has segments, a prefix and a length of its own."""
    B, T, N = 4, 160, 4
    rng = np.random.default_rng(0)
    q, g = (jnp.asarray(rng.standard_normal((B, T, N, H)), jnp.float32) for _ in range(2))
    k, v = (jnp.asarray(rng.standard_normal((B, T, 2, H)), jnp.float32) for _ in range(2))
    ids = jnp.asarray(np.sort(rng.integers(-1, 3, (B, T))), jnp.int32)
    per_row = {"prefix_length": jnp.array([0, 20, 3, 90]), "kv_length": jnp.array([160, 50, 120, 7])}
    mask = AttentionMask(q_segment_ids=ids, kv_segment_ids=ids, **per_row)
    table = jnp.asarray(rng.standard_normal((N, T)), jnp.float32)

    def both(implementation: Implementation) -> Any:
        def attend(q: Any, k: Any, v: Any, table: Any) -> Any:
            return implementation.attend(Call(q, k, v, mask, 0.25, position_bias=DistanceTable(table)))

        out, pull = jax.vjp(attend, q, k, v, table)
        return jax.tree.leaves((out, pull((g, jnp.zeros_like(out[1])))))

    call = Call(q, k, v, mask, 0.25)
    monkeypatch.setattr(xla, "_TOGETHER", room * xla.kept_probabilities(call))
    assert xla.rows_together(call) == room
    jax.clear_caches()  # the jits inside do not see what has been set
    for got, expected in zip(both(xla.IMPLEMENTATION), both(reference.IMPLEMENTATION), strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-4, rtol=1e-4)


def working_memory(T: int, mask: AttentionMask) -> int:
    """Bytes that the forward and the backward pass of a row need beside arguments and results."""

    def both(q: Any, k: Any, v: Any, g: Any) -> Any:
        out, pull = jax.vjp(lambda *a: xla.IMPLEMENTATION.attend(Call(*a, mask, 0.25))[0], q, k, v)
        return out, pull(g)

    a = jax.ShapeDtypeStruct((1, T, 2, H), jnp.float32)
    return jax.jit(both).lower(a, a, a, a).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("mask", [AttentionMask(), AttentionMask(causal=False), AttentionMask(window=300)])
def test_memory_is_linear_in_length(mask: AttentionMask) -> None:
    at = {T: working_memory(T, mask) for T in (4096, 8192, 16384)}
    assert at[16384] - at[8192] == pytest.approx(2 * (at[8192] - at[4096]), rel=0.1)
    assert at[16384] < 16 * 16384 * 2 * H * 4  # some operands' worth


@pytest.mark.parametrize("T", [32, 128, 512, 896, 960])
def test_memory_is_some_operands_worth_at_short_lengths_too(T: int) -> None:
    tile = 2 * 128 * min(T, 128) * 4 if T <= 128 else 2 * 256 * 512 * 4
    assert working_memory(T, AttentionMask()) < 16 * T * 2 * 64 * 4 + 6 * tile


def test_dead_tiles_are_not_computed() -> None:
    """Keys that no query of a block of queries may see hold NaN, which a product would carry into the result."""
    T = 2048
    poisoned = np.full((1, T, 1, H), np.nan, np.float32)
    poisoned[:, 1024:] = 1
    q = np.ones((1, T, 1, H), np.float32)
    ids = np.repeat([[0, 1]], T // 2, 1).astype(np.int32)
    mask = AttentionMask(q_segment_ids=jnp.asarray(ids), kv_segment_ids=jnp.asarray(ids))
    for some in (mask, AttentionMask(window=100)):
        out, _ = xla.IMPLEMENTATION.attend(Call(*map(jnp.asarray, (q, poisoned, poisoned)), some, 0.25))
        assert np.isnan(out[0, :1000]).all() and np.allclose(out[0, 1536:], 1)


def test_open_tiles_are_not_masked() -> None:
    """Of a causal mask's tiles the loops mask those on the diagonal: the counts of the schedule."""
    a = jnp.ones((1, 2048, 2, H))
    blocks = xla._blocks(Call(a, a, a, AttentionMask(), 0.25))
    Q, P = blocks.sizes
    partial, whole = np.asarray(blocks.counts_BI2[0]).T
    rows = np.arange(2048 // Q)
    np.testing.assert_array_equal(whole, rows * Q // P)
    np.testing.assert_array_equal(partial, -(-((rows + 1) * Q) // P) - rows * Q // P)


@pytest.mark.parametrize(("Q", "P"), [(1, 1), (1, 7), (5, 1), (4, 9), (16, 16)])
def test_a_band_is_laid_out_along_diagonals_and_summed_back(Q: int, P: int) -> None:
    band, tile = np.random.default_rng(0).standard_normal((3, Q + P - 1)), np.arange(3 * Q * P).reshape(3, Q, P)
    got, sums = from_band(jnp.asarray(band), Q, P), to_band(jnp.asarray(tile))
    index = Q - 1 - np.arange(Q)[:, None] + np.arange(P)
    np.testing.assert_array_equal(got, band[:, index].astype(got.dtype))
    np.testing.assert_array_equal(sums, [[row[index == d].sum() for d in range(Q + P - 1)] for row in tile])
