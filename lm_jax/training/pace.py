"""Steps that take much longer than those before them."""

from __future__ import annotations

import collections
import statistics
import time
from collections.abc import Callable

_RECENT = 25  # steps that the median is of
_ENOUGH = 5  # fewer have no median to speak of
_FACTOR, _SECONDS = 3.0, 1.0  # slow: by this factor, and longer than so much
_TELL_SECONDS = 60.0  # a line at most so often


class Pace:
    """Says which steps are slow, once in a while. Args: a monotonic clock in seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._recent: collections.deque[float] = collections.deque(maxlen=_RECENT)
        self._skip = 2  # the first steps compile, and fill caches
        self._told = float("-inf")
        self._untold = 0

    def rest(self) -> None:
        """The next step comes after something else (an evaluation, a save), and may be slow."""
        self._skip = max(self._skip, 1)

    def step(self, number: int, seconds: float) -> str | None:
        """Takes a step's time. A line about it, where it was slow and there was none of late."""
        if self._skip:
            self._skip -= 1
            return None
        usual = statistics.median(self._recent) if len(self._recent) >= _ENOUGH else None
        self._recent.append(seconds)
        if usual is None or seconds <= _SECONDS or seconds <= _FACTOR * usual:
            return None
        if self._clock() - self._told < _TELL_SECONDS:
            self._untold += 1
            return None
        more = f"; {self._untold} others were slow since the last such line" if self._untold else ""
        self._told, self._untold = self._clock(), 0
        return f"step {number} was slow: {seconds:.1f} s, where the median is {usual:.2f} s{more}"
