"""Runs a command inside a job, and says by its exit status whether the job is to be started again.

    python -m launch.jobs.again --workdir=gs://bucket/run --job=ID -- python -m launch.train --workdir=gs://bucket/run

One on each host, started by whoever starts the job: `launch.tpu_pod`, a JobSet on GKE, a batch script of SLURM. All of
them know these statuses, and nothing else of what runs:

    0   finished
    75  start all hosts again: saved and not finished, a lost peer, a crash, a host that was killed
    76  do not: the user's mistake, or three starts without a new step

Starts are counted in WORKDIR/starts.json, under the job's ID: sent once more by a person, a job counts from one again.
The first host counts, when it starts and when it ends, so that a host that is killed is counted as well. What counts
as a step is what is committed: a run's newest checkpoint, and in the folder of a sweep those of its runs and the runs
that have ended. SIGTERM and Ctrl-C are handed on to the command, which saves and ends.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

from absl import flags

from launch import cli
from lm_jax.errors import UserError

if TYPE_CHECKING:
    from etils import epath

DONE, AGAIN, FINAL = 0, 75, 76
# What a host may end with that no start can better: FINAL, and where not even this program could be started there: a
# flag that it does not know, no such module, no such file.
HOPELESS = (1, cli.USER_MISTAKE, FINAL, 126, 127)
STARTS = "starts.json"
MOST_STARTS = 3  # without a new step

_FIRST_SPEAKS_SECONDS = 5.0  # how much later than the first host, which knows more, the others end
_PATIENCE = (1, 5, 20, 60)  # seconds between attempts to reach the run's folder

FLAGS = flags.FlagValues()
WORKDIR = flags.DEFINE_string(
    "workdir", None, "the run's folder (local, gs:// or s3://)", required=True, flag_values=FLAGS
)
JOB = flags.DEFINE_string("job", "", "which job this is: another one counts its starts anew", flag_values=FLAGS)
HOST = flags.DEFINE_integer(
    "host", None, "which of the job's hosts this is, from 0; None: as the cluster says", flag_values=FLAGS
)


def main(words: list[str], command: list[str]) -> int:
    from lm_jax.paths import run_path

    if words or not command:
        raise UserError("what is to be run comes behind --: python -m launch.jobs.again --workdir=DIR -- COMMAND")
    child = Child(command)
    host = _host() if HOST.value is None else HOST.value
    if host > 0:
        status = decide(child.run())
        if status != DONE and not child.signals:
            time.sleep(_FIRST_SPEAKS_SECONDS)
        return status
    return _first_host(run_path(WORKDIR.value), JOB.value, child)


def decide(code: int) -> int:
    """What a command's exit status (negative: killed by a signal) asks for, as one of this program's."""
    return {0: DONE, cli.USER_MISTAKE: FINAL}.get(code, AGAIN)


def _first_host(directory: epath.Path, job: str, child: Child) -> int:
    """Runs the command, and counts."""
    try:
        starts = patiently(lambda: begin(directory, job))
        if starts > MOST_STARTS:
            return _give_up(directory)
        if starts > 1:
            _say(f"start {starts} of {MOST_STARTS} without a new step in {directory}")
        status = decide(child.run())
        if status == AGAIN and starts == MOST_STARTS and not patiently(lambda: moved(directory)):
            return _give_up(directory)
    except OSError as e:
        raise UserError(f"starts cannot be counted in {directory}: {e}\nthe job ends, as nobody would notice") from e
    if status == FINAL:
        _say("not started again: the lines above say what is wrong")
    return status


def _give_up(directory: epath.Path) -> int:
    _say(
        f"{MOST_STARTS} starts made no new step in {directory}: the job ends\n"
        "the lines above, and log lines of earlier starts, say why; sent once more, the same job counts anew"
    )
    return FINAL


# ------------------------------------------------------------------------------------------------------------- counting


def begin(directory: epath.Path, job: str) -> int:
    """Counts a start. Returns how many there were, with this one, since the last new step."""
    from lm_jax import paths

    before, now = _record(directory), progress(directory)
    same = before.get("job") == job and now <= before.get("progress", -1)
    starts = before["starts"] + 1 if same else 1
    record = {"job": job, "starts": starts, "progress": max(now, before["progress"]) if same else now}
    paths.write_text_atomic(directory / STARTS, json.dumps(record) + "\n")
    return int(starts)


def moved(directory: epath.Path) -> bool:
    """Whether there is a new step since the last start."""
    return progress(directory) > _record(directory).get("progress", -1)


def progress(directory: epath.Path) -> int:
    """A number that grows with what a folder has of committed work. A step that was taken back and made again is no
    new one."""
    from lm_jax.training import steps

    runs = directory / "runs"
    folders = [directory, *(sorted(runs.iterdir()) if runs.exists() else ())]
    newest = [next(iter(steps.numbered(folder / steps.FOLDER)), 0) for folder in folders]
    return sum(newest) + sum((folder / "result.json").exists() for folder in folders)


def _record(directory: epath.Path) -> dict[str, Any]:
    from lm_jax import paths

    try:
        record = json.loads(paths.read_text(directory / STARTS))
    except (FileNotFoundError, ValueError):
        return {}
    return record if isinstance(record, dict) and isinstance(record.get("starts"), int) else {}


T = TypeVar("T")


def patiently(act: Callable[[], T]) -> T:
    """What `act` returns. An object store that does not answer is asked again for a minute or two.

    Raises:
      OSError: it does not answer even then.
    """
    from lm_jax.paths import StorageError

    for seconds in (*_PATIENCE, None):
        try:
            return act()
        except (StorageError, OSError) as e:
            if seconds is None:
                raise OSError(str(e).splitlines()[0]) from e
            time.sleep(seconds)
    raise AssertionError


# ---------------------------------------------------------------------------------------------------------- the command


class Child:
    """The command, as a process that gets the signals of this one.

    Attributes:
      signals: that have asked for an end.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self.signals: list[int] = []
        self._command = list(command)
        self._process: subprocess.Popen[bytes] | None = None
        self._parent = os.getpid()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._hand_on)

    def run(self) -> int:
        """Its exit status; the status of what was stopped where the end is asked for before it starts."""
        if self.signals:
            return AGAIN
        try:
            # In a session of its own, so that a signal to the whole group does not reach it twice.
            self._process = subprocess.Popen(self._command, start_new_session=True, preexec_fn=self._end_with_parent)
        except OSError as e:
            raise UserError(f"cannot run {self._command[0]}: {e.strerror}\nis the project installed here?") from e
        if self.signals:  # between the question above and here
            self._process.send_signal(signal.SIGTERM)
        return self._process.wait()

    def _hand_on(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.signals.append(number)
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)

    def _end_with_parent(self) -> None:
        """Where this program is killed, the command saves and ends: nobody else would stop it (Linux; prctl.h)."""
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(1, signal.SIGTERM, 0, 0, 0)
            if os.getppid() != self._parent:
                os.kill(os.getpid(), signal.SIGTERM)


def _host() -> int:
    from launch import cluster

    found = cluster.find()
    return found.process if found else 0


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    cli.run(main, FLAGS, command=True)
