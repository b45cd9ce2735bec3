"""MinHash signatures (Broder 1997) and their bands (Leskovec, Rajaraman, Ullman: Mining of Massive Datasets, ch. 3).

Shingles are runs of words, hashed on arrays (`words.py`); the permutations are rensa's, in Rust. Two documents are
compared where all rows of one band agree, and are alike where their signatures say so. D is documents, P permutations.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np

from lm_jax.corpus import words as W

PERMUTATIONS = 128
SEED = 0x1EAF
FOUND = 0.99  # of the pairs at the threshold, the share that bands are to find


def shingles(hashes: np.ndarray, size: int) -> np.ndarray:
    """Hashes of the runs of `size` words `[S]` uint64, with repetitions. A shorter text is one shingle; a text without
    a word has none.

    Args:
      hashes: `[W]` uint64, of `words.normalised`.
      size: words a shingle.
    """
    return W.ngrams(hashes, min(size, len(hashes))) if len(hashes) else hashes


def shingles_batch(hashes: np.ndarray, offsets: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """`shingles` of many texts at once.

    Args:
      hashes, offsets: of `words.normalised_batch`.
      size: words a shingle.

    Returns:
      All texts' shingles, and the number of the first of each text `[texts + 1]` uint64.
    """
    lengths = np.diff(offsets)
    counts = np.where(lengths >= size, lengths - size + 1, np.minimum(lengths, 1))
    first = np.zeros(len(lengths) + 1, np.uint64)
    np.cumsum(counts, out=first[1:])
    grams = W.ngrams(hashes, size)
    inside = np.ones(len(grams), bool)
    # Runs that begin in the last words of a text reach into the next one.
    crossing = (offsets[1:-1, None] - np.arange(1, size)).ravel()
    inside[crossing[(crossing >= 0) & (crossing < len(grams))]] = False
    flat = grams[inside]
    for text in np.flatnonzero((lengths > 0) & (lengths < size)).tolist():
        alone = W.ngrams(hashes[offsets[text] : offsets[text + 1]], int(lengths[text]))
        flat = np.insert(flat, int(first[text]), alone)
    return flat, first


def signatures(sets: Sequence[np.ndarray], permutations: int = PERMUTATIONS) -> np.ndarray:
    """The signature `[D, P]` uint32 of each set of hashes; of an empty one, all ones."""
    first = np.zeros(len(sets) + 1, np.uint64)
    np.cumsum([len(s) for s in sets], out=first[1:])
    return signatures_batch(np.concatenate([np.zeros(0, np.uint64), *sets]), first, permutations)


def signatures_batch(flat: np.ndarray, first: np.ndarray, permutations: int = PERMUTATIONS) -> np.ndarray:
    """`signatures` of sets that stand behind each other, as `shingles_batch` gives them."""
    from rensa import RMinHash

    if len(first) == 1:
        return np.zeros((0, permutations), np.uint32)
    rows = RMinHash.digest_matrix_from_flat_token_hashes(flat, first, permutations, SEED).to_rows()
    return np.array(rows, np.uint32).reshape(len(first) - 1, permutations)


def similarity(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The estimate of the Jaccard similarity `[pairs]` of rows `a` and `b`, `[pairs, P]` each; its standard deviation
    at similarity J is sqrt(J (1 - J) / P)."""
    return (a == b).mean(1)


def margin(threshold: float, permutations: int = PERMUTATIONS) -> float:
    """The estimate from which on a pair is taken to be at the threshold: two standard deviations below it, so that of
    the pairs at the threshold 2% are lost, not half."""
    return threshold - 2 * math.sqrt(threshold * (1 - threshold) / permutations)


@functools.cache
def banding(threshold: float, permutations: int = PERMUTATIONS) -> tuple[int, int]:
    """(bands, rows of each): the most rows with which `FOUND` of the pairs at the threshold still share a band.

    A pair of similarity J shares one of b bands of r rows with probability 1 - (1 - J^r)^b.
    """
    found = [r for r in range(1, permutations + 1) if 1 - (1 - threshold**r) ** (permutations // r) >= FOUND]
    rows = max(found)
    return permutations // rows, rows


def bands(signature: np.ndarray, threshold: float) -> np.ndarray:
    """A hash for each band of each signature.

    Args:
      signature: `[D, P]`.

    Returns:
      `[bands, D]` uint64.
    """
    count, rows = banding(threshold, signature.shape[1])
    columns = signature.astype(np.uint64)
    out = np.empty((count, len(signature)), np.uint64)
    for band in range(count):
        value = np.full(len(signature), band, np.uint64)
        for column in range(band * rows, (band + 1) * rows):
            value = W.mix(value ^ (columns[:, column] + np.uint64(0x9E3779B97F4A7C15)))
        out[band] = value
    return out
