"""Which raw files there are, wherever they lie, and how they are divided into parts.

A part is a list of pieces: a file, or a range of one that can be cut (lines of `.jsonl`, row groups of `.parquet`,
records of an ArrayRecord, rows of a data set). It follows from the files and `work.part_bytes` alone, so that any
number of workers, in any order, make the same parts.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import glob
import importlib.util
import itertools
import json
import os
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from etils import epath

from lm_jax import paths
from lm_jax.data import sources
from lm_jax.data.joined import is_sharded
from lm_jax.errors import ConfigError, UserError

KINDS = {
    ".txt": "text",
    ".md": "text",
    ".py": "text",
    ".jsonl": "jsonl",
    ".jsonl.gz": "jsonl.gz",
    ".jsonl.zst": "jsonl.zst",
    ".parquet": "parquet",
    ".arrayrecord": "arrayrecord",
    ".array_record": "arrayrecord",
    ".html": "html",
    ".htm": "html",
}
FOUND_IN_FOLDERS = tuple(suffix for suffix in KINDS if suffix not in (".md", ".py"))  # others, where they are named
HUGGING_FACE = "hf:"
PLAN = "plan.json"  # of an output's folder; nothing below it is raw


@dataclasses.dataclass(frozen=True)
class Piece:
    """A file, or a range of one.

    Attributes:
      path: a path, `gs://` or `s3://` name, or `hf:NAME:CONFIG:SPLIT`.
      kind: one of `KINDS`, or "hf".
      size: bytes of the piece, as they lie in the file.
      start, stop: the range: bytes of a `.jsonl`, row groups of a `.parquet`, records, rows; (0, 0) is all of it.
    """

    path: str
    kind: str
    size: int
    start: int = 0
    stop: int = 0

    @functools.cached_property
    def origin(self) -> str:
        """The path as text that can be written: a name on a disk need not be UTF-8."""
        return os.fsencode(self.path).decode("utf-8", errors="backslashreplace")


@dataclasses.dataclass(frozen=True)
class Found:
    """A file of a source: where, of which kind, how large, when it was last written (nanoseconds; 0 if unknown), and
    which of the names led to it."""

    path: str
    kind: str
    size: int
    changed: int = 0
    source: int = 0


def kind_of(name: str) -> str | None:
    """The kind of a file, by the end of its name."""
    lower = name.lower()
    return next((kind for suffix, kind in KINDS.items() if lower.endswith(suffix)), None)


def find(names: tuple[str, ...], key: str = "raw.sources") -> tuple[list[Found], int]:
    """The files that sources name, in their order, and how many others were passed over.

    Args:
      names: files, directories, globs, `gs://` and `s3://` names, "python", `hf:..`.
      key: the config key that messages name.

    Raises:
      ConfigError: where something named is not there, holds nothing of a known kind, or is named twice.
    """
    found: list[Found] = []
    ignored = 0
    for number, name in enumerate(names):
        files, others = _find(name, key)
        found += [dataclasses.replace(file, source=number) for file in files]
        ignored += others
    real = (f.path if f.kind == "hf" or "://" in f.path else os.path.realpath(f.path) for f in found)
    twice = [path for path, n in collections.Counter(real).items() if n > 1]
    if twice:
        raise ConfigError(key, f"{twice[0]} is named twice", "name every file once")
    return found, ignored


def _find(name: str, key: str) -> tuple[list[Found], int]:
    if name == sources.EMBEDDED:
        return [_local(path, "text") for path in sources.find_files(name, key).paths], 0
    if name.startswith(HUGGING_FACE):
        return [Found(name, "hf", _dataset_bytes(name, key))], 0
    if "://" in name:
        return _remote(name, key)
    path = Path(name).expanduser()
    if path.is_file():
        kind = kind_of(path.name)
        if kind is None:
            raise ConfigError(key, f"{name!r} is of an unknown kind", f"known are {', '.join(KINDS)}")
        return [_local(path.absolute(), kind)], 0
    if path.is_dir():
        listed = sources._walk(path)
    elif glob.has_magic(name):
        listed = sorted(Path(p) for p in glob.glob(str(path), recursive=True) if os.path.isfile(p))
    else:
        raise ConfigError(key, f"{name!r} does not exist", sources._near(path))
    globbed = glob.has_magic(name)
    raw = _not_prepared(listed, _base(name))
    kinds = [(p, kind_of(p.name)) for p in raw if globbed or p.name.lower().endswith(FOUND_IN_FOLDERS)]
    known = [_local(p.absolute(), kind) for p, kind in kinds if kind]
    if not known:
        raise ConfigError(key, f"{name!r} holds no file of a known kind", f"known are {', '.join(FOUND_IN_FOLDERS)}")
    return known, len(listed) - len(known)


def check_output(out: Path, names: tuple[str, ...], key: str = "raw.sources") -> None:
    """Raises ConfigError where an output's folder is in a folder that is read: it would become its own input."""
    real = os.path.realpath(out)
    for name in names:
        if name == sources.EMBEDDED or name.startswith(HUGGING_FACE) or "://" in name:
            continue
        folder = os.path.realpath(Path(name).expanduser())
        if os.path.isdir(folder) and os.path.commonpath([real, folder]) == folder:
            raise ConfigError(key, f"{name!r} holds the output, {out}", "give an --out outside of what is read")


