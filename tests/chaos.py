"""Kills training at bad moments and looks whether anything was lost.

    python -m tests.chaos --runs=30 --processes=both

A run here is real processes of `launch.train` (one, or two that find each other by their flags), struck by SIGKILL,
SIGTERM or SIGINT at a random moment, started again by the same command, struck again, and in the end left to finish.
Then it must be the run that was never stopped: every step once, bit for bit its losses, gradient norms, batches and
evaluations, and the last checkpoint leaf by leaf. On the way no committed step may be lost, and exit statuses must say
what happened. The moments aim at what is fragile: starting, tokenising, compiling, saves in the background, the
deletion of old checkpoints, the end.

Exit status 1 if anything differed; the folders of such runs are kept.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.support import jobs
from tests.support.jobs import Job
from tests.support.small_run import write_text

STEPS, EVERY, KEEP_EVERY = 80, 7, 28  # as small_run.py has them
PATIENCE = 600  # seconds that a process may take to end; a busy machine is slow
FINISHED, FAILED, SAVED = 0, 1, 75
TIMES = ("tokens_per_second", "step_seconds", "data_wait_seconds", "peak_memory_bytes", "mfu")
SIGNALS = {signal.SIGKILL: 5, signal.SIGTERM: 3, signal.SIGINT: 1}
EARLY = {"starting": 2, "tokenising": 1, "compiling": 1}  # moments, and how often each
LATE = {"stepping": 4, "saving": 5, "retiring": 3, "ending": 1}


class Different(AssertionError):
    """A run is not what it must be."""


def need(holds: bool, what: str) -> None:
    """Raises `Different` unless it holds."""
    if not holds:
        raise Different(what)


@dataclasses.dataclass(frozen=True)
class Blow:
    """A signal at a moment.

    Attributes:
      number: which signal.
      moment: of `EARLY` or `LATE`.
      step: for late moments, not before this step.
      delay: seconds after the moment.
      victims: the processes that get it.
    """

    number: signal.Signals
    moment: str
    step: int = 0
    delay: float = 0.0
    victims: tuple[int, ...] = (0,)

    def __str__(self) -> str:
        where = f" {self.step}" if self.step else ""
        return f"{self.number.name[3:]} {'+'.join(map(str, self.victims))} {self.moment}{where}"


def random_blow(choice: random.Random, run: Run) -> Blow:
    """A blow for a run as it is now."""

    def one_of(weights: dict[Any, int]) -> Any:
        return choice.choices(list(weights), list(weights.values()))[0]

    everyone, newest = tuple(range(run.processes)), run.newest or 0
    victims = choice.choice([everyone, *((i,) for i in everyone)])
    late = choice.random() < 0.8
    moment = one_of(LATE if late else EARLY)
    if moment == "ending" and run.resumes < 1:  # what comes after it would find nothing left to do
        moment = "saving"
    step = choice.randint(min(newest + 2, STEPS - 2), min(newest + 2 * EVERY + 2, STEPS - 2))
    delays = {
        "starting": run.reference.start_seconds,
        "tokenising": 0.05,
        "compiling": 2.0,
        "retiring": 0.005,
        "ending": 1.0,
    }
    delay = choice.uniform(0, delays.get(moment, 0.03))
    return Blow(one_of(SIGNALS), moment, step if late else 0, delay, victims)


def moment_of(blow: Blow, job: Job, cache: Path) -> Callable[[], bool]:
    """Whether the blow's moment has come."""
    run = job.workdir

    def training() -> bool:  # before that the records are those of the start before
        return "compiling" in job.said()

    def retiring() -> bool:
        step = jobs.last_step(run)
        trash = jobs.TRASH in jobs.names(run / "checkpoints")
        return step >= blow.step and (trash or step > blow.step + 2 * EVERY)  # too quick to be seen every time

    return {
        "starting": lambda: True,
        "tokenising": lambda: bool(jobs.names(cache / "data")),
        "compiling": training,
        "stepping": lambda: training() and jobs.last_step(run) >= blow.step,
        "saving": lambda: training() and (jobs.saving(run) or 0) >= blow.step,
        "retiring": lambda: training() and retiring(),
        "ending": lambda: training() and jobs.last_step(run) >= STEPS,
    }[blow.moment]


@dataclasses.dataclass(frozen=True)
class Reference:
    """A run that was never stopped."""

    records: list[dict[str, Any]]
    leaves: dict[str, Any]
    start_seconds: float  # until its first step, on a warm cache


