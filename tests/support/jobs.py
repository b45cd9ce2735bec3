"""Jobs of one or more processes of `python -m launch.train` on the small run: started, watched, signalled, read."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.support.processes import ROOT, environment

UNFINISHED, TRASH = ".orbax-checkpoint-tmp", ".trash"  # in the names of folders that a kill may leave behind
CONFIG = "tests/support/small_run.py"
_LOOK_SECONDS = 0.003


class Job:
    """The processes of one start of a run.

    Args:
      workdir: the run's folder.
      source: the text.
      logs: a folder for what the processes say, one file each.
      processes: how many.
      options: further arguments.
      devices: how many CPU devices each process makes (None: as many as it finds best).
      env: environment variables that go over all others.
      slurm: whether the processes find each other as SLURM's do, instead of by flags.
    """

    def __init__(
        self,
        workdir: Path,
        source: Path,
        logs: Path,
        *,
        processes: int = 1,
        options: Sequence[str] = (),
        devices: int | None = None,
        env: Mapping[str, str] | None = None,
        slurm: bool = False,
    ) -> None:
        command = [sys.executable, "-m", "launch.train", f"--config={CONFIG}", f"--workdir={workdir}"]
        command += [f"--config.data.source={source}", *options]
        logs.mkdir(parents=True, exist_ok=True)
        self.workdir = workdir
        self.logs = [logs / f"process_{i}.txt" for i in range(processes)]
        self.began = time.monotonic()
        port = free_port()
        self.processes = []
        for i, log in enumerate(self.logs):
            mine, cluster = command, slurm_task(i, processes, port) if slurm else {}
            if processes > 1 and not slurm:
                mine = [*command, f"--coordinator_address=127.0.0.1:{port}", f"--num_processes={processes}"]
                mine.append(f"--process_id={i}")
            with log.open("w") as out:
                self.processes.append(
                    subprocess.Popen(
                        mine,
                        cwd=ROOT,
                        env=environment(devices, {**(env or {}), **cluster}),
                        stdin=subprocess.DEVNULL,
                        stdout=out,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                )

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self.began

    @property
    def statuses(self) -> list[int | None]:
        """Exit statuses; None where a process still runs, -9 for one that SIGKILL ended."""
        return [process.poll() for process in self.processes]

    @property
    def ended(self) -> bool:
        """Whether any process has."""
        return any(status is not None for status in self.statuses)

    def said(self, process: int = 0) -> str:
        """What a process has written to its terminal."""
        return self.logs[process].read_text("utf-8", errors="replace")

    def wait_for(self, moment: Callable[[], bool], seconds: float) -> bool:
        """Waits for a moment; False where a process ended, or the time was up, before it came."""
        end = time.monotonic() + seconds
        while not moment():
            if self.ended or time.monotonic() > end:
                return False
            time.sleep(_LOOK_SECONDS)
        return True

    def strike(self, number: signal.Signals, victims: Sequence[int]) -> None:
        """Sends a signal to some of the processes."""
        for i in victims:
            if self.processes[i].poll() is None:
                self.processes[i].send_signal(number)

    def wait(self, seconds: float) -> list[int]:
        """The exit statuses, once all have ended.

        Raises:
          AssertionError: where one has not in time; all are killed then.
        """
        end = time.monotonic() + seconds
        try:
            return [process.wait(max(0.0, end - time.monotonic())) for process in self.processes]
        except subprocess.TimeoutExpired:
            found = self.statuses
            self.kill()
            said = "\n".join(self.said(i)[-1500:] for i in range(len(self.logs)))
            raise AssertionError(f"not ended after {seconds:.0f} s, statuses {found}; they said:\n{said}") from None

    def kill(self) -> None:
        """Ends whatever still runs, at once."""
        self.strike(signal.SIGKILL, range(len(self.processes)))
        for process in self.processes:
            process.wait()


def slurm_task(index: int, count: int, port: int) -> dict[str, str]:
    """The environment that `srun` gives to a task, all of them on this machine."""
    values = {"JOB_ID": 4711, "STEP_NODELIST": "127.0.0.1", "NTASKS": count, "STEP_NUM_TASKS": count}
    values |= {"PROCID": index, "LOCALID": index}
    return {f"SLURM_{k}": str(v) for k, v in values.items()} | {"JAX_COORDINATOR_PORT": str(port)}


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def records(workdir: Path) -> list[dict[str, Any]]:
    """What `metrics.jsonl` holds; a last line that was cut short by a kill is left out."""
    file = workdir / "metrics.jsonl"
    lines = file.read_bytes().split(b"\n")[:-1] if file.exists() else []
    return [json.loads(line) for line in lines]


def last_step(workdir: Path) -> int:
    """The last step on record; 0 for none."""
    try:
        return max((r["step"] for r in records(workdir) if r["kind"] == "step"), default=0)
    except ValueError:  # looked at while it was being replaced
        return 0


def names(folder: Path) -> list[str]:
    """What is in a folder; nothing where it is not there."""
    try:
        return sorted(os.listdir(folder))
    except FileNotFoundError:
        return []


def checkpoints(workdir: Path) -> list[int]:
    """The steps that are committed: whether they are whole is for the next start to see."""
    return sorted(int(name) for name in names(workdir / "checkpoints") if name.isdecimal())


def saving(workdir: Path) -> int | None:
    """The step that is being saved, by the folder that it is being written to."""
    for name in names(workdir / "checkpoints"):
        if UNFINISHED in name and name.split(".")[0].isdecimal():
            return int(name.split(".")[0])
    return None


def fingerprints(workdir: Path, step: int) -> dict[str, Any]:
    """Every leaf's record in a checkpoint's manifest: shape, dtype, fingerprint."""
    file = workdir / "checkpoints" / str(step) / "manifest" / "metadata"
    return json.loads(file.read_text("utf-8"))["content"]["leaves"]
