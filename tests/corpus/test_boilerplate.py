"""Lines that many documents share are found by counting documents, whatever the buckets, and taken out of each."""

from __future__ import annotations

import collections

import numpy as np
import pytest

from lm_jax.corpus import boilerplate


def hashes_of(texts: list[str], shortest: int = 5) -> list[np.ndarray]:
    return [np.unique(boilerplate.line_hashes(text, shortest)[1]) for text in texts]


@pytest.mark.parametrize("bucket", [1, 7, 10**6])
def test_lines_are_frequent_by_the_documents_that_have_them(bucket: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    texts = ["\n".join(f"line number {n}" for n in rng.zipf(1.4, 12) % 50) for _ in range(60)]
    counts = collections.Counter(line for text in texts for line in set(text.split("\n")))
    parts = [np.sort(np.concatenate(hashes_of(texts[i : i + 13]))) for i in range(0, 60, 13)]
    monkeypatch.setattr(boilerplate, "BUCKET", bucket)
    numbers = np.repeat(np.arange(60, dtype=np.uint64), [len(h) for h in hashes_of(texts)])  # all are different texts
    of = []
    for i in range(0, 60, 13):
        order = np.argsort(np.concatenate(hashes_of(texts[i : i + 13])), kind="stable")
        of.append(numbers[: len(order)][order])
        numbers = numbers[len(order) :]
    found = boilerplate.frequent(parts, of, 6)
    wanted = sorted(int(boilerplate.line_hashes(line, 5)[1][0]) for line, n in counts.items() if n > 6)
    assert found.tolist() == wanted and 0 < len(wanted) < len(counts)


def test_the_largest_hash_is_counted() -> None:
    top = np.array([0, 2**64 - 1, 2**64 - 1], np.uint64)
    of = [np.array(texts, np.uint64) for texts in ((1, 1, 2), (3, 3, 4))]
    assert boilerplate.frequent([top, top], of, 2).tolist() == [2**64 - 1]
    assert boilerplate.frequent([], [], 2).tolist() == []


@pytest.mark.parametrize("bucket", [1, 10**6])
def test_copies_of_a_text_count_as_one(bucket: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boilerplate, "BUCKET", bucket)
    lines = [np.array([5, 2**63, 2**63], np.uint64), np.array([5, 2**63], np.uint64)]
    of = [np.array([1, 1, 2], np.uint64), np.array([1, 1], np.uint64)]
    assert boilerplate.frequent(lines, of, 1).tolist() == [2**63]


def test_frequent_lines_are_taken_out_and_others_stay_as_they_are() -> None:
    frequent = boilerplate.line_hashes("  a menu, a menu  ", 5)[1]
    text = "kept\n\ta menu, a menu\n\n  kept too\na menu, a menu"
    assert boilerplate.without(text, frequent, 5) == ("kept\n\n  kept too", 2)
    assert boilerplate.without("nothing of it", frequent, 5) == ("nothing of it", 0)
    assert boilerplate.without("a menu, a menu", frequent, 40) == ("a menu, a menu", 0)  # too short to count
