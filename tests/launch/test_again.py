"""`python -m launch.jobs.again`: which endings start a job again, how starts are counted, real runs killed, stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launch import cli
from launch.jobs import again
from lm_jax.paths import StorageError, run_path
from lm_jax.training import steps
from lm_jax.training.metrics import read_metrics
from tests.support.jobs import CONFIG
from tests.support.processes import ROOT, environment
from tests.support.small_run import write_text


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    old = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in old.items():
        signal.signal(number, handler)
    while _started:
        _started.pop().kill()  # of a test that failed; its command is asked to end


_started: list[subprocess.Popen[bytes]] = []


def watch(folder: Path, *command: str, job: str = "1", host: int = 0) -> int:
    """Its exit status, in this process; the command is one of its own all the same."""
    for name in again.FLAGS:  # flags keep their values from one command line to the next
        again.FLAGS[name].unparse()
    words = ["again", f"--workdir={folder}", f"--job={job}", f"--host={host}", "--", *command]
    return cli.status(again.main, again.FLAGS, words, command=True)


def commit(folder: Path, step: int) -> None:
    (folder / "checkpoints" / str(step)).mkdir(parents=True)


def shell(text: str) -> tuple[str, str, str]:
    return ("sh", "-c", text)


# ------------------------------------------------------------------------------------------------------------- statuses


@pytest.mark.parametrize(
    ("script", "status"),
    [
        ("exit 0", again.DONE),
        ("exit 75", again.AGAIN),
        ("exit 1", again.AGAIN),  # a lost peer, a crash
        ("kill -KILL $$", again.AGAIN),
        ("exit 2", again.FINAL),  # the user's mistake, a model that does not fit
    ],
)
def test_how_a_command_ends_decides(tmp_path: Path, script: str, status: int) -> None:
    assert watch(tmp_path, *shell(script)) == status


def test_the_other_hosts_decide_alike_and_let_the_first_speak_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    assert watch(tmp_path, *shell("exit 0"), host=3) == again.DONE and waited == []
    assert watch(tmp_path, *shell("exit 1"), host=3) == again.AGAIN and waited == [again._FIRST_SPEAKS_SECONDS]
    assert watch(tmp_path, *shell("exit 2"), host=3) == again.FINAL
    assert not (tmp_path / again.STARTS).exists()  # the first host alone counts


def test_what_cannot_be_run_is_not_tried_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert watch(tmp_path, str(tmp_path / "nothing")) in again.HOPELESS
    assert "No such file" in capsys.readouterr().err
    assert watch(tmp_path) in again.HOPELESS


# ------------------------------------------------------------------------------------------------------------- counting


def test_three_starts_without_a_new_step_end_the_job(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert [watch(tmp_path, *shell("exit 1")) for _ in range(3)] == [again.AGAIN, again.AGAIN, again.FINAL]
    told = capsys.readouterr().err
    assert "start 2 of 3 without a new step" in told and "3 starts made no new step" in told
    # A host that did not hear of it starts all again: at once, and without the command.
    assert watch(tmp_path, *shell(f"touch {tmp_path}/ran; exit 1")) == again.FINAL
    assert not (tmp_path / "ran").exists()
    assert watch(tmp_path, *shell("exit 1"), job="2") == again.AGAIN  # sent once more


def test_a_new_step_starts_the_count_anew(tmp_path: Path) -> None:
    folder = run_path(tmp_path)
    assert [again.begin(folder, "1") for _ in range(3)] == [1, 2, 3]
    assert not again.moved(folder)
    commit(tmp_path, 7)
    assert again.moved(folder)
    assert [again.begin(folder, "1") for _ in range(2)] == [1, 2]


def test_a_third_start_that_makes_a_step_is_not_the_last(tmp_path: Path) -> None:
    for _ in range(2):
        watch(tmp_path, *shell("exit 1"))
    assert watch(tmp_path, *shell(f"mkdir -p {tmp_path}/checkpoints/7; exit 1")) == again.AGAIN


def test_a_host_that_is_killed_is_counted(tmp_path: Path) -> None:
    """Its watcher with it: nobody is left to say how the start ended."""
    for _ in range(3):
        again.begin(run_path(tmp_path), "1")
    assert watch(tmp_path, *shell("exit 0")) == again.FINAL


def test_a_step_that_was_taken_back_is_not_a_new_one(tmp_path: Path) -> None:
    folder = run_path(tmp_path)
    commit(tmp_path, 7)
    commit(tmp_path, 14)
    assert again.begin(folder, "1") == 1
    (tmp_path / "checkpoints" / "14").rename(tmp_path / "checkpoints" / "damaged-14")
    assert again.begin(folder, "1") == 2
    commit(tmp_path, 14)
    assert again.begin(folder, "1") == 3


def test_the_runs_of_a_sweep_are_steps_of_the_sweep(tmp_path: Path) -> None:
    folder = run_path(tmp_path)
    assert again.begin(folder, "1") == 1
    commit(tmp_path / "runs" / "a", 7)
    assert again.begin(folder, "1") == 1
    (tmp_path / "runs" / "a" / "result.json").write_text("{}")
    assert again.begin(folder, "1") == 1
    assert again.begin(folder, "1") == 2


def test_in_an_object_store_a_step_is_there_with_its_marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "is_local", lambda path: False)
    commit(tmp_path, 7)
    commit(tmp_path, 14)
    (tmp_path / "checkpoints" / "7" / steps.COMMITTED).touch()
    assert again.progress(run_path(tmp_path)) == 7


@pytest.mark.parametrize("torn", ["", "{", "[]", '{"starts": "many"}'])
def test_a_count_that_cannot_be_read_begins_anew(tmp_path: Path, torn: str) -> None:
    (tmp_path / again.STARTS).write_text(torn)
    assert again.begin(run_path(tmp_path), "1") == 1
    assert json.loads((tmp_path / again.STARTS).read_text())["starts"] == 1


def test_a_store_that_does_not_answer_is_asked_again_and_then_ends_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)

    def failing(times: int) -> Callable[..., int]:
        left = iter([True] * times)

        def begin(*args: object) -> int:
            if next(left, False):
                raise StorageError("cannot read gs://b/x: 503")
            return 1

        return begin

    monkeypatch.setattr(again, "begin", failing(2))
    assert watch(tmp_path, *shell("exit 0")) == again.DONE and len(waited) == 2
    monkeypatch.setattr(again, "begin", failing(100))
    assert watch(tmp_path, *shell("exit 0")) in again.HOPELESS
    assert "starts cannot be counted" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------- signals, and runs


def watcher(folder: Path, *command: str, log: Path) -> subprocess.Popen[bytes]:
    words = [sys.executable, "-m", "launch.jobs.again", f"--workdir={folder}", "--job=1", "--host=0", "--", *command]
    with log.open("ab") as out:
        _started.append(subprocess.Popen(words, env=environment(), cwd=ROOT, stdout=out, stderr=subprocess.STDOUT))
    return _started[-1]


def wait_until(what: Callable[[], object], seconds: float = 180) -> None:
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until, f"not within {seconds} s"
        time.sleep(0.05)


def test_a_command_whose_watcher_is_killed_is_asked_to_end(tmp_path: Path) -> None:
    script = f"trap 'touch {tmp_path}/asked; exit 75' TERM; touch {tmp_path}/began; while :; do sleep 0.05; done"
    process = watcher(tmp_path, *shell(script), log=tmp_path / "log")
    wait_until((tmp_path / "began").exists)
    process.kill()
    process.wait()
    wait_until((tmp_path / "asked").exists)


class Run:
    """The small run under the watcher."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.folder, self.log = folder / "run", folder / "log"
        text = write_text(folder / "text")
        self.command = [sys.executable, "-m", "launch.train", f"--config={CONFIG}", f"--workdir={self.folder}"]
        self.command += [f"--config.data.source={text}", "--config.evaluation.every=1000", *options]

    def start(self) -> subprocess.Popen[bytes]:
        return watcher(self.folder, *self.command, log=self.log)

    def committed(self) -> int:
        return again.progress(run_path(self.folder))

    def steps(self) -> list[int]:
        return [r["step"] for r in read_metrics(self.folder / "metrics.jsonl") if r["kind"] == "step"]


