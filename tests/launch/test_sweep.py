"""`python -m launch.sweep` as it is started: killed, resumed, with a run that fails, retried, refused."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from launch import cli, sweep
from lm_jax.config import build
from lm_jax.errors import UserError
from lm_jax.paths import lock, run_path
from lm_jax.scaling.sweep import Run
from lm_jax.training.metrics import read_metrics
from lm_jax.training.run import RunConfig
from tests.support import small_run
from tests.support.processes import ROOT, environment, run_module
from tests.support.small_run import write_text

SWEEP = """
from tests.support.small_run import get_config

REPORT = "rates"

def sweep(s):
    good = s.product(s.each("model.embed", (16,)), s.each("optimizer.learning_rate", (1e-3, 2e-3)))
    # A rate that blows up in its second step, and three such steps end a run.
    bad = s.conditional(s.each("optimizer.learning_rate", (1e30,)), lambda c: {"train.max_bad_steps": 3})
    return s.chain(good, bad)
"""
GOOD = ["embed=16,learning_rate=0.001", "embed=16,learning_rate=0.002"]
BAD = "learning_rate=1e30"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tmp = tmp_path_factory.mktemp("sweep")
    (tmp / "sweep.py").write_text(SWEEP)
    write_text(tmp / "text")
    return tmp


def arguments(folder: Path, *more: str) -> list[str]:
    paths = [f"--config={folder / 'sweep.py'}", f"--workdir={folder / 'out'}"]
    return [*paths, f"--config.data.source={folder / 'text'}", "--config.evaluation.prompt=None", *more]


def records(folder: Path, name: str) -> list[int]:
    return [r["step"] for r in read_metrics(folder / "out" / "runs" / name / "metrics.jsonl") if r["kind"] == "step"]


def children(pid: int) -> set[int]:
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=False)
    return {int(p) for p in found.stdout.split()}


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def until(condition: Callable[[], bool], seconds: float, what: str) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.05)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="asks /proc which processes are left")
def test_killed_resumed_failed_and_retried(folder: Path) -> None:
    command = [sys.executable, "-m", "launch.sweep", *arguments(folder)]
    with (folder / "first.txt").open("w") as log:
        first = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=log, stderr=log, start_new_session=True)
    started = [folder / "out" / "runs" / name / "metrics.jsonl" for name in GOOD]
    try:
        until(
            lambda: (
                first.poll() is not None or any(f.is_file() and len(f.read_text().splitlines()) > 10 for f in started)
            ),
            240,
            "no run got to its tenth step",
        )
        assert first.poll() is None, (folder / "first.txt").read_text()
        workers = children(first.pid)
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    assert workers
    until(lambda: not any(map(alive, workers)), 90, "processes are left over")

    again = run_module("launch.sweep", *arguments(folder), check=False)
    assert again.returncode == 1
    assert f"1 of 3 runs failed; {BAD}" in again.stderr and "--retry" in again.stderr
    for name in GOOD:
        assert records(folder, name) == list(range(1, 81)), name  # none lost and none twice, killed or not
    with (folder / "out" / "runs.csv").open() as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    assert {name for name, row in rows.items() if row["status"] == "finished"} == set(GOOD)
    assert all(float(rows[name]["loss"]) > 0 for name in GOOD)
    page = (folder / "out" / "report.html").read_text()
    assert f"{BAD} is left out: it failed" in page and "launch.train" in page
    _ends_without_running(folder)


def _ends_without_running(folder: Path) -> None:
    """What has ended is not run again, but for what failed where a flag says so; another config is refused."""
    results = {name: folder / "out" / "runs" / name / "result.json" for name in (*GOOD, BAD)}
    before = {name: file.stat().st_mtime_ns for name, file in results.items()}
    retried = run_module("launch.sweep", *arguments(folder, "--retry"), check=False)
    assert retried.returncode == 1 and f"failed {BAD}" in retried.stderr
    changed = {name for name, file in results.items() if file.stat().st_mtime_ns != before[name]}
    assert changed == {BAD}
    assert json.loads(results[BAD].read_text())["status"] == "failed"
    other = run_module("launch.sweep", *arguments(folder, "--config.optimizer.eps=1e-7"), check=False)
    assert other.returncode == 2 and "was run with another config" in other.stderr
    results[GOOD[0]].unlink()  # as if it had been stopped before its end
    other = run_module("launch.sweep", *arguments(folder, "--config.optimizer.eps=1e-7"), check=False)
    assert other.returncode == 2 and "was begun with another config" in other.stderr


def test_a_run_that_is_still_being_saved_is_waited_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import fcntl, sys, time; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); "
            "time.sleep(1)",
            str(tmp_path / ".lock"),
        ],
        stdout=subprocess.PIPE,
    )
    assert holder.stdout is not None and holder.stdout.readline()
    sweep._wait_for_others([run_path(tmp_path / "not there"), run_path(tmp_path)])
    assert "waiting for it to save" in capsys.readouterr().err
    lock(run_path(tmp_path)).release()
    holder.communicate()


def test_processes_take_the_gpus_that_the_sweep_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run("a", {}, {}, RunConfig())
    sweep.FLAGS(["sweep"])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    slots, cores = sweep._slots([run] * 5, sweep.Machine("gpu", 2, "a GPU"), whole=5)
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in slots] == ["2", "3"] and cores == [None, None]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    slots, _ = sweep._slots([run] * 5, sweep.Machine("gpu", 2, "a GPU"), whole=5)
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in slots] == ["0", "1"]
    slots, _ = sweep._slots([run], sweep.Machine("gpu", 2, "a GPU"), whole=5)  # the last one left
    assert slots == [{"CUDA_VISIBLE_DEVICES": "0"}]


def test_another_text_under_the_same_name_is_refused(tmp_path: Path) -> None:
    config = small_run.get_config()
    config.data.source = str(write_text(tmp_path / "text"))
    run, directory = Run("a", {}, {}, build(RunConfig, config)), run_path(tmp_path)
    sweep._share_data([run], directory)
    sweep._share_data([run], directory)
    write_text(tmp_path / "text", seed=1)
    with pytest.raises(UserError, match="is not the text that earlier runs"):
        sweep._share_data([run], directory)


def test_dry_run_lists_and_runs_nothing(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "none"
    done = run_module("launch.sweep", *arguments(folder, "--dry_run", f"--workdir={out}"))
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["run", "parameters", "no", "embedding", "tokens", "steps", "FLOPs", "hours"]
    assert [line.split()[0] for line in lines[1:4]] == [*GOOD, BAD]
    assert lines[4].startswith("3 runs, ")
    assert not out.exists()


def test_a_config_without_a_sweep_is_refused() -> None:
    done = run_module("launch.sweep", "--config=configs/tiny.py", "--dry_run", check=False)
    assert done.returncode == 2 and "declares no sweep" in done.stderr


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("REPORT = 'lw'\ndef sweep(s):\n    return s.seeds(1)\n", "did you mean law"),
        ("REPORT = 3\ndef sweep(s):\n    return s.seeds(1)\n", "there is no such report"),
        ("def sweep(s):\n    return s.each('train.seed', 3)\n", "line 3\n    return s.each"),
        ("def sweep(s):\n    return s.products()\n", "AttributeError"),
    ],
)
def test_what_is_wrong_in_a_sweep_s_file_is_said_with_its_line(
    text: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.py").write_text("from tests.support.small_run import get_config\n" + text)
    argv = ["sweep", f"--config={tmp_path / 'a.py'}", "--dry_run"]
    assert cli.status(sweep.main, sweep.FLAGS, argv, config=True, file=True) == 2
    assert words in capsys.readouterr().err