class World:
    """The text, the caches and the references that runs share, in one folder; compiled programs may lie elsewhere."""

    def __init__(self, folder: Path, compiled: Path | None = None) -> None:
        self.folder = folder
        self.source = write_text(folder / "text")
        self.cache, self.compiled = folder / "cache", compiled or folder / "compiled"
        self._references: dict[int, Reference] = {}

    def job(self, folder: Path, processes: int, start: int, cache: Path, compiled: Path) -> Job:
        env = {"LM_JAX_CACHE": str(cache), "JAX_COMPILATION_CACHE_DIR": str(compiled)}
        devices = 3 - processes  # two in all: on any machine the same program
        return Job(folder / "run", self.source, folder / f"log_{start}", processes=processes, devices=devices, env=env)

    def reference(self, processes: int) -> Reference:
        """The run of that many processes that was never stopped, made on first use."""
        if processes not in self._references:
            name = f"reference_{processes}"
            job = self.job(self.folder / name, processes, 1, self.cache, self.compiled)
            try:
                need(job.wait_for(lambda: jobs.last_step(job.workdir) >= 1, PATIENCE), f"{name}: no step\n{job.said()}")
                start_seconds = job.seconds
                statuses = job.wait(PATIENCE)
            finally:
                job.kill()
            need(statuses == [FINISHED] * processes, f"{name} ended with {statuses}\n{job.said()}")
            leaves = jobs.fingerprints(job.workdir, STEPS)
            self._references[processes] = Reference(timeless(job.workdir), leaves, start_seconds)
        return self._references[processes]


def timeless(workdir: Path) -> list[dict[str, Any]]:
    """A run's records without what the clock decides."""
    return [{k: v for k, v in record.items() if k not in TIMES} for record in jobs.records(workdir)]


class Run:
    """One run: struck, started again, and compared.

    Attributes:
      blows: those that it got.
      resumes: how many starts went on from a checkpoint.
      alone: the longest, in seconds, that a process took to end by itself after another was killed.
    """

    def __init__(self, world: World, name: str, processes: int) -> None:
        self.world, self.processes = world, processes
        self.reference = world.reference(processes)
        self.folder = world.folder / name
        self.workdir = self.folder / "run"
        self.blows: list[Blow] = []
        self.starts = self.resumes = 0
        self.alone = 0.0
        self.cache, self.compiled = world.cache, world.compiled

    @property
    def newest(self) -> int | None:
        """The newest committed checkpoint."""
        return max(jobs.checkpoints(self.workdir), default=None)

    def start(self) -> Job:
        self.starts += 1
        return self.world.job(self.folder, self.processes, self.starts, self.cache, self.compiled)

    def strike(self, blow: Blow) -> bool:
        """Starts the run, strikes it and looks at what is left. False where it finished before the moment came."""
        if blow.moment == "tokenising":
            self.cache = self.folder / f"cache_{self.starts}"
        if blow.moment == "compiling":
            self.compiled = self.folder / "compiled"
        self.blows.append(blow)
        before, job = self.newest, self.start()
        try:
            came = job.wait_for(moment_of(blow, job, self.cache), PATIENCE)
            self._delay(job, blow)
            job.strike(blow.number, blow.victims)
            statuses = self._end(job, blow)
        finally:
            job.kill()
        need(came or self._finished(statuses), f"ended with {statuses} before {blow}\n{job.said()[-1500:]}")
        self._check_start(job, before)
        self._check_disk(before)
        if came and not self._finished(statuses):
            self._check_statuses(job, blow, statuses)
        return not self._finished(statuses)

    def finish(self) -> None:
        """Starts the run, lets it finish, and compares it with the reference."""
        before, job = self.newest, self.start()
        try:
            statuses = job.wait(PATIENCE)
        finally:
            job.kill()
        need(statuses == [FINISHED] * self.processes, f"the last start ended with {statuses}\n{job.said()[-1500:]}")
        self._check_start(job, before)
        self._check_disk(before)
        self._compare()

    def _delay(self, job: Job, blow: Blow) -> None:
        if blow.moment == "starting":  # on a machine that has become faster it is over sooner
            job.wait_for(lambda: "compiling" in job.said(), blow.delay)
        else:
            time.sleep(blow.delay)

    def _end(self, job: Job, blow: Blow) -> list[int]:
        """The exit statuses. What waits for a process that is gone is left to notice it, once training goes on."""
        left = [i for i in range(self.processes) if i not in blow.victims]
        if not left or (blow.number != signal.SIGKILL and "compiling" in job.said()):
            return job.wait(PATIENCE)
        if "compiling" not in job.said():  # they may still be looking for each other
            time.sleep(2)
            job.kill()
            return job.wait(PATIENCE)
        began = time.monotonic()
        statuses = job.wait(PATIENCE)
        self.alone = max(self.alone, time.monotonic() - began)
        for i in left:
            finished = statuses[i] == FINISHED and self.newest == STEPS
            need(finished or statuses[i] not in (FINISHED, SAVED), f"process {i} lost its peer and ended {statuses}")
        return statuses

    def _finished(self, statuses: Sequence[int]) -> bool:
        return all(status == FINISHED for status in statuses)

    def _check_statuses(self, job: Job, blow: Blow, statuses: Sequence[int]) -> None:
        """SIGKILL shows as it is; who was asked to stop says that there is something to go on from."""
        said = job.said()
        for i in blow.victims:
            if blow.number == signal.SIGKILL:
                need(statuses[i] in (-signal.SIGKILL, FINISHED), f"{blow}: process {i} ended with {statuses[i]}")
                continue
            early = {-blow.number} | ({FAILED} if blow.number == signal.SIGINT else set())
            starting = "2 x cpu" not in said and "1 x cpu" not in said  # maybe Python itself was
            allowed = {SAVED, FINISHED} | (early if starting else set())
            need(statuses[i] in allowed, f"{blow}: process {i} ended with {statuses[i]}\n{job.said(i)[-1500:]}")
        stopped = blow.number != signal.SIGKILL and "compiling" in said and "while starting" not in said
        if stopped:
            need(set(statuses) <= {SAVED, FINISHED}, f"{blow}: ended with {statuses}\n{said[-1500:]}")
            last = jobs.last_step(self.workdir)
            need(self.newest == last, f"{blow}: stopped after step {last}, saved {self.newest}")

    def _check_start(self, job: Job, before: int | None) -> None:
        """A start goes on from the newest committed checkpoint, and finds none damaged."""
        said = job.said()
        need("damaged" not in said, f"start {self.starts} told of damage:\n{said}")
        resumed = f"going on from checkpoint {before}\n" in said
        need(resumed or before is None or "eval_loss" not in said, f"did not go on from {before}:\n{said[-1500:]}")
        need(resumed or "going on" not in said, f"went on from another step than {before}:\n{said}")
        self.resumes += resumed

    def _check_disk(self, before: int | None) -> None:
        """No committed step is gone, and the steps up to the newest are all on record, once each."""
        newest = self.newest
        need(
            before is None or (newest or 0) >= before, f"checkpoint {before} was committed, and now {newest} is newest"
        )
        kept = set(range(KEEP_EVERY, (newest or 0) + 1, KEEP_EVERY))
        need(kept <= set(jobs.checkpoints(self.workdir)), f"{sorted(kept)} are kept for good, and not all are there")
        steps = [r["step"] for r in jobs.records(self.workdir) if r["kind"] == "step"]
        need(len(set(steps)) == len(steps), f"a step twice in metrics.jsonl: {steps}")
        missing = set(range(1, (newest or 0) + 1)) - set(steps)
        need(not missing, f"checkpoint {newest} is committed, and steps {sorted(missing)} are not on record")

    def _compare(self) -> None:
        """The finished run with the reference."""
        ours = timeless(self.workdir)
        for mine, theirs in zip(ours, self.reference.records, strict=False):
            need(mine == theirs, f"a record differs:\n  {mine}\n  {theirs}")
        need(len(ours) == len(self.reference.records), f"{len(ours)} records, not {len(self.reference.records)}")
        leaves = jobs.fingerprints(self.workdir, STEPS)
        other = [name for name, leaf in self.reference.leaves.items() if leaves.get(name) != leaf]
        need(not other and len(leaves) == len(self.reference.leaves), f"leaves of the last checkpoint differ: {other}")
        left = [n for n in jobs.names(self.workdir / "checkpoints") if not n.isdecimal()]
        allowed = {".lock", "checkpoints", "config.json", "loss.png", "metrics.jsonl", "report.md", "tensorboard"}
        left += [n for n in jobs.names(self.workdir) if n not in allowed and not n.startswith("stacks-")]
        left += [n for n in jobs.names(self.cache / "data") if ".tmp-" in n]
        need(not left, f"left behind: {left}")


