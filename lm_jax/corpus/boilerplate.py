"""Lines that many documents share are taken out of all of them: menus, notices, licences (after CCNet, Wenzek et al.
2020, which drops paragraphs that it has seen before; here the lines of a document go only where many others have them).
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Sequence

import numpy as np

BUCKET = 2**22  # hashes that are sorted at a time: 32 MB, as much for their texts, and that again for sorting


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


def frequent(sorted_hashes: Sequence[np.ndarray], texts: Sequence[np.ndarray], more_than: int) -> np.ndarray:
    """The hashes of lines that more than `more_than` different texts have `[..]` uint64, sorted.

    Copies of a text count as one: a document that is mirrored often enough would lose all its lines, in all copies.
    Memory is that of a bucket, however many hashes there are.

    Args:
      sorted_hashes: each sorted; a hash stands in it once for each document.
      texts: of each hash the digest, as a number, of the document that it is of.
    """
    total = sum(map(len, sorted_hashes))
    count = -(-total // BUCKET) or 1
    found = []
    for low, high in _ranges(count):
        lines, of = [_NONE], [_NONE]
        for hashes, digests in zip(sorted_hashes, texts, strict=True):
            start, stop = np.searchsorted(hashes, (low, high))
            within = slice(start, None if high == _LAST else stop)
            lines.append(hashes[within])
            of.append(digests[within])
        values, counts = _different(np.concatenate(lines), np.concatenate(of))
        found.append(values[counts > more_than])
    return np.concatenate(found)


def _different(lines: np.ndarray, texts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each line, and how many different texts it stands beside."""
    order = np.lexsort((texts, lines))
    lines, texts = lines[order], texts[order]
    new = np.ones(len(lines), bool)
    new[1:] = (lines[1:] != lines[:-1]) | (texts[1:] != texts[:-1])
    return np.unique(lines[new], return_counts=True)


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
