"""What a tokenizer makes of a text, in numbers that can be compared."""

from __future__ import annotations

import collections
import re
import time
from collections.abc import Sequence
from typing import NamedTuple

from lm_jax.data.tokenizers.tokenizer import Tokenizer

# A word: a run of letters, digits and underscores; every character of a script that writes no spaces between words
# (kana, Chinese, Thai, Lao, Khmer, Burmese) is one of its own.
_NO_SPACES = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
_WORD = re.compile(f"[{_NO_SPACES}]|[^\\W{_NO_SPACES}]+")
_LONG_ENOUGH = 0.5  # seconds over which speed is measured


class Measured(NamedTuple):
    """A tokenizer on a text.

    Attributes:
      tokenizer: what it is called.
      text: what the text is called.
      vocab_size: its ids.
      tokens: of the text.
      bytes_per_token: of UTF-8.
      characters_per_token: Unicode code points.
      fertility: tokens a word; see `_WORD` for scripts without spaces.
      coverage: the share of the text's characters, white space aside, that are a token where they stand alone; the
        others are spelt in bytes, or unknown.
      megabytes_per_second: 10^6 bytes of UTF-8, encoded by all cores.
      unchanged: whether every document comes back.
    """

    tokenizer: str
    text: str
    vocab_size: int
    tokens: int
    bytes_per_token: float
    characters_per_token: float
    fertility: float
    coverage: float
    megabytes_per_second: float
    unchanged: bool


def measure(name: str, tokenizer: Tokenizer, text_name: str, documents: Sequence[str]) -> Measured:
    """A tokenizer's numbers on some documents.

    Raises:
      UserError: where the tokenizer cannot encode them.
    """
    size = sum(len(text.encode("utf-8")) for text in documents)
    times, encoded = 0, []
    start = time.perf_counter()
    while not times or time.perf_counter() - start < _LONG_ENOUGH:
        encoded, times = tokenizer.encode_batch(documents), times + 1
    seconds = (time.perf_counter() - start) / times
    tokens = max(1, sum(map(len, encoded)))
    return Measured(
        tokenizer=name,
        text=text_name,
        vocab_size=tokenizer.vocab_size,
        tokens=tokens,
        bytes_per_token=size / tokens,
        characters_per_token=sum(map(len, documents)) / tokens,
        fertility=tokens / max(1, sum(len(_WORD.findall(text)) for text in documents)),
        coverage=coverage(tokenizer, documents),
        megabytes_per_second=size / seconds / 1e6,
        unchanged=all(tokenizer.decode(i) == text for i, text in zip(encoded, documents, strict=True)),
    )


def coverage(tokenizer: Tokenizer, documents: Sequence[str]) -> float:
    """The share of characters, white space aside, that have a token of their own."""
    counts: collections.Counter[str] = collections.Counter()
    for text in documents:
        counts.update(text)
    counts = collections.Counter({c: n for c, n in counts.items() if not c.isspace()})
    whole = sum(n for c, n in counts.items() if any(tokenizer.decode([i]).strip() == c for i in tokenizer.encode(c)))
    return whole / max(1, counts.total())


def table(rows: Sequence[Measured]) -> str:
    """Lines of aligned columns."""
    head = (
        "tokenizer",
        "text",
        "ids",
        "tokens",
        "bytes/token",
        "characters/token",
        "tokens/word",
        "covered",
        "MB/s",
        "",
    )
    lines = [head] + [
        (
            *(r.tokenizer, r.text, f"{r.vocab_size:,}", f"{r.tokens:,}"),
            *(f"{r.bytes_per_token:.3f}", f"{r.characters_per_token:.3f}", f"{r.fertility:.3f}"),
            *(f"{r.coverage:.2%}", f"{r.megabytes_per_second:.1f}", "" if r.unchanged else "alters text"),
        )
        for r in rows
    ]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    aligned = [
        [cell.ljust(w) if i in (0, 1) else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))]
        for line in lines
    ]
    return "\n".join("  ".join(line).rstrip() for line in aligned)
