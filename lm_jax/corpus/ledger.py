"""What became of every document and byte: counts by step and reason, with examples. Nothing leaves without an entry."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable
from typing import Any

EXAMPLES = 4  # that are kept of each reason
SHOWN = 280  # characters of a text in an example


@dataclasses.dataclass
class Example:
    """A document that a step dropped or changed: where it stood, its text, and what the text became."""

    origin: str
    text: str
    after: str | None = None


@dataclasses.dataclass
class Step:
    """Counts of one step. `bytes` are of UTF-8.

    Attributes:
      dropped: documents and bytes by reason.
      changed: documents whose text is another one behind the step.
      removed, added: bytes by which changed documents shrank and grew.
      pieces: how many things within documents it acted on, by name (lines taken out, addresses replaced).
      examples: of what was dropped or changed, by reason ("changed").
    """

    documents_in: int = 0
    bytes_in: int = 0
    documents_out: int = 0
    bytes_out: int = 0
    changed: int = 0
    removed: int = 0
    added: int = 0
    dropped: dict[str, list[int]] = dataclasses.field(default_factory=dict)
    pieces: dict[str, int] = dataclasses.field(default_factory=dict)
    examples: dict[str, list[Example]] = dataclasses.field(default_factory=dict)

    def keep(self, before: int, after: int, *, changed: bool = False) -> None:
        """A document went through: its bytes before and after."""
        self.documents_in += 1
        self.documents_out += 1
        self.bytes_in += before
        self.bytes_out += after
        self.changed += changed
        self.removed += max(before - after, 0)
        self.added += max(after - before, 0)

    def drop(self, reason: str, size: int, documents: int = 1) -> None:
        self.documents_in += documents
        self.bytes_in += size
        counts = self.dropped.setdefault(reason, [0, 0])
        counts[0] += documents
        counts[1] += size

    def wants_example(self, reason: str) -> bool:
        return len(self.examples.get(reason, ())) < EXAMPLES

    def example(self, reason: str, origin: str, text: str, after: str | None = None) -> None:
        found = self.examples.setdefault(reason, [])
        if len(found) < EXAMPLES:
            before, now = (text[:SHOWN], None) if after is None else _around(text, after)
            found.append(Example(origin, before, now))

    @property
    def dropped_documents(self) -> int:
        return sum(documents for documents, _ in self.dropped.values())

    @property
    def dropped_bytes(self) -> int:
        return sum(size for _, size in self.dropped.values())

    def check(self, name: str) -> None:
        """Raises RuntimeError where documents or bytes are unaccounted for."""
        if self.documents_in != self.documents_out + self.dropped_documents:
            raise RuntimeError(f"{name}: {self.documents_in} documents in, {self.documents_out} out, {self.dropped}")
        if self.bytes_in != self.bytes_out + self.dropped_bytes + self.removed - self.added:
            raise RuntimeError(f"{name}: {self.bytes_in} bytes in, {self.bytes_out} out, {self.dropped}")

    def merge(self, other: Step) -> None:
        for field in ("documents_in", "bytes_in", "documents_out", "bytes_out", "changed", "removed", "added"):
            setattr(self, field, getattr(self, field) + getattr(other, field))
        for reason, (documents, size) in other.dropped.items():
            counts = self.dropped.setdefault(reason, [0, 0])
            counts[0] += documents
            counts[1] += size
        for name, n in other.pieces.items():
            self.pieces[name] = self.pieces.get(name, 0) + n
        for reason, found in other.examples.items():
            mine = self.examples.setdefault(reason, [])
            mine += found[: EXAMPLES - len(mine)]


def _around(text: str, after: str) -> tuple[str, str]:
    """Both texts from shortly before the first difference."""
    pairs = zip(text, after, strict=False)
    at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(text), len(after)))
    start = max(0, at - SHOWN // 4)
    return text[start : start + SHOWN], after[start : start + SHOWN]


@dataclasses.dataclass
class Histograms:
    """What the documents are like at one point: by length and by language.

    Attributes:
      lengths: documents by the power of two of their bytes: `lengths[k]` have 2^k to 2^(k+1) - 1.
      languages: documents and bytes by language.
    """

    lengths: dict[int, int] = dataclasses.field(default_factory=dict)
    languages: dict[str, list[int]] = dataclasses.field(default_factory=dict)

    def add(self, size: int, language: str) -> None:
        bin_ = max(size, 1).bit_length() - 1
        self.lengths[bin_] = self.lengths.get(bin_, 0) + 1
        counts = self.languages.setdefault(language, [0, 0])
        counts[0] += 1
        counts[1] += size

    def merge(self, other: Histograms) -> None:
        for bin_, n in other.lengths.items():
            self.lengths[bin_] = self.lengths.get(bin_, 0) + n
        for language, (documents, size) in other.languages.items():
            counts = self.languages.setdefault(language, [0, 0])
            counts[0] += documents
            counts[1] += size


@dataclasses.dataclass
class Ledger:
    """Steps in their order, and histograms by name ("read", "kept")."""

    steps: dict[str, Step] = dataclasses.field(default_factory=dict)
    histograms: dict[str, Histograms] = dataclasses.field(default_factory=dict)

    def step(self, name: str) -> Step:
        return self.steps.setdefault(name, Step())

    def histogram(self, name: str) -> Histograms:
        return self.histograms.setdefault(name, Histograms())

    def merge(self, other: Ledger) -> None:
        for name, step in other.steps.items():
            self.step(name).merge(step)
        for name, histogram in other.histograms.items():
            self.histogram(name).merge(histogram)

    def check(self) -> None:
        """Raises RuntimeError where a step does not add up, or does not take what the one before it gave."""
        before: Step | None = None
        for name, step in self.steps.items():
            step.check(name)
            given = (before.documents_out, before.bytes_out) if before else (step.documents_in, step.bytes_in)
            if (step.documents_in, step.bytes_in) != given:
                raise RuntimeError(f"{name}: takes {step.documents_in} documents, {given[0]} were given")
            before = step

    def to_json(self) -> dict[str, Any]:
        """Plain values; `from_json` makes an equal ledger of them."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Ledger:
        steps = {}
        for name, raw in values["steps"].items():
            examples = {reason: [Example(**e) for e in found] for reason, found in raw["examples"].items()}
            steps[name] = Step(**{**raw, "examples": examples})
        histograms = {
            name: Histograms({int(k): n for k, n in raw["lengths"].items()}, raw["languages"])
            for name, raw in values["histograms"].items()
        }
        return cls(steps, histograms)


def merged(ledgers: Iterable[Ledger]) -> Ledger:
    """One ledger of many parts', in their order."""
    out = Ledger()
    for ledger in ledgers:
        out.merge(ledger)
    return out


def by_size(counts: dict[str, list[int]]) -> list[tuple[str, int, int]]:
    """Reasons with their documents and bytes, the largest first."""
    ordered = collections.Counter({reason: documents for reason, (documents, _) in counts.items()}).most_common()
    return [(reason, documents, counts[reason][1]) for reason, documents in ordered]
