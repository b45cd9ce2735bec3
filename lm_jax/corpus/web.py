"""The rules of C4 (Raffel et al. 2020, JMLR 21, section 2.2), as its reference code (c4_utils.py of
tensorflow_datasets) applies them.

datatrove has them as well, and the tests compare verdicts; where it differs from the published code, this follows the
code: a line needs 5 words and a page 3 sentences (datatrove: 3 and 5, an earlier text of the paper), and an apostrophe
does not end a sentence. Left out, here as there by default: the list of bad words, which is known to drop text about
minorities (Dodge et al. 2021). Sentences are counted by their marks, not by NLTK's punkt model, which would have to be
downloaded: "e.g. this" counts as one more.
"""

from __future__ import annotations

import collections
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lm_jax.corpus.config import CleaningConfig

_ENDS = (".", "?", "!", '"')
_CITATION = re.compile(r"\[\d*\]|\[edit\]|\[citation needed\]")
# Of a run of marks only its first is tried, and no part of the run: else the time is the square of its length.
_SENTENCE_END = re.compile(r"(?<![.!?])[.!?]++[\"'”’)\]]*+(?=\s|$)")
_POLICY = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")


def c4(text: str, c: CleaningConfig, pieces: collections.Counter[str]) -> tuple[str, str]:
    """The lines of a text that are kept, and why the page is dropped (or an empty string).

    Args:
      text: of a page.
      c: the limits.
      pieces: is told how many lines went, by rule.
    """
    kept: list[str] = []
    sentences = 0
    for raw in text.splitlines():
        line = raw.strip()
        if not line:
            continue
        if len(line) > c.c4_word_characters and any(len(w) > c.c4_word_characters for w in line.split()):
            pieces["lines with a word too long"] += 1
            continue
        line = _CITATION.sub("", line)
        if not line.endswith(_ENDS) or line.endswith("..."):
            pieces["lines without an end mark"] += 1
            continue
        if len(line.split()) < c.c4_line_words:
            pieces["lines with too few words"] += 1
            continue
        lower = line.lower()
        if "lorem ipsum" in lower:
            return "", "lorem ipsum"
        if "javascript" in lower:
            pieces["lines about javascript"] += 1
            continue
        if "{" in line:
            return "", "a curly bracket"
        if any(phrase in lower for phrase in _POLICY):
            pieces["lines about cookies and terms"] += 1
            continue
        sentences += max(len(_SENTENCE_END.findall(line)), 1)
        kept.append(line)
    if sentences < c.c4_sentences:
        return "", f"fewer than {c.c4_sentences} sentences"
    return "\n".join(kept), ""
