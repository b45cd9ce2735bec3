"""Which steps a run's folder holds, by the names of their folders: without jax, for whoever only watches the run."""

from __future__ import annotations

from etils import epath

from lm_jax.paths import is_local, storage_errors

FOLDER = "checkpoints"  # in a run's folder
COMMITTED = "commit_success.txt"  # the marker of a committed step on an object store


def numbered(directory: epath.Path) -> list[int]:
    """All folders named by a step, newest first: whole, damaged or foreign. What was never committed is not among them:
    on a disk it has another name, in an object store no marker.

    Args:
      directory: of the steps, `DIR/checkpoints`.

    Raises:
      StorageError: where it cannot be read.
    """
    with storage_errors("read", directory):
        names = [path.name for path in directory.iterdir()] if directory.exists() else []
        steps = sorted((int(n) for n in names if n.isdecimal() and str(int(n)) == n), reverse=True)
        if is_local(directory):
            return steps
        return [step for step in steps if (directory / str(step) / COMMITTED).exists()]
