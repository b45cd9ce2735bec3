"""Fill-in-the-middle (Bavarian et al. 2022, arXiv:2207.14255): documents rewritten so that a model learns to fill gaps.

A document is cut at two places into a prefix, a middle and a suffix, and stands as

- prefix-suffix-middle: `<prefix> prefix <suffix> suffix <middle> middle`
- suffix-prefix-middle: `<prefix> <suffix> suffix <middle> prefix middle`

with three special tokens. Which documents, which of the two, and where they are cut is decided by the seed and the
document's number: a rewritten document is three tokens longer, and a plan of rows knows that from lengths alone. It is
cut between tokens, at the same places in every epoch; the boundaries around it stay where they were.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from lm_jax.data.packing import Plan, TokenReader, hashes, key
from lm_jax.data.store import Store, spread

_PARTS = 8  # boundary, three special tokens with a part behind each (in suffix-prefix-middle another), boundary


@dataclasses.dataclass(frozen=True)
class FillInTheMiddle:
    """How documents are rewritten.

    Attributes:
      rate: the share of documents that are.
      spm_rate: of those, the share that stands suffix first.
      prefix, suffix, middle: the special tokens' ids.
      edge: tokens of boundary at either end of a document: 0 or 1.
      seed: of all that is drawn.
    """

    rate: float
    spm_rate: float
    prefix: int
    suffix: int
    middle: int
    edge: int
    seed: int

    @property
    def way(self) -> str:
        marks = f"{self.prefix}, {self.suffix}, {self.middle}"
        return f"fill-in-the-middle {self.rate!r} (suffix first {self.spm_rate!r}; tokens {marks})"

    def of_shard(self, number: int) -> FillInTheMiddle:
        """The same for a shard, whose documents are counted from 0 again."""
        return dataclasses.replace(self, seed=key(self.seed, number, "fim"))

    def _draw(self, documents: np.ndarray, use: str) -> np.ndarray:
        """A number in [0, 1) for each document."""
        return hashes(documents, key(self.seed, 0, f"fim {use}")) / 2.0**64

    def rewritten(self, documents: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Which documents are: `[n]` bool. One of fewer than two tokens between its boundaries is not."""
        return (self._draw(documents, "rate") < self.rate) & (lengths - 2 * self.edge >= 2)

    def lengths(self, documents: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """How many tokens each document has then."""
        return lengths + 3 * self.rewritten(documents, lengths)

    def parts(self, documents: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What rewritten documents are made of, part by part.

        Returns:
          Three arrays `[n, 8]`: where a part begins in the document, how long it is, and the special token that it is
          instead (-1: none).
        """
        n, inner = len(documents), lengths - 2 * self.edge
        cuts = np.sort(
            np.stack([self._draw(documents, use) * (inner + 1) for use in ("first cut", "second cut")]), axis=0
        )
        a, b = cuts.astype(np.int64) + self.edge
        end, zero, one = lengths - self.edge, np.zeros(n, np.int64), np.ones(n, np.int64)
        first = (zero, zero + self.edge)  # where, how long
        last = (end, zero + self.edge)
        prefix, middle, suffix = (zero + self.edge, a - self.edge), (a, b - a), (b, end - b)
        mark = (zero, one)
        psm = [first, mark, prefix, mark, suffix, mark, middle, last]
        spm = [first, mark, mark, suffix, mark, prefix, middle, last]
        psm_ids = [-1, self.prefix, -1, self.suffix, -1, self.middle, -1, -1]
        spm_ids = [-1, self.prefix, self.suffix, -1, self.middle, -1, -1, -1]
        other = (self._draw(documents, "order") < self.spm_rate)[:, None]
        begins, sizes = (np.where(other, *(np.stack([p[i] for p in parts], 1) for parts in (spm, psm))) for i in (0, 1))
        return begins, sizes, np.where(other, spm_ids, psm_ids)


def plan_of(
    store: Store,
    side: str,
    fim: FillInTheMiddle | None,
    *,
    length: int,
    seed: int | None,
    content: str = "",
    **packed: Any,
) -> Plan:
    """The rows of a side of a store, whose documents are rewritten (None: as they are). Else as `Plan`."""
    documents = store.documents(side)
    lengths, rewritten = store.lengths[documents], ""
    if fim is not None:
        lengths, rewritten = fim.lengths(documents, lengths), fim.way
    return Plan(
        documents,
        lengths,
        length=length,
        seed=seed,
        content=content,
        prompts=None if store.prompts is None else store.prompts[documents],
        rewritten=rewritten,
        **packed,
    )


class FimReader:
    """The tokens of documents as they are rewritten."""

    def __init__(self, fim: FillInTheMiddle, reader: TokenReader, lengths: np.ndarray) -> None:
        """Args: how, the documents as they are, and the lengths of all of them `[documents]`."""
        self.fim, self._reader, self._lengths = fim, reader, lengths

    def read(self, documents: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
        """The tokens [start, stop) of each document, rewritten, one after the other."""
        lengths = self._lengths[documents]
        n = len(documents)
        begins, sizes = np.zeros((n, _PARTS), np.int64), np.zeros((n, _PARTS), np.int64)
        marks = np.full((n, _PARTS), -1)
        sizes[:, 0] = lengths
        chosen = np.flatnonzero(self.fim.rewritten(documents, lengths))
        begins[chosen], sizes[chosen], marks[chosen] = self.fim.parts(documents[chosen], lengths[chosen])
        before = np.cumsum(sizes, axis=1) - sizes
        low = np.clip(starts[:, None] - before, 0, sizes)
        high = np.clip(stops[:, None] - before, 0, sizes)
        wanted = (high - low).ravel()
        ends = np.cumsum(wanted)
        is_text = (wanted > 0) & (marks.ravel() < 0)
        text = np.flatnonzero(is_text)
        out = np.empty(ends[-1] if n else 0, np.int32)
        special = np.flatnonzero((wanted > 0) & ~is_text)
        out[ends[special] - 1] = marks.ravel()[special]
        if len(text):
            which = np.repeat(documents, _PARTS)[text]
            ids = self._reader.read(which, (begins + low).ravel()[text], (begins + high).ravel()[text])
            out[spread((ends - wanted)[text], wanted[text])] = ids
        return out
