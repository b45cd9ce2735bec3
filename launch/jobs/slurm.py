"""A job as a batch script of SLURM.

One task a GPU, as jax expects it there (one a node without GPUs). The script waits for the tasks and asks SLURM to put
the job back into the queue, unless it is done or cannot be bettered; SLURM itself does so when a node fails or a more
important job takes the nodes.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from launch.jobs.job import Job, final_statuses

_WARNING_SECONDS = 180  # before the time limit, to save in
_STRAGGLER_SECONDS = 300  # that tasks may take to end after the first of them; a lost peer is noticed in 40

_SCRIPT = """\
#!/bin/bash
{directives}
# {title}
# Made by python -m launch.slurm. Statuses: 0 finished, 75 start again, {final} do not (launch/jobs/again.py).
set -uo pipefail
cd {folder}
export PATH="$PWD/.venv/bin:$PATH"
{exports}trap : TERM  # the tasks are told as well; this script waits for them
srun --kill-on-bad-exit=0 --wait={straggler} {command} &
wait $!
status=$?
while kill -0 $! 2> /dev/null; do  # a signal ends `wait`, and not the tasks
    wait $!
    status=$?
done
case $status in
    0) echo "$SLURM_JOB_NAME: finished" ;;
    {final_cases}) echo "$SLURM_JOB_NAME: ended with status $status, and is not started again" ;;
    *)
        state=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)
        case $state in CANCELLED|COMPLETING)  # scancel: what a person has ended must not come back
            echo "$SLURM_JOB_NAME: stopped with status $status, not started again: the job is $state"
            exit $status ;;
        esac
        echo "$SLURM_JOB_NAME: stopped with status $status, starting again"
        if scontrol requeue "$SLURM_JOB_ID"; then exit 0; fi
        echo "$SLURM_JOB_NAME: this cluster puts no job back into the queue: send it again, it goes on where it stopped"
        status=75
        ;;
esac
exit $status
"""


def script(job: Job, folder: Path, options: Sequence[str] = ()) -> str:
    """The batch script.

    Args:
      job: what it runs.
      folder: the checkout, on a disk that all nodes see; with an environment in `.venv`, if it has one.
      options: more of sbatch's, as `--partition=gpu`.
    """
    directives = [
        f"--job-name={job.name}",
        f"--nodes={job.nodes}",
        f"--ntasks-per-node={max(1, job.gpus)}",
        *([f"--gpus-per-node={job.gpu_type + ':' if job.gpu_type else ''}{job.gpus}"] if job.gpus else []),
        "--requeue",
        "--open-mode=append",
        "--output=%x-%j.log",
        f"--signal=TERM@{_WARNING_SECONDS}",
        *options,
    ]
    return _SCRIPT.format(
        directives="\n".join(f"#SBATCH {option}" for option in directives),
        title=" ".join(shlex.join(job.command).split()),
        final=final_statuses().replace("|", ", "),
        final_cases=final_statuses(),
        folder=shlex.quote(str(folder)),
        exports="".join(f"export {name}={shlex.quote(value)}\n" for name, value in job.environment),
        straggler=_STRAGGLER_SECONDS,
        command=_quoted(job.watched("$SLURM_JOB_ID")),
    )


def _quoted(words: Sequence[str]) -> str:
    """As the shell takes them; the job's number is the shell's to fill in."""
    return " ".join('--job="$SLURM_JOB_ID"' if word == "--job=$SLURM_JOB_ID" else shlex.quote(word) for word in words)
