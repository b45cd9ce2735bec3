"""Rows against a slow reference, and every pair in exactly one row an epoch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm_jax.data.bins import best_fit, first_fit
from lm_jax.data.packing import Plan, read_rows
from lm_jax.errors import UserError
from tests.support.rows import row

STRIDE = 1000  # token i of document d is d * STRIDE + i: a token says where it stands


class Numbered:
    """Documents whose tokens say which they are."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = lengths

    def read(self, documents: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
        parts = []
        for document, start, stop in zip(documents.tolist(), starts.tolist(), stops.tolist(), strict=True):
            assert 0 <= start < stop <= self.lengths[document]
            parts.append(np.arange(start, stop, dtype=np.int32) + document * STRIDE)
        return np.concatenate(parts)


def make(lengths: Sequence[int], length: int, seed: int | None = 0, **packed: Any) -> Plan:
    return Plan(np.arange(len(lengths)), np.array(lengths), length=length, seed=seed, **packed)


lengths_of_documents = st.lists(st.integers(1, 40), min_size=1, max_size=12).filter(lambda xs: max(xs) > 1)
seeds = st.one_of(st.none(), st.integers(0, 2**31))


def slow_rows(plan: Plan, lengths: Sequence[int], number: int) -> list[list[tuple[int, int]]]:
    """An epoch's rows as lists of (document, index of the input), written down pair by pair."""
    epoch = plan._epoch(number)
    alive = [d for d, n in enumerate(lengths) if n > 1]
    ring = [(alive[which], i) for which in epoch.order for i in range(lengths[alive[which]] - 1)]
    turned = ring[epoch.offset :] + ring[: epoch.offset]
    cut = [turned[i : i + plan.length] for i in range(0, len(turned), plan.length)]
    return [cut[i] for i in epoch.rows]


@settings(deadline=None, max_examples=150)
@given(lengths_of_documents, st.integers(1, 50), seeds, st.integers(0, 3))
def test_rows_equal_a_slow_reference(lengths: list[int], length: int, seed: int | None, number: int) -> None:
    plan, store = make(lengths, length, seed), Numbered(lengths)
    expected = slow_rows(plan, lengths, number)
    assert len(expected) == plan.rows_per_epoch
    batch = read_rows(plan, store, range(number * len(expected), (number + 1) * len(expected)))
    for b, pairs in enumerate(expected):
        segment, position = -1, 0
        for t, (document, i) in enumerate(pairs):
            goes_on = t > 0 and pairs[t - 1] == (document, i - 1)
            segment, position = (segment, position + 1) if goes_on else (segment + 1, 0)
            assert batch["tokens"][b, t] == document * STRIDE + i
            assert batch["targets"][b, t] == document * STRIDE + i + 1
            assert (batch["segment_ids"][b, t], batch["positions"][b, t]) == (segment, position)
        n = len(pairs)
        assert batch["loss_mask"][b].tolist() == [True] * n + [False] * (length - n)
        assert (batch["segment_ids"][b, n:] == -1).all()
        assert not any(batch[name][b, n:].any() for name in ("tokens", "targets", "positions"))


@settings(deadline=None, max_examples=100)
@given(lengths_of_documents, st.integers(1, 50), seeds)
def test_every_pair_once_an_epoch_with_padding_in_one_row_at_most(
    lengths: list[int], length: int, seed: int | None
) -> None:
    plan, store = make(lengths, length, seed), Numbered(lengths)
    everything = sorted(d * STRIDE + i for d, n in enumerate(lengths) for i in range(n - 1))
    for number in range(3):
        rows = range(number * plan.rows_per_epoch, (number + 1) * plan.rows_per_epoch)
        batch = read_rows(plan, store, rows)
        mask = batch["loss_mask"]
        assert sorted(batch["tokens"][mask].tolist()) == everything
        assert (batch["targets"][mask] == batch["tokens"][mask] + 1).all()
        assert (~mask.all(axis=1)).sum() <= 1
    assert plan.rows_per_epoch == -(-len(everything) // length)


@settings(deadline=None, max_examples=50)
@given(lengths_of_documents, st.integers(1, 20), st.integers(0, 99), st.integers(0, 60), st.integers(1, 9))
def test_a_row_depends_on_the_plan_and_its_number_alone(
    lengths: list[int], length: int, seed: int, first: int, batch_size: int
) -> None:
    """Resuming anywhere, in batches of any size and in any order, gives the rows that reading from the start gives."""
    store = Numbered(lengths)
    whole = read_rows(make(lengths, length, seed), store, range(first + 2 * batch_size))
    fresh = make(lengths, length, seed)
    later = read_rows(fresh, store, range(first + batch_size, first + 2 * batch_size))
    sooner = read_rows(fresh, store, range(first, first + batch_size))
    for name, values in whole.items():
        np.testing.assert_array_equal(values[first : first + batch_size], sooner[name])
        np.testing.assert_array_equal(values[first + batch_size :], later[name])


def test_epochs_and_seeds_differ_and_a_single_document_is_cut_elsewhere() -> None:
    lengths, length = [900], 64
    plan, store = make(lengths, length), Numbered(lengths)
    epochs = [[e * plan.rows_per_epoch + r for r in range(4)] for e in range(4)]
    starts = [set(read_rows(plan, store, rows)["tokens"][:, 0].tolist()) for rows in epochs]
    assert len(set(map(frozenset, starts))) == 4
    assert len({plan._epoch(e).offset for e in range(20)}) > 10
    many = make([30] * 200, length)
    assert row(many, 0) != row(make([30] * 200, length, seed=1), 0)
    assert many._epoch(0).order.tolist() != many._epoch(1).order.tolist() != list(range(200))


def test_the_order_is_written_down() -> None:
    """Fixed by arithmetic of our own: the same on every machine and version."""
    plan = make([5, 9, 2, 7], 4, seed=3)
    assert [row(plan, n) for n in range(5)] == [
        [(1, 6, 8), (3, 0, 1)],
        [(3, 5, 6), (0, 0, 3)],
        [(3, 1, 5)],
        [(0, 3, 4), (2, 0, 1), (1, 0, 2)],
        [(1, 2, 6)],
    ]
    assert plan.fingerprint == make([5, 9, 2, 7], 4, seed=3).fingerprint


def test_evaluation_is_in_order_and_ends_in_padding() -> None:
    plan, store = make([6, 4], 3, seed=None), Numbered([6, 4])
    batch = read_rows(plan, store, [0, 1, 2, None])
    assert batch["tokens"][:3].tolist() == [[0, 1, 2], [3, 4, 1000], [1001, 1002, 0]]
    assert batch["loss_mask"].sum(axis=1).tolist() == [3, 3, 2, 0]
    assert batch["segment_ids"].tolist() == [[0, 0, 0], [0, 0, 1], [0, 0, -1], [-1, -1, -1]]


def test_fingerprints_tell_plans_apart() -> None:
    documents, tokens = np.arange(3), np.array([4, 5, 6])
    plans = [
        Plan(documents, tokens, length=4, seed=0),
        Plan(documents, tokens, length=5, seed=0),
        Plan(documents, tokens, length=4, seed=1),
        Plan(documents, tokens, length=4, seed=None),
        Plan(documents, tokens, length=4, seed=0, content="other"),
        Plan(documents + 1, tokens, length=4, seed=0),
        Plan(documents, tokens, length=4, seed=0, packing="best_fit"),
        Plan(documents, tokens, length=4, seed=0, packing="first_fit"),
        Plan(documents, tokens, length=4, seed=0, packing="best_fit", truncate=True),
        Plan(documents, tokens[::-1], length=4, seed=0),
    ]
    assert len({p.fingerprint for p in plans}) == len(plans)


@pytest.mark.parametrize("lengths", [[], [1], [1, 1]])
def test_nothing_to_predict_is_refused(lengths: list[int]) -> None:
    with pytest.raises(UserError, match="two tokens"):
        make(lengths, 8)


def test_a_plan_of_many_documents() -> None:
    """Lengths up to a corpus's: no loop over documents, no overflow."""
    lengths = np.random.default_rng(0).integers(2, 50_000, 300_000)
    plan = Plan(np.arange(300_000), lengths, length=2048, seed=0)
    assert plan.pairs == int((lengths - 1).sum()) > 2**32
    assert sum(p.stop - p.start for n in range(50) for p in row(plan, n)) == 50 * 2048


# ------------------------------------------------------------------------------------------------- best fit, first fit


@settings(deadline=None, max_examples=150)
@given(lengths_of_documents, st.integers(1, 50), seeds, st.sampled_from(["best_fit", "first_fit"]))
def test_fitted_rows_have_every_pair_once_and_cut_no_document_that_fits(
    lengths: list[int], length: int, seed: int | None, packing: str
) -> None:
    plan, store = make(lengths, length, seed, packing=packing), Numbered(lengths)
    everything = sorted(d * STRIDE + i for d, n in enumerate(lengths) for i in range(n - 1))
    for number in range(3):
        rows = range(number * plan.rows_per_epoch, (number + 1) * plan.rows_per_epoch)
        batch = read_rows(plan, store, rows)
        mask = batch["loss_mask"]
        assert sorted(batch["tokens"][mask].tolist()) == everything
        assert (batch["targets"][mask] == batch["tokens"][mask] + 1).all()
        pieces = [piece for n in rows for piece in row(plan, n)]
        for d, n in enumerate(lengths):
            sizes = [p.stop - p.start for p in pieces if p.document == d]
            full, rest = divmod(n - 1, length)
            assert sorted(sizes) == sorted([length] * full + [rest] * (rest > 0))


@settings(deadline=None, max_examples=100)
@given(lengths_of_documents, st.integers(1, 50), seeds, st.sampled_from(["best_fit", "first_fit"]))
def test_truncated_documents_are_one_piece_and_what_is_left_out_is_counted(
    lengths: list[int], length: int, seed: int | None, packing: str
) -> None:
    plan = make(lengths, length, seed, packing=packing, truncate=True)
    pieces = sorted(piece for n in range(plan.rows_per_epoch) for piece in row(plan, n))
    assert pieces == [(d, 0, min(n - 1, length)) for d, n in enumerate(lengths) if n > 1]
    assert plan.left_out == sum(max(0, n - 1 - length) for n in lengths)
    assert plan.pairs + plan.left_out == sum(n - 1 for n in lengths if n > 1)


def plain_fit(sizes: list[int], capacity: int, best: bool) -> list[int]:
    """Bin by bin, as the textbook has it."""
    room: list[int] = []
    found = []
    for size in sizes:
        fitting = [(room[b], b) if best else (b, b) for b in range(len(room)) if room[b] >= size]
        at = min(fitting)[1] if fitting else len(room)
        if at == len(room):
            room.append(capacity)
        room[at] -= size
        found.append(at)
    return found


@settings(deadline=None, max_examples=150)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=60), st.integers(30, 64))
def test_bins_are_the_textbook_s(sizes: list[int], capacity: int) -> None:
    sizes = sorted(sizes, reverse=True)
    assert first_fit(np.array(sizes), capacity).tolist() == plain_fit(sizes, capacity, best=False)
    found, plain = best_fit(np.array(sizes), capacity), plain_fit(sizes, capacity, best=True)
    # Of bins with the same room either will do: the rooms that each step leaves are the same.
    assert sorted(np.bincount(found, sizes).tolist()) == sorted(np.bincount(plain, sizes).tolist())


def test_long_documents_are_cut_elsewhere_in_another_epoch() -> None:
    plan = make([1000], length=64, packing="best_fit")
    cuts = {tuple(sorted(p.start for n in range(16 * e, 16 * e + 16) for p in row(plan, n))) for e in range(20)}
    assert plan.rows_per_epoch == 16 and len(cuts) > 8


def test_a_large_corpus_fills_its_rows() -> None:
    """Log-normal lengths of median 400, as web text has them."""
    rng = np.random.default_rng(0)
    lengths = np.maximum(2, np.exp(rng.normal(np.log(400), 1, 100_000)).astype(int))
    for packing in ("best_fit", "first_fit"):
        plan = Plan(np.arange(len(lengths)), lengths, length=2048, seed=0, packing=packing)
        assert plan.pairs / (plan.rows_per_epoch * 2048) > 0.99
        assert sum(p.stop - p.start for p in row(plan, 5)) <= 2048