def chaos_run(world: World, name: str, processes: int, choice: random.Random) -> Run:
    """A run with two to four random blows, and more until it has been resumed twice."""
    run = Run(world, name, processes)
    blows = choice.randint(2, 4)
    while len(run.blows) < blows or (run.resumes < 1 and len(run.blows) < 8):
        if not run.strike(random_blow(choice, run)):
            break
    run.finish()
    return run


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--processes", choices=("1", "2", "both"), default="both")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    counts = (1, 2) if options.processes == "both" else (int(options.processes),)
    folder = Path(tempfile.mkdtemp(prefix="lm_jax_chaos_"))
    world = World(folder)
    for processes in counts:
        began = time.monotonic()
        seconds = world.reference(processes).start_seconds
        print(
            f"reference of {processes}: {time.monotonic() - began:.0f} s, {seconds:.1f} s to its first step", flush=True
        )
    wrong, blows, resumes, alone, began = 0, 0, 0, 0.0, time.monotonic()
    for n in range(1, options.runs + 1):
        processes, at = counts[n % len(counts)], time.monotonic()
        try:
            run = chaos_run(world, f"run_{n}", processes, random.Random(f"{options.seed}/{n}"))
        except Different as e:
            wrong += 1
            print(f"run {n} ({processes}): WRONG: {e}\nits files are in {folder / f'run_{n}'}", flush=True)
            continue
        blows, resumes, alone = blows + len(run.blows), resumes + run.resumes, max(alone, run.alone)
        shutil.rmtree(run.folder)
        left = (time.monotonic() - began) / n * (options.runs - n)
        what = ", ".join(map(str, run.blows))
        seconds = time.monotonic() - at
        print(f"run {n} ({processes}): {seconds:.0f} s, {run.resumes} resumes: {what}; {left / 60:.0f} min left")
        sys.stdout.flush()
    print(f"{options.runs} runs, {blows} blows, {resumes} resumes, {wrong} wrong; seed {options.seed}")
    if alone:
        print(f"a process whose peer was killed ended by itself within {alone:.0f} s")
    if not wrong:
        shutil.rmtree(folder)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
