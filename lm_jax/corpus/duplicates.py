"""Which documents repeat others: exactly, or nearly by their signatures. The first of a cluster is kept.

Signatures, bands and digests lie on the disk, some 700 bytes a document. In memory are 14 bytes a document, whatever
the length of its text, and what a bucket of hashes takes: 0.36 GB (measured at 4 to 32 million documents).
A cluster is a connected component of pairs that are alike: its ends may be less alike than the threshold.

N is documents, all parts' in order; E pairs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from lm_jax.corpus import minhash

KEPT, EXACT, NEAR = 0, 1, 2
BUCKET = 2**22  # documents whose hashes are sorted at a time
MOST_BUCKETS = 16  # each is a pass over all hashes
LAGS = 12  # neighbours in a group of equal bands with which each is compared; and with the group's first
PAIRS = 2**15  # that are compared at a time: their signatures take 32 MB


@dataclasses.dataclass
class Clusters:
    """What repeats what.

    Attributes:
      status: `[N]` uint8: KEPT, EXACT or NEAR.
      first: `[N]` int64, the first document of the cluster that each is in.
      compared, alike: pairs whose signatures were compared, and that were alike.
    """

    status: np.ndarray
    first: np.ndarray
    compared: int = 0
    alike: int = 0


class Forest:
    """Sets that grow together; each is known by its lowest member."""

    def __init__(self, size: int) -> None:
        self.parent = np.arange(size, dtype=np.int64)

    def roots(self, of: np.ndarray) -> np.ndarray:
        """The lowest member of the set that each is in."""
        found = self.parent[of]
        while True:
            above = self.parent[found]
            if (above == found).all():
                break
            found = above
        self.parent[of] = found
        return found

    def join(self, a: np.ndarray, b: np.ndarray) -> None:
        """Makes one set of those of `a[i]` and `b[i]`, for every i."""
        from scipy.sparse import coo_array  # half a second to import, and one stage needs it
        from scipy.sparse.csgraph import connected_components

        if not len(a):
            return
        nodes, where = np.unique(np.concatenate([self.roots(a), self.roots(b)]), return_inverse=True)
        left, right = where[: len(a)], where[len(a) :]
        graph = coo_array((np.ones(len(a), bool), (left, right)), shape=(len(nodes), len(nodes)))
        count, component = connected_components(graph, directed=False)
        lowest = np.full(count, len(self.parent), np.int64)
        np.minimum.at(lowest, component, nodes)
        self.parent[nodes] = lowest[component]


class Rows:
    """Rows of arrays that lie one behind another, by their number in all of them."""

    def __init__(self, arrays: Sequence[np.ndarray]) -> None:
        self.arrays = arrays
        self.offsets = np.cumsum([0, *map(len, arrays)])

    def __getitem__(self, numbers: np.ndarray) -> np.ndarray:
        out = np.empty((len(numbers), *self.arrays[0].shape[1:]), self.arrays[0].dtype)
        which = np.searchsorted(self.offsets, numbers, "right") - 1
        for part in np.unique(which):
            mask = which == part
            out[mask] = self.arrays[part][numbers[mask] - self.offsets[part]]
        return out


def find(
    digests: Sequence[np.ndarray],
    bands: Sequence[np.ndarray],
    signatures: Sequence[np.ndarray],
    *,
    exact: bool,
    near: bool,
    threshold: float,
    advance: Callable[[float], None] = lambda n: None,
) -> Clusters:
    """The clusters of equal and alike documents.

    Args:
      digests: `[documents, 2]` uint64 of each part: 128 bits of a cryptographic hash of the text.
      bands: `[bands, documents]` uint64 of each part; not looked at without `near`.
      signatures: `[documents, P]` uint32 of each part; the same.
      exact, near: what to look for.
      threshold: the Jaccard similarity from which on documents are alike.
      advance: is told what share of the work is done, in steps that add up to 1.
    """
    total = sum(map(len, digests))
    forest = Forest(total)
    found = Clusters(np.zeros(total, np.uint8), forest.parent)
    steps = 1 + (bands[0].shape[0] if near and bands else 0)
    if exact:
        for again, firsts in _equal(digests, total):
            found.status[again] = EXACT
            forest.join(firsts, again)
    advance(1 / steps)
    if near:
        rows = Rows(signatures)
        least = minhash.margin(threshold, signatures[0].shape[1]) if signatures else threshold
        for band in range(steps - 1):
            for a, b in _candidates([part[band] for part in bands], found.status, total):
                _compare(a, b, rows, least, forest, found)
            advance(1 / steps)
    for start in range(0, total, BUCKET):
        some = np.arange(start, min(start + BUCKET, total))
        status = found.status[start : start + BUCKET]
        status[(forest.roots(some) != some) & (status == KEPT)] = NEAR
    found.first = forest.parent
    return found


def _numbered(arrays: Sequence[np.ndarray], total: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(keys, numbers of their documents), a bucket of keys at a time: those that are equal are in one bucket."""
    count = min(-(-total // BUCKET), MOST_BUCKETS) or 1
    for bucket in range(count):
        keys, numbers = [], []
        offset = 0
        for array in arrays:
            column = array if array.ndim == 1 else array[:, 0]
            mask = slice(None) if count == 1 else (column % np.uint64(count)) == bucket
            chosen = np.arange(len(column), dtype=np.int64)[mask]
            keys.append(np.asarray(array[mask]))
            numbers.append(chosen + offset)
            offset += len(column)
        if keys:
            yield np.concatenate(keys), np.concatenate(numbers)


def _equal(digests: Sequence[np.ndarray], total: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(documents that repeat one, the first of their kind)."""
    for keys, numbers in _numbered(digests, total):
        order = np.lexsort((numbers, keys[:, 1], keys[:, 0]))
        same = (keys[order][1:] == keys[order][:-1]).all(1)
        starts = np.maximum.accumulate(np.where(np.concatenate([[True], ~same]), np.arange(len(order)), 0))
        again = np.flatnonzero(np.concatenate([[False], same]))
        yield numbers[order[again]], numbers[order[starts[again]]]


def _candidates(bands: Sequence[np.ndarray], status: np.ndarray, total: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of documents that agree in a band, each with its neighbours in the group and with the group's first."""
    for keys, numbers in _numbered(bands, total):
        kept = status[numbers] == KEPT
        keys, numbers = keys[kept], numbers[kept]
        order = np.argsort(keys, kind="stable")
        keys, numbers = keys[order], numbers[order]
        same = keys[1:] == keys[:-1]
        member = np.flatnonzero(np.concatenate([same, [False]]) | np.concatenate([[False], same]))
        keys, numbers = keys[member], numbers[member]
        for lag in range(1, min(LAGS, len(keys) - 1) + 1):
            at = np.flatnonzero(keys[lag:] == keys[:-lag])
            if not len(at):
                break
            yield numbers[at], numbers[at + lag]
        if len(keys):
            new = np.concatenate([[True], keys[1:] != keys[:-1]])
            first = np.maximum.accumulate(np.where(new, np.arange(len(keys)), 0))
            far = np.flatnonzero(np.arange(len(keys)) - first > LAGS)
            yield numbers[first[far]], numbers[far]


def _compare(a: np.ndarray, b: np.ndarray, rows: Rows, least: float, forest: Forest, found: Clusters) -> None:
    """Joins the pairs that are alike; those that are in one set already need no look."""
    for start in range(0, len(a), PAIRS):
        left, right = a[start : start + PAIRS], b[start : start + PAIRS]
        apart = forest.roots(left) != forest.roots(right)
        left, right = left[apart], right[apart]
        if not len(left):
            continue
        alike = minhash.similarity(rows[left], rows[right]) >= least
        found.compared += len(left)
        found.alike += int(alike.sum())
        forest.join(left[alike], right[alike])
