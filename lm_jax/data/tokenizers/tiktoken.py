"""Tokenizers of tiktoken: ranks of byte sequences, a pattern that cuts text into words, special tokens.

A `.tiktoken` file holds the ranks alone. A file with the same name ending in `.json` beside it says the rest:

    {"pattern": "cl100k_base", "special_tokens": {"<|endoftext|>": 100257}}

where the pattern is a regular expression or the name of an encoding in `ENCODINGS`; files that are called as one of
those need none.
"""

from __future__ import annotations

import base64
import binascii
import concurrent.futures
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lm_jax.data.cache import digest
from lm_jax.data.tokenizers.huggingface import ENDS
from lm_jax.data.tokenizers.tokenizer import DESCRIPTION, Tokenizer, describe, ignore, refuse_surrogates
from lm_jax.errors import UserError

RANKS = "ranks.tiktoken"


class Known(NamedTuple):
    """What a published encoding has beside its ranks."""

    pattern: str
    special_tokens: Mapping[str, int]


_ENDINGS = "'s|'t|'re|'ve|'m|'ll|'d"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_GPT2 = "|".join((_ENDINGS, r" ?\p{L}+", r" ?\p{N}+", r" ?[^\s\p{L}\p{N}]+", r"\s+(?!\S)", r"\s+"))
_CL100K = "|".join(
    (
        f"(?i:{_ENDINGS})",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        *(r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+"),
    )
)
_O200K = "|".join(
    (
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+(?i:{_ENDINGS})?",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*(?i:{_ENDINGS})?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        *(r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+"),
    )
)
_END = "<|endoftext|>"
_FILL = {"<|fim_prefix|>": 100258, "<|fim_middle|>": 100259, "<|fim_suffix|>": 100260, "<|endofprompt|>": 100276}
ENCODINGS = {
    "gpt2": Known(_GPT2, {_END: 50256}),
    "r50k_base": Known(_GPT2, {_END: 50256}),
    "p50k_base": Known(_GPT2, {_END: 50256}),
    "cl100k_base": Known(_CL100K, {_END: 100257} | _FILL),
    "o200k_base": Known(_O200K, {_END: 199999, "<|endofprompt|>": 200018}),
}


def read_beside(path: Path) -> tuple[str, dict[str, int]]:
    """The pattern and the special tokens of a `.tiktoken` file.

    Raises:
      UserError: where nothing says them.
    """
    beside = path.with_suffix(".json")
    if not beside.exists():
        if path.stem in ENCODINGS:
            return path.stem, dict(ENCODINGS[path.stem].special_tokens)
        raise UserError(
            f"holds ranks alone, and {beside.name} is not beside it\n"
            f'write there {{"pattern": ..., "special_tokens": {{"{_END}": 50256}}}}; '
            f"patterns with a name are {', '.join(ENCODINGS)}"
        )
    try:
        values = json.loads(beside.read_bytes())
        return values["pattern"], {str(name): int(i) for name, i in values["special_tokens"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"has a {beside.name} beside it without pattern and special_tokens ({error!r})") from error


class Tiktoken(Tokenizer):
    """An encoding of tiktoken.

    The boundary is its special token of a name in `ENDS`, else one more id after its last. Special tokens cannot be
    spelt.
    """

    kind = "tiktoken"

    def __init__(self, ranks: bytes, pattern: str, special_tokens: Mapping[str, int], boundary: bool = True) -> None:
        """Args: a `.tiktoken` file, a regular expression or a name of `ENCODINGS`, special tokens, a boundary.

        Raises:
          UserError: where they are no encoding, or the library is not installed.
        """
        try:
            import tiktoken
        except ImportError as error:
            raise UserError(
                "needs the package tiktoken, which is not installed\npip install 'lm_jax[tokenizers]'"
            ) from error
        table = read_ranks(ranks)
        for name, i in special_tokens.items():
            if i < 0 or i in table.values():
                raise UserError(f"has the special token {name!r} at {i}, which is the id of a piece\ngive a free one")
        known = ENCODINGS.get(pattern)
        try:
            self.library = tiktoken.Encoding(
                "lm_jax",
                pat_str=known.pattern if known else pattern,
                mergeable_ranks=table,
                special_tokens=dict(special_tokens),
            )
        except ValueError as error:
            raise UserError(f"has a pattern that is no regular expression: {error}") from error
        self.ranks, self.pattern, self.special = ranks, pattern, dict(special_tokens)
        size = max(table.values(), default=-1) + 1
        size = max(size, *(i + 1 for i in special_tokens.values())) if special_tokens else size
        ends = [special_tokens[name] for name in ENDS if name in special_tokens]
        self.boundary = (ends[0] if ends else size) if boundary else None
        self.vocab_size = size + (boundary and not ends)
        self.names_boundary = bool(ends)
        self.exact = known is not None
        self.caveat = "" if known else "what its pattern does not match is left out"
        self._bytes = ["\ufffd".encode()] * self.vocab_size  # ids that nothing has
        for piece, i in [*table.items(), *((name.encode("utf-8"), i) for name, i in special_tokens.items())]:
            self._bytes[i] = piece

    def encode(self, text: str) -> np.ndarray:
        refuse_surrogates(text)
        return self.library.encode_to_numpy(text, disallowed_special=()).astype(np.int32)

    def encode_batch(self, texts: Sequence[str], advance: Callable[[int], None] = ignore) -> list[np.ndarray]:
        out: list[np.ndarray] = []
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 1) as threads:  # the library lets go of the lock
            for text, ids in zip(texts, threads.map(self.encode, texts), strict=True):
                out.append(ids)
                advance(len(text))
        return out

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        pieces = [self._bytes[i] for i in self._text_ids(ids).tolist()]
        return b"".join(pieces).decode("utf-8", errors="replace")

    def bytes_of(self, token: int) -> int:
        return len(self._bytes[token])

    def files(self) -> dict[str, bytes]:
        description = describe(
            kind=self.kind,
            boundary=self.boundary is not None,
            model=digest(self.ranks),
            pattern=self.pattern,
            special_tokens=dict(self.special),
        )
        return {DESCRIPTION: description, RANKS: self.ranks}


def read_ranks(content: bytes) -> dict[bytes, int]:
    """The pieces of a `.tiktoken` file and their ranks, which are their ids.

    Raises:
      UserError: names the line that is not a piece in base64 and its rank, and bytes that have none.
    """
    table: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines(), start=1):
        if not line:
            continue
        try:
            piece, rank = line.split()
            table[base64.b64decode(piece, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise UserError(f"is no file of ranks: line {number} is not a piece in base64 and its rank") from error
    missing = [b for b in range(256) if bytes([b]) not in table]
    if missing:
        raise UserError(f"has no rank for the byte 0x{missing[0]:02X} ({len(missing)} of 256 are missing)")
    if len(set(table.values())) < len(table) or min(table.values()) < 0:
        raise UserError("gives two pieces the same rank, or one a rank below 0")
    return table


def write_ranks(table: Mapping[bytes, int]) -> bytes:
    """The file that `read_ranks` reads."""
    lines = sorted((rank, base64.b64encode(piece)) for piece, rank in table.items())
    return b"".join(b"%s %d\n" % (piece, rank) for rank, piece in lines)
