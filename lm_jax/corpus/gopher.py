"""The filters of Gopher (Rae et al. 2021, arXiv:2112.11446, appendix A1.1).

datatrove has them as well, and the tests compare verdicts. They are written anew here because its version departs from
the paper, or cannot be used as it is:

- Its words come from spaCy, where punctuation marks are words of their own: "at least 80% of words with a letter" drops
  ordinary prose with many commas. The paper's words, and these, are what white space separates.
- It builds a Python string for every n-gram, nine times a document: 0.4 to 0.5 MB/s a core. On arrays of word hashes
  (`words.py`) the same counts take a fraction of that.

Two things the paper leaves open are as datatrove has them: the first of several equal lines, paragraphs or n-grams does
not count as duplicate, and fractions of characters are of the whole text, white space included.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from lm_jax.corpus import words as W

if TYPE_CHECKING:
    from lm_jax.corpus.config import CleaningConfig

STOP_WORDS = frozenset(("the", "be", "to", "of", "and", "that", "have", "with"))
BULLETS = ("•", "‣", "▪", "*", "-", "–")  # the paper says "a bullet point"; datatrove knows • and - alone
ELLIPSES = ("...", "…")

# Table A1.
LINES, PARAGRAPHS, LINE_CHARACTERS, PARAGRAPH_CHARACTERS = 0.30, 0.30, 0.20, 0.20
TOP_NGRAMS = ((2, 0.20), (3, 0.18), (4, 0.16))
DUPLICATE_NGRAMS = ((5, 0.15), (6, 0.14), (7, 0.13), (8, 0.12), (9, 0.11), (10, 0.10))


def quality(text: str, c: CleaningConfig) -> str:
    """Why the quality filter drops a text, or an empty string."""
    found = W.by_space(text)
    count = len(found.hashes)
    if count < c.min_words:
        return f"fewer than {c.min_words} words"
    if count > c.max_words:
        return f"more than {c.max_words} words"
    if not count:
        return ""
    mean = float((found.ends - found.starts).mean())
    if not c.min_word_length <= mean <= c.max_word_length:
        side = "short" if mean < c.min_word_length else "long"
        return f"words too {side} in the mean"
    if text.count("#") > c.max_symbols * count:
        return "too many hash signs"
    if text.count("...") + text.count("…") > c.max_symbols * count:
        return "too many ellipses"
    return _lines(text, c) or _letters(text, found, c) or _stop_words(text, c)


def _lines(text: str, c: CleaningConfig) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    if sum(line.lstrip().startswith(BULLETS) for line in lines) > c.max_bullet_lines * len(lines):
        return "too many lines begin with a bullet"
    if sum(line.rstrip().endswith(ELLIPSES) for line in lines) > c.max_ellipsis_lines * len(lines):
        return "too many lines end with an ellipsis"
    return ""


def _letters(text: str, found: W.Words, c: CleaningConfig) -> str:
    letters = np.zeros(len(text) + 1, np.int64)
    np.cumsum(W.is_letter(W.codes(text)), out=letters[1:])
    alphabetic = int((letters[found.ends] > letters[found.starts]).sum())
    if alphabetic < c.min_alphabetic_words * len(found.hashes):
        return f"fewer than {c.min_alphabetic_words:.0%} of words have a letter"
    return ""


def _stop_words(text: str, c: CleaningConfig) -> str:
    if c.min_stop_words and len(STOP_WORDS.intersection(text.split())) < c.min_stop_words:
        return f"fewer than {c.min_stop_words} English stop words"
    return ""


def repetition(text: str) -> str:
    """Why the repetition filter drops a text, or an empty string."""
    size = len(text)
    if not size or text.isspace():
        return "nothing but white space"
    for what, parts, most, most_characters in (
        ("paragraphs", re.split(r"\n{2,}", text.strip()), PARAGRAPHS, PARAGRAPH_CHARACTERS),
        ("lines", re.split(r"\n+", text.strip("\n")), LINES, LINE_CHARACTERS),
    ):
        repeated, characters = duplicates(parts)
        if repeated > most * len(parts):
            return f"duplicate {what}"
        if characters > most_characters * size:
            return f"characters in duplicate {what}"
    found = W.by_space(text)
    lengths = found.ends - found.starts
    for n, most in TOP_NGRAMS:
        if top_ngram(found.hashes, lengths, n) > most * size:
            return f"the most frequent run of {n} words"
    for n, most in DUPLICATE_NGRAMS:
        characters = duplicate_ngrams(found.hashes, lengths, n)
        if not characters:
            break  # a longer run that repeats would have shorter ones in it
        if characters > most * size:
            return f"duplicate runs of {n} words"
    return ""


def duplicates(parts: Sequence[str]) -> tuple[int, int]:
    """How many parts repeat an earlier one, and their characters."""
    seen: set[str] = set()
    count = characters = 0
    for part in parts:
        if part in seen:
            count += 1
            characters += len(part)
        seen.add(part)
    return count, characters


def top_ngram(hashes: np.ndarray, lengths: np.ndarray, n: int) -> int:
    """Characters that the most frequent run of `n` words takes, a space between words counted.

    Args:
      hashes, lengths: `[W]`, of words.
    """
    grams = W.ngrams(hashes, n)
    if not len(grams):
        return 0
    ordered = np.argsort(grams, kind="stable")
    edges = np.flatnonzero(np.concatenate([[True], np.diff(grams[ordered]) != 0]))
    counts = np.diff(np.append(edges, len(grams)))
    first = ordered[edges]  # of each kind; the sort is stable
    most = counts.max()
    start = int(first[counts == most].min())  # among equals, the first in the text
    return int(most) * (int(lengths[start : start + n].sum()) + n - 1)


def duplicate_ngrams(hashes: np.ndarray, lengths: np.ndarray, n: int) -> int:
    """Characters of words in runs of `n` that stood before, each word counted once however many runs it is in.

    datatrove goes from left to right and passes over a run that it has counted, so that words in the overlap of two
    runs may not count; here all do, which is what the paper says.
    """
    grams = W.ngrams(hashes, n)
    if len(grams) < 2:
        return 0
    ordered = np.argsort(grams, kind="stable")
    again = np.concatenate([[False], grams[ordered][1:] == grams[ordered][:-1]])
    if not again.any():
        return 0
    edges = np.zeros(len(hashes) + 1, np.int64)
    starts = ordered[again]
    np.add.at(edges, starts, 1)
    np.add.at(edges, starts + n, -1)
    return int(lengths[np.cumsum(edges[:-1]) > 0].sum())
