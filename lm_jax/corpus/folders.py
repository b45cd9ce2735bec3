"""Where the work lies, and how a part of it is done whole or not at all.

The output's folder has `plan.json` (the config and the parts), which stays, and below `work/` a folder for each stage
with a folder for each of its tasks. A task writes under another name, and renames when all of it is on the disk: what
has its name is whole. Two processes that do the same task write the same, and the later one's is thrown away.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lm_jax import paths
from lm_jax.config import build, differences, to_dict
from lm_jax.corpus.config import PrepareConfig
from lm_jax.corpus.inputs import PLAN, Found, Piece
from lm_jax.corpus.ledger import Ledger
from lm_jax.data import cache
from lm_jax.data.store import MANIFEST
from lm_jax.errors import UserError
from lm_jax.paths import storage_errors

FORMAT = 3  # of the plan
DOCUMENTS, RECORD = "documents.jsonl.zst", "record.json"
_UNFINISHED = ".tmp-"


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is prepared.

    Attributes:
      out: the output's folder.
      config: all that was asked for.
      files: the raw files, as they were found.
      parts: the pieces of each part.
      ignored: files that were passed over, of unknown kinds.
      given: by config key, what else was named and could change: files with their sizes, a tokenizer's fingerprint.
    """

    out: Path
    config: PrepareConfig
    files: list[Found]
    parts: list[list[Piece]]
    ignored: int = 0
    given: dict[str, list[str]] = dataclasses.field(default_factory=dict)

    @property
    def work(self) -> Path:
        return self.out / "work"

    @property
    def part_bytes(self) -> list[int]:
        return [sum(piece.size for piece in part) for part in self.parts]

    @functools.cached_property
    def known(self) -> dict[str, Found]:
        """The raw files by their paths."""
        return {file.path: file for file in self.files}

    @functools.cached_property
    def digest(self) -> str:
        """A hash of all that decides what comes out; shards and manifest bear it."""
        values = [FORMAT, _deciding(self.config), self.given, *_listed(self.files, self.parts)]
        return cache.digest(json.dumps(values, sort_keys=True))

    def folder(self, stage: str, task: int) -> Path:
        return self.work / stage / f"part-{task:05d}"


def write_plan(plan: Plan) -> None:
    """Writes the plan for those who work on it.

    Raises:
      UserError: where the folder has another plan (another config, or raw files that have changed since), or has what
        was prepared and no plan that would say from what.
    """
    path = plan.out / PLAN
    if path.exists():
        _check_same(read_plan(plan.out), plan)
        return
    for pattern in (MANIFEST, "shard-*", "work/*/part-*"):
        if there := next(plan.out.glob(pattern), None):
            name = there.relative_to(plan.out)
            raise UserError(f"{plan.out} has {name} but no {PLAN}: from what it was made is not known\n{REMEDY}")
    files, parts = _listed(plan.files, plan.parts)
    values = {
        "format": FORMAT,
        "config": to_dict(plan.config),
        "files": files,
        "parts": parts,
        "ignored": plan.ignored,
        "given": plan.given,
    }
    paths.make_directory(paths.run_path(plan.work))
    paths.write_text_atomic(paths.run_path(path), json.dumps(values, indent=1) + "\n")


def _listed(files: list[Found], parts: list[list[Piece]]) -> tuple[Any, Any]:
    return [dataclasses.asdict(f) for f in files], [[dataclasses.asdict(piece) for piece in part] for part in parts]


def _deciding(config: PrepareConfig) -> dict[str, Any]:
    """A config without how the work is divided over processes, which changes nothing."""
    return {**to_dict(config), "work": {"part_bytes": config.work.part_bytes}}


REMEDY = "give another folder, or delete this one"


def _check_same(old: Plan, new: Plan) -> None:
    changed = differences(_deciding(old.config), _deciding(new.config))
    if changed:
        raise UserError(f"{new.out} was begun with another config: {changed[0]}\n{REMEDY}")
    if old.files != new.files:
        known = {f.path: f for f in old.files}
        other = next((f.path for f in new.files if known.get(f.path) != f), "a file that is gone")
        raise UserError(f"the raw files are not those that {new.out} was begun with: {other}\n{REMEDY}")
    for key in old.given.keys() | new.given.keys():
        check_given(key, old.given.get(key), new.given.get(key), new.out)


def check_unchanged(plan: Plan, task: int) -> None:
    """Raises UserError where a local file of a part is not what it was when the plan was made: text would be lost, or
    counted twice."""
    for path in {piece.path for piece in plan.parts[task] if piece.kind != "hf" and "://" not in piece.path}:
        file = plan.known[path]
        try:
            state = os.stat(path)
            same = (state.st_size, state.st_mtime_ns) == (file.size, file.changed)
        except OSError:
            same = False
        if not same:
            raise UserError(f"{path} changed while it was being read, or since the parts were planned\n{REMEDY}")


