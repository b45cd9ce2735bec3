"""Runs what a config file's `sweep` declares.

    python -m launch.sweep --config=configs/sweeps/isoflop_tiny.py --workdir=runs/isoflop_tiny

Lists, runs, resumes and collects. The same command goes on where an earlier one stopped; runs that have ended are not
run again. Each run is a folder under DIR/runs as launch.train leaves it. Exit status: 0 all runs finished, 1 some
failed, 2 the user's mistake, 75 stopped and not finished (start me again).
"""

from __future__ import annotations

import functools
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from absl import flags
from ml_collections import ConfigDict

from launch import cli, runtime
from lm_jax.errors import Failure, UserError

if TYPE_CHECKING:
    from etils import epath

    from lm_jax.data.pipeline import Prepared
    from lm_jax.scaling.outcome import Outcome
    from lm_jax.scaling.pool import Job, Pool
    from lm_jax.scaling.sweep import Points, Run, Sweep

FLAGS = flags.FlagValues()
WORKDIR = flags.DEFINE_string("workdir", None, "the sweep's folder (local, gs:// or s3://)", flag_values=FLAGS)
DRY_RUN = flags.DEFINE_bool("dry_run", False, "print the table of runs, and run none", flag_values=FLAGS)
RETRY = flags.DEFINE_bool("retry", False, "run those that have failed once more", flag_values=FLAGS)
JOBS = flags.DEFINE_integer(
    "jobs", None, "how many runs at a time; None: as many as fit", lower_bound=1, flag_values=FLAGS
)
NEXT_FLOPS = flags.DEFINE_float(
    "next_flops", None, "training FLOPs of the next config; None: ten times the largest budget", flag_values=FLAGS
)

ONLY = flags.DEFINE_string(
    "only", None, "train this run alone: a job of its own, beside jobs for others", flag_values=FLAGS
)
MISSING = flags.DEFINE_bool("missing", False, "print the names of the runs that have not ended", flag_values=FLAGS)

_ASSUMED_MFU = 0.4  # of a device's bf16 peak, for estimates of hours before there are runs to go by
_TEXTS = "texts.json"  # fingerprints of the tokens that the sweep's runs read, by data config
_OTHERS_SECONDS = 90.0  # how long a process that lost its sweep may take to save its run
_CPU_FLOPS = 1.5e10  # a second and core, of models of a million parameters and less (x86, float32)


def main(config: ConfigDict, file: cli.ConfigFile) -> int:
    import jax

    from lm_jax.paths import lock, run_path
    from lm_jax.scaling import sweep
    from lm_jax.scaling.reports import make as report

    if getattr(file.module, "sweep", None) is None:
        raise UserError(f"{file.spec} declares no sweep\nwrite a function sweep(s) beside get_config")
    chosen = os.environ.get("JAX_PLATFORMS", "")
    jax.config.update("jax_platforms", "cpu")  # the devices are for the runs' processes
    report.check(getattr(file.module, "REPORT", report.PLAIN))
    plan = sweep.plan(config, functools.partial(_declared, file))
    for note in plan.notes:
        print(note, file=sys.stderr)
    if DRY_RUN.value:
        print(_listing(plan.runs, {}, _machine(chosen)))
        return 0
    if not WORKDIR.value:
        raise UserError("--workdir is missing: the sweep's folder (local, gs:// or s3://)")
    directory = run_path(WORKDIR.value)
    if MISSING.value:
        ended = _collect(plan.runs, _folders(plan.runs, directory))
        for run in plan.runs:
            if run.name not in ended:
                print(run.name)
        return 0
    if ONLY.value is not None:
        return _run_one(plan.runs, ONLY.value, directory, file, chosen)
    with lock(directory):
        return _run(plan.runs, directory, file, chosen)


def _folders(runs: Sequence[Run], directory: epath.Path) -> dict[str, epath.Path]:
    return {run.name: directory / "runs" / run.name for run in runs}


