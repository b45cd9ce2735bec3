"""Tokenizers beside each other, on the same texts:

python -m launch.compare_tokenizers --tokenizers=runs/tokenizer,runs/extended --texts=English=FILE,Chinese=FILE

A table of bytes and characters a token, tokens a word, the share of characters that have a token of their own, and
speed; with --png also a picture. docs/tokenizers.md explains the columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from absl import flags

from launch import cli

if TYPE_CHECKING:
    from lm_jax.data.tokenizers.report import Measured

FLAGS = flags.FlagValues()
TOKENIZERS = flags.DEFINE_list(
    "tokenizers",
    None,
    "folders or files of tokenizers, or bytes; NAME=PATH names one",
    required=True,
    flag_values=FLAGS,
)
TEXTS = flags.DEFINE_list("texts", None, "texts as NAME=FILE or FILE", required=True, flag_values=FLAGS)
FIELD = flags.DEFINE_string("field", "text", "the field or column that holds the text", flag_values=FLAGS)
PNG = flags.DEFINE_string("png", None, "where to write a picture", flag_values=FLAGS)


def main() -> int:
    from lm_jax.data.sources import Policy, Reader, find_files
    from lm_jax.data.tokenizers import Bytes, open_path
    from lm_jax.data.tokenizers.report import measure, table
    from lm_jax.errors import UserError
    from lm_jax.paths import run_path, write_bytes_atomic

    chosen = {}
    for name, path in _named(TOKENIZERS.value):
        chosen[name] = Bytes() if path == "bytes" else open_path(path, True, "--tokenizers")
    rows = []
    for text, path in _named(TEXTS.value):
        documents = [d.text for d in Reader(find_files(path, "--texts"), Policy(FIELD.value))]
        if not documents:
            raise UserError(f"--texts: {path} has no text")
        rows += [measure(name, tokenizer, text, documents) for name, tokenizer in chosen.items()]
    print(table(rows))
    if PNG.value is not None:
        write_bytes_atomic(run_path(PNG.value), picture(rows))
    return 0


def _named(values: Sequence[str]) -> list[tuple[str, str]]:
    """`NAME=PATH` or `PATH` as names and paths."""
    from lm_jax.errors import UserError

    pairs = [(name, path) if eq else (name, name) for name, eq, path in (v.partition("=") for v in values)]
    twice = [name for n, (name, _) in enumerate(pairs) if name in [before for before, _ in pairs[:n]]]
    if twice:
        raise UserError(f"--tokenizers, --texts: {twice[0]!r} is named twice\nname every one once")
    return pairs


def picture(rows: Sequence[Measured]) -> bytes:
    """Bars of bytes a token and tokens a word, a group a text, as a PNG."""
    import io

    import numpy as np
    from matplotlib.figure import Figure

    names, texts = (list(dict.fromkeys(getattr(r, part) for r in rows)) for part in ("tokenizer", "text"))
    found = {(r.tokenizer, r.text): r for r in rows}
    figure = Figure(figsize=(12, 4.4), layout="constrained")
    axes: Any = figure.subplots(1, 2)
    places, width = np.arange(len(texts)), 0.8 / len(names)
    for axis, (key, label) in zip(
        axes, (("bytes_per_token", "bytes a token"), ("fertility", "tokens a word")), strict=True
    ):
        for n, name in enumerate(names):
            values = [getattr(found[name, text], key) for text in texts]
            bars = axis.bar(places + (n - (len(names) - 1) / 2) * width, values, width, label=name)
            axis.bar_label(bars, fmt="%.2f", fontsize=7)
        axis.set(ylabel=label)
        axis.set_xticks(places, texts)
        axis.grid(axis="y", alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(names), fontsize=8)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110)
    return out.getvalue()


if __name__ == "__main__":
    cli.run(main, FLAGS)
