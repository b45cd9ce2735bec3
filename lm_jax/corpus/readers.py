"""From raw files to documents. What cannot be a document is quarantined: left out, and counted with its file and line.

A reader is a function from a piece of a file to texts, one a kind; a new kind is a function here and its file ending in
`inputs.KINDS`. A file that is damaged as a whole gives what can be read before the damage.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import zlib
from collections.abc import Callable, Iterator
from typing import IO, Any, NamedTuple

from etils import epath

from lm_jax.corpus import inputs
from lm_jax.corpus.config import RawConfig
from lm_jax.corpus.inputs import Piece
from lm_jax.corpus.rules import Document
from lm_jax.errors import UserError
from lm_jax.paths import StorageError

EVERY = "*"  # as `field`: every text of a record, wherever in it; `SEPARATOR` between them
SEPARATOR = "\x00"
BLANK = "blank line"  # is counted, and no mistake


class Broken(NamedTuple):
    """What cannot be a document: why, where it stands, its bytes, and its beginning for a person to see."""

    reason: str
    origin: str
    size: int
    sample: str = ""


_Raw = Iterator[Document | Broken]


def read(piece: Piece, c: RawConfig) -> _Raw:
    """The documents of a piece of a file, in order, and what in it cannot be one.

    Raises:
      UserError: with `raw.bad = "refuse"`, at the first that is broken.
      StorageError: where the storage fails, as opposed to the file.
    """
    for found in _guarded(piece, c):
        if isinstance(found, Broken) and found.reason != BLANK and c.bad == "refuse":
            raise UserError(
                f'{found.origin}: {found.reason}\nmend it, or set raw.bad="quarantine" to leave such out and count them'
            )
        yield found


def _guarded(piece: Piece, c: RawConfig) -> _Raw:
    try:
        yield from _READERS[piece.kind](piece, c)
    except _DAMAGE as error:
        what = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
        yield Broken(f"damaged {piece.kind} file", piece.origin, 0, what)
    except FileNotFoundError:
        raise UserError(f"{piece.origin}: was there when the parts were planned, and is gone") from None
    except OSError as error:
        # gzip says by an OSError without a number that a file is none of its kind.
        if error.errno is None and piece.kind == "jsonl.gz":
            yield Broken(f"damaged {piece.kind} file", piece.origin, 0, str(error))
        else:
            raise StorageError(f"cannot read {piece.origin}: {error.strerror or error}") from error


class _Damage(Exception):
    """A file is not of its kind, or is cut short."""


_DAMAGE = (_Damage, EOFError, zlib.error, gzip.BadGzipFile)


def _open(piece: Piece) -> IO[bytes]:
    return epath.Path(piece.path).open("rb")


# ------------------------------------------------------------------------------------------------------- text and HTML


def _text(piece: Piece, c: RawConfig) -> _Raw:
    if piece.size > c.max_document_bytes:
        yield Broken(f"larger than {c.max_document_bytes:,} bytes", piece.origin, piece.size)
        return
    with _open(piece) as file:
        yield _document(file.read(), piece.origin, c)


def _html(piece: Piece, c: RawConfig) -> _Raw:
    """A page says by itself how it is encoded, so that bytes that are not UTF-8 are no mistake."""
    if piece.size > c.max_document_bytes:
        yield Broken(f"larger than {c.max_document_bytes:,} bytes", piece.origin, piece.size)
        return
    with _open(piece) as file:
        data = file.read()
    if not data.strip():
        yield Broken("empty", piece.origin, len(data))
        return
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        from trafilatura.utils import decode_file

        text = decode_file(data)
    found = _document(text, piece.origin, c)
    yield Document(found.text, found.origin, markup=True) if isinstance(found, Document) else found


# ---------------------------------------------------------------------------------------------------------- JSON lines


def _jsonl(piece: Piece, c: RawConfig) -> _Raw:
    """The lines that begin in a range of the file."""
    with _open(piece) as file:
        if piece.start:
            file.seek(piece.start - 1)
            _skip_line(file)
        yield from _lines(file, piece, c, stop=piece.stop or None)


def _jsonl_gz(piece: Piece, c: RawConfig) -> _Raw:
    with _open(piece) as file, gzip.open(file, "rb") as lines:
        yield from _lines(lines, piece, c)


def _jsonl_zst(piece: Piece, c: RawConfig) -> _Raw:
    with _open(piece) as file, io.BufferedReader(_Zstd(file), 2**20) as lines:
        yield from _lines(lines, piece, c)


class _Zstd(io.RawIOBase):
    """What a file of zstd frames holds. The library's own reader takes a file that is cut short for one that ends."""

    def __init__(self, file: IO[bytes]) -> None:
        import zstandard

        self._file, self._error = file, zstandard.ZstdError
        self._new = zstandard.ZstdDecompressor().decompressobj
        self._frame: Any = None
        self._given = self._held = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._held:
            self._given = self._given or self._file.read(2**12)  # little: a kilobyte may hold megabytes
            if not self._given:
                if self._frame is not None:
                    raise EOFError("it ends in the middle of a frame")
                return 0
            self._frame = self._frame or self._new()
            try:
                self._held = self._frame.decompress(self._given)
            except self._error as error:
                raise _Damage(str(error)) from error
            self._given = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame = None
        n = min(len(buffer), len(self._held))
        buffer[:n] = self._held[:n]
        self._held = self._held[n:]
        return n


