"""Writes the golden dumps of the shipped configs: `python -m tests.golden.dump_configs`.

A dump holds a config's resolved values, the names, shapes and axes of its parameters, and what its variants change.
What a commit changes about any of them stands in its diff.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from launch.cli import load
from lm_jax.config import build, differences, to_dict
from lm_jax.models.transformer import transformer_specs
from lm_jax.params import describe
from lm_jax.training.run import RunConfig

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(__file__).parent / "configs"
# Vocabularies that a tokenizer decides and no config can tell: the characters of tinyshakespeare.
CHARACTERS = {"shakespeare_char": 65}
VARIANTS = {"tiny": ("adamw", "adafactor")}


def names() -> list[str]:
    """The shipped configs."""
    return sorted(p.stem for p in (ROOT / "configs").glob("*.py") if p.stem not in ("base", "__init__"))


def resolved(name: str, variant: str = "") -> RunConfig:
    """A shipped config, checked, as it is in the file."""
    return build(RunConfig, load(f"{ROOT / 'configs' / name}.py" + (f":{variant}" if variant else "")))


def with_vocabulary(name: str) -> RunConfig:
    """A shipped config with the vocabulary that its tokenizer has."""
    config = resolved(name)
    return config.with_vocab(config.model.vocab or CHARACTERS.get(name, config.data.vocab_size))


def dump(name: str) -> dict[str, Any]:
    """What a golden file holds, as plain values."""
    config = resolved(name)
    variants = {v: differences(to_dict(config), to_dict(resolved(name, v))) for v in VARIANTS.get(name, ())}
    parameters = describe(transformer_specs(with_vocabulary(name).model))
    return {"config": to_dict(config), "variants": variants, "parameters": dict(parameters)}


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for old in FOLDER.glob("*.json"):
        old.unlink()
    for name in names():
        (FOLDER / f"{name}.json").write_text(json.dumps(dump(name), indent=1) + "\n")


if __name__ == "__main__":
    main()
