"""Which tokenizers there are, and how one is read from its files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lm_jax.data.cache import digest
from lm_jax.data.tokenizers.huggingface import JSON, HuggingFace
from lm_jax.data.tokenizers.sentencepiece import MODEL, SentencePiece
from lm_jax.data.tokenizers.simple import Bytes, Characters
from lm_jax.data.tokenizers.tiktoken import RANKS, Tiktoken, read_beside
from lm_jax.data.tokenizers.tokenizer import DESCRIPTION, Tokenizer
from lm_jax.errors import ConfigError, UserError

NAMES = ("bytes", "characters", "sentencepiece")  # those that are made of a run's own source
KINDS = (*NAMES, "huggingface", "tiktoken")
SUFFIXES = (".model", ".json", ".tiktoken")
_FORMS = "a folder that launch.train_tokenizer wrote, a .model file, a tokenizer.json or a .tiktoken file"


def from_files(files: dict[str, bytes], boundary: bool | None = None) -> Tokenizer:
    """The tokenizer that `files()` describes.

    Args:
      files: contents by file name.
      boundary: whether there is an id for it; None: as described.

    Raises:
      UserError: where they describe none, or the file beside the description is not the one that was saved.
    """
    try:
        values = json.loads(files[DESCRIPTION])
        if values["format"] != 1:
            raise UserError(f"{DESCRIPTION} is of format {values['format']!r}; this version reads format 1")
        kind, edge = values["kind"], bool(values["boundary"]) if boundary is None else boundary
        if kind == "bytes":
            return Bytes(edge)
        if kind == "characters":
            return Characters(values["characters"], edge)
        if kind == "sentencepiece":
            return SentencePiece(_sealed(files, MODEL, values), edge, exact_parts=values.get("parts") == "exact")
        if kind == "huggingface":
            return HuggingFace(_sealed(files, JSON, values), edge)
        if kind == "tiktoken":
            return Tiktoken(_sealed(files, RANKS, values), values["pattern"], values["special_tokens"], edge)
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{DESCRIPTION} is no description of a tokenizer ({error!r})") from error
    raise UserError(f"{DESCRIPTION}: unknown tokenizer {kind!r}; known are {', '.join(KINDS)}")


def _sealed(files: dict[str, bytes], name: str, values: dict[str, Any]) -> bytes:
    if digest(files[name]) != values["model"]:
        raise UserError(f"{name} is damaged: it is not the model that {DESCRIPTION} names")
    return files[name]


def load(directory: Any, boundary: bool | None = None) -> Tokenizer:
    """The tokenizer that `save` wrote into a folder (any path object).

    Raises:
      UserError: where there is none.
    """
    paths = {name: directory / name for name in (DESCRIPTION, MODEL, JSON, RANKS)}
    files = {name: path.read_bytes() for name, path in paths.items() if path.exists()}
    if DESCRIPTION not in files:
        raise UserError(f"{directory} holds no tokenizer: {DESCRIPTION} is missing")
    return from_files(files, boundary)


def is_path(name: str) -> bool:
    """Whether `data.tokenizer` names files rather than a kind that is made of the source."""
    return bool(name) and name not in NAMES and ("/" in name or name.endswith(SUFFIXES) or Path(name).exists())


def open_path(name: str, boundary: bool, key: str = "data.tokenizer") -> Tokenizer:
    """A tokenizer that is there already, whoever trained it.

    Args:
      name: a folder that holds one, or a file: sentencepiece's `.model`, a `tokenizer.json`, tiktoken's ranks.
      boundary: whether it is to have an id for a document's boundary.
      key: what messages call the name.

    Raises:
      ConfigError: where there is none, or it cannot be used.
    """
    path = Path(name).expanduser()
    try:
        if path.is_dir():
            return (
                load(path, boundary) if not _is_huggingface(path / DESCRIPTION) else _read(path / DESCRIPTION, boundary)
            )
        return _read(path, boundary)
    except OSError as error:
        raise ConfigError(key, f"{name!r} cannot be read: {error.strerror or error}", f"give {_FORMS}") from error
    except ConfigError:
        raise
    except UserError as error:
        first, _, rest = str(error).partition("\n")
        raise ConfigError(key, f"{name!r} {first}", rest or f"give {_FORMS}") from error


def _is_huggingface(path: Path) -> bool:
    """Whether it is a `tokenizer.json` of the library's, not a description of ours: both have the name."""
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and "model" in values and "format" not in values


def _read(path: Path, boundary: bool) -> Tokenizer:
    content = path.read_bytes()
    if path.suffix == ".tiktoken":
        return Tiktoken(content, *read_beside(path), boundary)
    if path.suffix == ".json":
        return HuggingFace(content, boundary) if _is_huggingface(path) else load(path.parent, boundary)
    return SentencePiece(content, boundary, exact_parts=True)
