"""Makes a batch script of SLURM for a job on GPU nodes, and sends it.

    python -m launch.slurm --name=lm-1b --nodes=4 --gpus=8 --sbatch=--partition=gpu -- \\
        python -m launch.train --config=configs/1b.py --workdir=/shared/runs/1b

prints the script; --submit gives it to sbatch. To be run in the checkout, on a disk that all nodes see. The job goes
back into the queue after a preemption, at its time limit and after the loss of a peer, and ends by itself after three
starts without a new step (launch/jobs/again.py). See docs/pods.md.
"""

from __future__ import annotations

from pathlib import Path

from absl import flags

from launch import cli
from launch.jobs import slurm, tools
from launch.jobs.job import define_flags, job_of
from launch.jobs.sweeps import each_run
from lm_jax.errors import UserError

FLAGS = flags.FlagValues()
define_flags(FLAGS, tpus=False, gpus=True)
SBATCH = flags.DEFINE_multi_string(
    "sbatch", [], "an option for sbatch: --sbatch=--partition=gpu --sbatch=--time=24:00:00", flag_values=FLAGS
)
EACH_RUN = flags.DEFINE_bool("each_run", False, "of a sweep: a job for each run that has not ended", flag_values=FLAGS)
SUBMIT = flags.DEFINE_bool("submit", False, "send it with sbatch, instead of printing it", flag_values=FLAGS)


def main(words: list[str], command: list[str]) -> None:
    if words:
        raise UserError(f"unexpected argument {words[0]!r}: flags are written --name=value")
    wrong = next((option for option in SBATCH.value if not option.startswith("-")), None)
    if wrong is not None:
        raise UserError(f"--sbatch={wrong} is no option of sbatch\nwrite it with its dashes: --sbatch=--partition=gpu")
    job = job_of(FLAGS, command, shared_disk=True)
    jobs = each_run(job) if EACH_RUN.value else [job]
    if not jobs:
        print("all runs have ended: the sweep's own command collects them")
    for one in jobs:
        text = slurm.script(one, Path.cwd(), SBATCH.value)
        if not SUBMIT.value:
            print(text, end="")
            continue
        number = tools.call(["sbatch", "--parsable"], seconds=tools.ASK, given=text).strip().partition(";")[0]
        print(f"{one.name} is sent. It is at: squeue --jobs={number}")
        print(f"  its log:  tail --follow=name {one.name}-{number}.log")
        print(f"  its end:  scancel {number}")


if __name__ == "__main__":
    cli.run(main, FLAGS, command=True)
