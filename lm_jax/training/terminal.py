"""What a run shows while it runs: one progress line on a terminal, plain lines at intervals anywhere else."""

from __future__ import annotations

import collections
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, TextIO

_RECENT = 25  # steps that the speed shown is the median of
_WARM_UP = 2  # steps at the start of a process that are no guide to the others: compilation, caches
_REDRAW_SECONDS = 0.1


def count(n: float) -> str:
    """A number in three digits: 950, 12.3k, 1.20M."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(n) >= limit * 0.9995:
            scaled = n / limit
            return f"{scaled:.{2 if abs(scaled) < 9.995 else 1 if abs(scaled) < 99.95 else 0}f}{unit}"
    return f"{n:.0f}" if float(n).is_integer() or abs(n) >= 100 else f"{n:.3g}"


def duration(seconds: float) -> str:
    """A time in its two largest units: 45s, 1m20s, 2h05m, 3d04h."""
    s = max(0, round(seconds))
    if s < 60:
        return f"{s}s"
    if s < 3600:
        return f"{s // 60}m{s % 60:02d}s"
    if s < 86400:
        return f"{s // 3600}h{s % 3600 // 60:02d}m"
    return f"{s // 86400}d{s % 86400 // 3600:02d}h"


def visible(text: str) -> str:
    """Text with control characters (but newline and tab) as escapes: what a model says must not steer a terminal."""
    return "".join(c if c in "\n\t" or c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _is_terminal(stream: TextIO) -> bool:
    try:
        return stream.isatty() and os.environ.get("TERM", "") != "dumb"
    except (AttributeError, ValueError):  # a stand-in without isatty, or a closed stream
        return False


def columns(stream: TextIO) -> int:
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError, AttributeError):
        return 80


class Progress:
    """The progress of a run: loss, speed, the share of time spent waiting for data, time left.

    On a terminal it is one line, drawn again in place. Elsewhere it is a line at the first step, at every tenth of the
    run and every 10 seconds (every minute once a run is an hour old).

    Args:
      total_steps: the step that the run ends at.
      tokens_per_step: tokens of a whole global batch.
      start_step: steps already done by earlier processes of this run.
      stream: where it is written; stderr if None.
      clock: seconds, monotonic.
    """

    def __init__(
        self,
        total_steps: int,
        tokens_per_step: int,
        *,
        start_step: int = 0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total, self._tokens, self._start = total_steps, tokens_per_step, start_step
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._terminal = _is_terminal(self._stream)
        self._seconds: collections.deque[float] = collections.deque(maxlen=_RECENT)
        self._waits: collections.deque[float] = collections.deque(maxlen=_RECENT)
        self._began = self._drawn = clock()
        self._warm: tuple[int, float] | None = None  # (step, time) that the time left is measured from
        self._line = ""  # what stands on the terminal's last line
        self._shown = start_step  # the last step that a plain line told of

    def start(self, text: str = "compiling the first step ...") -> None:
        """Says what the wait before the first step is for."""
        if self._terminal:
            self._draw(text)
        else:
            self._write(text + "\n")

    def update(self, record: Mapping[str, Any]) -> None:
        """Shows a finished step by its record: `step`, `loss`, where known `step_seconds` and `data_wait_seconds`."""
        now, step = self._clock(), record["step"]
        if record.get("step_seconds") is not None and step > self._start + 1:
            self._seconds.append(record["step_seconds"])
            self._waits.append(record.get("data_wait_seconds") or 0.0)
        if self._warm is None and step >= self._start + _WARM_UP:
            self._warm = (step, now)
        if self._due(step, now):
            self._drawn, self._shown = now, step
            line = self.line(record)
            if self._terminal:
                self._draw(line)
            else:
                self._write(line + "\n")

    def _due(self, step: int, now: float) -> bool:
        if step >= self._total or self._shown == self._start:
            return True
        if self._terminal:
            return now - self._drawn >= _REDRAW_SECONDS
        interval = min(60.0, max(10.0, (now - self._began) / 60))
        tenth = max(1, self._total // 10)
        return now - self._drawn >= interval or step // tenth > self._shown // tenth

    def line(self, record: Mapping[str, Any]) -> str:
        """The line about a step's record."""
        step, loss = record["step"], record.get("loss")
        parts = [f"step {step}/{self._total} {100 * step // self._total}%"]
        parts.append(f"loss {loss:.3f}" if loss is not None and math.isfinite(loss) else "loss not finite")
        if self._seconds and sum(self._seconds) > 0:
            parts.append(f"{count(self._tokens / statistics.median(self._seconds))} tok/s")
            parts.append(f"data {100 * sum(self._waits) / sum(self._seconds):.1f}%")
        left = self.seconds_left(step)
        if left is not None:
            parts.append(
                f"{duration(left)} left" if step < self._total else f"{duration(self._clock() - self._began)} in all"
            )
        return "  ".join(parts)

    def seconds_left(self, step: int) -> float | None:
        """Seconds to the end at the pace of this process, evaluations and saves included; None while warming up."""
        if self._warm is None or step <= self._warm[0]:
            return None
        return (self._total - step) * (self._clock() - self._warm[1]) / (step - self._warm[0])

    def say(self, text: str) -> None:
        """Writes a line of its own: on a terminal above the progress line."""
        if self._terminal and self._line:
            self._write(f"\r\x1b[K{text}\n{self._line}")
        else:
            self._write(text + "\n")

    def close(self) -> None:
        """Leaves the last line standing."""
        if self._terminal and self._line:
            self._line = ""
            self._write("\n")

    def _draw(self, text: str) -> None:
        self._line = text[: columns(self._stream) - 1]  # a line that wraps could not be erased
        self._write(f"\r\x1b[K{self._line}")

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):
            pass  # a run outlives the terminal that it was started from; what matters is in its files
