"""The few fields of a sentencepiece `.model` file, a protocol buffer, that are read and added to here.

A message is a sequence of fields; those of a repeated field may stand anywhere in it and count in their order. So
pieces are added to a model by writing them behind its last byte.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from typing import NamedTuple

PIECES, TRAINER = 1, 2  # fields of the model
UNIGRAM, BPE = 1, 2  # values of the trainer's model_type
NORMAL = 1  # a piece that is neither unknown, control, user-defined, unused nor a byte

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


class Piece(NamedTuple):
    """A piece of a model."""

    text: str
    score: float
    type: int


def model_type(model: bytes) -> int:
    """`UNIGRAM`, `BPE`, or another of the library's numbers."""
    for number, value in _fields(model):
        if number == TRAINER and isinstance(value, bytes):
            return next((v for n, v in _fields(value) if n == 3 and isinstance(v, int)), UNIGRAM)
    return UNIGRAM


def pieces(model: bytes) -> list[Piece]:
    """All pieces, in the order of their ids."""
    found = []
    for number, value in _fields(model):
        if number == PIECES and isinstance(value, bytes):
            fields = dict(_fields(value))
            (score,) = struct.unpack("<f", bytes(fields.get(2, b"\0\0\0\0")))
            found.append(Piece(bytes(fields.get(1, b"")).decode("utf-8"), score, int(fields.get(3, NORMAL))))
    return found


def with_pieces(model: bytes, added: Iterable[Piece]) -> bytes:
    """The model with further pieces of type `NORMAL`; ids go on where its own end."""
    out = [model]
    for piece in added:
        text = piece.text.encode("utf-8")
        body = b"\x0a" + _varint(len(text)) + text + b"\x15" + struct.pack("<f", piece.score)
        out.append(b"\x0a" + _varint(len(body)) + body)
    return b"".join(out)


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    at = 0
    while at < len(message):
        key, at = _read_varint(message, at)
        kind = key & 7
        if kind == _VARINT:
            value: int | bytes
            value, at = _read_varint(message, at)
        elif kind in (_BYTES, _FIXED32, _FIXED64):
            size, at = _read_varint(message, at) if kind == _BYTES else (4 if kind == _FIXED32 else 8, at)
            value, at = message[at : at + size], at + size
        else:
            raise ValueError(f"a field of kind {kind}")
        yield key >> 3, value


def _read_varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])
