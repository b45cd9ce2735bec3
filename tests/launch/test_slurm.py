"""`python -m launch.slurm`: its script run by a shell, with stand-ins for srun, scontrol, squeue and sbatch."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from launch import cli, slurm
from launch.jobs import again
from tests.support.stand_ins import NO_PARTITION, NO_REQUEUE, Answer, StandIns

TRAIN = ["--", "python", "-m", "launch.train", "--config=configs/1b.py", "--workdir=/shared/runs/1b"]


def run(*options: str, command: list[str] = TRAIN) -> int:
    for name in slurm.FLAGS:  # flags keep their values from one command line to the next
        slurm.FLAGS[name].unparse()
    return cli.status(slurm.main, slurm.FLAGS, ["slurm", "--name=lm", *options, *command], command=True)


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandIns:
    for name, value in (("SLURM_JOB_ID", "7"), ("SLURM_JOB_NAME", "lm")):
        monkeypatch.setenv(name, value)
    tools = StandIns(tmp_path, monkeypatch)
    tools.add("squeue", Answer("--jobs=7", "RUNNING\n", times=None))
    tools.add("scontrol", Answer("requeue 7", times=None))
    return tools


@pytest.fixture
def script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    assert run("--nodes=2", "--gpus=8", "--env=WORDS=two words; $HOME", "--sbatch=--partition=gpu") == 0
    file = tmp_path / "job.sh"
    file.write_text(capsys.readouterr().out)
    return file


def start(script: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", str(script)], capture_output=True, text=True, timeout=30)


def test_what_the_script_asks_of_slurm(script: Path) -> None:
    text = script.read_text()
    asked = [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH ")]
    assert asked == [
        *["--job-name=lm", "--nodes=2", "--ntasks-per-node=8", "--gpus-per-node=8", "--requeue", "--open-mode=append"],
        *["--output=%x-%j.log", "--signal=TERM@180", "--partition=gpu"],
    ]
    assert text.splitlines()[0] == "#!/bin/bash"  # sbatch takes options up to the first command
    assert text.index("#SBATCH --partition") < text.index("set -uo")


def test_each_task_watches_the_command(tools: StandIns, script: Path) -> None:
    tools.add("srun", Answer(""))
    assert start(script).returncode == 0
    (call,) = tools.calls("srun")
    words = call["words"]
    assert words[words.index("python") :] == [
        *["python", "-m", "launch.jobs.again", "--workdir=/shared/runs/1b", "--job=7", "--", *TRAIN[1:]]
    ]
    assert tools.calls("scontrol") == []


@pytest.mark.parametrize(
    ("status", "state"), [(again.AGAIN, "RUNNING"), (again.AGAIN, "SIGNALING"), (137, "RUNNING"), (143, "")]
)
def test_what_was_stopped_goes_back_into_the_queue(tools: StandIns, script: Path, status: int, state: str) -> None:
    tools.add("srun", Answer("", status=status))
    tools.add("squeue", Answer("--jobs=7", f"{state}\n"))
    done = start(script)
    assert done.returncode == 0 and "starting again" in done.stdout
    assert [call["words"] for call in tools.calls("scontrol")] == [["requeue", "7"]]


@pytest.mark.parametrize("status", sorted(again.HOPELESS))
def test_what_no_start_can_better_ends(tools: StandIns, script: Path, status: int) -> None:
    tools.add("srun", Answer("", status=status))
    done = start(script)
    assert done.returncode == status and "not started again" in done.stdout
    assert tools.calls("scontrol") == []


def test_what_a_person_cancels_does_not_come_back(tools: StandIns, script: Path) -> None:
    tools.add("srun", Answer("", status=again.AGAIN))
    tools.add("squeue", Answer("", "COMPLETING\n"))
    done = start(script)
    assert done.returncode == again.AGAIN and "the job is COMPLETING" in done.stdout
    assert tools.calls("scontrol") == []


def test_where_nothing_goes_back_into_the_queue_it_is_said(tools: StandIns, script: Path) -> None:
    tools.add("srun", Answer("", status=again.AGAIN))
    tools.add("scontrol", Answer("requeue 7", err=NO_REQUEUE, status=1))
    done = start(script)
    assert done.returncode == again.AGAIN and "send it again" in done.stdout


def test_the_script_waits_for_tasks_that_save(tools: StandIns, script: Path) -> None:
    """SIGTERM ends no script that has tasks at work; and the tasks' environment is as asked."""
    began = script.parent / "began"
    (tools.bin / "srun").write_text(f"#!/bin/bash\ntouch {began}\nsleep 1\necho said $WORDS saved\nexit 75\n")
    (tools.bin / "srun").chmod(0o755)
    job = subprocess.Popen(["bash", str(script)], stdout=subprocess.PIPE, text=True)
    until = time.monotonic() + 20
    while not began.exists() and time.monotonic() < until:
        time.sleep(0.01)
    os.kill(job.pid, signal.SIGTERM)
    out, _ = job.communicate(timeout=30)
    assert "said two words; $HOME saved" in out and job.returncode == 0
    assert len(tools.calls("scontrol")) == 1


# ------------------------------------------------------------------------------------------------------------- sbatch


def test_it_is_sent_with_sbatch(tools: StandIns, capsys: pytest.CaptureFixture[str]) -> None:
    tools.add("sbatch", Answer("--parsable", "123;cluster\n"))
    assert run("--submit") == 0
    (call,) = tools.calls("sbatch")
    assert call["given"].startswith("#!/bin/bash\n#SBATCH --job-name=lm\n")
    out = capsys.readouterr().out
    assert "tail --follow=name lm-123.log" in out and "scancel 123" in out


def test_what_sbatch_refuses_is_told(tools: StandIns, capsys: pytest.CaptureFixture[str]) -> None:
    tools.add("sbatch", Answer("--parsable", err=NO_PARTITION, status=1))
    assert run("--submit", "--sbatch=--partition=gpus") == 1
    assert "Invalid partition name specified" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "command", "words"),
    [
        (["--sbatch=partition=gpu"], TRAIN, "--sbatch=--partition=gpu"),
        ([], [*TRAIN[:-1], "--workdir=runs/1b"], "give its whole path"),
        (["--slice=v5p:4x4x4"], TRAIN, "unknown flag --slice"),
    ],
)
def test_mistakes(capsys: pytest.CaptureFixture[str], options: list[str], command: list[str], words: str) -> None:
    assert run(*options, command=command) == 2
    assert words in capsys.readouterr().err


def test_without_slurm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run("--submit") == 2
    assert "sbatch is not installed here" in capsys.readouterr().err
