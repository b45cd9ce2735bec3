"""What a tokenizer is, and what all of them share."""

from __future__ import annotations

import abc
import json
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from lm_jax.data.cache import digest
from lm_jax.errors import UserError

DESCRIPTION = "tokenizer.json"  # the file of every kind that says which it is
SLAB = 2**20  # characters that threads share


def ignore(count: int) -> None:
    """Tells nobody."""


class Tokenizer(abc.ABC):
    """What every tokenizer does.

    Attributes:
      kind: its name.
      vocab_size: ids are 0 .. vocab_size - 1.
      boundary: the id before and after each document, or None.
      exact: `decode(encode(text)) == text` for every text, by construction; where not, whoever encodes checks.
      caveat: why some texts do not come back, as far as the tokenizer itself tells; else empty.
      special: ids that no text can spell, by name; the boundary is among them where it has a name.
    """

    kind: str
    vocab_size: int
    boundary: int | None
    exact = True
    caveat = ""
    special: Mapping[str, int] = types.MappingProxyType({})

    @abc.abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """Ids `[tokens]` int32 of a text, without boundaries.

        Raises:
          UserError: where the text has something that no id stands for.
        """

    @abc.abstractmethod
    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of some ids, boundaries left out; bytes that are no UTF-8 show as U+FFFD.

        Raises:
          ValueError: where an id is not below `vocab_size`.
        """

    @abc.abstractmethod
    def bytes_of(self, token: int) -> int:
        """How many bytes of UTF-8 an id (not the boundary) stands for."""

    @abc.abstractmethod
    def files(self) -> dict[str, bytes]:
        """What `from_files` makes the same tokenizer of: contents by file name."""

    def encode_batch(self, texts: Sequence[str], advance: Callable[[int], None] = ignore) -> list[np.ndarray]:
        """`encode` of each text; `advance` is told how many more characters are done."""
        out = []
        for text in texts:
            out.append(self.encode(text))
            advance(len(text))
        return out

    @property
    def fingerprint(self) -> str:
        """A hash of everything that decides how text is encoded."""
        return digest(*(part for name, data in sorted(self.files().items()) for part in (name, data)))

    def save(self, directory: Any) -> None:
        """Writes the tokenizer's files into a folder (any path object: `pathlib`, `etils.epath`)."""
        for name, data in self.files().items():
            (directory / name).write_bytes(data)

    def _text_ids(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        array = np.asarray(ids, dtype=np.int64).reshape(-1)
        if array.size and (array.min() < 0 or array.max() >= self.vocab_size):
            raise ValueError(f"ids must be in 0 .. {self.vocab_size - 1}, not {array.min()} .. {array.max()}")
        return array if self.boundary is None else array[array != self.boundary]


def refuse_surrogates(text: str) -> None:
    """Raises UserError where a text has half of a surrogate pair: it is no text, and libraries alter it silently."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise UserError(
            f"character {error.start} is half of a surrogate pair (U+{code:04X}), which no text in UTF-8 has"
        ) from None


def slabs(parts: Iterable[tuple[int, str]]) -> Iterator[list[tuple[int, str]]]:
    """Numbered texts in slabs of some `SLAB` characters."""
    slab: list[tuple[int, str]] = []
    size = 0
    for part in parts:
        slab.append(part)
        size += len(part[1])
        if size >= SLAB:
            yield slab
            slab, size = [], 0
    if slab:
        yield slab


def describe(**values: object) -> bytes:
    """The content of a `DESCRIPTION`."""
    return (json.dumps({"format": 1, **values}, sort_keys=True, ensure_ascii=True) + "\n").encode("ascii")
