"""Which documents hold a piece of an evaluation set: runs of 13 words, as for GPT-3 (Brown et al. 2020, appendix C).

Words are letters and digits in lower case, whatever stands between them, so layout, case, punctuation and the form of
Unicode hide no overlap; nor does what cleaning replaces, as sets are looked for as they are and as cleaned. GPT-3 cut
200 characters around an overlap out; here the whole document is dropped.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from lm_jax.corpus import inputs, readers
from lm_jax.corpus import words as W
from lm_jax.corpus.config import CleaningConfig, DecontaminationConfig, RawConfig
from lm_jax.corpus.rules import RULES, Document
from lm_jax.errors import ConfigError, UserError

NGRAMS, OF = "ngrams", "of"


@dataclasses.dataclass(frozen=True)
class Index:
    """The runs of words of all evaluation sets.

    Attributes:
      ngrams: `[runs]` uint64, their hashes, sorted, each once.
      of: `[runs]` uint16, the set that each is of (the first, where several have it).
      names: of the sets.
      words: how many words a run has.
    """

    ngrams: np.ndarray
    of: np.ndarray
    names: tuple[str, ...]
    words: int

    def overlap(self, hashes: np.ndarray) -> tuple[str, int] | None:
        """The set that a text has a run of words in common with, and which word the first such run begins with.

        Args:
          hashes: `[W]` uint64 of the text's words (`words.normalised`).
        """
        grams = W.ngrams(hashes, self.words)
        if not len(grams) or not len(self.ngrams):
            return None
        at = np.searchsorted(self.ngrams, grams)
        hits = np.flatnonzero(self.ngrams[np.minimum(at, len(self.ngrams) - 1)] == grams)
        return (self.names[self.of[at[hits[0]]]], int(hits[0])) if len(hits) else None


def find(source: str, key: str) -> list[inputs.Found]:
    """The files of an evaluation set.

    Raises:
      ConfigError: where it is not there, or is a data set of the hub: of those a column would have to be named.
    """
    if source.startswith(inputs.HUGGING_FACE):
        problem = f"{source!r} is no file, and evaluation sets are read from files"
        raise ConfigError(key, problem, "write its records to a .jsonl or .parquet file, and name that")
    return inputs.find((source,), key)[0]


def build(c: DecontaminationConfig, folder: Path, cleaning: CleaningConfig | None = None) -> dict[str, dict[str, int]]:
    """Writes the index of all sets into a folder.

    Args:
      c: the sets.
      folder: there, and empty.
      cleaning: what documents go through before they are compared; None for what is usual.

    Returns:
      For each set, how many texts it has, how many of them are too short for a run, and how many runs.

    Raises:
      ConfigError: where a set is not there, or has no run at all: it would protect nothing.
    """
    found: list[np.ndarray] = []
    of: list[np.ndarray] = []
    told = {}
    for number, (name, source) in enumerate(c.sets.items()):
        key = f"decontamination.sets.{name}"
        grams, counts = _grams(source, c.words, key, cleaning or CleaningConfig())
        if not len(grams):
            problem = f"{source!r} has no text of {c.words} words or more: it would protect nothing"
            raise ConfigError(key, problem, "give its whole text, or a smaller decontamination.words")
        told[name] = counts
        found.append(grams)
        of.append(np.full(len(grams), number, np.uint16))
    ngrams, first = np.unique(np.concatenate(found), return_index=True)
    np.save(folder / NGRAMS, ngrams)
    np.save(folder / OF, np.concatenate(of)[first])
    return told


def _grams(source: str, words: int, key: str, cleaning: CleaningConfig) -> tuple[np.ndarray, dict[str, int]]:
    files = find(source, key)
    texts = short = 0
    found: list[np.ndarray] = []
    for part in inputs.parts(files, 2**62):
        for piece in part:
            for text in _texts(piece):
                grams = [W.ngrams(W.normalised(form).hashes, words) for form in _forms(text, cleaning)]
                texts += 1
                short += not any(map(len, grams))
                found += grams
    runs = np.unique(np.concatenate(found)) if found else np.zeros(0, np.uint64)
    return runs, {"texts": texts, "too short": short, "runs": len(runs)}


def _texts(piece: inputs.Piece) -> Iterator[str]:
    """Every text of a file of an evaluation set; an empty one for a record without any.

    Raises:
      UserError: at what cannot be read: a set protects whole or not at all.
    """
    for found in readers.read(piece, RawConfig(field=readers.EVERY, max_document_bytes=2**28)):
        if isinstance(found, readers.Broken):
            if found.reason != "empty":
                raise UserError(f"{found.origin}: {found.reason}\nmend it: an evaluation set is read as a whole")
            yield ""
        elif found.markup:
            main = RULES["html"](found, CleaningConfig())
            yield main if isinstance(main, str) else ""
        elif piece.kind == "arrayrecord":
            yield from _of_record(found.text)
        else:
            yield from found.text.split(readers.SEPARATOR)


def _of_record(text: str) -> Iterator[str]:
    """The texts of a record that is JSON, or the record: an ArrayRecord does not say what it holds."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict | list):
        yield text
        return
    strings = list(readers._texts(value))
    for string in strings or [""]:
        yield string.encode("utf-8", errors="replace").decode("utf-8")  # half of a surrogate pair is no character


def _forms(text: str, cleaning: CleaningConfig) -> set[str]:
    """A text as it is, and as documents are that went through the rules that change what is in a line."""
    document = Document(text, "")
    for name in ("unicode", "personal_data"):
        changed = RULES[name](document, cleaning)
        if isinstance(changed, str):
            document.text = changed
    return {text, document.text}


def load(folder: Path, c: DecontaminationConfig) -> Index:
    """The index that `build` wrote, mapped from the disk."""
    ngrams = np.load(folder / f"{NGRAMS}.npy", mmap_mode="r")
    return Index(ngrams, np.load(folder / f"{OF}.npy", mmap_mode="r"), tuple(c.sets), c.words)
