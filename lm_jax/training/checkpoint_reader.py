"""Checkpoints, read and verified: whole steps only, every leaf's bits compared with its fingerprint, onto any mesh.

A step is one folder, `<step>/`, with three items: `state` (the arrays), `manifest` (every leaf's shape, dtype, PRNG and
fingerprint) and `metadata` (what the run wants to know again). A damaged step is passed over for the last good one.
With several processes every method is called by all of them, in the same order.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.experimental import multihost_utils

from lm_jax.errors import UserError
from lm_jax.paths import StorageError, reason, storage_errors
from lm_jax.training.fingerprint import fingerprints
from lm_jax.training.manifest import (
    FORMAT,
    Damaged,
    Leaves,
    Tree,
    describe,
    implementation,
    is_key,
    mismatches,
    named_leaves,
    shorten,
    unseal,
)
from lm_jax.training.steps import numbered

Metadata = dict[str, Any]

ITEMS = ("state", "manifest", "metadata")


class Restored(NamedTuple):
    """What a checkpoint gave back."""

    tree: Tree
    metadata: Metadata
    step: int


def to_stderr(line: str) -> None:
    """Says a line to whoever runs the program."""
    print(line, file=sys.stderr, flush=True)


class CheckpointReader:
    """The checkpoints of a run, to read: changes nothing, so it may look at a run that is being written."""

    def __init__(self, directory: epath.Path, report: Callable[[str], Any] = to_stderr) -> None:
        """Args: the folder of the steps (`DIR/checkpoints`), and what gets the line about a damaged step."""
        _quiet_orbax()
        self.directory = directory
        self._say = report if jax.process_index() == 0 else lambda line: None

    def steps(self) -> list[int]:
        """The steps that are whole, ascending. Arrays are not read here: `restore` verifies them."""
        return [step for step in reversed(self._numbered()) if self._problem(step) is None]

    @property
    def latest(self) -> int | None:
        """The newest step that is whole."""
        return next((step for step in self._numbered() if self._problem(step) is None), None)

    def read_metadata(self, step: int | None = None) -> Metadata:
        """The metadata of a step (of the newest that has them whole), without reading any array.

        Raises:
          UserError: where there are none.
        """
        damage = []
        for candidate in self._numbered() if step is None else [step]:
            try:
                return self._read_sealed(candidate, "metadata")
            except Damaged as e:
                damage.append((candidate, str(e)))
        raise self._nothing_good(damage)

    def restore_params(self, abstract: Tree, *, ema: bool = False, step: int | None = None) -> Restored:
        """The weights alone, of the newest good step or of a given one. Only they are read.

        Args:
          abstract: the parameters as `ShapeDtypeStruct`s with shardings. Weights saved in another dtype are cast.
          ema: whether to take the running average of the weights, where the run kept one.
          step: which step.

        Raises:
          UserError: where there is no good checkpoint, or its weights do not fit; names the first leaves that do not.
        """

        def load(candidate: int) -> Restored:
            averaged = ema and any(n.startswith("ema/") for n in self._read_sealed(candidate, "manifest")["leaves"])
            return self._load(candidate, {"ema" if averaged else "params": abstract}, partly=True, accept=("dtype",))

        restored = self._first_good(load, step)
        if restored is None:
            raise self._nothing_good([])
        (params,) = restored.tree.values()
        return restored._replace(tree=params)

    # -------------------------------------------------------------------------------------------- which steps are there

    def _numbered(self) -> list[int]:
        """All folders named by a step, newest first. See `steps.numbered`."""
        return numbered(self.directory)

    def _problem(self, step: int) -> str | None:
        """Why a step is not whole, as far as that shows without reading the arrays."""
        try:
            for item in ("manifest", "metadata"):
                self._read_sealed(step, item)
        except Damaged as e:
            return str(e)
        with storage_errors("read", self.directory):
            return None if (self.directory / str(step) / "state").is_dir() else "state is missing"

    def _is_foreign(self, step: int) -> bool:
        """Whether a folder that is named by a step holds nothing of a checkpoint."""
        with storage_errors("read", self.directory):
            return not any((self.directory / str(step) / item).exists() for item in ITEMS)

    def _read_sealed(self, step: int, item: str) -> dict[str, Any]:
        with storage_errors("read", self.directory / str(step)):
            try:
                # Orbax calls the file of every JSON item `metadata`.
                text = (self.directory / str(step) / item / "metadata").read_bytes()
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
                raise Damaged(f"{item} is missing") from None
        return unseal(text, item)

    def _nothing_good(self, damage: list[tuple[int, str]]) -> UserError:
        if not damage:
            return UserError(
                f"there is no checkpoint in {self.directory}\ngive the directory of a run that has saved one"
            )
        lines = [f"checkpoint {step} is damaged ({what})" for step, what in damage]
        return UserError(
            f"no checkpoint in {self.directory} can be used:\n{'; '.join(lines[:3])}\nmend or move them away"
        )

    # -------------------------------------------------------------------------------------------------------- one step

    def _first_good(self, load: Callable[[int], Restored], step: int | None) -> Restored | None:
        """What `load` makes of the newest good step, or of the step given. None where there is no step at all."""
        damage: list[tuple[int, str]] = []
        for candidate in _of_first_process(self._numbered()) if step is None else [step]:
            if step is None and self._is_foreign(candidate):
                self._say(f"{self.directory / str(candidate)} is ignored: no checkpoint is in it (damaged, or foreign)")
                continue
            try:
                restored = load(candidate)
            except Damaged as e:
                damage.append((candidate, str(e)))
                continue
            for bad, what in damage:
                self._say(
                    f"checkpoint {bad} is damaged ({what}): {self._leave(bad)}going on from checkpoint {candidate}"
                )
            return restored
        if damage:
            raise self._nothing_good(damage)
        return None

    def _leave(self, step: int) -> str:
        """What is done with a damaged step once an older one is found good: here nothing. Returns words for it."""
        del step
        return ""

    def _load(self, step: int, abstract: Tree, *, partly: bool = False, accept: Iterable[str] = ()) -> Restored:
        """One step, verified.

        Args:
          step: which.
          abstract: the leaves wanted, with shardings.
          partly: whether the checkpoint may hold more than what is wanted, outside the top-level names of `abstract`.
          accept: as of `manifest.mismatches`.

        Raises:
          Damaged: where a part is missing, cannot be read or is not what was saved; on every process alike.
          UserError: where the checkpoint is good and does not fit.
        """
        wanted = named_leaves(abstract)
        problem, records, metadata, arrays = "", {}, {}, {}
        try:
            manifest, metadata = self._read_sealed(step, "manifest"), self._read_sealed(step, "metadata")
            roots = {name.split("/")[0] for name in wanted}
            records = {n: r for n, r in _leaves_of(manifest).items() if not partly or n.split("/")[0] in roots}
            wrong = mismatches(records, {name: describe(leaf) for name, leaf in wanted.items()}, accept)
            if wrong:
                raise UserError(f"checkpoint {step} in {self.directory} does not fit:\n{shorten(wrong)}")
            arrays = self._read_arrays(step, records, wanted)
        except Damaged as e:
            problem = str(e)
        if not _everywhere(not problem):
            raise Damaged(problem or "another process cannot read it")
        found = fingerprints(arrays)
        other = [name for name, value in found.items() if value != records[name]["fingerprint"]]
        if other:
            raise Damaged(f"{shorten(other, 1)} does not match its fingerprint")
        leaves = [_as_wanted(arrays[name], records[name], found[name], leaf) for name, leaf in wanted.items()]
        return Restored(jax.tree.unflatten(jax.tree.structure(abstract), leaves), metadata, step)

    def _read_arrays(self, step: int, records: Leaves, wanted: Leaves) -> Leaves:
        """The arrays named in `wanted`, as they were saved (keys as their data), on the shardings wanted."""

        def how(name: str) -> ocp.ArrayRestoreArgs:
            shape, dtype = tuple(records[name]["shape"]), np.dtype(records[name]["dtype"])
            sharding = wanted[name].sharding  # of keys too: the dimension that their data add is not split
            return ocp.ArrayRestoreArgs(
                restore_type=jax.Array, sharding=sharding, global_shape=shape, dtype=dtype, strict=True
            )

        args = unflatten_dict({name: how(name) for name in wanted}, sep="/")
        path = self.directory / str(step) / "state"
        try:
            item = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.global_shape, a.dtype), args)
            restore = ocp.args.PyTreeRestore(item=item, restore_args=args, partial_restore=True)
            tree = array_handler().restore(path, args=restore)
        except Exception as e:
            _raise_unless_damage(path, e)
            raise Damaged(f"state cannot be read: {reason(_root(e))}") from e
        found = flatten_dict(tree, sep="/")
        return {name: found[name] for name in wanted}


def _leaves_of(manifest: dict[str, Any]) -> Leaves:
    if manifest.get("format") != FORMAT:
        raise UserError(
            f"a checkpoint of format {manifest.get('format')}; this version of lm_jax reads format {FORMAT}"
        )
    return manifest["leaves"]


def _root(error: BaseException) -> BaseException:
    """What an error came from: Orbax wraps the one that names leaf and file."""
    return error if error.__cause__ is None else _root(error.__cause__)


def _raise_unless_damage(path: epath.Path, error: Exception) -> None:
    """Too little memory, or a store that does not answer, must not pass for damage: a good step would be given up."""
    text = f"{error} {_root(error)}"
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text:
        raise error
    refused = ("PERMISSION_DENIED", "UNAUTHENTICATED", "UNAVAILABLE", "DEADLINE_EXCEEDED")
    if isinstance(_root(error), PermissionError | TimeoutError) or any(word in text for word in refused):
        raise StorageError(f"cannot read {path}: {reason(_root(error))}") from error


def _as_wanted(array: jax.Array, record: dict[str, Any], found: int, want: Any) -> Any:
    """An array as it was saved -> the leaf wanted: keys wrapped, and what was accepted as different changed."""
    if not is_key(want):
        return array if array.dtype == want.dtype else array.astype(want.dtype)
    kind = implementation(want)
    if kind == record["prng"]:
        return jax.random.wrap_key_data(array, impl=kind)

    def fresh(seed: jax.Array) -> jax.Array:  # a key of another kind: a new one, that follows from the old
        key = jax.random.key(seed, impl=kind)
        return jax.random.split(key, want.shape) if want.shape else key

    return jax.jit(fresh, out_shardings=want.sharding)(np.uint32(found))


def array_handler() -> ocp.PyTreeCheckpointHandler:
    # Weights hardly compress (7%), and zstd took four times the processor time of the rest of a save (30M numbers). The
    # file of shardings, which nothing here reads, took a fifth of a small save (50 leaves, 2.4M numbers). On two cores.
    arrays = ocp.type_handlers.ArrayHandler(enable_write_sharding_file=False)
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
    return ocp.PyTreeCheckpointHandler(use_compression=False, type_handler_registry=registry)


def _quiet_orbax() -> None:
    """Orbax tells each failure several times, with tracebacks, in its log and from threads that it leaves behind. It
    also raises it, and so it is told here, once."""
    logging.getLogger("absl").addFilter(_not_of_orbax)
    logging.getLogger("asyncio").addFilter(_not_of_orbax)
    if sys.unraisablehook is not _unraisable:
        _others.append(sys.unraisablehook)
        sys.unraisablehook = _unraisable


def _not_of_orbax(record: logging.LogRecord) -> bool:
    lost_task = record.name == "asyncio" and "never retrieved" in record.getMessage() and "orbax" in record.getMessage()
    return not (lost_task or "orbax" in record.pathname) or record.levelno >= logging.CRITICAL


_others: list[Callable[[Any], Any]] = []  # the hook that was there before


def _unraisable(unraisable: Any) -> None:
    text = str(unraisable.exc_value)
    if text != "Event loop is closed" and not text.startswith("Encountered error while reading array index"):
        _others[-1](unraisable)


# ------------------------------------------------------------------------------------------------- several processes


def _of_first_process(steps: list[int]) -> list[int]:
    """The first process's list, on all of them: what one has seen on a shared disk another may not see yet."""
    if jax.process_count() == 1:
        return steps
    most = 64
    padded = np.array((steps + [-1] * most)[:most], np.int32)
    return [int(s) for s in multihost_utils.broadcast_one_to_all(padded) if s >= 0]


def _everywhere(ok: bool) -> bool:
    """Whether it is so on every process."""
    return ok if jax.process_count() == 1 else bool(np.all(multihost_utils.process_allgather(np.bool_(ok))))
