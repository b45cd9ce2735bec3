"""Tokenizers that need no learning: bytes and characters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from lm_jax.data.tokenizers.tokenizer import DESCRIPTION, Tokenizer, describe, refuse_surrogates
from lm_jax.errors import UserError


class Bytes(Tokenizer):
    """The bytes of UTF-8: 256 ids, and 256 for the boundary."""

    kind = "bytes"

    def __init__(self, boundary: bool = True) -> None:
        self.boundary = 256 if boundary else None
        self.vocab_size = 256 + boundary

    def encode(self, text: str) -> np.ndarray:
        refuse_surrogates(text)
        return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._text_ids(ids).astype(np.uint8).tobytes().decode("utf-8", errors="replace")

    def bytes_of(self, token: int) -> int:
        return 1

    def files(self) -> dict[str, bytes]:
        return {DESCRIPTION: describe(kind=self.kind, boundary=self.boundary is not None)}


class Characters(Tokenizer):
    """The characters of a source in the order of their code points, and the boundary after the last."""

    kind = "characters"

    def __init__(self, characters: Iterable[str], boundary: bool = True) -> None:
        self.codes = np.array(sorted({ord(c) for c in characters}), dtype=np.uint32)
        if not self.codes.size:
            raise UserError("a tokenizer of characters needs a text with at least one")
        self.boundary = len(self.codes) if boundary else None
        self.vocab_size = len(self.codes) + boundary

    def encode(self, text: str) -> np.ndarray:
        refuse_surrogates(text)
        codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        ids = np.searchsorted(self.codes, codes)
        unknown = self.codes[np.minimum(ids, len(self.codes) - 1)] != codes
        if unknown.any():
            at = int(unknown.argmax())
            raise UserError(
                f"character {text[at]!r} (U+{codes[at]:04X}) is none of the tokenizer's {len(self.codes)}\n"
                'data.tokenizer="bytes" or "sentencepiece" would know every character'
            )
        return ids.astype(np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self.codes[self._text_ids(ids)].tobytes().decode("utf-32-le")

    def bytes_of(self, token: int) -> int:
        return len(self.decode([token]).encode("utf-8"))

    def files(self) -> dict[str, bytes]:
        text = self.codes.tobytes().decode("utf-32-le")
        return {DESCRIPTION: describe(kind=self.kind, boundary=self.boundary is not None, characters=text)}
