"""Which documents hold a piece of an evaluation set: runs of 13 words, as for GPT-3 (Brown et al. 2020, appendix C).

Words are letters and digits in lower case, whatever stands between them, so layout, case and punctuation hide no
overlap. GPT-3 cut 200 characters around an overlap out; here the whole document is dropped.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from lm_jax.corpus import inputs, readers
from lm_jax.corpus import words as W
from lm_jax.corpus.config import DecontaminationConfig, RawConfig
from lm_jax.errors import ConfigError

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


def build(c: DecontaminationConfig, folder: Path) -> dict[str, dict[str, int]]:
    """Writes the index of all sets into a folder.

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
        grams, counts = _grams(source, c.words, key)
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


def _grams(source: str, words: int, key: str) -> tuple[np.ndarray, dict[str, int]]:
    files, _ = inputs.find((source,), key)
    texts = short = 0
    found: list[np.ndarray] = []
    for part in inputs.parts(files, 2**62):
        for piece in part:
            for document in readers.read(piece, RawConfig(field=readers.EVERY, bad="refuse", max_document_bytes=2**28)):
                assert not isinstance(document, readers.Broken)  # refused
                for text in document.text.split(readers.SEPARATOR):
                    grams = W.ngrams(W.normalised(text).hashes, words)
                    texts += 1
                    short += not len(grams)
                    found.append(grams)
    grams = np.unique(np.concatenate(found)) if found else np.zeros(0, np.uint64)
    return grams, {"texts": texts, "too short": short, "runs": len(grams)}


def load(folder: Path, c: DecontaminationConfig) -> Index:
    """The index that `build` wrote, mapped from the disk."""
    ngrams = np.load(folder / f"{NGRAMS}.npy", mmap_mode="r")
    return Index(ngrams, np.load(folder / f"{OF}.npy", mmap_mode="r"), tuple(c.sets), c.words)
