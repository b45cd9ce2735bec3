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
WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "a run of this config: which rows its step had, whatever batch sizes it went through",
    flag_values=FLAGS,
)
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
    if WORKDIR.value is None and STEP.value > train.total_steps:
        raise UserError(f"--step={STEP.value} is beyond the run's {train.total_steps:,} steps")
    prepared = prepare(run.data, length=train.length, seed=train.seed)
    if WORKDIR.value is None:
        prepared.check_epochs(train.total_steps * train.batch_size)
        first, stop = (STEP.value - 1) * train.batch_size, STEP.value * train.batch_size
    else:
        first, stop = _rows_of_step(WORKDIR.value, STEP.value, train.length)
    numbers = range(first, min(first + ROWS.value, stop))
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


def _rows_of_step(workdir: str, step: int, length: int) -> tuple[int, int]:
    """The rows [first, stop) of a step that a run has taken, by its records.

    Raises:
      UserError: where it has not taken it.
    """
    from lm_jax.errors import UserError
    from lm_jax.paths import run_path
    from lm_jax.training.metrics import FILE, read_metrics

    records = read_metrics(run_path(workdir) / FILE)
    rows = {r["step"]: r["tokens"] // length for r in records if r["kind"] == "step"}
    if step not in rows or (step > 1 and step - 1 not in rows):
        have = f"it has steps 1 to {max(rows)}" if rows else "it has none yet"
        raise UserError(f"--step={step} is not among the steps of {workdir}: {have}")
    return rows.get(step - 1, 0), rows[step]


if __name__ == "__main__":
    cli.run(main, FLAGS, config=True)
