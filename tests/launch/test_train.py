"""`python -m launch.train` as it is started: exit statuses, what mistakes look like, full and read-only disks."""

from __future__ import annotations

import dataclasses
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path
from signal import SIGCONT, SIGSTOP, SIGTERM

import pytest

from launch import cli, train
from tests.support import jobs
from tests.support.jobs import CONFIG, Job
from tests.support.processes import run_module
from tests.support.small_run import write_text


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


# ------------------------------------------------------------------------------------------------------------- mistakes


@dataclasses.dataclass(frozen=True)
class Mistake:
    """What somebody types, and words that the answer must have. `{tmp}` is a folder; `inside`: a config file's line."""

    options: str
    words: tuple[str, ...]
    inside: str = ""


MISTAKES = {
    "a typo": Mistake("--config.optimizer.lerning_rate=1", ("lerning_rate", "optimizer.learning_rate")),
    "a typo in the file": Mistake("", ("stepz", "line 6", "did you mean steps"), "config.train.stepz = 5"),
    "a flag's typo": Mistake("--workdri=x", ("workdri", "--workdir")),
    "no such config": Mistake("--config={tmp}/confg.py", ("confg.py", "config.py")),
    "no such variant": Mistake("--config=configs/tiny.py:adam", ("'adam'", "adafactor")),
    "words for a number": Mistake("--config.train.steps=many", ("train.steps", "'many'", "whole number")),
    "no such source": Mistake("--config.data.source={tmp}/nothing", ("data.source", "nothing")),
    "an empty source": Mistake("--config.data.source={tmp}/empty", ("empty",)),
    "heads that do not divide": Mistake(
        "--config.model.heads=3", ("model.kv_heads", "3 query heads", "2 key-value heads")
    ),
    "a rate that is no number": Mistake("--config.optimizer.learning_rate=nan", ("optimizer.learning_rate", "nan")),
    "a negative rate": Mistake("--config.optimizer.learning_rate=-1", ("optimizer.learning_rate", "-1")),
    "zero layers": Mistake("--config.model.layers=0", ("model.layers", "0", "1 or more")),
    "a mesh too large": Mistake("--config.mesh.data=64", ("mesh", "64", "more than")),
    "a mesh that leaves devices": Mistake("--config.mesh.data=1", ("mesh", "2 devices", "-1")),
    "a batch that does not divide": Mistake("--config.train.batch_size=5", ("train.batch_size", "5", "nearest")),
    "micro-batches that do not divide": Mistake("--config.train.microbatches=3", ("train.microbatches", "3", "4")),
    "steps and tokens": Mistake(
        "--config.train.steps=80 --config.train.tokens=1000", ("train.steps", "80", "1000", "both")
    ),
    "steps and tokens in the file": Mistake("", ("train.steps", "80", "1000", "both"), "config.train.tokens = 1000"),
    "a rate in the file": Mistake("", ("optimizer.learning_rate", "nan"), "config.optimizer.learning_rate = math.nan"),
    "too many passes": Mistake("--config.train.steps=100000", ("data.max_epochs", "passes")),
    "too few ids": Mistake("--config.model.vocab=100", ("model.vocab", "100", "257")),
    "no such run to start from": Mistake("--config.train.init_from={tmp}/none", ("no checkpoint", "none")),
    "steps to trace backwards": Mistake("--profile_steps=15:10", ("--profile_steps=15:10", "10:15")),
    "steps to trace that are none": Mistake("--profile_steps=x", ("--profile_steps=x", "FIRST:LAST")),
    "steps to trace beyond the run": Mistake("--profile_steps=70:81", ("70:81", "ends at step 80")),
    "half of the process flags": Mistake("--num_processes=2", ("coordinator_address",)),
}
STARTED = (
    "a typo",
    "an empty source",
    "a mesh too large",
)  # as processes in each run of the tests; the others in long ones


def arguments(mistake: Mistake, text: Path, tmp: Path) -> list[str]:
    (tmp / "empty").mkdir()
    (tmp / "empty" / "a.txt").write_text("")
    file = tmp / "config.py"
    lines = ["import math", "from tests.support import small_run", "", "def get_config():"]
    file.write_text(
        "\n".join([*lines, "    config = small_run.get_config()", f"    {mistake.inside}", "    return config\n"])
    )
    options = mistake.options.format(tmp=tmp).split()
    if not any(option.startswith("--config=") for option in options):
        options.insert(0, f"--config={file if mistake.inside else CONFIG}")
    if "data.source" not in mistake.options and "tiny" not in mistake.options:
        options.append(f"--config.data.source={text}")
    return [f"--workdir={tmp}/run", *options]


