"""A vocabulary with further pieces for scripts that it spells in bytes, and a model grown to know them:

python -m launch.extend_tokenizer --tokenizer=runs/tokenizer --source=FILES --add=8000 --out=runs/extended
python -m launch.extend_tokenizer --workdir=runs/mine --source=FILES --out=runs/extended --out_workdir=runs/grown

Old ids keep their meaning, and Latin text gives the ids that it gave. The second form extends the tokenizer of a run;
its model's new rows begin as the mean of the rows that spelt the piece before. Train on from it with
--config.train.init_from=runs/grown --config.data.tokenizer=runs/extended. docs/tokenizers.md has more.
"""

from __future__ import annotations

import json
from typing import Any

from absl import flags

from launch import cli

FLAGS = flags.FlagValues()
TOKENIZER = flags.DEFINE_string("tokenizer", None, "the tokenizer to extend: a folder or a file", flag_values=FLAGS)
WORKDIR = flags.DEFINE_string("workdir", None, "a run, whose tokenizer is extended", flag_values=FLAGS)
SOURCE = flags.DEFINE_list(
    "source", None, "files, directories or globs of text in the new scripts", required=True, flag_values=FLAGS
)
FIELD = flags.DEFINE_string("field", "text", "the field or column that holds the text", flag_values=FLAGS)
ADD = flags.DEFINE_integer("add", 8000, "how many pieces to add at most", lower_bound=10, flag_values=FLAGS)
OUT = flags.DEFINE_string("out", None, "the folder of the new tokenizer", required=True, flag_values=FLAGS)
OUT_WORKDIR = flags.DEFINE_string("out_workdir", None, "the folder of the grown model", flag_values=FLAGS)
SAMPLE = flags.DEFINE_integer(
    "sample_mb", 64, "how much text to learn from, in 10^6 bytes", lower_bound=1, flag_values=FLAGS
)
HELD_OUT = flags.DEFINE_float("held_out", 0.02, "the share of the text that is kept to measure on", flag_values=FLAGS)

SPELT = "extension.json"  # beside the new tokenizer: the old ids that spelt each new one


def main() -> int:
    from lm_jax.data.corpus import Corpus
    from lm_jax.data.progress import Progress
    from lm_jax.data.sources import Policy, find_files
    from lm_jax.data.tokenizers.extend import extend
    from lm_jax.data.tokenizers.report import measure, table
    from lm_jax.errors import UserError
    from lm_jax.paths import make_directory, run_path, write_text_atomic

    if (TOKENIZER.value is None) == (WORKDIR.value is None):
        raise UserError("--tokenizer: give this or --workdir\na tokenizer, or a run whose tokenizer is meant")
    if OUT_WORKDIR.value is not None and WORKDIR.value is None:
        raise UserError("--out_workdir: there is no model to grow\ngive the run by --workdir, not a tokenizer")
    if not 0 < HELD_OUT.value <= 0.5:  # false for NaN
        raise UserError(f"--held_out: {HELD_OUT.value} is no share to measure on\ngive one above 0, to 0.5")
    old, trained = _old()
    corpus = Corpus(find_files(tuple(SOURCE.value), "--source"), Policy(FIELD.value), HELD_OUT.value)
    with Progress("learning pieces", ADD.value) as progress:
        extended = extend(old, corpus.sample(SAMPLE.value * 10**6), ADD.value, progress.advance)
    out = run_path(OUT.value)
    make_directory(out)
    extended.tokenizer.save(out)
    write_text_atomic(out / SPELT, json.dumps({"first": old.vocab_size, "spelt": extended.spelt}) + "\n")
    held_out = [d.text for d, held in zip(corpus, corpus.held_out.tolist(), strict=True) if held]
    print(f"{len(extended.spelt):,} pieces more: {extended.tokenizer.vocab_size:,} ids in {out}")
    rows = [measure(name, t, "held out", held_out) for name, t in (("before", old), ("extended", extended.tokenizer))]
    print(table(rows))
    if OUT_WORKDIR.value is not None:
        _grow(trained, old, extended, str(out), OUT_WORKDIR.value)
    return 0


def _old() -> tuple[Any, Any]:
    """The tokenizer to extend and, of a run, the model."""
    from lm_jax.data.tokenizers import open_path

    if TOKENIZER.value is not None:
        return open_path(TOKENIZER.value, True, "--tokenizer"), None
    import jax

    from lm_jax.paths import run_path
    from lm_jax.sharding import one_device_mesh
    from lm_jax.training.trained import load_trained

    mesh = one_device_mesh()
    with jax.set_mesh(mesh):
        trained = load_trained(run_path(WORKDIR.value or ""), mesh)
    return trained.tokenizer, trained


def _grow(trained: Any, old: Any, extended: Any, name: str, out_workdir: str) -> None:
    import jax

    from lm_jax.errors import UserError
    from lm_jax.paths import run_path
    from lm_jax.sharding import one_device_mesh
    from lm_jax.training.checkpoint_reader import CheckpointReader
    from lm_jax.training.grow import grown, save_grown

    out = run_path(out_workdir)
    if (out / "checkpoints").exists():
        raise UserError(f"--out_workdir: {out} is a run already\ngive another folder")
    mesh = one_device_mesh()
    with jax.set_mesh(mesh):
        metadata = CheckpointReader(run_path(WORKDIR.value or "") / "checkpoints").read_metadata(trained.step)
        params, model = grown(trained.params, trained.config.model, old.vocab_size, extended.spelt, mesh)
        save_grown(out, metadata, params, model, extended.tokenizer, name)
    print(f"a model of {model.ids:,} ids in {out}: train on from it with --config.train.init_from={out}")


if __name__ == "__main__":
    cli.run(main, FLAGS)
