"""The loss of a trained model on any text: `python -m launch.evaluate --workdir=runs/tiny --source=FILE`.

Or on what its own source keeps for that: `--split=test` (data.test), `--split=held_out`. Prints
loss (nats a token), perplexity and bits per byte over all of the text, as JSON with --json.
"""

from __future__ import annotations

import json
from typing import Any

from absl import flags

from launch import cli, runtime

FLAGS = flags.FlagValues()
WORKDIR = flags.DEFINE_string("workdir", None, "the run's folder", required=True, flag_values=FLAGS)
SOURCE = flags.DEFINE_string(
    "source",
    None,
    "a file, directory or glob of .txt, .jsonl and .parquet files, or python",
    flag_values=FLAGS,
)
SPLIT = flags.DEFINE_enum(
    "split", None, ("held_out", "test"), "instead of --source: that part of the run's own text", flag_values=FLAGS
)
FIELD = flags.DEFINE_string(
    "field", None, "the field that holds the text (the run's own, if not given)", flag_values=FLAGS
)
LENGTH = flags.DEFINE_integer(
    "length", None, "tokens a row (the run's own, if not given)", lower_bound=1, flag_values=FLAGS
)
BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", None, "rows at a time (the run's own)", lower_bound=1, flag_values=FLAGS
)
STEP = flags.DEFINE_integer("step", None, "which checkpoint (the newest, if not given)", flag_values=FLAGS)
JSON = flags.DEFINE_bool("json", False, "print one line of JSON", flag_values=FLAGS)


def main() -> int:
    import dataclasses

    import jax

    from lm_jax.data.loader import Batches
    from lm_jax.data.pipeline import prepare_evaluation
    from lm_jax.errors import UserError
    from lm_jax.evaluation.loss import held_out_loss, make_eval_step
    from lm_jax.objectives.next_token import next_token
    from lm_jax.paths import run_path
    from lm_jax.sharding import one_device_mesh
    from lm_jax.training.metrics import evaluation_values
    from lm_jax.training.trained import load_trained

    if (SOURCE.value is None) == (SPLIT.value is None):
        raise UserError("give either --source=.. or --split=test, which is of the run's own text")
    runtime.use_compilation_cache()
    mesh = one_device_mesh()
    with jax.set_mesh(mesh):
        model = load_trained(run_path(WORKDIR.value), mesh, step=STEP.value)
        train = model.config.train
        data = dataclasses.replace(model.config.data, field=FIELD.value or model.config.data.field)
        length = LENGTH.value or train.length
        if SOURCE.value is not None:
            text = prepare_evaluation(data, model.tokenizer, SOURCE.value, length=length, key="--source")
        else:
            text = _own_text(data, model.data, SPLIT.value, length)
        eval_step = jax.jit(make_eval_step(next_token(model.config.model)))
        size, rows = BATCH_SIZE.value or train.batch_size, text.plan.rows_per_epoch
        with Batches(text.plan, text.store, mesh, batch_size=size, stop=rows) as batches:
            nats, targets = held_out_loss(eval_step, model.params, {}, {}, batches)
    values = evaluation_values(nats, targets, round(targets * text.bytes_per_target))
    if JSON.value:
        print(json.dumps({"step": model.step, "targets": targets, **values}))
    else:
        named = "  ".join(f"{name} {value:.4f}" for name, value in values.items())
        print(f"step {model.step}: {named}  ({targets:,} targets)")
    return 0


def _own_text(data: Any, identity: str, split: str | None, length: int) -> Any:
    """What a run's own source keeps for evaluation.

    Raises:
      UserError: where it keeps nothing, or its tokens are no longer those that the run was trained on.
    """
    from lm_jax.data.pipeline import prepare
    from lm_jax.errors import UserError

    prepared = prepare(data, length=length, seed=0)
    if not identity.startswith(f"{prepared.data}, "):
        raise UserError("--split: the run's source is no longer the text that it was trained on\ngive --source=..")
    text = prepared.test if split == "test" else prepared.held_out
    if text is None:
        raise UserError(f"--split={split}: the run has data.{split} = 0: nothing of its text was kept for that")
    return text


if __name__ == "__main__":
    cli.run(main, FLAGS)
