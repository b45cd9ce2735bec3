"""`python -m launch.tpu_pod` with a stand-in for gcloud: preempted, refused, unreachable, ended; never a real TPU."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from launch import cli, tpu_pod
from launch.jobs import tools as tool_calls
from launch.jobs.gcloud import Pod, verdict
from launch.jobs.job import Job
from lm_jax.slices import slice_of
from tests.support.stand_ins import NO_ACCOUNT, NO_SUCH_RESOURCE, QUOTA, SSH_FAILED, Answer, StandIns

TRAIN = ["--", "python", "-m", "launch.train", "--config=configs/7b.py", "--workdir=gs://bucket/7b"]
VERBS = ("create", "describe", "delete", "scp", "pip install", "nohup", "lm_jax_status", "tail", "kill -TERM")
CREATE, DESCRIBE, DELETE, SCP, INSTALL, START, STATUS, LOG, STOP = VERBS  # START stops as well: STOP goes last


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandIns:
    return StandIns(tmp_path, monkeypatch)


def run(*words: str, slice_name: str = "v5p:2x2x2") -> int:
    """Of a slice of two hosts."""
    before = ["tpu_pod", *words, "--name=lm", "--zone=us-east5-a", f"--slice={slice_name}", "--poll_seconds=0"]
    values = tpu_pod.FLAGS
    for name in values:  # flags keep their values from one command line to the next
        values[name].unparse()
    return cli.status(tpu_pod.main, values, [*before, *TRAIN], command=True)


def state(name: str, times: int | None = 1, reason: str = "") -> Answer:
    data = {"state": {"state": name, **({"failedData": {"error": {"message": reason}}} if reason else {})}}
    return Answer(DESCRIBE, json.dumps(data), times=times)


MISSING = Answer(DESCRIBE, err=NO_SUCH_RESOURCE, status=1)


def workers(*said: str, times: int | None = 1) -> Answer:
    lines = [f"lm_jax_status {word}" for word in said]
    return Answer(STATUS, "\n".join(["Using ssh batch size of 2.", *lines]) + "\n", times=times)


def willing(*verbs: str) -> list[Answer]:
    return [Answer(verb, times=None) for verb in (INSTALL, START, CREATE, DELETE, SCP, LOG, STOP) if verb not in verbs]


# ---------------------------------------------------------------------------------------------------------- as it goes


def test_a_preempted_slice_is_asked_for_again_and_the_job_goes_on(
    tools: StandIns, capsys: pytest.CaptureFixture[str]
) -> None:
    first = [MISSING, state("ACCEPTED"), state("WAITING_FOR_RESOURCES"), state("PROVISIONING"), state("ACTIVE", 3)]
    then = [state("SUSPENDING"), state("SUSPENDED"), state("DELETING"), MISSING, state("ACTIVE", None)]
    said = [workers("absent", "absent"), workers("running", "running", times=2), workers("absent", "absent")]
    tools.add("gcloud", *first, *then, *said, workers("0", "0"), *willing())
    assert run("up") == 0
    started = [STATUS, STOP, SCP, INSTALL, START]
    assert [v for v in tools.verbs(VERBS) if v != DESCRIBE] == [
        *[CREATE, *started, STATUS, STATUS, DELETE],
        *[CREATE, *started, STATUS, DELETE],
    ]
    told = capsys.readouterr().err
    assert "in the queue, until there is room" in told and "preempted" in told and told.rstrip().endswith("finished")
    jobs = {w for call in tools.calls() for w in " ".join(call["words"]).split() if w.startswith("--job=")}
    assert len(jobs) == 1  # the count of starts goes on over slices


def test_a_lost_peer_starts_all_workers_again(tools: StandIns, capsys: pytest.CaptureFixture[str]) -> None:
    said = [workers("running", "running"), workers("75", "gone"), workers("running", "0"), workers("0", "0")]
    tools.add("gcloud", state("ACTIVE", None), *said, *willing())
    assert run("up", "--keep") == 0
    assert [v for v in tools.verbs(VERBS) if v != DESCRIBE] == [STATUS, STATUS, START, STATUS, STATUS]
    assert "stopped with status 75, gone: starting all workers again" in capsys.readouterr().err


@pytest.mark.parametrize("status", ["76", "2", "127"])
def test_what_no_start_can_better_ends_the_job_and_its_costs(
    tools: StandIns, capfd: pytest.CaptureFixture[str], status: str
) -> None:
    log = Answer(LOG, "3 starts made no new step\n")
    said = [workers("running", "running"), workers("75", status)]
    tools.add("gcloud", state("ACTIVE", None), *said, log, *willing(LOG))
    assert run("up") == 1
    assert [v for v in tools.verbs(VERBS) if v != DESCRIBE] == [STATUS, STATUS, LOG, DELETE]
    out, err = capfd.readouterr()
    assert "3 starts made no new step" in out
    assert f"ended with status {status}" in err.replace(f"{status}, 75", status).replace(f"75, {status}", status)


def test_what_an_earlier_watch_left_on_a_kept_slice_is_started_again_with_the_code_of_now(tools: StandIns) -> None:
    said = [workers("76", "75"), workers("0", "0")]
    tools.add("gcloud", state("ACTIVE", None), *said, *willing())
    assert run("up") == 0
    assert [v for v in tools.verbs(VERBS) if v != DESCRIBE] == [STATUS, STOP, SCP, INSTALL, START, STATUS, DELETE]


def test_a_worker_that_ssh_does_not_reach_is_tried_again(tools: StandIns, capsys: pytest.CaptureFixture[str]) -> None:
    failing = [Answer(SCP, err=SSH_FAILED, status=1), Answer(START, err=SSH_FAILED, status=255)]
    said = [workers("absent", "absent", times=3), workers("running"), workers("0", "0")]
    tools.add("gcloud", state("ACTIVE", None), *said, *failing, *willing())
    assert run("up") == 0
    told = capsys.readouterr().err
    assert "return code [255]. (tried 1 of 10 times)" in told.replace("\n", " ")
    assert "1 of 2 workers answer" in told


def test_a_slice_that_nobody_reaches_any_more_is_given_back(tools: StandIns) -> None:
    silent = Answer(STATUS, err=SSH_FAILED, status=255, times=10)
    said = [workers("running", "running"), silent, workers("0", "0")]
    tools.add("gcloud", state("ACTIVE", 11), MISSING, state("ACTIVE", None), *said, *willing())
    assert run("up") == 0
    assert [v for v in tools.verbs(VERBS) if v not in (DESCRIBE, STATUS)] == [DELETE, CREATE, DELETE]


def test_a_slice_that_this_machine_never_reached_is_left(tools: StandIns, capsys: pytest.CaptureFixture[str]) -> None:
    silent = Answer(STATUS, err=SSH_FAILED, status=255, times=None)
    tools.add("gcloud", state("ACTIVE", None), silent, *willing())
    assert run("up") == 1
    assert DELETE not in tools.verbs(VERBS)
    told = capsys.readouterr().err
    assert "exited with return code [255]" in told and "the slice is left, and costs: gcloud" in told


def test_a_limit_of_requests_a_minute_passes(tools: StandIns) -> None:
    busy = Answer(
        STATUS, err="ERROR: (gcloud) Quota exceeded for quota metric 'Requests' per minute", status=1, times=2
    )
    tools.add("gcloud", state("ACTIVE", None), workers("running", "running"), busy, workers("0", "0"), *willing())
    assert run("up") == 0


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long enough for a stand-in that answers, also on a busy machine."""
    for limit in ("ASK", "CHANGE", "CARRY"):
        monkeypatch.setattr(tool_calls, limit, 6.0)


