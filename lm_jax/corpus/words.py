"""Words of a text as arrays: where they stand, and a hash of each, without a Python object a word.

Duplicates, repetition and contamination are all questions about runs of words; asked of arrays they cost some tens of
nanoseconds a character. B is characters of a block, W words.
"""

from __future__ import annotations

import functools
import sys
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

BLOCK = 2**15  # characters at a time: tables and intermediate arrays stay within a processor's caches
_ODD = np.uint64(0x9E3779B97F4A7C15)
_BASE = np.uint64(0xD1342543DE82EF95)  # odd, so that it has an inverse modulo 2^64
_BASE_INVERSE = np.uint64(pow(0xD1342543DE82EF95, -1, 2**64))

# Scripts that are written without spaces between words: there each character counts as a word. Thai, Lao, Myanmar,
# Khmer; kana and the ideographs; their extensions.
_SPACELESS = ((0x0E00, 0x0F00), (0x1000, 0x10A0), (0x1780, 0x1800), (0x3040, 0x3100), (0x31F0, 0x3200),
              (0x3400, 0x4DC0), (0x4E00, 0xA000), (0xF900, 0xFB00), (0x20000, 0x32000))  # fmt: skip


class Words(NamedTuple):
    """Words of a text, in order.

    Attributes:
      starts, ends: `[W]` int64, in characters.
      hashes: `[W]` uint64.
    """

    starts: np.ndarray
    ends: np.ndarray
    hashes: np.ndarray


def codes(text: str) -> np.ndarray:
    """Code points `[characters]` uint32. The text has no lone surrogates."""
    return np.frombuffer(text.encode("utf-32-le"), np.uint32)


_ASSIGNED = 0x40000  # behind it there are no letters, digits or spaces in any version of Unicode
_NEITHER, _PART, _ALONE = 0, 1, 2  # of a code point: not in a word, part of one, one by itself


@functools.cache
def _classes(kind: str) -> np.ndarray:
    """For each code point what it is in words of a kind: "space", "alnum", or (part or not) "alpha"."""
    method = getattr(str, f"is{kind}")
    every = np.zeros(sys.maxunicode + 1, np.uint8)
    every[:_ASSIGNED] = np.fromiter((method(chr(c)) for c in range(_ASSIGNED)), np.uint8, _ASSIGNED)
    if kind == "space":
        return 1 - every
    if kind == "alnum":
        for low, high in _SPACELESS:
            every[low:high] *= _ALONE
        # A vowel sign or an accent does not end a word. Where each character is one, marks do not count.
        spaceless = np.zeros(len(every), bool)
        for low, high in _SPACELESS:
            spaceless[low:high] = True
        marks = np.array([c for c in range(_ASSIGNED) if unicodedata.category(chr(c)) in MARKS])
        every[marks[~spaceless[marks]]] = _PART
    return every


MARKS = ("Mn", "Mc", "Me")  # combining marks, of the general categories of Unicode
MOST_MARKS = 100  # in a row; no script has as many as ten
_MARK, _UNSEEN = 1, 2


@functools.cache
def _kinds() -> np.ndarray:
    """For each code point whether it is a combining mark, or what nobody sees: soft hyphens, zero widths, directions
    (Cf), variation selectors."""
    kinds = np.zeros(sys.maxunicode + 1, np.uint8)
    for c in (*range(_ASSIGNED), *range(0xE0000, 0xE0200)):
        category = unicodedata.category(chr(c))
        kinds[c] = _UNSEEN if category == "Cf" else _MARK if category in MARKS else 0
    kinds[0xFE00:0xFE10] = kinds[0xE0100:0xE01F0] = _UNSEEN
    return kinds


def _many(marks: np.ndarray) -> np.ndarray:
    """Where runs of more than `MOST_MARKS` marks begin and end `[runs, 2]`."""
    edges = np.flatnonzero(np.diff(marks.astype(np.int8), prepend=0, append=0)).reshape(-1, 2)
    return edges[edges[:, 1] - edges[:, 0] > MOST_MARKS]


def has_many_marks(text: str) -> bool:
    """Whether more combining marks stand in a row than any script has: NFC takes the square of their number."""
    return not text.isascii() and len(_many(np.take(_kinds(), codes(text)) == _MARK)) > 0


def _folded(text: str) -> str:
    """A text as it is compared: lower case, NFC, without what nobody sees."""
    text = text.lower()
    if text.isascii():
        return text
    points = codes(text)
    kinds = np.take(_kinds(), points)
    if kinds.any():
        keep = kinds != _UNSEEN
        points, marks = points[keep], kinds[keep] == _MARK
        if len(many := _many(marks)):
            points = np.delete(points, np.concatenate([np.arange(*run) for run in many]))
        text = points.tobytes().decode("utf-32-le")
    return unicodedata.normalize("NFC", text)