def check_given(key: str, planned: list[str] | None, found: list[str] | None, out: Path) -> None:
    """Raises UserError where what a config key names is not what it was when the plan was made."""
    if planned != found:
        known = set(planned or ())
        other = next((f": {name}" for name in found or () if name not in known), "")
        raise UserError(f"{key} is not what {out} was begun with{other}\n{REMEDY}")


def read_plan(out: Path) -> Plan:
    """The plan of an output's folder.

    Raises:
      UserError: where there is none, or it is of another version.
    """
    path = out / PLAN
    try:
        return _read_plan(out, path, path.stat().st_mtime_ns)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} cannot be read: {error}\n{REMEDY}") from error


@functools.lru_cache(maxsize=4)  # a worker asks for it with every task
def _read_plan(out: Path, path: Path, changed: int) -> Plan:
    values = json.loads(path.read_bytes())
    if values.get("format") != FORMAT:
        raise UserError(f"{path} is of format {values.get('format')!r}; this version writes format {FORMAT}")
    return Plan(
        out,
        build(PrepareConfig, values["config"]),
        [Found(**f) for f in values["files"]],
        [[Piece(**piece) for piece in part] for part in values["parts"]],
        values["ignored"],
        values["given"],
    )


# -------------------------------------------------------------------------------------------------------- whole folders


@contextlib.contextmanager
def whole(final: Path, same: Callable[[Path], bool] = Path.is_dir) -> Iterator[Path]:
    """An empty folder to write into, that gets its name when the body is through and all of it is on the disk.

    Args:
      final: its name.
      same: whether a folder that has the name by then is what the body has written, so that it can stay; one that is
        damaged is replaced.

    Raises:
      StorageError: where it cannot be written.
    """
    temporary = final.with_name(f"{_UNFINISHED}{final.name}-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        with storage_errors("write", final):
            temporary.mkdir(parents=True)
            yield temporary
            for path in temporary.iterdir():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
            paths.sync_directory(temporary)
            try:
                temporary.rename(final)
            except OSError:
                if not final.is_dir():
                    raise
                if not same(final):  # else another process has done the same in the meantime
                    shutil.rmtree(final)
                    temporary.rename(final)
            paths.sync_directory(final.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def clear_unfinished(plan: Plan) -> None:
    """Removes what killed processes have left behind. Only where no other process works on the folder."""
    for parent in (plan.out, *(p for p in plan.work.glob("*") if p.is_dir())):
        for left_behind in parent.glob(f"{_UNFINISHED}*"):
            shutil.rmtree(left_behind, ignore_errors=True)


# --------------------------------------------------------------------------------------------- documents between stages


@dataclasses.dataclass
class Text:
    """A document between stages: its text, where it came from, its language, and which source it is of."""

    text: str
    origin: str
    language: str
    source: int

    @functools.cached_property
    def data(self) -> bytes:
        return self.text.encode("utf-8")


class Documents:
    """Writes documents into a folder. Use as a context manager."""

    def __init__(self, folder: Path) -> None:
        import zstandard

        self._file = (folder / DOCUMENTS).open("wb")
        self._stream = zstandard.ZstdCompressor(level=1).stream_writer(self._file)

    def write(self, document: Text) -> None:
        values = [document.text, document.origin, document.language, document.source]
        line = json.dumps(values, ensure_ascii=False)
        self._stream.write(line.encode("utf-8") + b"\n")

    def __enter__(self) -> Documents:
        return self

    def __exit__(self, *error: object) -> None:
        self._stream.close()
        self._file.close()


def documents(folder: Path) -> Iterator[Text]:
    """The documents of a folder, in order."""
    import zstandard

    with (folder / DOCUMENTS).open("rb") as file:
        reader = zstandard.ZstdDecompressor().stream_reader(file)
        for line in io.BufferedReader(reader, 2**20):  # type: ignore[type-var]
            yield Text(*json.loads(line))


def write_record(folder: Path, ledger: Ledger, **more: Any) -> None:
    """What a task has to tell: its ledger, and plain values."""
    (folder / RECORD).write_text(json.dumps({"ledger": ledger.to_json(), **more}) + "\n")


def read_record(folder: Path) -> tuple[Ledger, dict[str, Any]]:
    values = json.loads((folder / RECORD).read_bytes())
    return Ledger.from_json(values.pop("ledger")), values


def arrays(plan: Plan, stage: str, name: str) -> Iterable[np.ndarray]:
    """The array that each task of a stage has left, one after another, mapped from the disk."""
    for task in range(len(plan.parts)):
        path = plan.folder(stage, task) / f"{name}.npy"
        # An array without elements cannot be mapped.
        array = np.load(path, mmap_mode="r") if path.stat().st_size > 128 else np.load(path)
        yield array
