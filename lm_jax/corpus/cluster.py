"""The same stages on a cluster, by datatrove's executors: SLURM job arrays that wait for each other, or Ray.

A task there calls `stages.run_task`, as a process here does. All nodes see the output's folder, and have this project
and the extra `corpus` installed. What is done is not done again: the same command, once the jobs have ended, sends what
is left.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from datatrove.executor.slurm import SlurmPipelineExecutor
from datatrove.pipeline.base import PipelineStep

from lm_jax.corpus import stages
from lm_jax.corpus.folders import Plan
from lm_jax.errors import Failure, UserError

_NO_LIMIT = -1


class Task(PipelineStep):
    """A task of a stage, as datatrove's executors call it: its number is their rank."""

    name = "task"
    type = "lm_jax"

    def __init__(self, out: str, stage: str) -> None:
        super().__init__()
        self.out, self.stage = out, stage

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Any:
        """Does the task of number `rank`, unless it is done."""
        with self.track_time("task"):
            stages.run_task(Path(self.out), self.stage, rank)
        return data or []


def send(
    plan: Plan,
    executor: str,
    *,
    partition: str,
    time: str,
    memory_gb: int,
    workers: int | None = None,
    setup: str | None = None,
) -> None:
    """Sends every stage that is not done.

    Args:
      plan: as `folders.write_plan` wrote it.
      executor: "slurm" returns when all jobs are in the queue, "ray" when all tasks have ended.
      partition, time: of SLURM.
      memory_gb: of a task.
      workers: tasks of a stage at a time; None for as many as there are.
      setup: of SLURM, a command before each task.

    Raises:
      UserError: where the cluster's tools are not here, or refuse.
      Failure: where tasks on Ray have failed.
    """
    if executor == "ray":
        _send_to_ray(plan, memory_gb, workers)
    else:
        _send_to_slurm(plan, partition, time, memory_gb, workers, setup)


def _send_to_slurm(
    plan: Plan, partition: str, time: str, memory_gb: int, workers: int | None, setup: str | None
) -> None:
    if shutil.which("sbatch") is None:
        raise UserError("there is no sbatch here\nrun this where jobs are sent to SLURM, or with --executor=local")
    before: SlurmPipelineExecutor | None = None
    for stage in stages.stages_of(plan):
        before = SlurmPipelineExecutor(
            pipeline=[Task(str(plan.out), stage)],
            tasks=stages.tasks_of(plan, stage),
            time=time,
            partition=partition,
            mem_per_cpu_gb=memory_gb,
            workers=workers or _NO_LIMIT,
            job_name=f"prepare-{stage}",
            qos="",
            env_command=_environment(setup),
            logging_dir=str(_logs(plan, stage)),
            depends=before,
        )
    assert before is not None  # there is always a report
    try:
        before.run()
    except subprocess.CalledProcessError as error:
        raise UserError(f"sbatch refused: it ended with status {error.returncode}\nits own words are above") from error


def _environment(setup: str | None) -> str:
    """What makes a node's shell like this one: this Python's commands first, and this folder's modules."""
    python = shlex.quote(os.path.dirname(sys.executable))
    here = shlex.quote(os.getcwd())
    own = f'export PATH={python}:"$PATH" PYTHONPATH={here}:"$PYTHONPATH" JAX_PLATFORMS=cpu'
    return f"{own}\n{setup}" if setup else own


def _send_to_ray(plan: Plan, memory_gb: int, workers: int | None) -> None:
    if importlib.util.find_spec("ray") is None:
        raise UserError("--executor=ray needs the package ray\npip install 'ray[default]'")
    import ray
    from datatrove.executor.ray import RayPipelineExecutor

    if not ray.is_initialized():
        ray.init(address=os.environ.get("RAY_ADDRESS"))
    for stage in stages.stages_of(plan):
        tasks = stages.tasks_of(plan, stage)
        executor = RayPipelineExecutor(
            pipeline=[Task(str(plan.out), stage)],
            tasks=tasks,
            workers=workers or _NO_LIMIT,
            mem_per_cpu_gb=memory_gb,
            logging_dir=str(_logs(plan, stage)),
        )
        executor.run()
        left = [task for task in range(tasks) if not plan.folder(stage, task).is_dir()]
        if left:
            raise Failure(
                f"{len(left)} of {tasks} tasks failed while {stages.STAGES[stage].doing}\n"
                f"their logs: {_logs(plan, stage) / 'logs'}; the same command goes on where it was"
            )


def _logs(plan: Plan, stage: str) -> Path:
    return plan.work / "datatrove" / stage