def _run_one(runs: Sequence[Run], name: str, directory: epath.Path, file: cli.ConfigFile, chosen: str) -> int:
    """Trains one run, and leaves the sweep's folder to others: no lock, no report. What has ended is left as it is.

    Raises:
      UserError: the sweep has no run of that name.
      Failure: the run failed.
    """
    from lm_jax.config import did_you_mean
    from lm_jax.scaling.display import Live
    from lm_jax.scaling.pool import Pool, python

    run = next((run for run in runs if run.name == name), None)
    if run is None:
        near = did_you_mean(name, [run.name for run in runs])
        raise UserError(f"--only={name}: the sweep has no such run\n{near}")
    folders = _folders([run], directory)
    if not _collect([run], folders):
        _wait_for_others(list(folders.values()))
        slots, cores = _slots([run], _machine(chosen), whole=1)
        pool = Pool(python("launch.worker"), [_job(run, folders[name], file)], slots, cores)
        _work(pool, Live({name: run}, folders, pool, done=0))
        _write_failures(pool, {name: run}, folders)
        if pool.states[name].status not in ("finished", "failed"):
            print(f"stopped before the end of {name}: the same command goes on", file=sys.stderr)
            return runtime.NOT_FINISHED
    outcome = _collect([run], folders)[name]
    print(f"{name}: {outcome.status}")
    if not outcome.finished:
        # No start can better what has ended: a failed run is run once more by the sweep's own --retry.
        raise UserError(
            f"{name}: {outcome.reason}\nsee {folders[name]}/log.txt; --retry of the sweep runs it once more"
        )
    return 0


def _declared(file: cli.ConfigFile, s: Sweep) -> Points:
    """What the config file's `sweep` declares.

    Raises:
      UserError: it fails; names its line.
    """
    try:
        points: Points = file.module.sweep(s)
        return points
    except UserError:
        raise
    except Exception as e:
        raise UserError(cli.failure(Path(file.module.__file__ or ""), e)) from e


def _run(runs: Sequence[Run], directory: epath.Path, file: cli.ConfigFile, chosen: str) -> int:
    """Runs what has not ended yet, and collects."""
    from lm_jax.scaling.display import Live
    from lm_jax.scaling.pool import Pool, python
    from lm_jax.scaling.reports import make as report

    folders = _folders(runs, directory)
    outcomes = _collect(runs, folders)
    missing = [r for r in runs if r.name not in outcomes or (RETRY.value and not outcomes[r.name].finished)]
    if missing:
        machine = _machine(chosen)
        print(_listing(runs, outcomes, machine), flush=True)
        _share_data(missing, directory)
        _wait_for_others([folders[run.name] for run in missing])
        missing.sort(key=lambda run: -run.flops)  # the longest first: the processes then end together
        slots, cores = _slots(missing, machine, whole=len(runs))
        pool = Pool(python("launch.worker"), [_job(r, folders[r.name], file) for r in missing], slots, cores)
        live = Live({r.name: r for r in missing}, folders, pool, done=len(runs) - len(missing))
        _work(pool, live)
        _write_failures(pool, {r.name: r for r in missing}, folders)
        # Not only by this process's signals: a cluster stops all processes of a job, each for itself.
        left = sum(state.status not in ("finished", "failed") for state in pool.states.values())
        if left:
            print(f"stopped with {left} of {len(runs)} runs to go: the same command goes on", file=sys.stderr)
            return runtime.NOT_FINISHED
        outcomes = _collect(runs, folders)
    made, summary = report.write(
        directory,
        getattr(file.module, "REPORT", report.PLAIN),
        runs,
        outcomes,
        command=_command(file),
        commands={run.name: _train_command(run, folders[run.name], file) for run in runs},
        flops=NEXT_FLOPS.value,
    )
    print("\n".join([*summary, f"the report: {made}"]))
    failed = {name: outcome.reason for name, outcome in outcomes.items() if not outcome.finished}
    if failed:
        first = next(iter(failed))
        raise Failure(
            f"{len(failed)} of {len(runs)} runs failed; {first}: {failed[first]}\n"
            f"see {folders[first]}/log.txt; --retry runs them once more"
        )
    return 0


def _collect(runs: Sequence[Run], folders: Mapping[str, epath.Path]) -> dict[str, Outcome]:
    """The outcomes that are there, by name.

    Raises:
      UserError: a run of that name was made with another config.
    """
    from lm_jax.scaling import outcome

    found = {run.name: outcome.read(folders[run.name]) for run in runs}
    for run in runs:
        ended = found[run.name]
        known = ended.fingerprint if ended is not None else outcome.begun(folders[run.name])
        if known not in (None, run.fingerprint):
            raise UserError(
                f"{folders[run.name]} was {'run' if ended else 'begun'} with another config\n"
                "give another --workdir, or delete that folder to run it again"
            )
    return {name: ended for name, ended in found.items() if ended is not None}


