"""Checkpoints, saved while training goes on.

A step is written by Orbax and committed by one rename (on object stores by a marker file); nothing in it is pickled.
What Orbax does not do is done here and in `checkpoint_reader.py`: a step counts only if all of it is there, every leaf
is fingerprinted, a failed save is told within a step, and a kill at any moment leaves whole steps only. With several
processes every method is called by all of them, in the same order; the first process alone moves and deletes.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from flax.traverse_util import unflatten_dict

from lm_jax.errors import ConfigError
from lm_jax.paths import StorageError, is_local, make_directory, reason, storage_errors, sync_directory
from lm_jax.training.checkpoint_reader import CheckpointReader, Metadata, Restored, array_handler, to_stderr
from lm_jax.training.fingerprint import fingerprints
from lm_jax.training.manifest import FORMAT, IDENTITY, Tree, describe, is_key, named_leaves, seal
from lm_jax.training.steps import COMMITTED

UNFINISHED = ".orbax-checkpoint-tmp"  # in the name of a step that is being written to a disk
TRASH = ".trash"  # where steps go to be deleted, so that none is ever half there under its own name


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When checkpoints are saved and which are kept.

    Attributes:
      every: steps between saves.
      keep: how many of the newest are kept.
      keep_every: steps that are multiples of this are kept for good; a multiple of `every`.
      accept: what may differ between a checkpoint and the run that goes on from it; out of `manifest.IDENTITY`.
    """

    every: int = 100
    keep: int = 3
    keep_every: int | None = None
    accept: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for key in ("every", "keep"):
            if getattr(self, key) < 1:
                raise ConfigError(f"checkpoint.{key}", f"{getattr(self, key)} is too small", "give 1 or more")
        if self.keep_every is not None and (self.keep_every < 1 or self.keep_every % self.every):
            problem = f"{self.keep_every} is no multiple of checkpoint.every = {self.every}"
            raise ConfigError("checkpoint.keep_every", problem, "only steps that are saved can be kept")
        for name in self.accept:
            if name not in IDENTITY:
                raise ConfigError("checkpoint.accept", f"{name!r} is unknown", f"known are {', '.join(IDENTITY)}")


