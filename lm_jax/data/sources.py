"""Where text comes from: files of `.txt`, `.jsonl` and `.parquet`, and the embedded default.

A `.txt` file is one document, a line of a `.jsonl` file or a row of a `.parquet` file is one. Bytes are decoded
strictly and nothing about them is changed: line ends, a byte order mark and spaces stay as they are. What cannot be a
document is refused with its file and line, or, where the policy is "drop", left out and counted; a file that is damaged
as a whole is always refused. Nothing is left out without a count.
"""

from __future__ import annotations

import collections
import dataclasses
import difflib
import glob
import json
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lm_jax.errors import ConfigError, UserError

EMBEDDED = "python"  # the name of the embedded default
SUFFIXES = (".txt", ".jsonl", ".parquet")

# Folders of the standard library that are not its own text: installed packages and tests. `encodings` is left out
# because its tables are near-copies of one another, so that text held out would stand in the training text as well.
_NOT_EMBEDDED = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "encodings"}


class Document(NamedTuple):
    """A text; where it stands: the file, and the line or row where a file holds several; and how many characters at its
    beginning are a prompt."""

    text: str
    origin: str
    prompt: int = 0


@dataclasses.dataclass(frozen=True)
class Files:
    """The files of a source, in the order in which their documents count.

    Attributes:
      paths: absolute paths.
      label: what to call the source in a message.
      ignored: files found beside them in a directory or by a glob that are of another kind.
    """

    paths: tuple[Path, ...]
    label: str
    ignored: int = 0


@dataclasses.dataclass(frozen=True)
class Policy:
    """How documents are taken from files.

    Attributes:
      field: the field of a `.jsonl` line or the column of a `.parquet` file that holds the text.
      prompt: the field or column of a prompt that stands before that text; None for none.
      bad: "refuse" (a `UserError` at the first) or "drop" (left out and counted) for what cannot be a document.
      max_bytes: the most bytes of UTF-8 that a document may have.
    """

    field: str = "text"
    bad: str = "refuse"
    max_bytes: int = 2**28
    prompt: str | None = None

    @property
    def fields(self) -> dict[str, str]:
        """By config key, what is read of a record."""
        return ({} if self.prompt is None else {"prompt_field": self.prompt}) | {"field": self.field}


# ------------------------------------------------------------------------------------------------------ finding files


def find_files(source: str | tuple[str, ...], key: str = "data.source") -> Files:
    """The files that a source names.

    Args:
      source: `"python"`, or one or several of: a file, a directory (all files below it), a glob (`**` goes into
        folders).
      key: the config key that messages name.

    Raises:
      ConfigError: where something named is not there, holds no file of a known kind, or is named twice.
    """
    names = (source,) if isinstance(source, str) else source
    if not names:
        raise ConfigError(key, "names nothing", f'give a file, a directory or a glob, or "{EMBEDDED}"')
    paths: list[Path] = []
    labels: list[str] = []
    ignored = 0
    for name in names:
        found, others = _find(name, key)
        paths += found
        ignored += others
        labels.append("Python's standard library (embedded default)" if name == EMBEDDED else name)
    repeated = [p for p, n in collections.Counter(os.path.realpath(p) for p in paths).items() if n > 1]
    if repeated:
        raise ConfigError(key, f"{repeated[0]} is named twice", "name every file once")
    label = labels[0] if len(labels) == 1 else f"{labels[0]} and {len(labels) - 1} more"
    return Files(tuple(paths), label, ignored)


