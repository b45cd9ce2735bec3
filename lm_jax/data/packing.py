"""The global packing plan: which tokens row `n` has, for every `n`, from lengths and a seed alone.

A document of N tokens is N - 1 pairs (token, the one after it). An epoch puts the pairs of all documents one after the
other, documents in a random order, and cuts this ring of pairs into rows of `length` from a random offset; the rows are
then put in a random order. So every pair stands in exactly one row an epoch, every epoch has the same number of rows,
and a single long document is cut elsewhere each time. Only one row an epoch may have padding.

The order is of hashes written out here, not of a library's generator: it is the same for every version of everything.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from lm_jax.data.cache import digest
from lm_jax.errors import UserError

Batch = dict[str, np.ndarray]


class Piece(NamedTuple):
    """Pairs of a document: the inputs are its tokens [start, stop), the targets its tokens [start + 1, stop + 1)."""

    document: int
    start: int
    stop: int


class TokenReader(Protocol):
    """What holds the tokens of documents (`store.Store`)."""

    def read(self, ranges: Sequence[tuple[int, int, int]]) -> list[np.ndarray]:
        """For each (document, start, stop), its tokens [start, stop) as integers."""


class _Epoch(NamedTuple):
    order: np.ndarray  # [documents]: which stands where in the ring
    ends: np.ndarray  # [documents]: where its pairs end
    offset: int  # where in the ring row 0 starts
    rows: np.ndarray  # [rows]: the order of the rows


class Plan:
    """The rows of one set of documents.

    Attributes:
      length: pairs a row, T.
      pairs: pairs an epoch.
      rows_per_epoch: rows that take them all.
    """

    def __init__(
        self, documents: np.ndarray, tokens: np.ndarray, *, length: int, seed: int | None, content: str = ""
    ) -> None:
        """Args:
          documents: `[n]`, the numbers by which the reader knows the documents.
          tokens: `[n]`, how many tokens each has.
          length: pairs a row.
          seed: of the random order; None for the given order without an offset, as evaluation wants it.
          content: a fingerprint of what the tokens are.

        Raises:
          UserError: where no document has two tokens.
        """
        pairs = np.asarray(tokens, np.int64) - 1
        self.documents = np.asarray(documents, np.int64)[pairs > 0]
        self._pairs = pairs[pairs > 0]
        self.length, self.seed, self.content = length, seed, content
        self.pairs = int(self._pairs.sum())
        if self.pairs == 0:
            raise UserError("there is no document of two tokens or more: nothing can be predicted")
        self.rows_per_epoch = -(-self.pairs // length)
        self._epochs: dict[int, _Epoch] = {}
        self._lock = threading.Lock()

    @property
    def fingerprint(self) -> str:
        """A hash of everything that decides what row `n` is."""
        return digest(
            f"plan 1, length {self.length}, seed {self.seed}",
            self.content,
            self.documents.tobytes(),
            self._pairs.tobytes(),
        )

    def row(self, n: int) -> list[Piece]:
        """The pieces of row `n`, n = 0, 1, ..; epoch after epoch."""
        number, place = divmod(n, self.rows_per_epoch)
        epoch = self._epoch(number)
        begin = int(epoch.rows[place]) * self.length
        end = min(begin + self.length, self.pairs)
        begin, end = begin + epoch.offset, end + epoch.offset
        if begin >= self.pairs:
            begin, end = begin - self.pairs, end - self.pairs
        if end <= self.pairs:
            return self._pieces(epoch, begin, end)
        return self._pieces(epoch, begin, self.pairs) + self._pieces(epoch, 0, end - self.pairs)  # round the ring

    def _pieces(self, epoch: _Epoch, begin: int, end: int) -> list[Piece]:
        """The pieces of the ring's pairs [begin, end)."""
        first = int(epoch.ends.searchsorted(begin, side="right"))
        last = int(epoch.ends.searchsorted(end, side="left"))
        which = epoch.order[first : last + 1]
        sizes = self._pairs[which]
        starts = epoch.ends[first : last + 1] - sizes
        lows = np.maximum(begin - starts, 0)
        highs = np.minimum(end - starts, sizes)
        return list(map(Piece, self.documents[which].tolist(), lows.tolist(), highs.tolist()))

    def _epoch(self, number: int) -> _Epoch:
        if self.seed is None:
            number = 0
        with self._lock:
            if number not in self._epochs:
                while len(self._epochs) > 1:  # readers cross from one epoch into the next: keep the latest two
                    del self._epochs[next(iter(self._epochs))]
                self._epochs[number] = self._make_epoch(number)
            return self._epochs[number]

    def _make_epoch(self, number: int) -> _Epoch:
        if self.seed is None:
            order, rows, offset = np.arange(len(self._pairs)), np.arange(self.rows_per_epoch), 0
        else:
            order = _permutation(len(self._pairs), _key(self.seed, number, "documents"))
            rows = _permutation(self.rows_per_epoch, _key(self.seed, number, "rows"))
            offset = _key(self.seed, number, "offset") % self.length % self.pairs
        return _Epoch(order, np.cumsum(self._pairs[order]), offset, rows)


def _key(seed: int, epoch: int, use: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}/{epoch}/{use}".encode(), digest_size=8).digest(), "little")


def _permutation(n: int, key: int) -> np.ndarray:
    """0 .. n - 1 in the order of their hashes (splitmix64, Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        x = np.arange(1, n + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(key)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x ^= x >> np.uint64(31)
    return np.argsort(x, kind="stable")


# ------------------------------------------------------------------------------------------------------- rows of tokens


def empty_batch(rows: int, length: int) -> Batch:
    """Rows `[B, T]` of nothing but padding."""
    return {
        "tokens": np.zeros((rows, length), np.int32),
        "targets": np.zeros((rows, length), np.int32),
        "segment_ids": np.full((rows, length), -1, np.int32),
        "positions": np.zeros((rows, length), np.int32),
        "loss_mask": np.zeros((rows, length), bool),
    }


def read_rows(plan: Plan, store: TokenReader, rows: Sequence[int | None]) -> Batch:
    """The batch `[len(rows), T]` of these rows of a plan; None is a row of padding.

    `segment_ids` count a row's pieces from 0 (-1 is padding), `positions` start again in each piece.
    """
    batch = empty_batch(len(rows), plan.length)
    pieces = [[] if n is None else plan.row(n) for n in rows]
    tokens = iter(store.read([(p.document, p.start, p.stop + 1) for row in pieces for p in row]))
    count = np.arange(plan.length, dtype=np.int32)
    for b, row in enumerate(pieces):
        at = 0
        for segment, (_, start, stop) in enumerate(row):
            ids, size = next(tokens), stop - start
            here = slice(at, at + size)
            batch["tokens"][b, here] = ids[:-1]
            batch["targets"][b, here] = ids[1:]
            batch["segment_ids"][b, here] = segment
            batch["positions"][b, here] = count[:size]
            at += size
        batch["loss_mask"][b, :at] = True
    return batch