class Checkpointer(CheckpointReader):
    """The checkpoints of a run, to read and to write."""

    def __init__(
        self, directory: epath.Path, config: CheckpointConfig, report: Callable[[str], Any] = to_stderr
    ) -> None:
        """Makes the folder and clears what an earlier, killed process left unfinished.

        Raises:
          StorageError: where the folder cannot be written.
        """
        super().__init__(directory, report)
        self.config = config
        self._first = jax.process_index() == 0
        self._current: int | None = None  # the step that was restored or saved last
        self._pending: Future[None] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._orbax = _orbax_checkpointer(directory)
        if self._first:
            make_directory(directory)
            self._clear_leftovers()

    def due(self, step: int) -> bool:
        """Whether a checkpoint is to be saved after this step."""
        return step % self.config.every == 0

    def save(self, step: int, tree: Tree, metadata: Metadata, *, force: bool = False) -> bool:
        """Saves the state in the background; the arrays may be donated as soon as this returns.

        Waits for an earlier save that still runs. A save may fail later: call `check` every step.

        Args:
          step: steps done.
          tree: the state, `jax.Array`s on one mesh (typed PRNG keys too).
          metadata: JSON. What must come back with the state: rows consumed, config, identity, tokenizer, versions.
          force: save although the step is not due.

        Returns:
          Whether something is being saved: not if the step is not due or is the one restored or saved last.

        Raises:
          StorageError: where this or the earlier save could not be written.
        """
        if step == self._current or not (force or self.due(step)):
            return False
        self.wait()
        if self._first:
            self._make_room(step)
        leaves = named_leaves(tree)
        arrays = {name: jax.random.key_data(leaf) if is_key(leaf) else leaf for name, leaf in leaves.items()}
        marks = fingerprints(arrays)
        records = {name: describe(leaf) | {"fingerprint": marks[name]} for name, leaf in leaves.items()}
        args = ocp.args.Composite(
            state=ocp.args.PyTreeSave(unflatten_dict(arrays, sep="/")),
            manifest=ocp.args.JsonSave(seal({"format": FORMAT, "step": step, "leaves": records})),
            metadata=ocp.args.JsonSave(seal(metadata)),
        )
        try:
            self._orbax.save(self.directory / str(step), args=args)
        except Exception as e:
            raise self._failure(step, e) from e
        self._current = step
        self._pending = self._thread.submit(self._finish, step)
        return True

    def check(self) -> None:
        """Tells, without waiting, whether a save has failed.

        Raises:
          StorageError: where it has: the disk is full, or the store does not answer.
        """
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Waits until the running save is committed.

        Raises:
          StorageError: where it could not be.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        step = self._current
        try:
            pending.result()
        except Exception as e:
            self._current = None
            raise self._failure(step, e) from e

    def restore(self, abstract: Tree, *, step: int | None = None) -> Restored | None:
        """The newest good state, on the shardings of `abstract`, verified leaf by leaf.

        A damaged step is passed over for the next older one, told in one line, and renamed `damaged-<step>`.

        Args:
          abstract: the state as `ShapeDtypeStruct`s (or arrays) with shardings, on any mesh.
          step: this step, and no other.

        Returns:
          The state, its metadata and its step; None where the run has no checkpoint yet.

        Raises:
          UserError: where the state does not fit (another dtype, shape or PRNG), or no checkpoint is good.
        """
        self.wait()
        restored = self._first_good(lambda s: self._load(s, abstract, accept=self.config.accept), step)
        if restored is not None:
            self._current = restored.step
        return restored

    def close(self) -> None:
        """Waits for the running save and ends the threads."""
        try:
            self.wait()
        finally:
            self._orbax.close()
            self._thread.shutdown()

    # ------------------------------------------------------------------------------------------------ after the arrays

    def _finish(self, step: int) -> None:
        """Runs in the background: waits for the commit, confirms it, and deletes what is no longer kept."""
        self._orbax.wait_until_finished()
        if not self._first:
            return
        if is_local(self.directory):
            sync_directory(self.directory)
        problem = self._problem(step)
        if problem:
            raise StorageError(f"checkpoint {step} in {self.directory} was written and is not whole: {problem}")
        self._retire()

    def _failure(self, step: int | None, cause: Exception) -> Exception:
        """What to raise for a failed save: a StorageError in one line where the storage is the reason."""
        if isinstance(cause, StorageError):
            return cause
        if isinstance(cause, OSError) or re.match(r"[A-Z_]{4,}: ", str(cause)):  # tensorstore begins with a status
            return StorageError(f"cannot save checkpoint {step} in {self.directory}: {reason(cause)}")
        return cause

    def _retire(self) -> None:
        """Deletes the steps that are neither among the newest nor kept for good."""
        steps, every = self.steps(), self.config.keep_every
        for step in steps[: -self.config.keep]:
            if every is None or step % every:
                self._delete(self.directory / str(step))

    def _delete(self, path: epath.Path) -> None:
        """Deletes a step; killed in the middle, no half of it is left under its name."""
        with storage_errors("delete", path):
            if is_local(path):
                trash = self.directory / TRASH
                trash.rmtree(missing_ok=True)
                path.rename(trash)
                trash.rmtree()
            else:
                (path / COMMITTED).unlink(missing_ok=True)
                path.rmtree()

    def _clear_leftovers(self) -> None:
        whole = set(self._numbered())
        with storage_errors("delete", self.directory):
            for path in list(self.directory.iterdir()):
                uncommitted = not is_local(path) and path.name.isdecimal() and int(path.name) not in whole
                if path.name == TRASH or UNFINISHED in path.name or uncommitted:
                    path.rmtree()

    def _leave(self, step: int) -> str:
        return f"kept as {self._move_aside(step, 'damaged') if self._first else ''}, "

    def _make_room(self, step: int) -> None:
        """Moves away what is in the place of a step that is about to be saved: never overwritten, never mixed."""
        if step in self._numbered():
            name = self._move_aside(step, "damaged" if self._problem(step) else "replaced")
            self._say(f"there was a checkpoint {step} already: kept as {name}")

    def _move_aside(self, step: int, word: str) -> str:
        with storage_errors("rename", self.directory / str(step)):
            name, n = f"{word}-{step}", 1
            while (self.directory / name).exists():
                n += 1
                name = f"{word}-{step}-{n}"
            (self.directory / str(step)).rename(self.directory / name)
        return name


def _orbax_checkpointer(directory: epath.Path) -> ocp.AsyncCheckpointer:
    modes = ocp.options.AtomicityMode
    mode = modes.ATOMIC_RENAME if is_local(directory) else modes.COMMIT_FILE
    atomicity = ocp.options.AtomicityOptions(mode=mode)
    handler = ocp.CompositeCheckpointHandler(
        composite_options=ocp.CompositeOptions(atomicity_options=atomicity),
        state=array_handler(),
        manifest=ocp.JsonCheckpointHandler(),
        metadata=ocp.JsonCheckpointHandler(),
    )
    return ocp.AsyncCheckpointer(handler, atomicity_options=atomicity)
