"""Whose turn it is: a sequence in which each of several sources has its share, exactly, from the start to any place.

At each place a source is due the sum of its shares up to there. The order takes, of the sources that are due at least
`1 / (2m - 2)` of a place more than they had, the one that would first be late (Tijdeman 1980, "The chairman assignment
problem", Discrete Mathematics 32): then none of the `m` is ever a whole place away from what it is due, whatever the
shares are and however they change.

Shares are whole numbers, so nothing is rounded on the way, and the order repeats: place `n` is found without what
stands before it. Worked out are the first period of each stage and the last few before the shares change. A place
takes some 4 us (x86), so the longest period a quarter of a second.
"""

from __future__ import annotations

import bisect
import heapq
import itertools
import math
import threading
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np

FINEST = 2**16  # what shares are rounded to where no smaller sum has them exactly
MOST = 256  # sources: each place of a sequence is a byte
_MARK = 2**6  # places between counts that are kept
_AT_ONCE = 2**14  # places that are worked out at a time
_NEVER = 2**62


class Stage(NamedTuple):
    """Shares from a place on: whole numbers, each of their sum."""

    start: int
    shares: tuple[int, ...]


class _Run(NamedTuple):
    """Places whose sources are known: `sources` from `start` on, so many times over."""

    start: int
    times: int
    sources: np.ndarray  # [places]
    before: np.ndarray  # [m]: turns of each source before `start`
    marks: np.ndarray  # [places // _MARK + 1, m]: turns in the first so many times `_MARK` places
    all: np.ndarray  # [m]: turns in `sources`

    @property
    def stop(self) -> int:
        return self.start + len(self.sources) * self.times


