"""Trains a model: `python -m launch.train --config=configs/tiny.py --workdir=runs/tiny`.

The same command goes on where an earlier process stopped. Exit status: 0 finished, 2 the user's mistake or a model that
does not fit, 75 saved and not finished (start me again), 1 anything else.
"""

from __future__ import annotations

from absl import flags
from ml_collections import ConfigDict

from launch import cli, runtime

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


def main(config: ConfigDict) -> int:
    from lm_jax.config import build
    from lm_jax.paths import run_path
    from lm_jax.training.profile import parse_steps
    from lm_jax.training.run import RunConfig

    run = build(RunConfig, config)
    directory = run_path(WORKDIR.value)
    profile = None if PROFILE_STEPS.value is None else parse_steps(PROFILE_STEPS.value, run.train.total_steps)
    runtime.start(FLAGS, run)

    from launch.fit import fitted
    from lm_jax.objectives.next_token import next_token
    from lm_jax.objectives.objective import Objective
    from lm_jax.training.loop import train
    from lm_jax.training.report import command_line

    def objective(c: RunConfig) -> Objective:
        return next_token(c.model, z_loss=c.train.z_loss, remat=c.train.remat, layout=c.mesh.layout)

    return train(fitted(run), directory, objective, command_line(), profile)


if __name__ == "__main__":
    runtime.exit_on_signals()
    cli.run(main, FLAGS, config=True)