def child_of(process: subprocess.Popen[bytes]) -> int | None:
    try:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    except FileNotFoundError:
        return None
    return int(children[0]) if children else None


def kill_child_of(process: subprocess.Popen[bytes]) -> None:
    wait_until(lambda: child_of(process) or process.poll() is not None)
    child = child_of(process)
    assert child is not None, f"it ended by itself, with status {process.poll()}"
    os.kill(child, signal.SIGKILL)


def test_a_run_that_is_killed_and_stopped_goes_on_and_loses_no_step(tmp_path: Path) -> None:
    run = Run(tmp_path, "--config.train.steps=1000", "--config.data.max_epochs=100")
    first = run.start()
    wait_until(lambda: run.committed() >= 7 or first.poll() is not None)
    kill_child_of(first)
    assert first.wait(180) == again.AGAIN
    kept = run.committed()
    second = run.start()
    wait_until(lambda: run.committed() > kept or second.poll() is not None)
    second.send_signal(signal.SIGTERM)  # as a cluster does that takes the host away
    assert second.wait(180) == again.AGAIN
    saved, done = run.committed(), run.steps()
    assert saved == done[-1] > kept  # it saved the step that it was at
    run.command.append(f"--config.train.steps={saved + 5}")
    assert run.start().wait(180) == again.DONE
    assert run.steps() == list(range(1, saved + 6))
    assert f"start 2 of {again.MOST_STARTS}" not in run.log.read_text()


def test_a_run_that_is_killed_before_its_first_step_three_times_ends(tmp_path: Path) -> None:
    run = Run(tmp_path)
    ended = []
    for _ in range(3):
        process = run.start()
        kill_child_of(process)
        ended.append(process.wait(180))
    assert ended == [again.AGAIN, again.AGAIN, again.FINAL]
    assert "3 starts made no new step" in run.log.read_text()
    assert run.start().wait(180) == again.FINAL