def check(mistake: Mistake, status: int, out: str, err: str) -> None:
    assert status == 2, err
    lines = err.splitlines()
    assert 1 <= len(lines) <= cli.MAX_LINES and "Traceback" not in err, err
    for word in mistake.words:
        assert word in err, f"{word!r} is not in: {err}"
    assert out == ""


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake(
    name: str, text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if "devices" in name or name == "a batch that does not divide":
        pytest.skip("of two devices: as a process")
    if "process flags" not in name:
        monkeypatch.setattr(train.runtime, "start", lambda values, config: None)
    monkeypatch.setattr("lm_jax.training.program.init_state", None)  # nothing may get as far as compiling
    command = ["train", *arguments(MISTAKES[name], text, tmp_path)]
    try:
        status = cli.status(train.main, train.FLAGS, command, config=True)
    finally:
        train.FLAGS.unparse_flags()
        for flag in ("coordinator_address", "num_processes", "process_id", "profile_steps"):
            train.FLAGS[flag].value = None
    captured = capfd.readouterr()
    check(MISTAKES[name], status, captured.out, captured.err)


@pytest.mark.parametrize("name", [n if n in STARTED else pytest.param(n, marks=pytest.mark.slow) for n in MISTAKES])
def test_a_mistake_in_a_process(name: str, text: Path, tmp_path: Path) -> None:
    done = run_module("launch.train", *arguments(MISTAKES[name], text, tmp_path), devices=2, check=False)
    check(MISTAKES[name], done.returncode, done.stdout, done.stderr)


# --------------------------------------------------------------------------------------------------- statuses and disks


def _command(run: Path, text: Path) -> list[str]:
    return [f"--config={CONFIG}", f"--workdir={run}", f"--config.data.source={text}"]


def test_stopped_and_finished_on_another_mesh(text: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = Job(run, text, tmp_path / "first", devices=2)
    try:
        assert job.wait_for(lambda: jobs.last_step(run) >= 5, 300), job.said()
        job.strike(SIGSTOP, [0])
        refused = run_module("launch.train", *_command(run, text), check=False)
        assert refused.returncode == 2 and f"in use by process {job.processes[0].pid}" in refused.stderr
        job.strike(SIGTERM, [0])
        job.strike(SIGCONT, [0])
        assert job.wait(300) == [75], job.said()
    finally:
        job.kill()
    step = jobs.last_step(run)
    assert jobs.checkpoints(run)[-1] == step and f"Saved at step {step} of" in (run / "report.md").read_text("utf-8")
    layout = ["--config.mesh.fsdp=2", "--config.mesh.zero=1", "--config.mesh.offload_optimizer=True"]
    job = Job(run, text, tmp_path / "second", options=[*layout, "--config.evaluation.prompt=the"], devices=2)
    try:
        assert job.wait(300) == [0], job.said()
    finally:
        job.kill()
    assert "changed: mesh.fsdp: 1 -> 2\n" in job.said() and f"going on from checkpoint {step}\n" in job.said()
    assert "changed: mesh.zero: 3 -> 1\n" in job.said()
    assert [r["step"] for r in jobs.records(run) if r["kind"] == "step"] == list(range(1, 81))
    # Other weights to begin with, which the average begins with as well.
    other = tmp_path / "other"
    job = Job(other, text, tmp_path / "third", options=[*layout, f"--config.train.init_from={run}"], devices=2)
    try:
        assert job.wait_for(lambda: jobs.last_step(other) >= 7, 300), job.said()
    finally:
        job.kill()
    last, first = ([r["eval_loss"] for r in jobs.records(where) if r["kind"] == "evaluation"] for where in (run, other))
    assert first[0] == pytest.approx(last[-1], rel=1e-5)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB; skips where this user may not mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True)
    if made.returncode:
        pytest.skip("no right to mount")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_full_disk_ends_the_run_and_loses_nothing(text: Path, small_disk: Path, tmp_path: Path) -> None:
    run = small_disk / "run"
    keep = ["--config.checkpoint.keep=100"]
    job = Job(run, text, tmp_path / "full", options=keep, devices=2)
    try:
        assert job.wait(300) == [1], job.said()
    finally:
        job.kill()
    _one_clear_line(job.said(), "No space left on device")
    saved, last = jobs.checkpoints(run)[-1], jobs.last_step(run)
    assert 7 <= saved <= last < 80 and last - saved <= 14  # told at the save that failed, or within the one after
    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    job = Job(run, text, tmp_path / "again", options=keep, devices=2)
    try:
        assert job.wait(300) == [0], job.said()
    finally:
        job.kill()
    assert f"going on from checkpoint {saved}\n" in job.said() and "damaged" not in job.said()
    assert [r["step"] for r in jobs.records(run) if r["kind"] == "step"] == list(range(1, 81))


def test_a_file_that_may_not_grow_ends_the_run(text: Path, tmp_path: Path) -> None:
    """As a full disk does, also where nobody may mount one."""
    run = tmp_path / "run"
    wide = ["--config.model.feed_forward_dim=6000"]  # one array of 1.5 MB: which arrays share a file is chance
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, old[1]))  # the tokens fit, the largest array does not
    try:
        job = Job(run, text, tmp_path / "log", options=wide, devices=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    try:
        assert job.wait(300) == [1], job.said()
    finally:
        job.kill()
    _one_clear_line(job.said(), "File too large")
    assert jobs.checkpoints(run) == [] and 7 <= jobs.last_step(run) <= 14


def test_a_read_only_disk_is_told(text: Path, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    done = run_module("launch.train", *_command(small_disk / "run", text), check=False)
    assert done.returncode == 1
    _one_clear_line(done.stderr, "Read-only file system")


def _one_clear_line(said: str, word: str) -> None:
    # JAX tells of its own when it cannot keep a compiled program.
    lines = [line for line in said.splitlines() if word in line and "compilation cache" not in line]
    assert len(lines) == 1 and said.splitlines()[-1] == lines[0], said
    assert "Traceback" not in said and len(lines[0]) < 400
