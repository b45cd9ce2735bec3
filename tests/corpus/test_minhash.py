"""Signatures estimate what sets of shingles have in common, as datasketch's do; bands find what they should."""

from __future__ import annotations

import itertools
import math

import datasketch
import numpy as np
import pytest

from lm_jax.corpus import minhash
from lm_jax.corpus import words as W
from tests.corpus.texts import edited, jaccard, prose


def shingles(text: str, size: int = 5) -> np.ndarray:
    return minhash.shingles(W.normalised(text).hashes, size)


def exact(a: str, b: str) -> float:
    x, y = set(shingles(a).tolist()), set(shingles(b).tolist())
    return len(x & y) / len(x | y)


@pytest.mark.parametrize("changes", [0, 1, 4, 12, 40])
def test_shingles_have_the_jaccard_similarity_of_tuples_of_words(changes: int) -> None:
    text = prose(1, 60)
    other = edited(text, changes, 2)
    assert exact(text, other) == pytest.approx(jaccard(text.replace("\n\n", " "), other.replace("\n\n", " ")), abs=0.02)


def test_short_texts_are_one_shingle_and_texts_without_words_none() -> None:
    assert len(shingles("only three words")) == 1 and len(shingles("!! -- ..")) == 0
    assert shingles("Only three, words")[0] == shingles("only three words")[0]
    assert minhash.signatures([shingles("...")]).tolist() == [[2**32 - 1] * 128]


def test_estimates_are_as_good_as_datasketch_s() -> None:
    ours, theirs = [], []
    for seed in range(60):
        text = prose(seed, 30)
        other = edited(text, 1 + seed % 20, seed)
        truth = exact(text, other)
        a, b = minhash.signatures([shingles(text), shingles(other)])
        ours.append(float(minhash.similarity(a[None], b[None])[0]) - truth)
        sketches = []
        for one in (text, other):
            sketch = datasketch.MinHash(128)
            sketch.update_batch([x.tobytes() for x in np.unique(shingles(one))])
            sketches.append(sketch)
        theirs.append(sketches[0].jaccard(sketches[1]) - truth)
    # The standard deviation of an estimate is at most 0.5 / sqrt(128) = 0.044; its mean over 60 has an eighth of that.
    assert abs(np.mean(ours)) < 0.02 and np.std(ours) < 0.05
    assert np.std(ours) < 1.3 * np.std(theirs)


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 1.0])
def test_banding_finds_pairs_at_the_threshold(threshold: float) -> None:
    bands, rows = minhash.banding(threshold)
    assert bands * rows <= 128
    assert 1 - (1 - threshold**rows) ** bands >= minhash.FOUND
    more = rows + 1
    assert more > 128 or 1 - (1 - threshold**more) ** (128 // more) < minhash.FOUND  # more rows would find fewer


def test_bands_agree_where_all_of_their_rows_do() -> None:
    rng = np.random.default_rng(0)
    signature = rng.integers(0, 3, (200, 128), dtype=np.uint32)
    count, rows = minhash.banding(0.8)
    found = minhash.bands(signature, 0.8)
    assert found.shape == (count, 200)
    for band in range(0, count, 7):
        columns = signature[:, band * rows : (band + 1) * rows]
        same = (columns[:, None] == columns[None]).all(-1)
        assert ((found[band][:, None] == found[band][None]) == same).all()


def test_the_margin_is_two_standard_deviations() -> None:
    assert minhash.margin(0.8) == pytest.approx(0.8 - 2 * math.sqrt(0.16 / 128))


@pytest.mark.parametrize("size", [1, 3, 5, 40])
def test_a_batch_has_the_shingles_and_signatures_of_each_text(size: int) -> None:
    texts = ["", "one", prose(1, 3), "...", "two words", prose(2, 6), "", "a b c d e", "a b c d"]
    for chosen in (texts, texts[::-1], texts[:1], [], texts[4:5]):
        words, offsets = W.normalised_batch(chosen)
        flat, first = minhash.shingles_batch(words.hashes, offsets, size)
        alone = [shingles(text, size) for text in chosen]
        bounds = first.astype(int).tolist()
        assert [flat[a:b].tolist() for a, b in itertools.pairwise(bounds)] == [s.tolist() for s in alone]
        assert (minhash.signatures_batch(flat, first) == minhash.signatures(alone)).all()
