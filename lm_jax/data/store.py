"""Token ids of documents on disk: ArrayRecord files and a manifest.

A record holds at most `CHUNK` tokens of one document, so that reading a piece of a long document stays cheap. Which
records a document has follows from its length. ArrayRecord checks a sum of every record that it reads.
"""

from __future__ import annotations

import hashlib
import json
import threading
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from lm_jax.errors import UserError

CHUNK = 8192  # tokens a record: 12-20 us a read on one core, small or whole (x86, NVMe)
SHARD = 2**16  # records a file: at most 1 GiB of 16-bit ids
KEEP = 2**28  # bytes of tokens up to which what was read stays in memory
MANIFEST, DOCUMENTS = "manifest.json", "documents.npz"

# One record a chunk, not compressed: a row reads a few records from anywhere, and decompressing would take longer than
# reading.
_WRITER_OPTIONS = "group_size:1,uncompressed"
_READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"


def spread(firsts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """first, first + 1, .., so many of each, one after the other: `[sum(counts)]`, of the dtype of `firsts`."""
    ends = np.cumsum(counts)
    out = np.arange(ends[-1] if len(ends) else 0, dtype=firsts.dtype)
    out += np.repeat((firsts - (ends - counts)).astype(firsts.dtype), counts)
    return out


def stretches(values: np.ndarray, begins: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """The parts [begin, end) of an array, one after the other: for parts of hundreds far faster than an index."""
    if not len(begins):
        return values[:0]
    return np.concatenate([values[a:b] for a, b in zip(begins.tolist(), ends.tolist(), strict=True)])


def shard_name(number: int) -> str:
    return f"tokens-{number:05d}.arrayrecord"


class Writer:
    """Writes documents' tokens into a folder; `finish` makes it a store."""

    def __init__(self, directory: Path, vocab_size: int) -> None:
        self.directory, self.vocab_size = directory, vocab_size
        self.dtype = np.dtype("<u2" if vocab_size <= 2**16 else "<u4")
        self.lengths: list[int] = []
        self._content = hashlib.blake2b(digest_size=16)
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
            chunk = stored[start : start + CHUNK].tobytes()
            self._writer().write(chunk)
            self._content.update(chunk)
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
            text = str(error).strip() or "its library does not say why"
            raise OSError(text.splitlines()[0]) from error  # without a number: 0 would read "Success"

    def finish(
        self,
        held_out: np.ndarray,
        manifest: dict[str, Any],
        *,
        test: np.ndarray | None = None,
        prompts: np.ndarray | None = None,
    ) -> None:
        """Writes what there is to know about the store.

        Args:
          held_out: `[documents]` bool.
          manifest: plain values.
          test: `[documents]` bool, which are for the test; None: none.
          prompts: `[documents]`, how many tokens at the beginning are a prompt; None: none anywhere.
        """
        self._close()
        arrays: dict[str, Any] = {"lengths": np.array(self.lengths, np.int64), "held_out": held_out}
        arrays |= {name: x for name, x in (("test", test), ("prompts", prompts)) if x is not None}
        np.savez(self.directory / DOCUMENTS, **arrays)
        for name in sorted(arrays):
            self._content.update(name.encode() + np.ascontiguousarray(arrays[name]).tobytes())
        names = [*map(shard_name, range(self.shards)), DOCUMENTS]
        sizes = {name: (self.directory / name).stat().st_size for name in names}
        record = {**manifest, "dtype": self.dtype.str, "vocab_size": self.vocab_size, "files": sizes}
        record["content"] = self._content.hexdigest()
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
      prompts: `[documents]` int64, tokens at the beginning that are a prompt; None: none anywhere.
      manifest: what the writer was told, plain values.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.manifest: dict[str, Any] = json.loads((directory / MANIFEST).read_bytes())
        try:
            with np.load(directory / DOCUMENTS, allow_pickle=False) as file:
                arrays = dict(file)
            self.lengths, self.held_out = arrays["lengths"], arrays["held_out"]
        except (zipfile.BadZipFile, ValueError, KeyError, EOFError) as error:
            raise UserError(f"{directory / DOCUMENTS} is damaged: {error}\ndelete {directory}") from error
        self.test = arrays.get("test", np.zeros_like(self.held_out))
        self.prompts: np.ndarray | None = arrays.get("prompts")
        self._dtype = np.dtype(self.manifest["dtype"])
        records = -(-self.lengths // CHUNK)
        self._first = np.cumsum(records) - records
        self._readers: dict[int, Any] = {}
        self._lock = threading.Lock()
        total = int(self.lengths.sum())
        small = total * self._dtype.itemsize <= KEEP
        self._kept = np.empty(total, self._dtype) if small else None  # memory that is not touched is not taken
        if small:
            self._there = np.zeros(int(records.sum()), bool)
            sizes = self._sizes(np.arange(len(self._there)))
            self._places = np.cumsum(sizes) - sizes

    def documents(self, side: str) -> np.ndarray:
        """The numbers of the documents on a side: "train", "held_out" or "test"."""
        sides = {"train": ~(self.held_out | self.test), "held_out": self.held_out, "test": self.test}
        return np.flatnonzero(sides[side])

    def read(self, documents: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
        """The tokens [start, stop) of each document, one after the other.

        Args: `[pieces]` each; no piece is empty.

        Raises:
          UserError: where a file is damaged.
        """
        first = self._first[documents] + starts // CHUNK
        counts = (stops - 1) // CHUNK + 1 - starts // CHUNK
        records = spread(first, counts)
        if self._kept is None:
            wanted, place = np.unique(records, return_inverse=True)
            tokens, sizes = self._fetch(wanted), self._sizes(wanted)
            at = np.cumsum(sizes) - sizes
            # The records of a piece stand together, so its first one says where it is.
            begins = at[place[np.cumsum(counts) - counts]]
        else:
            missing = np.unique(records[~self._there[records]])
            if len(missing):
                self._kept[spread(self._places[missing], self._sizes(missing))] = self._fetch(missing)
                self._there[missing] = True  # after the tokens: another thread may ask meanwhile
            tokens, begins = self._kept, self._places[first]
        begins = begins + starts % CHUNK
        return stretches(tokens, begins, begins + stops - starts)

    def _sizes(self, records: np.ndarray) -> np.ndarray:
        """The tokens of each record."""
        documents = np.searchsorted(self._first, records, side="right") - 1
        return np.minimum(self.lengths[documents] - (records - self._first[documents]) * CHUNK, CHUNK)

    def _fetch(self, records: np.ndarray) -> np.ndarray:
        """The tokens of records in increasing order, one after the other."""
        parts = []
        for shard in np.unique(records // SHARD).tolist():
            numbers = records[records // SHARD == shard] % SHARD
            try:
                parts += self._reader(shard).read(numbers.tolist())
            except (RuntimeError, IndexError, ValueError) as error:
                path = self.directory / shard_name(shard)
                problem = str(error).splitlines()[0][:200]
                raise UserError(f"{path} is damaged: {problem}\ndelete {self.directory}") from error
        return np.frombuffer(b"".join(parts), self._dtype)

    def _reader(self, shard: int) -> Any:
        from array_record.python.array_record_module import ArrayRecordReader

        with self._lock:
            if shard not in self._readers:
                self._readers[shard] = ArrayRecordReader(str(self.directory / shard_name(shard)), _READER_OPTIONS)
            return self._readers[shard]
