"""What a step trains on: `python -m launch.inspect_data --config=configs/tiny.py --step=1000`.

Shows the decoded rows of that step: documents by colour, where each comes from, positions, what the loss does not
count.
"""

from __future__ import annotations

import sys
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from launch import cli

FLAGS = flags.FlagValues()
STEP = flags.DEFINE_integer("step", 1, "the training step, from 1", lower_bound=1, flag_values=FLAGS)
ROWS = flags.DEFINE_integer("rows", 4, "how many of its rows", lower_bound=1, flag_values=FLAGS)
HTML = flags.DEFINE_string("html", None, "write a page to this file instead", flag_values=FLAGS)


def main(config: ConfigDict) -> int:
    from lm_jax.config import build
    from lm_jax.data.inspection import page, rows_of, summary, terminal
    from lm_jax.data.packing import read_rows
    from lm_jax.data.pipeline import prepare
    from lm_jax.errors import UserError
    from lm_jax.training.run import RunConfig

    run = build(RunConfig, config)
    train = run.train
    if STEP.value > train.total_steps:
        raise UserError(f"--step={STEP.value} is beyond the run's {train.total_steps:,} steps")
    prepared = prepare(run.data, length=train.length, seed=train.seed)
    prepared.check_epochs(train.total_steps * train.batch_size)
    first = (STEP.value - 1) * train.batch_size
    numbers = range(first, first + min(ROWS.value, train.batch_size))
    plan, store = prepared.train.plan, prepared.train.store
    rows = rows_of(
        read_rows(plan, store, list(numbers)), plan, numbers, prepared.tokenizer, run.data.prompt_field is not None
    )
    where = f"step {STEP.value}: rows {first:,} on"
    if consumed := prepared.consumed(first):
        where += ", before them " + ", ".join(f"{n:,} of {name}" for name, n in consumed.items())
    else:
        epoch, place = divmod(first, plan.rows_per_epoch)
        where += f", row {place:,} of {plan.rows_per_epoch:,} of epoch {epoch}"
    about = f"{where}; {summary(rows, train.length)}"
    if HTML.value:
        Path(HTML.value).write_text(page(rows, f"What step {STEP.value} trains on", about), encoding="utf-8")
        print(f"{about}\n{HTML.value}")
    else:
        print(about)
        print(terminal(rows, color=sys.stdout.isatty()))
    return 0


if __name__ == "__main__":
    cli.run(main, FLAGS, config=True)
