"""The global packing plan: which tokens row `n` has, for every `n`, from lengths and a seed alone.

A document of N tokens is N - 1 pairs (token, the one after it), and every pair stands in exactly one row an epoch, and
every epoch has the same number of rows. Which pairs share a row is the packing's choice:

- `split`: the pairs of all documents one after the other, documents in a random order, make a ring, which is cut into
  rows of `length` from a random offset. Only one row an epoch has padding; documents are cut wherever a row ends, a
  single long one elsewhere each time.
- `best_fit`, `first_fit`: no document is cut that fits a row (`bins.py`); of a longer one as many whole rows as it
  fills, and what is left of it, from another place of it each epoch. Rows end in padding. With `truncate` a longer
  document is one row, and the rest of it is left out.

The rows are then put in a random order.

The order is of hashes written out here, not of a library's generator: it is the same for every version of everything.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from lm_jax.data.bins import FITS
from lm_jax.data.cache import digest
from lm_jax.data.store import spread, stretches
from lm_jax.errors import UserError

Batch = dict[str, np.ndarray]


class Pieces(NamedTuple):
    """The pieces of several rows, row by row.

    A piece is pairs of a document: the inputs are its tokens [start, stop), the targets those one further on.
    """

    counts: np.ndarray  # [rows]: how many pieces each row has
    documents: np.ndarray  # [pieces]
    starts: np.ndarray  # [pieces]
    stops: np.ndarray  # [pieces]
    prompts: np.ndarray  # [pieces]: the first so many tokens of the document are no targets that the loss counts


class TokenReader(Protocol):
    """What holds the tokens of documents: a `Store`, or several of them joined."""

    def read(self, documents: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
        """The tokens [start, stop) of each document as integers, one after the other; `[pieces]` each."""


class Rows(Protocol):
    """Which tokens row `n` has: a `Plan` of one set of documents, or what several plans make together.

    Attributes:
      length: pairs a row, T.
      pairs: pairs an epoch.
      left_out: pairs that no epoch has, of documents that are truncated.
      rows_per_epoch: rows that take them all.
    """

    length: int
    pairs: int
    left_out: int
    rows_per_epoch: int

    @property
    def fingerprint(self) -> str:
        """A hash of everything that decides what row `n` is."""

    @property
    def way(self) -> str:
        """How rows are made, in words that say what differs from `split` of one source; empty for that."""

    def pieces(self, rows: np.ndarray) -> Pieces:
        """The pieces of rows n = 0, 1, ..; epoch after epoch."""

    def name_of(self, document: int) -> str:
        """What a person calls a piece's document."""


PACKINGS = ("split", *FITS)


class _Ring(NamedTuple):
    """An epoch of `split`."""

    order: np.ndarray  # [documents]: which stands where in the ring
    ends: np.ndarray  # [documents]: where its pairs end
    offset: int  # where in the ring row 0 starts
    rows: np.ndarray  # [rows]: the order of the rows


class _Bins(NamedTuple):
    """An epoch of pieces in rows; the pieces of a row stand together."""

    which: np.ndarray  # [pieces]: the document
    starts: np.ndarray  # [pieces]
    sizes: np.ndarray  # [pieces]
    first: np.ndarray  # [rows + 1]: where each row's pieces begin
    rows: np.ndarray  # [rows]: the order of the rows


