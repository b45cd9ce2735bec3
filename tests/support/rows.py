"""Rows and tokens one by one, where a test looks at single ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lm_jax.data.packing import Rows, TokenReader


class Piece(NamedTuple):
    """Pairs of a document whose inputs are its tokens [start, stop)."""

    document: int
    start: int
    stop: int


def row(plan: Rows, n: int) -> list[Piece]:
    """The pieces of row `n`."""
    counts, *columns, _ = plan.pieces(np.array([n]))
    assert counts.tolist() == [len(columns[0])]
    return [Piece(*values) for values in zip(*(column.tolist() for column in columns), strict=True)]


def read(store: TokenReader, ranges: Sequence[tuple[int, int, int]]) -> list[np.ndarray]:
    """For each (document, start, stop), its tokens [start, stop)."""
    documents, starts, stops = np.array(ranges, np.int64).reshape(-1, 3).T
    return np.split(store.read(documents, starts, stops), np.cumsum(stops - starts)[:-1]) if len(ranges) else []