def whole_shares(weights: Sequence[float | Fraction]) -> tuple[int, ...]:
    """Weights as whole numbers in proportion to them, without a common divisor.

    They are exact where their sum can be `FINEST` or less, else rounded to that; none above 0 becomes 0. A float counts
    as the decimal that it is written as: 0.1 is a tenth.
    """
    exact = [Fraction(repr(w)) if isinstance(w, float) else Fraction(w) for w in weights]
    total = sum(exact)
    shares = [w / total for w in exact]
    scale = min(FINEST, math.lcm(*(s.denominator for s in shares)))
    found = [max(1, int(s * scale)) if s else 0 for s in shares]
    while (rest := scale - sum(found)) != 0:
        step = 1 if rest > 0 else -1
        # The one that is furthest from its share; none is taken down to 0.
        movable = [i for i, s in enumerate(shares) if s and (step > 0 or found[i] > 1)]
        found[max(movable, key=lambda i: step * (shares[i] * scale - found[i]))] += step
    common = math.gcd(*found)
    return tuple(n // common for n in found)


class Quota:
    """The order of `m` sources under stages of shares. Threads may share it."""

    def __init__(self, stages: Sequence[Stage], ties: Sequence[int] | None = None) -> None:
        """Args:
        stages: the first from place 0 on, each starting later than the one before; shares of 0 or more, not all 0, of
          at most `MOST` sources.
        ties: `[m]`, a number for each source: the lowest goes first where two would be late at the same place.
        """
        self.stages = tuple(stages)
        self._m = len(self.stages[0].shares)
        self._ties = list(range(self._m)) if ties is None else list(ties)
        sums = [sum(stage.shares) for stage in self.stages]
        self._unit = math.lcm(*sums)  # parts of a place: all that is due is a whole number of them
        self._rates = [
            [s * (self._unit // n) for s in stage.shares] for stage, n in zip(self.stages, sums, strict=True)
        ]
        self._starts = [stage.start for stage in self.stages]
        dues = [[0] * self._m]  # of each source, at each stage's start
        for (begin, end), rates in zip(itertools.pairwise(self._starts), self._rates, strict=False):
            dues.append([d + (end - begin) * r for d, r in zip(dues[-1], rates, strict=True)])
        self._dues = list(zip(*dues, strict=True))  # by source
        self._counts = [0] * self._m  # turns in all runs
        self._runs: list[_Run] = []
        self._period: tuple[int, list[int]] | None = (0, [0] * self._m)  # where one was begun, and the turns then
        self._lock = threading.Lock()

    def turn(self, n: int) -> tuple[int, int]:
        """The source whose turn place `n` is, and how many turns it had before."""
        run = self._run(n)
        times, place = divmod(n - run.start, len(run.sources))
        source, mark = int(run.sources[place]), place // _MARK
        rest = run.sources[mark * _MARK : place].tobytes().count(source)
        return source, int(run.before[source]) + times * int(run.all[source]) + int(run.marks[mark, source]) + rest

    def counts(self, n: int) -> np.ndarray:
        """How many turns each source has in the first `n` places: `[m]` int64."""
        run = self._run(n)
        times, place = divmod(n - run.start, len(run.sources))
        mark = place // _MARK
        rest = np.bincount(run.sources[mark * _MARK : place], minlength=self._m)
        return run.before + times * run.all + run.marks[mark] + rest

    def due(self, n: int) -> list[Fraction]:
        """How many turns each source is due in the first `n` places."""
        stage = bisect.bisect_right(self._starts, n) - 1
        begin, rates = self._starts[stage], self._rates[stage]
        return [Fraction(d[stage] + (n - begin) * r, self._unit) for d, r in zip(self._dues, rates, strict=True)]

    def _run(self, n: int) -> _Run:
        """The run that has place `n`."""
        with self._lock:
            while not self._runs or self._runs[-1].stop <= n:
                self._extend()
            return self._runs[bisect.bisect_right(self._runs, n, key=lambda run: run.start) - 1]

    # -------------------------------------------------------------------------------------------------- working it out

    def _extend(self) -> None:
        """Adds a run: the next places, or, when a period has come to its end, what repeats it."""
        here = self._runs[-1].stop if self._runs else 0
        stage = bisect.bisect_right(self._starts, here) - 1
        size = sum(self.stages[stage].shares)
        end = self._starts[stage + 1] if stage + 1 < len(self.stages) else _NEVER
        if here == self._starts[stage]:
            self._period = (here, list(self._counts))
        if self._period and here == self._period[0] + size:
            begin, counts = self._period
            # What is due within the next two periods decides a place: the last ones before a change are not like the
            # others.
            times = (end - begin) // size - 4
            if times > 0 and all(
                b - a == s for a, b, s in zip(counts, self._counts, self.stages[stage].shares, strict=True)
            ):
                first = next(i for i, run in enumerate(self._runs) if run.start == begin)
                self._append(np.concatenate([run.sources for run in self._runs[first:]]), times)
                self._period = None
                return
            self._period = (here, list(self._counts))
        stop = min(here + _AT_ONCE, end, self._period[0] + size if self._period else _NEVER)
        self._append(np.array(self._picks(here, stop), np.uint8), 1)

    def _append(self, sources: np.ndarray, times: int) -> None:
        m, before = self._m, np.array(self._counts, np.int64)
        whole = len(sources) // _MARK
        grouped = sources[: whole * _MARK].reshape(whole, _MARK, 1) == np.arange(m)
        marks = np.concatenate([np.zeros((1, m), np.int64), np.cumsum(grouped.sum(1), axis=0)])
        turns = np.bincount(sources, minlength=m)
        start = self._runs[-1].stop if self._runs else 0
        self._runs.append(_Run(start, times, sources, before, marks, turns))
        self._counts = [c + times * int(t) for c, t in zip(self._counts, turns, strict=True)]

    def _picks(self, start: int, stop: int) -> list[int]:
        """The sources of places [start, stop), from the turns that there were before."""
        if self._m == 1:
            return [0] * (stop - start)
        parts = 2 * self._m - 2
        early, late = -(-self._unit // parts), self._unit * (parts - 1) // parts + 1
        counts, picks = list(self._counts), []
        waiting = [(self._reached(i, c * self._unit + early), i) for i, c in enumerate(counts)]
        heapq.heapify(waiting)
        ready: list[tuple[int, int, int]] = []
        for place in range(start, stop):
            while waiting and waiting[0][0] <= place + 1:
                _, i = heapq.heappop(waiting)
                heapq.heappush(ready, (self._reached(i, counts[i] * self._unit + late), self._ties[i], i))
            _, _, i = heapq.heappop(ready)
            picks.append(i)
            counts[i] += 1
            heapq.heappush(waiting, (self._reached(i, counts[i] * self._unit + early), i))
        return picks

    def _reached(self, source: int, due: int) -> int:
        """The first `n` in whose first places a source is due so many parts."""
        dues = self._dues[source]
        stage = max(0, bisect.bisect_left(dues, due) - 1)
        rate = self._rates[stage][source]
        return self._starts[stage] - (dues[stage] - due) // rate if rate else _NEVER