def _skip_line(file: Any) -> int:
    """Reads to the line's end in bounded pieces. Returns the bytes passed over."""
    passed = 0
    while rest := file.readline(2**20):
        passed += len(rest)
        if rest.endswith(b"\n"):
            break
    return passed


def _lines(file: Any, piece: Piece, c: RawConfig, stop: int | None = None) -> _Raw:
    # JSON may write a character as \uXXXX, and a line has other fields: this only keeps memory bounded.
    limit = 8 * c.max_document_bytes + 2**20
    number, cut = 0, piece.start > 0
    while stop is None or file.tell() < stop:
        at = file.tell() if stop is not None else 0
        line = file.readline(limit)
        if not line:
            return
        number += 1
        # Of a file that is read in ranges nobody knows a line's number: its place in bytes finds it as well.
        origin = f"{piece.origin} byte {at}" if cut or piece.stop else f"{piece.origin} line {number}"
        if len(line) == limit and not line.endswith(b"\n"):
            size = len(line) + _skip_line(file)
            yield Broken("a line too long", origin, size, _shown(line))
        elif not line.isspace():
            yield _record(line, origin, c)
        elif c.field != EVERY:  # of an evaluation set the texts alone count
            yield Broken(BLANK, origin, len(line))


def _record(line: bytes, origin: str, c: RawConfig) -> Document | Broken:
    """The document in an object of JSON."""
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return Broken("not UTF-8", origin, len(line), _shown(line))
    except (ValueError, RecursionError):
        return Broken("not JSON", origin, len(line), _shown(line))
    if c.field == EVERY:
        return _document(SEPARATOR.join(_texts(record)), origin, c, len(line))
    if not isinstance(record, dict):
        return Broken("not an object of JSON", origin, len(line), _shown(line))
    if c.field not in record:
        return Broken(f"no field {c.field!r}", origin, len(line), _shown(line))
    return _document(record[c.field], origin, c, len(line))