def at_work(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.usefixtures("impatient")
def test_a_gcloud_that_hangs_is_ended_with_all_that_it_started_and_asked_again(
    tools: StandIns, capsys: pytest.CaptureFixture[str]
) -> None:
    hung = Answer(DESCRIBE, err="waiting for the network\n", hangs=True)
    tools.add("gcloud", hung, state("ACTIVE", None), workers("running", "running"), workers("0", "0"), *willing())
    assert run("up", "--keep") == 0
    assert not any(map(at_work, tools.children()))
    told = capsys.readouterr().err
    assert "queued-resources describe failed\nno answer within 6 s; it was ended (tried 1 of 10 times)" in told


@pytest.mark.usefixtures("impatient")
def test_what_does_no_harm_twice_is_asked_for_again_where_no_answer_comes(
    tools: StandIns, capsys: pytest.CaptureFixture[str]
) -> None:
    tools.add("gcloud", Answer(DELETE, hangs=True), Answer(CREATE, hangs=True), *willing(CREATE))
    assert run("delete") == 0
    assert run("create") == 1  # it may have been made
    assert tools.verbs(VERBS) == [DELETE, DELETE, CREATE]
    assert "queued-resources create failed\nno answer within 6 s" in capsys.readouterr().err


def test_a_job_is_stopped_before_its_files_are_replaced(tools: StandIns) -> None:
    """Another job runs there under this name; the first attempt to copy fails."""
    said = [workers("absent", "absent", times=2), workers("0", "0")]
    failing = Answer(SCP, err=SSH_FAILED, status=1)
    tools.add("gcloud", state("ACTIVE", None), *said, failing, *willing())
    assert run("up", "--keep") == 0
    assert [v for v in tools.verbs(VERBS) if v != DESCRIBE] == [
        *[STATUS, STOP, SCP],
        *[STATUS, STOP, SCP, INSTALL, START, STATUS],
    ]


def test_files_of_a_job_at_work_are_not_replaced(tools: StandIns, capsys: pytest.CaptureFixture[str]) -> None:
    busy = "ERROR: a job is at work on these files\n##### Command execution on worker 0 failed with exit status 1.\n"
    tools.add("gcloud", Answer(INSTALL, err=busy, status=1), *willing(INSTALL))
    assert run("copy") == 2
    assert "stop it first, it saves: python -m launch.tpu_pod stop" in capsys.readouterr().err
    assert run("stop") == 0
    assert tools.verbs(VERBS)[-1] == STOP


# ------------------------------------------------------------------------------------------------------------- refused


def test_no_quota_is_told_at_once(tools: StandIns, capsys: pytest.CaptureFixture[str]) -> None:
    tools.add("gcloud", MISSING, Answer(CREATE, err=QUOTA, status=1), *willing())
    assert run("up") == 1
    told = capsys.readouterr().err.splitlines()
    assert "Quota limit 'TPUV5PPerProjectPerZoneForTPUAPI'" in told[-2] and "ask for quota" in told[-1]


def test_a_request_that_fails_three_times_is_not_repeated(tools: StandIns, capsys: pytest.CaptureFixture[str]) -> None:
    failed = [answer for _ in range(3) for answer in (MISSING, state("FAILED", reason="no capacity before its end"))]
    tools.add("gcloud", *failed, *willing())
    assert run("up") == 1
    assert tools.verbs(VERBS).count(CREATE) == 3
    assert "refused the slice 3 times\nno capacity before its end" in capsys.readouterr().err


def test_an_answer_that_never_comes_ends_the_watch(tools: StandIns) -> None:
    tools.add("gcloud", Answer(DESCRIBE, err="ERROR: gcloud crashed (ConnectionError): reset\n", status=1, times=None))
    assert run("up") == 1
    assert len(tools.calls()) == 10


def test_who_is_not_logged_in_is_told_how(tools: StandIns, capsys: pytest.CaptureFixture[str]) -> None:
    tools.add("gcloud", Answer(DESCRIBE, err=NO_ACCOUNT, status=1))
    assert run("up") == 2
    assert "log in: gcloud auth login" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "slice_name", "answer"),
    [
        (["up"], "v5p:4x4x5", "the nearest that can: v5p:4x4x4 (v5p-128, 64 chips)"),
        (["up"], "tpu7x:4x4x4", "python -m launch.gke"),
        (["start"], "v5p:2x2x2", "up, create, copy, run, stop, follow, delete"),
        ([], "v5p:2x2x2", "up, create, copy, run, stop, follow, delete"),
        (["up", "--spot", "--reserved"], "v5p:2x2x2", "one or the other"),
    ],
)
def test_mistakes_are_told_before_anything_is_asked(
    tools: StandIns, capsys: pytest.CaptureFixture[str], words: list[str], slice_name: str, answer: str
) -> None:
    tools.add("gcloud")
    assert run(*words, slice_name=slice_name) == 2
    told = capsys.readouterr().err
    assert answer in told and len(told.splitlines()) <= 3
    assert tools.calls() == []