@functools.cache
def _values() -> np.ndarray:
    """A number for each code point `[..]` uint64, their bits mixed."""
    values = np.arange(1, sys.maxunicode + 2, dtype=np.uint64) * _ODD
    return values ^ (values >> np.uint64(32))


def is_letter(points: np.ndarray) -> np.ndarray:
    return _classes("alpha")[points].astype(bool)


@functools.cache
def _powers() -> tuple[np.ndarray, np.ndarray]:
    ones = np.ones(BLOCK + 1, np.uint64)
    ones[1:] = _BASE
    inverse = np.ones(BLOCK + 1, np.uint64)
    inverse[1:] = _BASE_INVERSE
    return np.cumprod(ones, dtype=np.uint64), np.cumprod(inverse, dtype=np.uint64)


def mix(x: np.ndarray) -> np.ndarray:
    """A bijection of uint64 whose every output bit depends on every input bit (the finaliser of MurmurHash3)."""
    x = x ^ (x >> np.uint64(33))
    x *= np.uint64(0xFF51AFD7ED558CCD)
    x ^= x >> np.uint64(33)
    x *= np.uint64(0xC4CEB9FE1A85EC53)
    x ^= x >> np.uint64(33)
    return x


def by_space(text: str) -> Words:
    """Words as what white space separates: what the rules of Gopher and C4 count."""
    return _split(codes(text), "space")


def normalised(text: str) -> Words:
    """Words as runs of letters, their marks and digits, in lower case, without what stands between: what two texts
    share if they differ in layout, case, punctuation and the form of Unicode alone. In scripts without spaces each
    character is one. Places are counted in the text that is compared (`_folded`)."""
    return _split(codes(_folded(text)), "alnum")


def normalised_batch(texts: Sequence[str]) -> tuple[Words, np.ndarray]:
    """`normalised` of many texts at once: their words behind each other, counted in characters from each text's own
    start, and the number of the first word of each text `[texts + 1]`."""
    folded = [_folded(text) for text in texts]
    found = _split(codes("\n".join(folded)), "alnum")
    begins = np.zeros(len(folded) + 1, np.int64)
    np.cumsum([len(text) + 1 for text in folded], out=begins[1:])
    offsets = np.searchsorted(found.starts, begins)
    shift = np.repeat(begins[:-1], np.diff(offsets))
    return Words(found.starts - shift, found.ends - shift, found.hashes), offsets


def _split(points: np.ndarray, kind: str) -> Words:
    parts = []
    at = 0
    while at < len(points):
        block = points[at : at + BLOCK]
        starts, ends = _spans(block, kind)
        stop = len(block)
        if at + stop < len(points) and len(ends) and ends[-1] == stop and starts[-1] > 0:
            stop = int(starts[-1])  # it may go on behind the block: it is the next block's first
            starts, ends = starts[:-1], ends[:-1]
        if len(starts):
            parts.append((starts + at, ends + at, _hashes(block, starts, ends)))
        at += stop
    if not parts:
        return Words(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.uint64))
    return Words(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def _spans(block: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray]:
    classes = np.take(_classes(kind), block)
    inside = classes > 0
    # A word begins where something is inside and what is before it is not; and around each character that is alone.
    begins, stops = inside.copy(), inside.copy()
    np.greater(inside[1:], inside[:-1], out=begins[1:])
    np.greater(inside[:-1], inside[1:], out=stops[:-1])
    if kind == "alnum" and (alone := classes == _ALONE).any():
        begins |= alone
        stops |= alone
        begins[1:] |= inside[1:] & alone[:-1]
        stops[:-1] |= inside[:-1] & alone[1:]
    return np.flatnonzero(begins), np.flatnonzero(stops) + 1


def _hashes(block: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """A polynomial in the characters of each span, by differences of one running sum; modulo 2^64."""
    powers, inverse = _powers()
    values = np.take(_values(), block)
    values *= powers[: len(block)]
    sums = np.zeros(len(block) + 1, np.uint64)
    np.cumsum(values, out=sums[1:])
    out = np.take(sums, ends)
    out -= np.take(sums, starts)
    out *= np.take(inverse, starts)
    out += (ends - starts).astype(np.uint64) * _ODD
    return mix(out)


def ngrams(hashes: np.ndarray, n: int) -> np.ndarray:
    """A hash for each run of `n` words `[max(W - n + 1, 0)]` uint64."""
    count = len(hashes) - n + 1
    if count <= 0:
        return np.zeros(0, np.uint64)
    out = np.zeros(count, np.uint64)
    for i in range(n):
        out *= _BASE
        out += hashes[i : i + count]
    return mix(out)