def _texts(value: Any) -> Iterator[str]:
    """Every string in a value of JSON that is no key."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)


def _shown(line: bytes) -> str:
    return line[:240].decode("utf-8", errors="replace")


# ------------------------------------------------------------------------------------------------------------- records


def _parquet(piece: Piece, c: RawConfig) -> _Raw:
    import pyarrow as pa  # takes a third of a second, and only these files need it
    import pyarrow.parquet as pq

    try:
        with _open(piece) as source, pq.ParquetFile(source, page_checksum_verification=True) as file:
            if c.field == EVERY:
                for batch in file.iter_batches(batch_size=64):
                    for number, row_values in enumerate(batch.to_pylist()):
                        text = SEPARATOR.join(_texts(row_values))
                        yield _document(text, f"{piece.origin} row {number}", c)
                return
            if c.field not in file.schema_arrow.names:
                columns = ", ".join(file.schema_arrow.names[:8])
                yield Broken(f"no column {c.field!r}", piece.origin, piece.size, f"its columns: {columns}")
                return
            kind = file.schema_arrow.field(c.field).type
            kind = kind.value_type if pa.types.is_dictionary(kind) else kind
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
                yield Broken(f"column {c.field!r} holds no text", piece.origin, piece.size, f"it holds {kind}")
                return
            groups = range(piece.start, piece.stop or file.num_row_groups)
            row = sum(file.metadata.row_group(g).num_rows for g in range(piece.start))
            for batch in file.iter_batches(batch_size=64, row_groups=groups, columns=[c.field]):
                for value in batch.column(0).cast(pa.large_binary()):
                    row += 1
                    yield _document(value.as_py(), f"{piece.origin} row {row}", c)
    except pa.ArrowException as error:
        raise _Damage(str(error)) from error
    except OSError as error:
        if error.errno is None:  # what arrow says of a page that it cannot read
            raise _Damage(str(error)) from error
        raise


def _arrayrecord(piece: Piece, c: RawConfig) -> _Raw:
    from array_record.python.array_record_module import ArrayRecordReader

    if "://" in piece.path:
        raise UserError(f"{piece.origin}: ArrayRecord files are read from a disk\ncopy it to one, and name that path")
    try:
        reader = ArrayRecordReader(os.fsencode(piece.path))
        count = piece.stop or reader.num_records()
        for start in range(piece.start, count, 256):
            stop = min(start + 256, count)
            for number, data in enumerate(reader.read(start, stop), start=start):
                origin = f"{piece.origin} record {number}"
                yield _record(data, origin, c) if c.records == "json" else _document(data, origin, c)
        reader.close()
    except (RuntimeError, IndexError, ValueError) as error:
        raise _Damage(str(error)) from error


def _hugging_face(piece: Piece, c: RawConfig) -> _Raw:
    data = inputs.dataset(piece.path)
    if c.field not in data.column_names:
        columns = ", ".join(data.column_names[:8])
        raise UserError(f"{piece.origin}: has no column {c.field!r}\nset raw.field to one of its columns: {columns}")
    for row in range(piece.start, piece.stop or len(data)):
        yield _document(data[row][c.field], f"{piece.origin} row {row}", c)


def _document(value: Any, origin: str, c: RawConfig, size: int | None = None) -> Document | Broken:
    """A document of what a file holds: bytes of UTF-8, a `str`, or anything else, which is none."""
    if not isinstance(value, str | bytes):
        return Broken(f"{type(value).__name__} in the place of text", origin, size or 0, repr(value)[:240])
    try:
        text = value.decode("utf-8") if isinstance(value, bytes) else value
        length = len(value) if isinstance(value, bytes) else len(value.encode("utf-8"))
    except UnicodeDecodeError:
        return Broken("not UTF-8", origin, len(value), _shown(value) if isinstance(value, bytes) else "")
    except UnicodeEncodeError:
        return Broken("half of a surrogate pair", origin, size or len(value), repr(value)[:240])
    if length > c.max_document_bytes:
        return Broken(f"larger than {c.max_document_bytes:,} bytes", origin, length, text[:240])
    if not length:
        return Broken("empty", origin, size or 0)
    return Document(text, origin)


_READERS: dict[str, Callable[[Piece, RawConfig], _Raw]] = {
    "text": _text,
    "html": _html,
    "jsonl": _jsonl,
    "jsonl.gz": _jsonl_gz,
    "jsonl.zst": _jsonl_zst,
    "parquet": _parquet,
    "arrayrecord": _arrayrecord,
    "hf": _hugging_face,
}
