"""The stages on SLURM and Ray, by datatrove's executors: jobs that wait for each other, and the same bytes."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
from pathlib import Path

import pytest

from lm_jax.corpus import cluster, stages
from lm_jax.errors import Failure, UserError
from tests.corpus.test_prepare import config, contents, prepare, raw
from tests.corpus.texts import planned
from tests.support.processes import ROOT, environment
from tests.support.stand_ins import Answer, StandIns


def send(plan: stages.Plan, executor: str = "slurm") -> None:
    cluster.send(plan, executor, partition="cpu", time="1:00:00", memory_gb=2, workers=3, setup="echo ready")


def run_jobs(calls: list[dict[str, str]], folder: Path, tools: StandIns) -> None:
    """Runs the scripts that were sent, an array's jobs one after another, in bash, as SLURM would."""
    tools.add("srun", Answer(".*", status=1, times=None))
    (tools.bin / "srun").write_text(
        '#!/bin/bash\nwhile [ "$1" != launch_pickled_pipeline ]; do shift; done\nexec "$@"\n'
    )
    (tools.bin / "scontrol").write_text("#!/bin/bash\necho localhost\n")
    (tools.bin / "scontrol").chmod(0o755)
    for number, call in enumerate(calls):
        script = folder / f"job{number}.sh"
        script.write_text(call["script"])
        array = re.search(r"--array=0-(\d+)", call["script"])
        for task in range(int(array[1]) + 1 if array else 0):
            env = environment(
                extra={"SLURM_ARRAY_TASK_ID": str(task), "SLURM_NODELIST": "localhost", "SLURM_JOB_ID": "1"}
            )
            done = subprocess.run(["bash", str(script)], env=env, cwd=ROOT, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandIns:
    """An sbatch that keeps the scripts it is given, and numbers the jobs."""
    tools = StandIns(tmp_path / "tools", monkeypatch)
    sent = tmp_path / "sent"
    sent.mkdir()
    (tools.bin / "sbatch").write_text(
        f'#!/bin/bash\nn=$(ls {sent} | wc -l)\nfile="${{@: -1}}"\n'
        f'{{ echo "# $*"; cat "$file"; }} > {sent}/$(printf %03d $n)\necho "Submitted batch job $((100 + n))"\n'
    )
    (tools.bin / "sbatch").chmod(0o755)
    return tools


def sent_jobs(tmp_path: Path) -> list[dict[str, str]]:
    found = []
    for path in sorted((tmp_path / "sent").iterdir()):
        first, _, script = path.read_text().partition("\n")
        found.append({"arguments": first, "script": script, "number": str(100 + int(path.name))})
    return found


def test_stages_are_jobs_that_wait_for_each_other(tmp_path: Path, slurm: StandIns) -> None:
    plan = planned(tmp_path / "out", config(raw(tmp_path / "raw", 12)))
    send(plan)
    jobs = [j for j in sent_jobs(tmp_path) if "launch_pickled_pipeline" in j["script"]]
    names = [re.search(r"--job-name=(\S+)", j["script"]) for j in jobs]
    assert [n and n[1] for n in names] == [f"prepare-{stage}" for stage in stages.stages_of(plan)]
    for job, stage in zip(jobs, stages.stages_of(plan), strict=True):
        last = stages.tasks_of(plan, stage) - 1
        assert f"#SBATCH --array=0-{last}%3" in job["script"] and "#SBATCH --partition=cpu" in job["script"]
        assert "echo ready" in job["script"] and f"PYTHONPATH={os.getcwd()}" in job["script"]
    for before, job in itertools.pairwise(jobs):
        assert f"--dependency=afterok:{before['number']}" in job["arguments"]


@pytest.mark.slow
def test_the_jobs_make_the_same_bytes_and_go_on_where_they_were(tmp_path: Path, slurm: StandIns) -> None:
    c = config(raw(tmp_path / "raw", 12))
    reference = prepare(tmp_path / "reference", c)
    plan = planned(tmp_path / "out", c)
    stages.run_task(plan.out, "index", 0)  # done before: the job finds it so
    send(plan)
    run_jobs([j for j in sent_jobs(tmp_path) if "launch_pickled_pipeline" in j["script"]], tmp_path, slurm)
    assert contents(plan.out) == contents(reference.out)
    before = len(sent_jobs(tmp_path))
    send(plan)  # nothing is left to be sent
    assert [j for j in sent_jobs(tmp_path)[before:] if "launch_pickled_pipeline" in j["script"]] == []


def test_a_task_of_datatrove_s_is_a_task_of_a_stage(tmp_path: Path) -> None:
    from datatrove.executor import LocalPipelineExecutor

    c = config(raw(tmp_path / "raw", 12))
    plan = planned(tmp_path / "out", c)
    for stage in stages.stages_of(plan):
        tasks = stages.tasks_of(plan, stage)
        steps = [cluster.Task(str(plan.out), stage)]
        executor = LocalPipelineExecutor(steps, tasks=tasks, workers=1, logging_dir=str(tmp_path / "logs" / stage))
        for rank in range(tasks):  # what its `run` does, without the process that it forks off for a queue
            executor._run_for_rank(rank)
        assert executor.get_incomplete_ranks() == []
    assert contents(plan.out) == contents(prepare(tmp_path / "reference", c).out)


def test_what_a_cluster_lacks_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = planned(tmp_path / "out", config(raw(tmp_path / "raw", 12)))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="there is no sbatch here"):
        send(plan)
    monkeypatch.setattr(cluster.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs the package ray"):
        send(plan, "ray")


def test_an_sbatch_that_refuses_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tools = StandIns(tmp_path / "tools", monkeypatch)
    tools.add("sbatch", Answer(".*", err="sbatch: error: invalid partition\n", status=1, times=None))
    plan = planned(tmp_path / "out", config(raw(tmp_path / "raw", 12)))
    with pytest.raises(UserError, match="sbatch refused"):
        send(plan)


@pytest.mark.slow
def test_ray_runs_the_same_tasks(tmp_path: Path) -> None:
    ray = pytest.importorskip("ray")
    c = config(raw(tmp_path / "raw", 12))
    plan = planned(tmp_path / "out", c)
    ray.init(num_cpus=4, include_dashboard=False, runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}})
    try:
        send(plan, "ray")
        assert contents(plan.out) == contents(prepare(tmp_path / "reference", c).out)
        broken = planned(tmp_path / "broken", c)
        (tmp_path / "raw" / "a.jsonl").unlink()
        with pytest.raises(Failure, match="tasks failed while cleaning"):
            send(broken, "ray")
    finally:
        ray.shutdown()