class Plan:
    """The rows of one set of documents.

    Attributes:
      length: pairs a row, T.
      pairs: pairs an epoch.
      left_out: pairs of documents that are truncated, which no epoch has.
      rows_per_epoch: rows that take them all.
    """

    def __init__(
        self,
        documents: np.ndarray,
        tokens: np.ndarray,
        *,
        length: int,
        seed: int | None,
        content: str = "",
        packing: str = "split",
        truncate: bool = False,
        prompts: np.ndarray | None = None,
        rewritten: str = "",
    ) -> None:
        """Args:
          documents: `[n]`, the numbers by which the reader knows the documents.
          tokens: `[n]`, how many tokens each has.
          length: pairs a row.
          seed: of the random order; None for the given order without an offset, as evaluation wants it.
          content: a fingerprint of what the tokens are.
          packing: of `PACKINGS`.
          truncate: whether what a document has beyond a row is left out; not with `split`.
          prompts: `[n]`, how many tokens at the beginning of each document are no targets for the loss; None: none.
          rewritten: what was done to the documents' tokens, in words.

        Raises:
          UserError: where no document has two tokens.
        """
        pairs = np.asarray(tokens, np.int64) - 1
        self.documents = np.asarray(documents, np.int64)[pairs > 0]
        self._pairs = pairs[pairs > 0]
        self._prompts = None if prompts is None else prompts[pairs > 0]
        self._rewritten = rewritten
        self.length, self.seed, self.content, self.packing, self.truncate = length, seed, content, packing, truncate
        everything = int(self._pairs.sum())
        if everything == 0:
            raise UserError("there is no document of two tokens or more: nothing can be predicted")
        if truncate:
            self._pairs = np.minimum(self._pairs, length)
        self.pairs = int(self._pairs.sum())
        self.left_out = everything - self.pairs
        if packing == "split":
            self.rows_per_epoch = -(-self.pairs // length)
        else:
            rest = self._pairs % length
            self._bins = FITS[packing](-np.sort(-rest[rest > 0]), length)
            self._whole = int((self._pairs // length).sum())
            self.rows_per_epoch = self._whole + (int(self._bins.max()) + 1 if len(self._bins) else 0)
        self._epochs: dict[int, _Ring | _Bins] = {}
        self._lock = threading.Lock()

    @property
    def fingerprint(self) -> str:
        return digest(
            f"plan 1, length {self.length}, seed {self.seed}" + self.way,
            self.content,
            self.documents.tobytes(),
            self._pairs.tobytes(),
            *([] if self._prompts is None else [self._prompts.tobytes()]),
        )

    @property
    def way(self) -> str:
        return way_of(self.packing, self.truncate, self._rewritten)

    def name_of(self, document: int) -> str:
        return f"document {document}"

    def pieces(self, rows: np.ndarray) -> Pieces:
        numbers, places = np.divmod(np.asarray(rows, np.int64), self.rows_per_epoch)
        if self.seed is None:
            numbers = np.zeros_like(numbers)
        return by_group(numbers, lambda number, here: self._of_epoch(self._epoch(number), places[here]))

    def _of_epoch(self, epoch: _Ring | _Bins, places: np.ndarray) -> Pieces:
        rows = epoch.rows[places]
        if isinstance(epoch, _Bins):
            counts = epoch.first[rows + 1] - epoch.first[rows]
            here = spread(epoch.first[rows], counts)
            starts, which = epoch.starts[here], epoch.which[here]
            stops = starts + epoch.sizes[here]
            return Pieces(counts, self.documents[which], starts, stops, self._prompts_of(which))
        begins = rows * self.length
        ends = np.minimum(begins + self.length, self.pairs) + epoch.offset
        begins = begins + epoch.offset
        # Two stretches a row: the ring's up to its end, and those beyond it, from its beginning.
        low = np.stack([begins, np.maximum(begins - self.pairs, 0)], 1)
        high = np.stack([np.minimum(ends, self.pairs), np.maximum(ends - self.pairs, 0)], 1)
        first = epoch.ends.searchsorted(low, side="right")
        counts = np.where(low < high, epoch.ends.searchsorted(high, side="left") + 1 - first, 0)
        here = spread(first.ravel(), counts.ravel())
        which = epoch.order[here]
        before = epoch.ends[here] - self._pairs[which]
        starts = np.maximum(np.repeat(low.ravel(), counts.ravel()) - before, 0)
        stops = np.minimum(np.repeat(high.ravel(), counts.ravel()) - before, self._pairs[which])
        return Pieces(counts.sum(1), self.documents[which], starts, stops, self._prompts_of(which))

    def _prompts_of(self, which: np.ndarray) -> np.ndarray:
        return np.zeros(len(which), np.int64) if self._prompts is None else self._prompts[which]

    def _epoch(self, number: int) -> _Ring | _Bins:
        with self._lock:
            if number not in self._epochs:
                while len(self._epochs) > 1:  # readers cross from one epoch into the next: keep the latest two
                    del self._epochs[next(iter(self._epochs))]
                self._epochs[number] = self._make_epoch(number)
            return self._epochs[number]

    def _make_epoch(self, number: int) -> _Ring | _Bins:
        if self.packing != "split":
            return self._make_bins(number)
        if self.seed is None:
            order, rows, offset = np.arange(len(self._pairs)), np.arange(self.rows_per_epoch), 0
        else:
            order = permutation(len(self._pairs), key(self.seed, number, "documents"))
            rows = permutation(self.rows_per_epoch, key(self.seed, number, "rows"))
            offset = key(self.seed, number, "offset") % self.length % self.pairs
        return _Ring(order, np.cumsum(self._pairs[order]), offset, rows)

    def _make_bins(self, number: int) -> _Bins:
        """Whole rows first, then the bins."""
        n, length = len(self._pairs), self.length
        if self.seed is None:
            order, turn, rows = np.arange(n), np.zeros(n, np.uint64), np.arange(self.rows_per_epoch)
        else:
            order = permutation(n, key(self.seed, number, "documents"))
            turn = hashes(np.arange(n), key(self.seed, number, "offset"))
            rows = permutation(self.rows_per_epoch, key(self.seed, number, "rows"))
        full, rest = np.divmod(self._pairs, length)
        # What is left of a document stands behind so many of its whole rows.
        before = (turn % (full + 1).astype(np.uint64)).astype(np.int64)
        whole = np.repeat(np.arange(n), full)
        at = np.arange(self._whole) - np.repeat(np.cumsum(full) - full, full)
        whole_starts = at * length + np.where(at >= before[whole], rest[whole], 0)
        left = order[rest[order] > 0]
        left = left[
            np.argsort(-rest[left], kind="stable")
        ]  # the sizes that `_bins` was made for, in this epoch's order
        grouped = np.argsort(self._bins, kind="stable")
        left = left[grouped]
        ends = np.cumsum(np.bincount(self._bins, minlength=self.rows_per_epoch - self._whole))
        return _Bins(
            which=np.concatenate([whole, left]),
            starts=np.concatenate([whole_starts, before[left] * length]),
            sizes=np.concatenate([np.full(self._whole, length), rest[left]]),
            first=np.concatenate([np.arange(self._whole + 1), self._whole + ends]),
            rows=rows,
        )


def way_of(packing: str, truncate: bool, rewritten: str) -> str:
    """`Rows.way` of a set of documents."""
    packed = "" if packing == "split" else f", {packing}" + (", truncated" if truncate else "")
    return packed + (f", {rewritten}" if rewritten else "")


def key(seed: int, epoch: int, use: str) -> int:
    """A number of 64 bits for a use of a seed."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{epoch}/{use}".encode(), digest_size=8).digest(), "little")


def permutation(n: int, key: int) -> np.ndarray:
    """0 .. n - 1 in the order of their hashes."""
    return np.argsort(hashes(np.arange(n), key), kind="stable")


def hashes(numbers: np.ndarray, key: int) -> np.ndarray:
    """A number of 64 bits for each of some numbers (splitmix64, Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        x = (numbers.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(key)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x ^= x >> np.uint64(31)
    return x


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


def read_rows(plan: Rows, store: TokenReader, rows: Sequence[int | None]) -> Batch:
    """The batch `[len(rows), T]` of these rows of a plan; None is a row of padding.

    `segment_ids` count a row's pieces from 0 (-1 is padding), `positions` start again in each piece.
    """
    asked = np.array([n is not None for n in rows], bool)
    pieces = plan.pieces(np.array([n for n in rows if n is not None], np.int64))
    sizes = pieces.stops - pieces.starts
    if not len(sizes):
        return empty_batch(len(rows), plan.length)
    counts = np.zeros(len(rows), np.int64)
    counts[asked] = pieces.counts
    ids = store.read(pieces.documents, pieces.starts, pieces.stops + 1)
    ends = np.cumsum(sizes + 1)  # of each piece in `ids`: one token more than it has pairs
    values = {
        "tokens": stretches(ids, ends - sizes - 1, ends - 1),
        "targets": stretches(ids, ends - sizes, ends),
        "segment_ids": np.repeat(spread(np.zeros(len(counts), np.int32), counts), sizes),
        "positions": spread(np.zeros(len(sizes), np.int32), sizes),
    }
    filled = np.add.reduceat(np.append(sizes, 0), np.minimum(np.cumsum(counts) - counts, len(sizes))) * (counts > 0)
    batch = _in_rows(values, filled, plan.length)
    if pieces.prompts.any():
        at = (
            np.repeat(pieces.starts + 1 - pieces.prompts, sizes) + values["positions"]
        )  # of each target behind the prompt
        batch["loss_mask"][batch["loss_mask"]] = at >= 0
    return batch


def _in_rows(values: dict[str, np.ndarray], filled: np.ndarray, length: int) -> Batch:
    """Values that stand one after the other in rows, of each of which so many places are filled."""
    if (filled == length).all():
        batch = {name: x.astype(np.int32, copy=False).reshape(-1, length) for name, x in values.items()}
        return batch | {"loss_mask": np.ones((len(filled), length), bool)}
    batch = empty_batch(len(filled), length)
    ends = np.cumsum(filled).tolist()
    for b, (end, n) in enumerate(zip(ends, filled.tolist(), strict=True)):
        for name, x in values.items():
            batch[name][b, :n] = x[end - n : end]
        batch["loss_mask"][b, :n] = True
    return batch


def by_group(groups: np.ndarray, of_group: Callable[[int, np.ndarray], Pieces]) -> Pieces:
    """The pieces of rows that are looked up group by group, in the order of the rows.

    Args:
      groups: `[rows]`, the group of each.
      of_group: from a group and its places in `groups`, the pieces of those rows.
    """
    found = [
        (here, of_group(int(group), here)) for group in np.unique(groups) for here in [np.flatnonzero(groups == group)]
    ]
    if len(found) == 1:
        return found[0][1]
    counts = np.zeros(len(groups), np.int64)
    for here, part in found:
        counts[here] = part.counts
    ends = np.cumsum(counts)
    joined = Pieces(counts, *(np.zeros(ends[-1] if len(ends) else 0, np.int64) for _ in range(4)))
    for here, part in found:
        at = spread((ends - counts)[here], part.counts)
        for whole, values in zip(joined[1:], part[1:], strict=True):
            whole[at] = values
    return joined