def _base(name: str) -> Path:
    """The folder that a name or a glob begins with."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    plain = itertools.takewhile(lambda part: not glob.has_magic(part), path.parent.parts)
    return Path(*plain)


def _not_prepared(listed: list[Path], base: Path) -> list[Path]:
    """Files without those in folders that were prepared from others."""

    @functools.cache
    def prepared(folder: Path) -> bool:
        if is_sharded(str(folder)) or _is_plan(folder / PLAN):
            return True
        return folder != base and folder != folder.parent and prepared(folder.parent)

    return [path for path in listed if not prepared(path.parent)]


def _is_plan(path: Path) -> bool:
    if not path.is_file():
        return False
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and {"format", "config", "files", "parts"} <= values.keys()


def _local(path: Path, kind: str) -> Found:
    try:
        state = path.stat()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    return Found(str(path), kind, state.st_size, state.st_mtime_ns)


def _remote(name: str, key: str) -> tuple[list[Found], int]:
    """Files of an object store: one, all below a prefix, or a glob."""
    if "**" in name:
        raise ConfigError(key, f"{name!r}: no object store is asked for **", "name the folder: all below it is read")
    root = paths.run_path(name)
    with paths.storage_errors("read", name):
        if glob.has_magic(name):
            base = posixpath.dirname(re.split(r"[*?\[]", name, maxsplit=1)[0])
            listed = [str(p) for p in epath.Path(base).glob(name[len(base) + 1 :])]
        elif root.is_dir():
            listed = list(_below(root))
        else:
            listed = [str(root)]
        known = [(p, kind) for p in sorted(listed) if (kind := kind_of(p))]
        try:
            found = [Found(p, kind, epath.Path(p).stat().length) for p, kind in known]
        except FileNotFoundError:
            raise ConfigError(key, f"{name!r} does not exist") from None
    if not found:
        raise ConfigError(key, f"{name!r} holds no file of a known kind", f"known are {', '.join(FOUND_IN_FOLDERS)}")
    return found, len(listed) - len(found)


def _below(folder: epath.Path) -> Iterator[str]:
    for path in folder.iterdir():
        if path.is_dir():
            yield from _below(path)
        else:
            yield str(path)


# ---------------------------------------------------------------------------------------------- Hugging Face data sets


def dataset(name: str, key: str = "raw.sources") -> Any:
    """The data set that `hf:NAME:CONFIG:SPLIT` names, memory-mapped by its library.

    Raises:
      ConfigError: where the name or the data set is none, or the library is missing.
    """
    words = name[len(HUGGING_FACE) :].rsplit(":", 2)
    if len(words) != 3 or not words[0] or not words[2]:
        raise ConfigError(
            key, f"{name!r} is no data set", "write hf:NAME:CONFIG:SPLIT, as hf:wikitext:wikitext-2-v1:train"
        )
    if importlib.util.find_spec("datasets") is None:
        raise ConfigError(key, f"{name!r} needs the package datasets", "pip install datasets")
    import datasets

    try:
        return datasets.load_dataset(words[0], words[1] or None, split=words[2])
    except Exception as error:  # of many kinds: no network, no such name, no such split
        problem = f"{name!r} cannot be had: {str(error).splitlines()[0][:200] if str(error) else type(error).__name__}"
        raise ConfigError(key, problem, "see huggingface.co/docs/datasets for names, configs and splits") from error


def _dataset_bytes(name: str, key: str) -> int:
    found = dataset(name, key)
    return int(getattr(found, "size_in_bytes", None) or getattr(found, "dataset_size", None) or 0) or len(found)


# ---------------------------------------------------------------------------------------------------------------- parts


def parts(found: list[Found], limit: int) -> list[list[Piece]]:
    """Files as parts of some `limit` bytes, in order; a file that cannot be cut is in one part, however large."""
    out: list[list[Piece]] = []
    size = 0
    for file in found:
        for piece in _pieces(file, limit):
            if not out or size + piece.size > limit:
                out.append([])
                size = 0
            out[-1].append(piece)
            size += piece.size
    return out


def _pieces(file: Found, limit: int) -> Iterator[Piece]:
    if file.size <= limit or file.kind not in _UNITS:
        yield Piece(file.path, file.kind, file.size)
        return
    try:
        units = _UNITS[file.kind](file)
    except Exception:  # a damaged file: whoever reads it says so, and counts it
        units = 0
    if units < 2:
        yield Piece(file.path, file.kind, file.size)
        return
    count = min(-(-file.size // limit), units)
    edges = [units * i // count for i in range(count + 1)]
    for start, stop in itertools.pairwise(edges):
        yield Piece(file.path, file.kind, file.size * (stop - start) // units, start, stop)


def _row_groups(file: Found) -> int:
    import pyarrow.parquet as pq

    with epath.Path(file.path).open("rb") as source, pq.ParquetFile(source) as table:
        return int(table.num_row_groups)


def _records(file: Found) -> int:
    from array_record.python.array_record_module import ArrayRecordReader

    reader = ArrayRecordReader(os.fsencode(file.path))
    try:
        return int(reader.num_records())
    finally:
        reader.close()


_UNITS = {
    "jsonl": lambda file: file.size,
    "parquet": _row_groups,
    "arrayrecord": _records,
    "hf": lambda file: len(dataset(file.path)),
}
