"""Writes docs/configs.md from the dataclasses of the sections: `python -m tests.golden.dump_docs`."""

from __future__ import annotations

import dataclasses
import re
import textwrap
import typing
from pathlib import Path

from lm_jax.training.run import RunConfig

FILE = Path(__file__).resolve().parents[2] / "docs" / "configs.md"

HEAD = """\
# Configs

A config file has a function `get_config` that starts from `configs.base.base()` and sets what differs. Any key can be
set on the command line, `--config.SECTION.KEY=VALUE`; a variant that the file declares is chosen by
`--config=configs/tiny.py:adamw`. A list is written `a,b`, no value `None`, a large number `1e9`. New evaluation sets
are named as they come: `--config.evaluation.sets.books=books/`.

A mistake (an unknown key, a value of another type or out of range, sizes that do not divide) ends the command before
anything compiles: at most three lines, with the key, the value, and what would be right; exit status 2.

This page is made from the code by `python -m tests.golden.dump_docs`.
"""


def text() -> str:
    """The whole page."""
    hints = typing.get_type_hints(RunConfig)
    return HEAD + "".join(section(field.name, hints[field.name]) for field in dataclasses.fields(RunConfig))


def section(name: str, cls: type) -> str:
    """A section's table: key, default, meaning."""
    meanings = {
        key: meaning for base in reversed(cls.__mro__) for key, meaning in attributes(base.__doc__ or "").items()
    }
    rows = []
    for field in dataclasses.fields(cls):
        value = field.default if field.default is not dataclasses.MISSING else "{}"
        meaning = meanings[field.name].replace("|", "\\|")
        rows.append(f"| `{name}.{field.name}` | `{value}` | {meaning} |")
    return f"\n## {name}\n\n| key | default | |\n| --- | --- | --- |\n" + "\n".join(rows) + "\n"


def attributes(docstring: str) -> dict[str, str]:
    """What the `Attributes:` of a docstring say, by name. `a, b: text` says the same of both."""
    if "Attributes:\n" not in docstring:
        return {}
    block = textwrap.dedent(docstring.split("Attributes:\n", 1)[1].split("\n\n")[0])
    found: dict[str, str] = {}
    for entry in re.split(r"\n(?=\w)", textwrap.dedent(block).strip()):
        names, _, meaning = entry.partition(": ")
        for name in names.split(", "):
            found[name.strip()] = " ".join(meaning.split())
    return found


if __name__ == "__main__":
    FILE.write_text(text())
