"""Trains what it is told to, one run after the other: the process that `launch.sweep` starts, maybe several times.

It reads a line of JSON for each run from its standard input and answers with one on its standard output; what a run
prints goes to `log.txt` in the run's folder. Starting Python, JAX and its devices is paid for once. Where its standard
input ends, because whoever started it is gone, it saves the run that it is at and leaves.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from absl import flags

from launch import runtime
from lm_jax.errors import Failure, UserError

if TYPE_CHECKING:
    from etils import epath

_KEPT = 16  # runs whose traced programs are kept: some 5 MB each; the next run is set up in 3/4 of the time

FLAGS = flags.FlagValues()
runtime.define_process_flags(FLAGS)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else prints must not answer
    jobs: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
    busy = threading.Event()
    setup = json.loads(sys.stdin.readline())
    if setup["cores"] is not None:
        os.sched_setaffinity(0, setup["cores"])
    runtime.exit_on_signals()
    threading.Thread(target=_listen, args=(jobs, busy), daemon=True).start()
    done = 0
    while (job := jobs.get()) is not None:
        answer = _answer(job, done > 0)
        busy.clear()
        done += 1
        if done % _KEPT == 0:
            _forget()
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _forget() -> None:
    """What JAX has traced is of use to the next run, and adds up over many."""
    import jax

    jax.clear_caches()


def _listen(jobs: queue.SimpleQueue[dict[str, Any] | None], busy: threading.Event) -> None:
    """Hands on what comes in. At its end, the run that is being trained is asked to stop."""
    for line in sys.stdin:
        busy.set()  # before the job is taken up: the next line may be the end
        jobs.put(json.loads(line))
    jobs.put(None)
    if busy.is_set():
        os.kill(os.getpid(), signal.SIGTERM)


def _answer(job: Mapping[str, Any], started: bool) -> dict[str, str]:
    """Trains one run: how it ended (finished, saved, failed), and why it failed."""
    from lm_jax.paths import run_path

    directory = run_path(job["directory"])
    try:
        with _into_log(directory):
            try:
                return {"status": _train(job, directory, started), "reason": ""}
            except (UserError, Failure):
                raise
            except Exception:
                traceback.print_exc()
                raise
    except Exception as e:
        from lm_jax.scaling import outcome

        reason = (str(e).strip() or type(e).__name__).splitlines()[0]
        with contextlib.suppress(Failure, OSError):  # at once: whoever asked may be killed before all runs end
            outcome.write(directory, outcome.Outcome(job["fingerprint"], "failed", reason))
        return {"status": "failed", "reason": reason}


def _train(job: Mapping[str, Any], directory: epath.Path, started: bool) -> str:
    began = time.perf_counter()
    import jax

    from launch.memory import fitted
    from launch.train import objective
    from lm_jax.config import build
    from lm_jax.scaling import outcome
    from lm_jax.training.loop import FINISHED, train
    from lm_jax.training.memory import need
    from lm_jax.training.run import RunConfig

    config = build(RunConfig, job["config"])
    if not started:
        FLAGS(["worker", "--num_processes=1"])
        runtime.start(FLAGS, config)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # small programs, many times
    config = fitted(config)
    outcome.begin(directory, job["fingerprint"])
    if train(config, directory, objective, job["command"]) != FINISHED:
        return "saved"
    memory = need(config.with_likely_vocab(), jax.device_count())["total"]
    seconds = time.perf_counter() - began
    ended = outcome.finished(job["fingerprint"], directory, seconds=seconds, memory_bytes=memory)
    if not ended.finished:
        raise Failure(ended.reason)
    outcome.write(directory, ended)
    return "finished"


@contextlib.contextmanager
def _into_log(directory: epath.Path) -> Iterator[None]:
    """What is printed meanwhile goes to `log.txt`, behind what is there. (Nowhere for a run in an object store.)"""
    from lm_jax.paths import is_local, make_directory

    make_directory(directory)
    kept = os.dup(1), os.dup(2)
    path = os.fspath(directory / "log.txt") if is_local(directory) else os.devnull
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.dup2(log, 1)
        os.dup2(log, 2)
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, old in zip((1, 2), kept, strict=True):
            os.dup2(old, number)
            os.close(old)
        os.close(log)


if __name__ == "__main__":
    main()
