"""What a job is: mistakes are told before any machine is asked for."""

from __future__ import annotations

import dataclasses
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
from absl import flags

from launch import cli
from launch.jobs import sweeps
from launch.jobs.job import Job, define_flags, job_of
from lm_jax.errors import UserError
from tests.support.processes import run_module
from tests.support.small_run import write_text

COMMAND = ["python", "-m", "launch.train", "--config=configs/tiny.py", "--workdir=gs://bucket/tiny"]


def described(*options: str, command: Sequence[str] = COMMAND, shared_disk: bool = False) -> Job:
    values = flags.FlagValues()
    define_flags(values, tpus=True, gpus=True)
    cli.parse(values, ["x", "--name=lm", *options])
    return job_of(values, command, shared_disk=shared_disk)


def with_workdir(workdir: str, *more: str) -> list[str]:
    return [*COMMAND[:-1], f"--workdir={workdir}", *more]


def test_a_job_is_as_described() -> None:
    job = described("--slice=v5p-128", "--env=A=b=c", "--env=EMPTY=")
    assert job.slice is not None and job.slice.name == "v5p:4x4x4" and job.hosts == 16
    assert job.workdir == "gs://bucket/tiny" and job.command == tuple(COMMAND)
    assert job.environment == (("A", "b=c"), ("EMPTY", ""))
    assert described("--nodes=3", "--gpus=8").hosts == 3
    assert job.watched("id", host="2")[:6] == [
        *["python", "-m", "launch.jobs.again", "--workdir=gs://bucket/tiny", "--job=id", "--host=2"]
    ]


@pytest.mark.parametrize(
    ("options", "command", "words"),
    [
        (["--name=LM_7b"], COMMAND, ("--name=LM_7b", "--name=lm-7b")),
        (["--name=" + "a" * 41], COMMAND, ("at most 40",)),
        (["--slice=v5p:4x4x5"], COMMAND, ("nearest", "v5p:4x4x4")),
        (["--slice=v5p:4x4x4", "--gpus=8"], COMMAND, ("one or the other",)),
        (["--env=A"], COMMAND, ("--env=NAME=VALUE",)),
        (["--env=1A=b"], COMMAND, ("--env=NAME=VALUE",)),
        ([], [], ("nothing", "behind --")),
        ([], ["rm", "-rf", "x"], ("not rm -rf x", "python -m launch.train")),
        ([], ["python", "-m", "launch.trian", "--workdir=gs://b/x"], ("there is no program launch.trian",)),
        ([], ["python", "-m", "launch.jobs.again", "--workdir=gs://b/x"], ("there is no program",)),
        ([], COMMAND[:-1], ("--workdir=DIR",)),
        ([], with_workdir("runs/tiny"), ("own disk", "gs://bucket/name")),
        ([], with_workdir("gs://b/x", "--config.train.stepz=5"), ("train.stepz", "steps")),
        ([], with_workdir("gs://b/x", "--config.model.heads=7"), ("model",)),
        ([], [*COMMAND[:3], "--config=configs/tinny.py", COMMAND[-1]], ("configs/tiny.py",)),
    ],
)
def test_mistakes(options: list[str], command: list[str], words: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as e:
        described(*options, command=command)
    assert len(str(e.value).splitlines()) <= 3
    assert all(word in str(e.value) for word in words), str(e.value)


def test_on_a_shared_disk_a_whole_path_will_do() -> None:
    assert described(command=with_workdir("/shared/tiny"), shared_disk=True).workdir == "/shared/tiny"
    with pytest.raises(UserError, match="give its whole path"):
        described(command=with_workdir("runs/tiny"), shared_disk=True)


# --------------------------------------------------------------------------------------------------------------- sweeps

SWEEP = """
from tests.support.small_run import get_config

REPORT = "rates"

def sweep(s):
    good = s.each("optimizer.learning_rate", (1e-3,))
    bad = s.conditional(s.each("optimizer.learning_rate", (1e30,)), lambda c: {"train.max_bad_steps": 3})
    return s.chain(good, bad)
"""


def sweep_in(folder: Path) -> Job:
    (folder / "sweep.py").write_text(SWEEP)
    text = write_text(folder / "text")
    words = ["--config.train.steps=8", f"--config.data.source={text}", "--config.evaluation.prompt=None"]
    command = ["python", "-m", "launch.sweep", f"--config={folder / 'sweep.py'}", f"--workdir={folder}/out", *words]
    return described(command=command, shared_disk=True)


def sent(job: Job) -> subprocess.CompletedProcess[str]:
    return run_module(job.command[2], *job.command[3:], check=False, timeout=120)


@pytest.mark.slow  # a minute; test_slurm and test_gke send such jobs, test_sweep trains the runs
def test_each_run_of_a_sweep_trains_as_a_job_of_its_own(tmp_path: Path) -> None:
    sweep = sweep_in(tmp_path)
    good, bad = sweeps.each_run(sweep)
    assert (good.command[-1], bad.command[-1]) == ("--only=learning_rate=0.001", "--only=learning_rate=1e30")
    assert good.name != bad.name
    done = sent(good)
    assert done.returncode == 0, done.stderr
    assert (Path(good.workdir) / "result.json").exists()
    assert not (tmp_path / "out" / ".lock").exists()  # the sweep's folder is left to others
    assert sweeps.each_run(sweep) == [bad]


@pytest.mark.slow
def test_a_run_of_a_sweep_that_fails_is_not_started_again(tmp_path: Path) -> None:
    sweep = sweep_in(tmp_path)
    _, bad = sweeps.each_run(sweep)
    for _ in range(2):
        done = sent(bad)
        assert done.returncode == 2 and "--retry" in done.stderr  # started again, it would fail again
    unknown = sent(dataclasses.replace(bad, command=(*bad.command[:-1], "--only=rate")))
    assert unknown.returncode == 2 and "learning_rate=0.001" in unknown.stderr


@pytest.mark.slow
def test_a_sweep_that_cannot_be_listed_is_told() -> None:
    command = ["python", "-m", "launch.sweep", "--config=configs/tiny.py", "--workdir=gs://bucket/x"]
    with pytest.raises(UserError, match="declares no sweep"):
        sweeps.each_run(described(command=command))