def test_without_gcloud(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run("delete") == 2
    assert "gcloud is not installed here" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------ commands


def test_a_dry_run_prints_each_command_and_runs_none(tools: StandIns, capsys: pytest.CaptureFixture[str]) -> None:
    tools.add("gcloud")
    for verb in tpu_pod.VERBS:
        assert run(verb, "--dry_run", "--spot", "--project=p") == 0
    assert tools.calls() == []
    text = capsys.readouterr().out
    assert (
        "gcloud compute tpus queued-resources create lm --node-id=lm --accelerator-type=v5p-16 "
        "--runtime-version=v2-alpha-tpuv5 --spot --zone=us-east5-a --project=p\n" in text
    )
    assert "gcloud compute tpus queued-resources delete lm --force --quiet --zone=us-east5-a --project=p\n" in text
    assert all(verb in text for verb in VERBS)
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0


def test_a_shape_that_its_number_does_not_stand_for_is_asked_for_by_its_topology() -> None:
    job = Job("lm", ("python", "-m", "launch.train"), "gs://b/x", slice_of("v5p:4x4x16"))
    words = Pod("lm", "us-east5-a").create_command(job)
    assert "--type=v5p" in words and "--topology=4x4x16" in words
    assert not any(word.startswith("--accelerator-type") for word in words)


@pytest.mark.parametrize(
    ("statuses", "expected"),
    [
        (["running"], "unreachable"),
        (["running", "absent"], "start"),
        (["running", "running"], "wait"),
        (["0", "running"], "wait"),
        (["0", "0"], "done"),
        (["0", "75"], "again"),
        (["gone", "running"], "again"),
        (["137", "75"], "again"),
        (["75", "76"], "final"),
        (["0", "2"], "final"),
        (["76", "absent"], "start"),  # of a slice that was made anew in between
    ],
)
def test_all_workers_together_decide(statuses: list[str], expected: str) -> None:
    assert verdict(statuses, 2) == expected


def test_what_is_run_on_a_worker_does_what_it_says(tmp_path: Path) -> None:
    """The shell's part of it, by a shell, in a home directory of its own."""
    folder = tmp_path / "lm_jax" / ".venv" / "bin"
    folder.mkdir(parents=True)
    (folder / "python").write_text('#!/bin/sh\necho "$0 $WORDS $@"\nsleep "$SECONDS_TO_RUN"\nexit 75\n')
    (folder / "python").chmod(0o755)
    slow = tmp_path / "bin" / "setsid"  # as on a machine with much else to do
    slow.parent.mkdir()
    slow.write_text(f'#!/bin/sh\nsleep 0.5\nexec {shutil.which("setsid")} "$@"\n')
    slow.chmod(0o755)
    pod = Pod("lm", "us-east5-a")

    def on_worker(words: list[str]) -> str:
        command = next(w for w in words if w.startswith("--command=")).removeprefix("--command=")
        env = dict(os.environ, HOME=str(tmp_path), PATH=f"{slow.parent}:{os.environ['PATH']}")
        done = subprocess.run(
            ["bash", "-c", command], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=30
        )
        return f"{done.stdout}{done.stderr}exit {done.returncode}"

    def status(of: Job | None = None) -> str:
        return on_worker(pod.status_command(of or now)).split()[1]

    def wait_while(holds: Callable[[], bool]) -> None:
        until = time.monotonic() + 20
        while holds() and time.monotonic() < until:
            time.sleep(0.05)

    def said() -> list[str]:
        log = tmp_path / "lm.log"
        return log.read_text().splitlines() if log.exists() else []

    def job(seconds: float) -> Job:
        variables = (("SECONDS_TO_RUN", str(seconds)), ("WORDS", "two words; $HOME"))
        command = ("python", "-m", "launch.train")
        return Job("lm", command, "gs://b/x", slice_of("v6e-1"), environment=variables, setup="echo fetched; cd ..")

    now = job(60)
    assert status() == "absent"
    on_worker(pod.start_command(now, "id"))
    assert status() == "running"
    assert status(job(0)) == "absent"  # another job
    wait_while(lambda: len(said()) < 2)
    now, first = job(60), int((tmp_path / "lm.pid").read_text())
    on_worker(pod.start_command(now, "id"))  # stops the one that runs
    assert not at_work(first)
    wait_while(lambda: len(said()) < 4)
    install, pid = pod.copy_commands(tmp_path, tmp_path)[-1], int((tmp_path / "lm.pid").read_text())
    assert "a job is at work on these files" in on_worker(install)
    assert at_work(pid) and (folder / "python").exists()
    on_worker(pod.stop_command())
    assert not at_work(pid) and status() == "absent"  # and not what it ended with: it can be started anew
    now = job(0)
    on_worker(pod.start_command(now, "id"))
    wait_while(lambda: status() == "running")
    assert status() == "75"
    log = said()
    assert log[0] == "fetched" and log[:2] == log[2:4] == log[4:]
    assert (
        "two words; $HOME -m launch.jobs.again --workdir=gs://b/x --job=id -- .venv/bin/python -m launch.train"
        in log[1]
    )
    (tmp_path / "lm.status").unlink()
    wait_while(lambda: status() == "running")  # the shell that wrote it
    assert status() == "gone"
    now = dataclasses.replace(now, setup="exit 22")
    on_worker(pod.start_command(now, "id"))
    wait_while(lambda: status() == "running")
    assert status() == "76" and said()[-1] == "the setup failed"  # whatever it ended with
    (tmp_path / "lm_jax").rename(tmp_path / "elsewhere")
    assert on_worker(pod.start_command(now, "id")).endswith("exit 1")  # no code there: not as if it had started


def test_the_archive_holds_what_git_holds(tmp_path: Path) -> None:
    checkout = tmp_path / "my checkout"
    (checkout / "launch").mkdir(parents=True)
    (checkout / "launch" / "a.py").write_text("committed")
    (checkout / "secret").write_text("untracked")
    for words in (["init", "-q"], ["add", "launch"]):
        subprocess.run(["git", *words], cwd=checkout, check=True)
    (checkout / "launch" / "a.py").write_text("changed since")
    subprocess.run(Pod("lm", "z").copy_commands(checkout, tmp_path)[0], check=True)
    listed = subprocess.run(["tar", "-xzvf", "lm.tar.gz"], cwd=tmp_path, capture_output=True, text=True)
    assert listed.stdout.split() == ["launch/a.py"]
    assert (tmp_path / "launch" / "a.py").read_text() == "changed since"