def _work(pool: Pool, live: Any) -> None:
    """Waits for the pool, showing how it stands. A signal has its runs save and stop; a second Ctrl-C ends them."""
    asked: list[int] = []
    told = False
    old = {n: signal.signal(n, lambda number, frame: asked.append(number)) for n in (signal.SIGINT, signal.SIGTERM)}
    pool.start()
    try:
        while pool.working:
            if asked and not told:
                told = True
                live.say("stopping: runs save after their step; Ctrl-C again ends them at once")
                pool.stop()
            if asked.count(signal.SIGINT) > 1:
                pool.kill()
            live.update()
            pool.wait(0.5)
    finally:
        live.close()
        for number, handler in old.items():
            signal.signal(number, handler)


def _wait_for_others(folders: Sequence[epath.Path]) -> None:
    """Until no process of a sweep that was killed saves one of these runs any more.

    Raises:
      UserError: one takes longer than that; names its process.
    """
    from lm_jax.paths import is_local, lock

    until, told = time.monotonic() + _OTHERS_SECONDS, False
    for folder in folders:
        while is_local(folder) and folder.exists():
            try:
                lock(folder).release()
                break
            except UserError as e:
                if time.monotonic() > until:
                    raise
                if not told:
                    print(f"{str(e).splitlines()[0]}: waiting for it to save", file=sys.stderr, flush=True)
                told = True
                time.sleep(0.5)


def _write_failures(pool: Pool, runs: Mapping[str, Run], folders: Mapping[str, epath.Path]) -> None:
    from lm_jax.scaling import outcome

    for name, state in pool.states.items():
        if state.status == "failed":
            outcome.write(folders[name], outcome.Outcome(runs[name].fingerprint, "failed", state.reason))


def _share_data(runs: Sequence[Run], directory: epath.Path) -> None:
    """Makes tokenizers and tokens once for all runs, before any of them asks for it.

    Raises:
      UserError: a run asks for more passes over its text than it may; the text is another one than when runs of this
        sweep were started before.
    """
    from lm_jax import paths
    from lm_jax.config import to_dict
    from lm_jax.data.pipeline import prepare

    made: dict[tuple[str, int], Prepared] = {}
    for run in runs:
        train = run.config.train
        key = (json.dumps(to_dict(run.config.data), sort_keys=True), train.length)
        if key not in made:
            made[key] = prepare(run.config.data, length=train.length, seed=train.seed)
        try:
            made[key].check_epochs(train.total_steps * train.batch_size)
        except UserError as e:
            raise UserError(f"run {run.name}: {e}") from e
    now = {text: prepared.data for (text, _), prepared in made.items()}
    file = directory / _TEXTS
    before: dict[str, str] = json.loads(paths.read_text(file)) if file.exists() else {}
    for (text, _), prepared in made.items():
        if before.get(text, now[text]) != now[text]:
            raise UserError(
                f"data.source {prepared.config.source!r} is not the text that earlier runs in {directory} were trained "
                "on\n"
                "give another --workdir: losses on different texts cannot be compared"
            )
    paths.write_text_atomic(file, json.dumps(before | now, indent=1) + "\n")


def _job(run: Run, folder: epath.Path, file: cli.ConfigFile) -> Job:
    from launch.runtime import cpu_devices
    from lm_jax.config import to_dict
    from lm_jax.scaling.pool import Job

    payload = {
        "name": run.name,
        "config": to_dict(run.config),
        "directory": os.fspath(folder),
        "command": _train_command(run, folder, file),
        "fingerprint": run.fingerprint,
    }
    return Job(run.name, payload, cpu_devices(run.config))


def _train_command(run: Run, folder: epath.Path, file: cli.ConfigFile) -> str:
    """What trains one run of the sweep by itself."""
    words = ["python", "-m", "launch.train", f"--config={file.spec}", *_overrides(file)]
    words += [f"--config.{key}={value}" for key, value in run.values.items()]
    return shlex.join([*words, f"--workdir={folder}"])


def _overrides(file: cli.ConfigFile) -> list[str]:
    return [f"--config.{key}" + ("" if text is None else f"={text}") for key, text in file.overrides]


