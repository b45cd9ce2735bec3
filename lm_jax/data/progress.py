"""A line on stderr for work that a person waits for, with the time left; silent for what ends within two seconds."""

from __future__ import annotations

import sys
import time

PATIENCE = 2.0  # seconds before the first word
EVERY_TTY = 0.5  # seconds between updates of a terminal's line
EVERY_PLAIN = 10.0  # seconds between plain lines


class Progress:
    """Counts towards a total and says now and then how far it is. Use as a context manager."""

    def __init__(self, label: str, total: float) -> None:
        """Args: what is being done ("tokenising"), and the sum that `advance` will reach."""
        self.label, self.total, self.done = label, max(total, 1), 0.0
        self.start = time.monotonic()
        self.next = self.start + PATIENCE
        self.tty = sys.stderr.isatty()
        self.shown = False

    def advance(self, amount: float) -> None:
        self.done += amount
        now = time.monotonic()
        if now < self.next:
            return
        self.next = now + (EVERY_TTY if self.tty else EVERY_PLAIN)
        self.shown = True
        share = min(self.done / self.total, 1.0)
        left = (now - self.start) * (1 - share) / share if share > 0 else float("inf")
        line = f"{self.label}: {share:4.0%}" + (f", {_duration(left)} left" if left < 1e7 else "")
        print(f"\r{line:<60}" if self.tty else line, end="" if self.tty else "\n", file=sys.stderr, flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        if self.shown:
            line = f"{self.label}: {_duration(time.monotonic() - self.start)}"
            print(f"\r{line:<60}" if self.tty else line, file=sys.stderr, flush=True)


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
