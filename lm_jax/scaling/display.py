"""What a sweep shows: its table of runs before, and how they stand while they run."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from etils import epath

from lm_jax.paths import is_local
from lm_jax.scaling.pool import Pool
from lm_jax.scaling.sweep import Run
from lm_jax.training.metrics import FILE
from lm_jax.training.terminal import columns, count, duration

_TAIL = 4096  # bytes of a run's records that hold its last step
_PLAIN_SECONDS = 60.0


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Text in columns: the first to the left, the others to the right."""
    cells = [list(titles), *[list(row) for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(titles))]
    return "\n".join(
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in cells
    )


def listing(runs: Sequence[Run], hours: Mapping[str, float], status: Mapping[str, str]) -> str:
    """The runs of a sweep as a table: parameters, tokens, FLOPs, estimated hours, how each stands."""
    rows = []
    for run in runs:
        sizes = run.parameters
        rows.append(
            (
                run.name,
                count(sizes["total"]),
                count(sizes["without_embedding"]),
                count(run.tokens),
                str(run.config.train.total_steps),
                f"{run.flops:.2e}",
                f"{hours[run.name]:.3g}",
                status.get(run.name, ""),
            )
        )
    total = sum(run.flops for run in runs)
    text = table(("run", "parameters", "no embedding", "tokens", "steps", "FLOPs", "hours", ""), rows)
    return f"{text}\n{len(runs)} runs, {total:.2e} FLOPs, {sum(hours.values()):.3g} hours one after the other"


def last_step(directory: epath.Path) -> dict[str, Any] | None:
    """The last step that a run on this machine has on record."""
    if not is_local(directory):
        return None
    try:
        with open(os.fspath(directory / FILE), "rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - _TAIL))
            lines = file.read().decode("utf-8", errors="replace").split("\n")
    except OSError:
        return None
    for line in reversed(lines[:-1]):
        try:
            record: dict[str, Any] = json.loads(line)
        except ValueError:
            continue
        if record.get("kind") == "step":
            return record
    return None


class Live:
    """How the runs of a pool stand: drawn again in place on a terminal, lines as runs end (and one a minute) elsewhere.

    Args:
      runs: those that the pool works on, by name.
      directories: where each is.
      pool: at work.
      done: runs of the sweep that had ended before.
      stream: where it is written; stderr if None.
    """

    def __init__(
        self,
        runs: Mapping[str, Run],
        directories: Mapping[str, epath.Path],
        pool: Pool,
        *,
        done: int,
        stream: TextIO | None = None,
    ) -> None:
        self._runs, self._directories, self._pool, self._done = runs, directories, pool, done
        self._stream = sys.stderr if stream is None else stream
        self._terminal = self._stream.isatty() and os.environ.get("TERM", "") != "dumb"
        self._began = self._told = time.monotonic()
        self._lines = 0
        self._ended: set[str] = set()
        self._flops = {name: run.flops for name, run in runs.items()}

    def update(self) -> None:
        """Draws how things stand."""
        states = self._pool.states
        for name, state in states.items():
            if state.status in ("finished", "failed", "saved") and name not in self._ended:
                self._ended.add(name)
                took = duration(state.ended - state.began) if state.began else "0s"
                reason = f": {state.reason}" if state.reason else ""
                self.say(f"{state.status} {name} ({took}){reason}")
        now = time.monotonic()
        running = {name: last_step(self._directories[name]) for name, s in states.items() if s.status == "running"}
        if self._terminal:
            self._draw([self._summary(running), *(self._line(name, record) for name, record in running.items())])
        elif now - self._told >= _PLAIN_SECONDS:
            self._told = now
            self._write(self._summary(running) + "\n")

    def close(self) -> None:
        """A last time; what was drawn in place is taken away."""
        self.update()
        self._erase()

    def _summary(self, running: Mapping[str, dict[str, Any] | None]) -> str:
        states = self._pool.states
        failed = sum(state.status == "failed" for state in states.values())
        finished = sum(state.status == "finished" for state in states.values())
        total = sum(self._flops.values())
        parts = {name: self._share(name, record) for name, record in running.items()}
        done = sum(self._flops[name] for name in self._ended) + sum(self._flops[n] * p for n, p in parts.items())
        elapsed = time.monotonic() - self._began
        text = f"{self._done + finished} of {self._done + len(states)} runs finished"
        text += f", {failed} failed" if failed else ""
        text += f", {len(running)} running, {100 * done / total:.0f}% of the FLOPs, {duration(elapsed)}"
        return text + (f", {duration(elapsed * (total - done) / done)} left" if done > 0.01 * total else "")

    def _share(self, name: str, record: Mapping[str, Any] | None) -> float:
        return record["step"] / self._runs[name].config.train.total_steps if record else 0.0

    def _line(self, name: str, record: Mapping[str, Any] | None) -> str:
        if record is None:
            return f"  {name}: starting"
        loss = record.get("loss")
        shown = f"{loss:.3f}" if loss is not None and math.isfinite(loss) else "not finite"
        total = self._runs[name].config.train.total_steps
        return f"  {name}: step {record['step']}/{total}, loss {shown}"

    def say(self, text: str) -> None:
        """Writes a line that stays."""
        self._erase()
        self._write(text + "\n")

    def _draw(self, lines: Sequence[str]) -> None:
        width = columns(self._stream) - 1  # a line that wraps could not be erased
        self._erase()
        self._write("".join(line[:width] + "\n" for line in lines))
        self._lines = len(lines)

    def _erase(self) -> None:
        if self._lines:
            self._write(f"\x1b[{self._lines}A\x1b[J")
            self._lines = 0

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):
            pass  # a sweep outlives the terminal that it was started from
