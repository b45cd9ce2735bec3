"""From raw text to a clean, tokenised corpus, with a report:

python -m launch.prepare_data --config=configs/data/example.py --out=runs/corpus

reads, cleans, deduplicates, decontaminates and tokenises. Stopped or killed, the same command goes on where it was.
Train on it by --config.data.source=runs/corpus. docs/data.md has more.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from launch import cli

FLAGS = flags.FlagValues()
OUT = flags.DEFINE_string("out", "runs/corpus", "the folder to write, on a local or shared disk", flag_values=FLAGS)
EXECUTOR = flags.DEFINE_enum(
    "executor", "local", ["local", "slurm", "ray"], "who runs the tasks; slurm and ray by datatrove", flag_values=FLAGS
)
PROCESSES = flags.DEFINE_integer(
    "processes", None, "tasks at a time; as a rule one a core", lower_bound=1, flag_values=FLAGS
)
PARTITION = flags.DEFINE_string("partition", None, "of SLURM: where the jobs run", flag_values=FLAGS)
TIME = flags.DEFINE_string("time", "24:00:00", "of SLURM: the limit of a task", flag_values=FLAGS)
MEMORY = flags.DEFINE_integer("memory_gb", 4, "of SLURM and Ray: memory of a task", lower_bound=1, flag_values=FLAGS)
SETUP = flags.DEFINE_string(
    "setup", None, "of SLURM: a command before each task, as 'source .venv/bin/activate'", flag_values=FLAGS
)


def main(values: ConfigDict) -> int:
    from lm_jax import paths
    from lm_jax.config import build
    from lm_jax.corpus import extra, stages
    from lm_jax.corpus.config import PrepareConfig
    from lm_jax.errors import UserError

    config = build(PrepareConfig, values)
    if "://" in OUT.value:
        raise UserError(
            f"--out={OUT.value} is not on a disk\ngive a local or shared folder, and copy it when it is whole"
        )
    out = Path(paths.run_path(OUT.value))
    extra.check()
    if EXECUTOR.value == "slurm" and not PARTITION.value:
        raise UserError("--partition is missing: the partition of SLURM that the jobs run in (see sinfo)")
    plan = stages.make_plan(out, config)
    with paths.lock(paths.run_path(out)):
        return _prepare(plan)


def _prepare(plan: Any) -> int:
    from lm_jax.corpus import extra, finish, folders, local

    folders.write_plan(plan)
    done = finish.finished(plan)
    if done is None:
        size = sum(file.size for file in plan.files)
        print(f"{len(plan.files):,} files, {size / 1e6:,.1f} MB, in {len(plan.parts):,} parts", file=sys.stderr)
        if EXECUTOR.value != "local":
            extra.check(("datatrove",))
            return _send(plan, EXECUTOR.value)
        local.run(plan, PROCESSES.value or plan.config.work.processes or os.cpu_count() or 1)
        done = finish.finished(plan)
        assert done is not None  # the last stage wrote it
    if not plan.config.work.keep:
        local.clear(plan)
    print(finish.summary(done))
    print(f"look at {plan.out / 'report.html'}, or {plan.out / 'report.md'}")
    return 0


def _send(plan: Any, executor: str) -> int:
    from lm_jax.corpus import cluster

    cluster.send(
        plan,
        executor,
        partition=PARTITION.value or "",
        time=TIME.value,
        memory_gb=MEMORY.value,
        workers=PROCESSES.value,
        setup=SETUP.value,
    )
    print(f"when all tasks have ended, {plan.out / 'report.html'} is there; the same command sends what is left")
    return 0


if __name__ == "__main__":
    cli.run(main, FLAGS, config=True)