def _find(name: str, key: str) -> tuple[list[Path], int]:
    """Files of one name, and how many others were passed over."""
    if name == EMBEDDED:
        return _embedded_files(key), 0
    if "://" in name:
        raise ConfigError(key, f"{name!r} is not on this machine", "copy it to a disk here and name that path")
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix.lower() not in SUFFIXES:
            raise ConfigError(key, f"{name!r} is of an unknown kind", f"known are {', '.join(SUFFIXES)}")
        return [path.absolute()], 0
    if path.is_dir():
        found = _walk(path)
    elif glob.has_magic(name):
        found = sorted(Path(p) for p in glob.glob(str(path), recursive=True) if os.path.isfile(p))
    else:
        raise ConfigError(key, f"{name!r} does not exist", _near(path))
    known = [p.absolute() for p in found if p.suffix.lower() in SUFFIXES]
    if not known:
        raise ConfigError(key, f"{name!r} holds no file of a known kind", f"known are {', '.join(SUFFIXES)}")
    return known, len(found) - len(known)


def _walk(root: Path) -> list[Path]:
    """Every file below a directory that is not hidden, by name; links are followed, each directory entered once."""
    found: list[Path] = []
    entered: set[str] = set()
    for folder, folders, names in os.walk(root, followlinks=True):
        if os.path.realpath(folder) in entered:
            folders.clear()
            continue
        entered.add(os.path.realpath(folder))
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        found += [Path(folder) / n for n in names if not n.startswith(".")]
    return sorted(found)


def _near(path: Path) -> str:
    try:
        names = [p.name for p in path.parent.iterdir()]
    except OSError:
        return f'the folder {path.parent} cannot be read; "{EMBEDDED}" is on every machine'
    near = difflib.get_close_matches(path.name, names, n=1)
    return f"did you mean {path.parent / near[0]}?" if near else f'"{EMBEDDED}" is on every machine'


def _embedded_files(key: str) -> list[Path]:
    root = sysconfig.get_path("stdlib")
    found: list[Path] = []
    for folder, folders, names in os.walk(root):
        folders[:] = [f for f in folders if f not in _NOT_EMBEDDED]
        found += [Path(folder) / n for n in names if n.endswith(".py")]
    if not found:
        raise ConfigError(key, f"this Python has no source text of its library in {root}", "name files of your own")
    return sorted(found)


# --------------------------------------------------------------------------------------------------- reading documents


