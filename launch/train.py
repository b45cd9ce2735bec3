"""Trains a model: `python -m launch.train --config=configs/tiny.py --workdir=runs/tiny`.

The same command goes on where an earlier process stopped. Exit status: 0 finished, 2 the user's mistake or a model that
does not fit, 75 saved and not finished (start me again), 1 anything else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from absl import flags
from ml_collections import ConfigDict

from launch import cli, runtime

if TYPE_CHECKING:
    from lm_jax.objectives.objective import Objective
    from lm_jax.training.run import RunConfig

FLAGS = flags.FlagValues()
WORKDIR = flags.DEFINE_string(
    "workdir", None, "the run's folder (local, gs:// or s3://)", required=True, flag_values=FLAGS
)
PROFILE_STEPS = flags.DEFINE_string(
    "profile_steps",
    None,
    "FIRST:LAST, both included: an XProf trace of these steps, in WORKDIR/profile",
    flag_values=FLAGS,
)
runtime.define_process_flags(FLAGS)


def objective(config: RunConfig) -> Objective:
    """What a run of this config minimises."""
    from lm_jax.objectives.next_token import next_token

    train = config.train
    return next_token(config.model, z_loss=train.z_loss, remat=train.remat, layout=config.mesh.layout)


def main(config: ConfigDict) -> int:
    from lm_jax.config import build
    from lm_jax.paths import run_path
    from lm_jax.training.profile import parse_steps
    from lm_jax.training.run import RunConfig

    run = build(RunConfig, config)
    directory = run_path(WORKDIR.value)
    profile = None if PROFILE_STEPS.value is None else parse_steps(PROFILE_STEPS.value, run.train.total_steps)
    runtime.start(FLAGS, run)

    from launch.memory import fitted
    from lm_jax.training.loop import train
    from lm_jax.training.report import command_line

    return train(fitted(run), directory, objective, command_line(), profile)


if __name__ == "__main__":
    runtime.exit_on_signals()
    cli.run(main, FLAGS, config=True)