def _command(file: cli.ConfigFile) -> str:
    words = ["python", "-m", "launch.sweep", f"--config={file.spec}", *_overrides(file)]
    words += [] if NEXT_FLOPS.value is None else [f"--next_flops={NEXT_FLOPS.value}"]
    return shlex.join([*words, f"--workdir={WORKDIR.value}"])


# --------------------------------------------------------------------------------------------------------- the machine


class Machine(NamedTuple):
    """What the runs' processes find: the platform, how many devices, of which kind."""

    platform: str
    devices: int
    kind: str


@functools.cache
def _machine(chosen: str) -> Machine:
    """The machine as a process finds it that may use its devices: asking takes them."""
    if chosen == "cpu":
        return Machine("cpu", 1, "cpu")
    ask = "import jax; d = jax.local_devices(); print(d[0].platform, len(d), d[0].device_kind, sep='|')"
    try:
        answer = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True, timeout=300)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as e:
        lines = (e.stderr or "").strip().splitlines() if isinstance(e.stderr, str) else []
        raise Failure(f"JAX finds no devices here: {lines[-1] if lines else e}") from e
    platform, devices, kind = answer.stdout.strip().splitlines()[-1].split("|")
    return Machine(platform, 1 if platform == "cpu" else int(devices), kind)


def _slots(runs: Sequence[Run], machine: Machine, *, whole: int) -> tuple[list[dict[str, str]], list[list[int] | None]]:
    """The processes that work at a time: what each adds to the environment, and its cores.

    Args:
      runs: that are left.
      machine: that they run on.
      whole: how many runs the sweep has. The last one left on several GPUs still gets one, as the others did.
    """
    if machine.platform == "gpu":
        alone = all(run.config.mesh.devices <= 1 for run in runs)  # negative where the mesh leaves an axis open
        if alone and min(JOBS.value or machine.devices, machine.devices, whole) > 1:
            wanted = min(JOBS.value or machine.devices, machine.devices, len(runs))
            given = os.environ.get("CUDA_VISIBLE_DEVICES")  # those that this sweep may use; not all, or not the first
            names = given.split(",") if given else [str(i) for i in range(wanted)]
            return [{"CUDA_VISIBLE_DEVICES": name.strip()} for name in names[:wanted]], [None] * wanted
    if machine.platform != "cpu":
        return [{}], [None]
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    available = len(cores) if cores else os.cpu_count() or 1
    wanted = max(1, min(JOBS.value or min(available, _fitting(runs)), len(runs)))
    if cores is None or wanted > available:
        return [{}] * wanted, [None] * wanted
    share = available // wanted
    return [{}] * wanted, [cores[i * share : (i + 1) * share] for i in range(wanted)]


def _fitting(runs: Sequence[Run]) -> int:
    """How many runs this machine's memory holds at a time."""
    from lm_jax.costs import host_memory
    from lm_jax.training.memory import need

    available = host_memory()
    if available is None:
        return 1
    largest = max(runs, key=lambda run: run.parameters["total"] * 10 + run.config.train.tokens_per_step).config
    return int(0.8 * available / (need(largest.with_likely_vocab(), 1)["total"] + 7e8))  # Python, JAX, XLA: 0.7 GB


def _listing(runs: Sequence[Run], outcomes: Mapping[str, Outcome], machine: Machine) -> str:
    from lm_jax.scaling.display import listing

    speed = _speed(outcomes, machine)
    status = {name: outcome.status for name, outcome in outcomes.items()}
    return listing(runs, {run.name: run.flops / speed / 3600 for run in runs}, status)


def _speed(outcomes: Mapping[str, Outcome], machine: Machine) -> float:
    """FLOPs a second that a run is taken to reach: what earlier ones did, else an assumption."""
    from lm_jax.costs import peak_flops

    ended = [o for o in outcomes.values() if o.finished and o.seconds > 0]
    if ended:
        # A run that went on in another process has but the last one's seconds.
        return sum(o.flops for o in ended) / sum(max(o.seconds, o.training_seconds) for o in ended)
    peak = peak_flops(machine.kind)
    return _CPU_FLOPS * (os.cpu_count() or 1) if peak is None else _ASSUMED_MFU * peak * machine.devices


if __name__ == "__main__":
    runtime.exit_on_signals()
    cli.run(main, FLAGS, config=True, file=True)
