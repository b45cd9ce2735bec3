"""All stages on this machine, each task in one of several processes."""

from __future__ import annotations

import concurrent.futures
import contextlib
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from lm_jax.corpus import folders, stages
from lm_jax.corpus.folders import Plan
from lm_jax.data.progress import Progress
from lm_jax.errors import Failure, UserError


def run(plan: Plan, processes: int) -> None:
    """Does what is not done yet of all stages.

    Args:
      plan: as `folders.write_plan` wrote it; whoever calls holds the lock of its folder.
      processes: how many tasks are worked on at a time.

    Raises:
      UserError: for raw files or settings that cannot be used.
      Failure: where storage fails, or a worker is killed; the same command goes on from there.
      SystemExit: after Ctrl-C, once the workers have ended; nothing more is said.
    """
    folders.clear_unfinished(plan)
    # Not forked: the libraries that workers use have threads. A worker keeps what it has loaded from task to task.
    context = multiprocessing.get_context("spawn")
    others = set(multiprocessing.active_children())
    with concurrent.futures.ProcessPoolExecutor(
        processes, context, initializer=_end_with, initargs=(os.getpid(),)
    ) as pool:
        try:
            for stage in stages.stages_of(plan):
                _run_stage(plan, stage, pool)
        except KeyboardInterrupt:
            for process in set(multiprocessing.active_children()) - others:
                process.terminate()
            print("stopped; the same command goes on where it was", file=sys.stderr, flush=True)
            # A thread of the pool may find that its workers are gone while it is being closed, and say so at length.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            raise SystemExit(128 + signal.SIGINT) from None


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Processes that are started in the body never see Ctrl-C, which goes to all that a terminal runs: this one ends
    them. What comes in the meantime comes at its end."""
    came: list[int] = []
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # which they inherit
    # Here it may still reach another thread, and Python would raise it in this one, with a process half started.
    heeded = signal.getsignal(signal.SIGINT) is not signal.SIG_IGN  # under nohup and its like it is ignored
    main = heeded and threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, lambda number, frame: came.append(number)) if main else None
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if main:
            signal.signal(signal.SIGINT, before)
    if came:
        raise KeyboardInterrupt


def _run_stage(plan: Plan, stage: str, pool: concurrent.futures.Executor) -> None:
    tasks = stages.tasks_of(plan, stage)
    weights = plan.part_bytes if stages.STAGES[stage].per_part else [1]
    waiting = [task for task in range(tasks) if not plan.folder(stage, task).is_dir()]
    with Progress(stages.STAGES[stage].doing, sum(weights[task] for task in waiting)) as progress:
        with _uninterrupted():
            futures = {pool.submit(_task, plan.out, stage, task): task for task in waiting}
        try:
            for future in concurrent.futures.as_completed(futures):
                if said := future.result():
                    raise said[0](said[1])
                progress.advance(weights[futures[future]])
        except BrokenProcessPool:
            raise Failure(
                f"a process that was {stages.STAGES[stage].doing} was killed, by lack of memory as a rule\n"
                "the same command goes on where it was; --processes=1 needs the least memory"
            ) from None
        finally:
            for future in futures:
                future.cancel()


def _task(out: Path, stage: str, task: int) -> tuple[type[UserError] | type[Failure], str] | None:
    """`stages.run_task` in a worker. What it has to say to the user comes back as plain values: an exception whose
    constructor takes other things than its text does not survive the way between processes."""
    try:
        stages.run_task(out, stage, task)
    except UserError as error:
        return UserError, str(error)
    except Failure as error:
        return Failure, str(error)
    return None


def _end_with(parent: int) -> None:
    """In a worker: ends it when the process that gives it work is gone, in whatever way."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def clear(plan: Plan) -> None:
    """Removes what only the work needed. What was prepared is whole without it; the plan stays, beside it."""
    shutil.rmtree(plan.work, ignore_errors=True)
