"""Token ids of documents on disk: ArrayRecord files and a manifest.

A record holds at most `CHUNK` tokens of one document, so that reading a piece of a long document stays cheap. Which
records a document has follows from its length. ArrayRecord checks a sum of every record that it reads.
"""

from __future__ import annotations

import collections
import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lm_jax.errors import UserError

CHUNK = 8192  # tokens a record: 12-20 us a read on one core, small or whole (x86, NVMe)
SHARD = 2**16  # records a file: at most 1 GiB of 16-bit ids
KEEP = 2**28  # bytes of records that stay in memory once they were read: all of a small source
MANIFEST, DOCUMENTS = "manifest.json", "documents.npz"

# One record a chunk, not compressed: a row reads a few records from anywhere, and decompressing would take longer than
# reading.
_WRITER_OPTIONS = "group_size:1,uncompressed"
_READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"


def shard_name(number: int) -> str:
    return f"tokens-{number:05d}.arrayrecord"


class Writer:
    """Writes documents' tokens into a folder; `finish` makes it a store."""

    def __init__(self, directory: Path, vocab_size: int) -> None:
        self.directory, self.vocab_size = directory, vocab_size
        self.dtype = np.dtype("<u2" if vocab_size <= 2**16 else "<u4")
        self.lengths: list[int] = []
        self.shards = self.records = 0
        self._file: Any = None

    def write(self, ids: np.ndarray) -> None:
        """One document's ids `[tokens]`; at least one.

        Raises:
          ValueError: where an id is not in 0 .. vocab_size - 1.
        """
        if ids.min() < 0 or ids.max() >= self.vocab_size:
            raise ValueError(f"token ids {ids.min()} .. {ids.max()} are not in 0 .. {self.vocab_size - 1}")
        stored = ids.astype(self.dtype)
        for start in range(0, len(stored), CHUNK):
            self._writer().write(stored[start : start + CHUNK].tobytes())
            self.records += 1
        self.lengths.append(len(ids))

    def _writer(self) -> Any:
        from array_record.python.array_record_module import ArrayRecordWriter

        if self.records == self.shards * SHARD:
            self._close()
            self._file = ArrayRecordWriter(str(self.directory / shard_name(self.shards)), _WRITER_OPTIONS)
            self.shards += 1
        return self._file

    def _close(self) -> None:
        if self._file is None:
            return
        try:
            self._file.close()
        except RuntimeError as error:  # what it throws for a full disk as well
            raise OSError(0, str(error).splitlines()[0]) from error

    def finish(self, held_out: np.ndarray, manifest: dict[str, Any], test: np.ndarray | None = None) -> None:
        """Writes which documents are held out, and which are for the test (None: none), each `[documents]` bool; and
        what there is to know about the store."""
        self._close()
        arrays: dict[str, Any] = {"lengths": np.array(self.lengths, np.int64), "held_out": held_out}
        if test is not None:
            arrays["test"] = test
        np.savez(self.directory / DOCUMENTS, **arrays)
        names = [*map(shard_name, range(self.shards)), DOCUMENTS]
        sizes = {name: (self.directory / name).stat().st_size for name in names}
        record = {**manifest, "dtype": self.dtype.str, "vocab_size": self.vocab_size, "files": sizes}
        (self.directory / MANIFEST).write_text(json.dumps(record, indent=1) + "\n")


def whole(directory: Path) -> bool:
    """Whether a folder has a manifest and every file at the size that it says."""
    try:
        sizes = json.loads((directory / MANIFEST).read_bytes())["files"]
        return all((directory / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


class Store:
    """The documents of a folder that a `Writer` finished. Threads may share it.

    Attributes:
      lengths: `[documents]` int64, tokens of each.
      held_out, test: `[documents]` bool.
      manifest: what the writer was told, plain values.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.manifest: dict[str, Any] = json.loads((directory / MANIFEST).read_bytes())
        with np.load(directory / DOCUMENTS, allow_pickle=False) as arrays:
            self.lengths, self.held_out = arrays["lengths"], arrays["held_out"]
            self.test = arrays["test"] if "test" in arrays else np.zeros_like(self.held_out)
        self._dtype = np.dtype(self.manifest["dtype"])
        records = -(-self.lengths // CHUNK)
        self._first = np.cumsum(records) - records
        self._readers: dict[int, Any] = {}
        self._kept: dict[int, np.ndarray] = {}
        self._lock = threading.Lock()

    def documents(self, side: str) -> np.ndarray:
        """The numbers of the documents on a side: "train", "held_out" or "test"."""
        sides = {"train": ~(self.held_out | self.test), "held_out": self.held_out, "test": self.test}
        return np.flatnonzero(sides[side])

    def read(self, ranges: Sequence[tuple[int, int, int]]) -> list[np.ndarray]:
        """For each (document, start, stop), its tokens [start, stop).

        Raises:
          UserError: where a file is damaged.
        """
        spans = []
        for document, start, stop in ranges:
            first = int(self._first[document])
            spans.append((first + start // CHUNK, first + (stop - 1) // CHUNK + 1))
        wanted = sorted({record for first, end in spans for record in range(first, end)})
        chunks = self._records(wanted)
        out = []
        for (_, start, stop), (first, end) in zip(ranges, spans, strict=True):
            parts = [chunks[record] for record in range(first, end)]
            ids = parts[0] if len(parts) == 1 else np.concatenate(parts)
            skip = start // CHUNK * CHUNK
            out.append(ids[start - skip : stop - skip])
        return out

    def _records(self, wanted: list[int]) -> dict[int, np.ndarray]:
        kept = self._kept
        chunks = {record: kept[record] for record in wanted if record in kept}
        by_shard: dict[int, list[int]] = collections.defaultdict(list)
        for record in wanted:
            if record not in chunks:
                by_shard[record // SHARD].append(record)
        for shard, records in by_shard.items():
            try:
                found = self._reader(shard).read([r % SHARD for r in records])
            except (RuntimeError, IndexError, ValueError) as error:
                path = self.directory / shard_name(shard)
                problem = str(error).splitlines()[0][:200]
                raise UserError(f"{path} is damaged: {problem}\ndelete {self.directory}") from error
            fresh = {r: np.frombuffer(data, self._dtype) for r, data in zip(records, found, strict=True)}
            chunks |= fresh
            if len(kept) * CHUNK * self._dtype.itemsize < KEEP:
                kept |= fresh
        return chunks

    def _reader(self, shard: int) -> Any:
        from array_record.python.array_record_module import ArrayRecordReader

        with self._lock:
            if shard not in self._readers:
                self._readers[shard] = ArrayRecordReader(str(self.directory / shard_name(shard)), _READER_OPTIONS)
            return self._readers[shard]
