"""Planted duplicates are found, against brute force; clusters are those of a plain graph."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from lm_jax.corpus import duplicates, minhash
from lm_jax.corpus import words as W
from lm_jax.corpus.duplicates import EXACT, KEPT, NEAR
from tests.corpus.texts import edited, prose

THRESHOLD = 0.8


def signed(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    digests = b"".join(hashlib.blake2b(t.encode(), digest_size=16).digest() for t in texts)
    sets = [minhash.shingles(W.normalised(t).hashes, 5) for t in texts]
    signatures = minhash.signatures(sets)
    return np.frombuffer(digests, "<u8").reshape(-1, 2), minhash.bands(signatures, THRESHOLD), signatures


def find(parts: Sequence[Sequence[str]], **options: Any) -> duplicates.Clusters:
    digests, bands, signatures = zip(*map(signed, parts), strict=True)
    settings: dict[str, Any] = {"exact": True, "near": True, "threshold": THRESHOLD, **options}
    return duplicates.find(digests, bands, signatures, **settings)


def similarity(a: str, b: str) -> float:
    x, y = (set(minhash.shingles(W.normalised(t).hashes, 5).tolist()) for t in (a, b))
    return len(x & y) / len(x | y)


def test_planted_near_duplicates_at_the_threshold_are_found() -> None:
    """Recall at the threshold is 0.95 or better, precision is what the margin gives up; both against exact sets."""
    pairs = []
    for seed in range(420):
        text = prose(seed, 24)
        pairs.append((text, edited(text, 2 + seed % 24, seed)))
    truth = np.array([similarity(a, b) for a, b in pairs])
    found = find([[a for a, _ in pairs], [b for _, b in pairs]])
    hit = found.status[len(pairs) :] == NEAR
    assert (found.status[: len(pairs)] == KEPT).all()  # the first of each stays, and no two texts were mixed up
    at = (truth >= THRESHOLD) & (truth < THRESHOLD + 0.04)
    assert at.sum() >= 30 and hit[at].mean() >= 0.95
    assert hit[truth >= THRESHOLD].mean() >= 0.97
    # What is removed by mistake is nearly at the threshold: two standard deviations below it or less, as a rule.
    assert (truth[hit] >= 0.6).all() and hit[(truth > 0.6) & (truth < 0.7)].mean() < 0.35
    assert not hit[truth < 0.6].any() and (truth < 0.6).sum() > 20


def test_texts_of_the_same_words_are_no_duplicates() -> None:
    assert (find([[prose(seed) for seed in range(300)]]).status == KEPT).all()


def test_exact_duplicates_are_told_from_near_ones_and_the_first_is_kept() -> None:
    a, b = prose(1, 40), prose(2, 40)
    parts = [[a, b], [edited(a, 1, 3), b, a], [a]]
    found = find(parts)
    assert found.status.tolist() == [KEPT, KEPT, NEAR, EXACT, EXACT, EXACT]
    assert found.first.tolist() == [0, 1, 0, 1, 0, 0]
    assert find(parts, near=False).status.tolist() == [KEPT, KEPT, KEPT, EXACT, EXACT, EXACT]
    only_near = find(parts, exact=False)
    assert only_near.status.tolist() == [KEPT, KEPT, NEAR, NEAR, NEAR, NEAR]


def test_parts_and_buckets_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [edited(prose(seed % 40, 40), seed // 40, seed) for seed in range(160)]
    random.Random(0).shuffle(texts)
    texts += texts[:30]
    once = find([texts])
    monkeypatch.setattr(duplicates, "BUCKET", 16)
    monkeypatch.setattr(duplicates, "PAIRS", 5)
    again = find([texts[:7], [], texts[7:100], texts[100:]])
    assert (once.status == again.status).all() and (once.first == again.first).all()
    assert (once.status == EXACT).sum() == 30 and (once.status == NEAR).sum() > 60


def test_a_large_cluster_is_one_cluster() -> None:
    text = prose(5, 80)
    texts = [edited(text, 1, seed) for seed in range(150)]
    found = find([texts])
    assert (found.first == 0).all() and (found.status[1:] == NEAR).all()


def test_texts_without_words_are_like_no_other() -> None:
    digest = [np.frombuffer(bytes([i]) * 16, "<u8") for i in range(3)]
    signatures = minhash.signatures([d.astype(np.uint64) for d in digest])
    found = duplicates.find(
        [np.stack(digest)], [minhash.bands(signatures, 0.8)], [signatures], exact=True, near=True, threshold=0.8
    )
    assert (found.status == KEPT).all()


def test_sets_are_the_connected_components_of_a_plain_graph() -> None:
    rng = np.random.default_rng(1)
    forest = duplicates.Forest(400)
    links: dict[int, set[int]] = {i: {i} for i in range(400)}
    for _ in range(12):
        a, b = rng.integers(0, 400, (2, 20))
        forest.join(a, b)
        for x, y in zip(a.tolist(), b.tolist(), strict=True):
            merged = links[x] | links[y]
            for member in merged:
                links[member] = merged
    roots = forest.roots(np.arange(400))
    assert roots.tolist() == [min(links[i]) for i in range(400)]


def test_nothing_at_all() -> None:
    assert len(find([[]]).status) == 0
