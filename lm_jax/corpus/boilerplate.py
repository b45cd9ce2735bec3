"""Lines that many documents share are taken out of all of them: menus, notices, licences (after CCNet, Wenzek et al.
2020, which drops paragraphs that it has seen before; here the lines of a document go only where many others have them).
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Sequence

import numpy as np

BUCKET = 2**23  # hashes that are sorted at a time: 64 MB, and as much again for sorting


def line_hashes(text: str, shortest: int) -> tuple[list[int], np.ndarray]:
    """The lines of a text that are long enough: their numbers, and their hashes `[lines]` uint64."""
    numbers: list[int] = []
    digests: list[bytes] = []
    for number, line in enumerate(text.split("\n")):
        stripped = line.strip()
        if len(stripped) >= shortest:
            numbers.append(number)
            digests.append(hashlib.blake2b(stripped.encode("utf-8"), digest_size=8).digest())
    return numbers, np.frombuffer(b"".join(digests), "<u8").astype(np.uint64)


def frequent(sorted_hashes: Sequence[np.ndarray], more_than: int) -> np.ndarray:
    """The hashes that occur more often than `more_than` times in all arrays together `[..]` uint64, sorted.

    Memory is that of a bucket, however many hashes there are.

    Args:
      sorted_hashes: each sorted; a hash stands in it once for each document.
    """
    total = sum(map(len, sorted_hashes))
    count = -(-total // BUCKET) or 1
    found = []
    for low, high in _ranges(count):
        chunk = np.concatenate([a[slice(*np.searchsorted(a, (low, high)))] for a in sorted_hashes] or [_NONE])
        if high == _LAST:
            chunk = np.concatenate([chunk, *(a[np.searchsorted(a, high) :] for a in sorted_hashes)])
        values, counts = np.unique(chunk, return_counts=True)
        found.append(values[counts > more_than])
    return np.concatenate(found)


_NONE = np.zeros(0, np.uint64)
_LAST = np.uint64(2**64 - 1)


def _ranges(count: int) -> Iterable[tuple[np.uint64, np.uint64]]:
    edges = [np.uint64(min(2**64 * i // count, 2**64 - 1)) for i in range(count + 1)]
    return itertools.pairwise(edges)


def without(text: str, frequent_hashes: np.ndarray, shortest: int) -> tuple[str, int]:
    """A text without its lines that are frequent, and how many those were."""
    numbers, hashes = line_hashes(text, shortest)
    if not len(hashes) or not len(frequent_hashes):
        return text, 0
    at = np.minimum(np.searchsorted(frequent_hashes, hashes), len(frequent_hashes) - 1)
    gone = {numbers[i] for i in np.flatnonzero(frequent_hashes[at] == hashes)}
    if not gone:
        return text, 0
    kept = [line for number, line in enumerate(text.split("\n")) if number not in gone]
    return "\n".join(kept), len(gone)
