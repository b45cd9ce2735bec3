"""Stopping at a step's end when SIGTERM or SIGINT asks for it, with one process or many."""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils


class StopSignal:
    """Whether the run has been asked to stop. A context manager, entered in the main thread after the set-up of
    `jax.distributed`, so that it takes the place of no handler of that.

    SIGTERM and SIGINT (Ctrl-C) ask; a second SIGINT ends the process at once. With several processes it is enough that
    one of them is asked: all stop after the same step.
    """

    def __init__(self) -> None:
        self._asked = False
        self._stopping = False
        self._many = jax.process_count() > 1
        self._old: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        self._old[signal.SIGINT] = signal.signal(signal.SIGINT, self._interrupt)
        if not self._many:
            self._old[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._terminate)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def should_stop(self, step: int) -> bool:
        """Whether to save and end after this step. With several processes all must call it after every step."""
        if self._many and not self._stopping:
            # jax.distributed hears SIGTERM itself, and has all processes agree on the step.
            self._stopping = multihost_utils.reached_preemption_sync_point(step)
        return self._stopping if self._many else self._asked

    def _terminate(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self._asked = True

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self._asked:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self._asked = True
        os.write(
            2, b"\nsaving and stopping after this step; Ctrl-C again ends at once\n"
        )  # print may not be re-entered
        if self._many:
            os.kill(os.getpid(), signal.SIGTERM)
