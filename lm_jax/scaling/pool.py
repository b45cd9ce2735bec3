"""Several processes at work on a list of jobs, each of them on one job after the other.

A process that dies takes one job with it and is replaced. What a process does is its own affair: it is handed a line
of JSON a job and answers with one.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

_GRACE_SECONDS = 60.0  # a run saves and stops after its step; then its process is killed
NOT_FINISHED = 75  # the exit status of a process that was stopped before it had anything to save


@dataclasses.dataclass(frozen=True)
class Job:
    """What a process is handed.

    Attributes:
      name: of the job.
      payload: JSON.
      devices: how many simulated devices its process needs: it cannot change them later.
    """

    name: str
    payload: Mapping[str, Any]
    devices: int = 1


@dataclasses.dataclass
class State:
    """How a job stands: waiting, running, finished, saved (stopped on request), failed."""

    status: str = "waiting"
    reason: str = ""
    began: float = 0.0
    ended: float = 0.0


class Pool:
    """Works on jobs in their order.

    Args:
      command: starts a process.
      jobs: what there is to do.
      slots: the environment of each process, what it adds to this one's; as many processes as slots.
      cores: the cores that each slot's process may use; None: all.

    Attributes:
      states: how each job stands, by name; read it at any time.
    """

    def __init__(
        self,
        command: Sequence[str],
        jobs: Sequence[Job],
        slots: Sequence[Mapping[str, str]],
        cores: Sequence[list[int] | None],
    ) -> None:
        self.states = {job.name: State() for job in jobs}
        self._command = list(command)
        self._waiting = collections.deque(jobs)
        self._lock = threading.Lock()
        self._stopping = False
        self._processes: dict[int, subprocess.Popen[str]] = {}
        self._threads = [
            threading.Thread(target=self._work, args=(slot, dict(environment), cores[slot]), daemon=True)
            for slot, environment in enumerate(slots)
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    @property
    def working(self) -> bool:
        """Whether any process still works."""
        return any(thread.is_alive() for thread in self._threads)

    def wait(self, seconds: float) -> None:
        """Returns when all is done, or after so long."""
        until = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))

    def stop(self) -> None:
        """Has all processes save and end; those that take too long are killed. Returns at once; see `working`."""
        with self._lock:
            first, self._stopping = not self._stopping, True
            processes = list(self._processes.values())
        if not first:
            return
        for process in processes:
            _signal(process, signal.SIGTERM)
        timer = threading.Timer(_GRACE_SECONDS, self.kill)
        timer.daemon = True
        timer.start()

    def kill(self) -> None:
        """Ends all processes at once; a run goes on later from its last checkpoint."""
        with self._lock:
            self._stopping = True
            processes = list(self._processes.values())
        for process in processes:
            _signal(process, signal.SIGKILL)

    # ---------------------------------------------------------------------------------------------- a thread a process

    def _work(self, slot: int, environment: dict[str, str], cores: list[int] | None) -> None:
        process, devices = None, 0
        while (job := self._next()) is not None:
            if process is None or devices != job.devices:
                _end(process)
                process, devices = self._spawn(slot, environment, cores), job.devices
            state = self.states[job.name]
            state.began, state.status = time.monotonic(), "running"
            answer = _ask(process, job.payload)
            state.ended = time.monotonic()
            if answer is not None:
                state.reason, state.status = answer["reason"], answer["status"]
                continue
            code = process.wait()
            process = None
            if code == NOT_FINISHED or self._stopping:
                state.status = "saved"
            else:
                state.reason, state.status = _death(code), "failed"
        _end(process)

    def _next(self) -> Job | None:
        with self._lock:
            return None if self._stopping or not self._waiting else self._waiting.popleft()

    def _spawn(self, slot: int, environment: dict[str, str], cores: list[int] | None) -> subprocess.Popen[str]:
        # A session of its own: Ctrl-C reaches the process that asks for runs, and that one alone.
        process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={**os.environ, **environment},
        )
        with self._lock:
            self._processes[slot] = process
            stopping = self._stopping
        if stopping:
            _signal(process, signal.SIGTERM)
        _tell(process, {"cores": cores})
        return process


def _tell(process: subprocess.Popen[str], message: Mapping[str, Any]) -> None:
    assert process.stdin is not None
    with contextlib.suppress(OSError):  # it is gone: reading its answer will tell
        process.stdin.write(json.dumps(message) + "\n")
        process.stdin.flush()


def _ask(process: subprocess.Popen[str], payload: Mapping[str, Any]) -> dict[str, str] | None:
    """A process's answer; None where it ended without one."""
    assert process.stdout is not None
    _tell(process, payload)
    line = process.stdout.readline()
    try:
        answer: dict[str, str] = json.loads(line)
        return answer
    except ValueError:
        return None


def _end(process: subprocess.Popen[str] | None) -> None:
    """Lets a process that has nothing to do go."""
    if process is None:
        return
    assert process.stdin is not None
    with contextlib.suppress(OSError):
        process.stdin.close()
    try:
        process.wait(_GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _signal(process: subprocess.Popen[str], number: int) -> None:
    if process.poll() is None:
        with contextlib.suppress(OSError):
            process.send_signal(number)


def _death(code: int) -> str:
    """Why a process has ended without an answer, in words."""
    if code >= 0:
        return f"its process ended with status {code}: see log.txt"
    name = signal.Signals(-code).name
    hint = ", maybe for want of memory" if name == "SIGKILL" else ""
    return f"its process was ended by {name}{hint}: see log.txt"


def python(module: str) -> list[str]:
    """The command that runs a module with this interpreter."""
    return [sys.executable, "-m", module]