class Reader:
    """The documents of some files, in order, each time the same; what was left out is counted in `dropped` by
    reason."""

    def __init__(self, files: Files, policy: Policy) -> None:
        self.files, self.policy = files, policy
        self.dropped: collections.Counter[str] = collections.Counter()

    def __iter__(self) -> Iterator[Document]:
        """Yields documents with text.

        Raises:
          UserError: names the file, and the line or row, of what cannot be read or, by policy, cannot be a document.
        """
        self.dropped.clear()
        readers = {".jsonl": self._jsonl, ".parquet": self._parquet}
        for path in self.files.paths:
            try:
                yield from readers.get(path.suffix.lower(), self._text)(path)
            except OSError as error:
                raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error

    def _text(self, path: Path) -> Iterator[Document]:
        if self.policy.prompt is not None:
            raise UserError(
                f"{path}: a file of text has no field {self.policy.prompt!r} for a prompt (data.prompt_field)\n"
                "give prompts in .jsonl or .parquet files"
            )
        if path.stat().st_size > self.policy.max_bytes:  # before it is read: it may not fit into memory
            self._bad("too large", str(path), self._too_large(path.stat().st_size))
            return
        yield from self._document([path.read_bytes()], str(path))

    def _jsonl(self, path: Path) -> Iterator[Document]:
        # JSON may write a character as \uXXXX, and a line has other fields: this only keeps memory bounded.
        limit = 8 * self.policy.max_bytes + 2**20
        with path.open("rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(limit), b""), start=1):
                origin = f"{path} line {number}"
                if len(line) == limit and not line.endswith(b"\n"):
                    self._bad("too large", origin, self._too_large(limit))
                    while (rest := file.readline(2**20)) and not rest.endswith(b"\n"):
                        pass
                elif line.isspace():
                    self.dropped["blank line"] += 1
                else:
                    yield from self._json_line(line, origin)

    def _json_line(self, line: bytes, origin: str) -> Iterator[Document]:
        try:
            record = json.loads(line.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            self._bad("not UTF-8", origin, f"is not UTF-8 (byte {error.start} of the line)")
        except (ValueError, RecursionError) as error:
            self._bad("not JSON", origin, f"is not JSON ({error})")
        else:
            if not isinstance(record, dict):
                self._bad("not an object", origin, f"is {type(record).__name__}, not an object with fields")
            elif missing := [(key, field) for key, field in self.policy.fields.items() if field not in record]:
                fields = ", ".join(list(record)[:8]) or "none"
                key, field = missing[0]
                self._bad("no such field", origin, f"has no field {field!r} (data.{key}); it has {fields}")
            else:
                yield from self._document([record[field] for field in self.policy.fields.values()], origin)

    def _parquet(self, path: Path) -> Iterator[Document]:
        import pyarrow as pa  # takes a third of a second, and only these files need it
        import pyarrow.parquet as pq

        try:
            with pq.ParquetFile(path, page_checksum_verification=True) as file:
                self._check_column(path, file.schema_arrow, pa)
                row = 0
                for batch in file.iter_batches(batch_size=256, columns=list(self.policy.fields.values())):
                    columns = [batch.column(field).cast(pa.large_binary()) for field in self.policy.fields.values()]
                    for values in zip(*columns, strict=True):
                        row += 1
                        yield from self._document([value.as_py() for value in values], f"{path} row {row}")
        except (pa.ArrowException, EOFError) as error:
            raise UserError(f"{path}: is no parquet file, or is damaged: {str(error).splitlines()[0][:200]}") from error

    def _check_column(self, path: Path, schema: Any, pa: Any) -> None:
        for key, field in self.policy.fields.items():
            if field not in schema.names:
                columns = ", ".join(schema.names[:8])
                raise UserError(f"{path}: has no column {field!r}\nset data.{key} to one of its columns: {columns}")
            kind = schema.field(field).type
            kind = kind.value_type if pa.types.is_dictionary(kind) else kind
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
                raise UserError(f"{path}: column {field!r} holds {kind}, not text\nset data.{key} to a column of text")

    def _document(self, values: list[Any], origin: str) -> Iterator[Document]:
        """One document of what a file holds in the policy's fields: bytes of UTF-8, a `str`, or anything else, which is
        wrong."""
        for value, field in zip(values, self.policy.fields.values(), strict=True):
            if not isinstance(value, str | bytes):
                self._bad("not text", origin, f"holds {type(value).__name__} in {field!r}, not text")
                return
        value = values[0] if len(values) == 1 else type(values[0])().join(values)
        try:
            text = value.decode("utf-8") if isinstance(value, bytes) else value
            size = len(value) if isinstance(value, bytes) else len(value.encode("utf-8"))
        except UnicodeDecodeError as error:
            self._bad("not UTF-8", origin, f"is not UTF-8: byte {error.start} is 0x{error.object[error.start]:02x}")
        except UnicodeEncodeError as error:
            self._bad("lone surrogate", origin, f"has half of a surrogate pair at character {error.start}")
        else:
            if size > self.policy.max_bytes:
                self._bad("too large", origin, self._too_large(size))
            elif not values[-1]:
                self.dropped["empty"] += 1
            else:
                yield Document(text, origin, self._characters(values[0]) if len(values) > 1 else 0)

    @staticmethod
    def _characters(value: str | bytes) -> int:
        return len(value.decode("utf-8") if isinstance(value, bytes) else value)

    def _too_large(self, size: int) -> str:
        return f"has {size:,} bytes or more; data.max_document_bytes is {self.policy.max_bytes:,}"

    def _bad(self, reason: str, origin: str, problem: str) -> None:
        if self.policy.bad == "refuse":
            raise UserError(
                f'{origin}: {problem}\nmend it, or set data.bad_documents="drop" to leave such out and count them'
            )
        self.dropped[reason] += 1
