"""One path layer for every file of a run: local disks, `gs://` and `s3://`.

On a local disk replacing a file is atomic and durable (fsync), and an append is there when the call returns. An object
store has neither appends nor locks: there, an `Appender` rewrites its object from memory, and a `Lock` holds nothing
and says so.
"""

from __future__ import annotations

import errno
import fcntl
import importlib.util
import os
import re
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from etils import epath

from lm_jax.errors import Failure, UserError

SCHEMES = {"gs": ("gcs", "gcsfs"), "s3": ("s3", "s3fs")}  # an extra of this package, and the module that it brings
LOCK_FILE = ".lock"


class StorageError(Failure):
    """A file could not be read or written: a full or read-only disk, a permission, a store that does not answer.

    Not the user's mistake and no fault of this project: launchers show its one line without a traceback, with exit
    status 1.
    """


def storage_error(action: str, path: object, cause: BaseException) -> StorageError:
    """The one line for a failed action (`write`, `read`) on a path, with the system's reason."""
    return StorageError(f"cannot {action} {path}: {reason(cause)}")


def reason(cause: BaseException) -> str:
    """Why an operation on files failed, in the operating system's words where it gave some."""
    code = cause.errno if isinstance(cause, OSError) else None
    if code is None:  # tensorstore puts the number into its text
        found = re.search(r"os_error_code='(\d+)'", str(cause))
        code = int(found.group(1)) if found else None
    if code is not None:
        return os.strerror(code)
    text = str(cause).strip() or type(cause).__name__
    return text.splitlines()[0].split(" [tensorstore_spec")[0][:300]


@contextmanager
def storage_errors(action: str, path: object) -> Iterator[None]:
    """Turns an OSError of the body into a StorageError. That a file is missing stays a FileNotFoundError."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as e:
        raise storage_error(action, path, e) from e


# --------------------------------------------------------------------------------------------------------------- paths


def run_path(text: str | os.PathLike[str]) -> epath.Path:
    """A path as the user wrote it: absolute if local (`~` is the home directory), else `gs://bucket/..` or `s3://bucket/..`.

    Raises:
      UserError: for an empty path, another scheme, or one that nothing installed here can reach.
    """
    text = os.fspath(text)
    if not text:
        raise UserError("an empty path\ngive a local directory, gs://bucket/name or s3://bucket/name")
    scheme, found, rest = text.partition("://")
    if not found:
        return epath.Path(os.path.abspath(os.path.expanduser(text)))
    if scheme not in SCHEMES or not rest.strip("/"):
        remedy = "give a local directory, gs://bucket/name or s3://bucket/name"
        raise UserError(f"{text} is no path that can be used\n{remedy}")
    extra, module = SCHEMES[scheme]
    if importlib.util.find_spec(module) is None and importlib.util.find_spec("tensorflow") is None:
        raise UserError(f"{text} needs the package {module}, which is not installed\npip install 'lm_jax[{extra}]'")
    return epath.Path(text)


def is_local(path: os.PathLike[str]) -> bool:
    """Whether a path is on a file system of this machine (not in an object store)."""
    return "://" not in os.fspath(path)


def make_directory(path: epath.Path) -> None:
    """Makes a directory with its parents; one that is there is left as it is.

    Raises:
      StorageError: where it cannot be made.
    """
    with storage_errors("make the directory", path):
        path.mkdir(parents=True, exist_ok=True)


def sync_directory(path: os.PathLike[str]) -> None:
    """Makes the names in a local directory durable (a new or renamed file's name belongs to its directory)."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_text(path: epath.Path) -> str:
    """A file's text (UTF-8, line ends as they are).

    Raises:
      FileNotFoundError: where there is none.
      StorageError: where it cannot be read.
    """
    with storage_errors("read", path):
        return path.read_bytes().decode("utf-8")


def write_text_atomic(path: epath.Path, text: str) -> None:
    """`write_bytes_atomic` of the text in UTF-8."""
    write_bytes_atomic(path, text.encode("utf-8"))


def write_bytes_atomic(path: epath.Path, data: bytes) -> None:
    """Writes a file whole or not at all: whoever reads it, at any moment, sees the old content or the new.

    Raises:
      StorageError: where it cannot be written; the old content is then still there.
    """
    with storage_errors("write", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if not is_local(path):
            path.write_bytes(data)  # an object appears when its upload is complete
            return
        temporary = f"{path}.{os.getpid()}.tmp"
        try:
            with open(temporary, "wb") as f:
                f.write(data)
                f.flush()
                os.fsync(f.fileno())
            os.replace(temporary, path)
        except OSError:
            if os.path.exists(temporary):
                os.unlink(temporary)
            raise
        sync_directory(path.parent)


# -------------------------------------------------------------------------------------------------------- lines of text


class Appender:
    """A file that grows by whole lines.

    Lines that are there stay. A last line without its end (its writer was killed in the middle) is cut off when the
    file is opened. One process at a time writes such a file; that is what `lock` is for.

    Attributes:
      path: the file.
      torn: how many bytes of an unfinished last line were cut off.
    """

    def __init__(self, path: epath.Path) -> None:
        """Opens the file, and makes it (and its directory) if it is not there.

        Raises:
          StorageError: where it cannot be opened.
        """
        self.path = path
        self.torn = 0
        self._file: int | None = None  # a descriptor, so that no buffer keeps what could not be written
        self._object = b""  # an object store's content, kept in memory
        self._changed = False
        with storage_errors("write", path):
            path.parent.mkdir(parents=True, exist_ok=True)
            if is_local(path):
                self._open()
            elif path.exists():
                data = path.read_bytes()
                self._object = data[: data.rfind(b"\n") + 1]
                self.torn = len(data) - len(self._object)

    def _open(self) -> None:
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        sync_directory(self.path.parent)
        self.torn += _cut_torn_line(self._file)

    def append(self, line: str) -> None:
        """Adds a line (given without its end). On a local disk a killed process loses nothing once this returns.

        Raises:
          StorageError: where it cannot be written; no part of the line stays behind.
        """
        data = line.encode("utf-8") + b"\n"
        if b"\n" in data[:-1]:
            raise ValueError(f"one line at a time, not {line[:80]!r}")
        if self._file is None:
            self._object += data
            self._changed = True
            return
        with storage_errors("write", self.path):
            end = os.fstat(self._file).st_size
            try:
                while data:
                    data = data[os.write(self._file, data) :]
            except OSError:
                os.ftruncate(self._file, end)
                raise

    def flush(self, *, durable: bool = False) -> None:
        """Makes the lines readable by others; with `durable`, a local disk keeps them through a loss of power.

        Raises:
          StorageError: where they cannot be written.
        """
        with storage_errors("write", self.path):
            if self._file is not None and durable:
                os.fsync(self._file)
            if self._file is None and self._changed:
                self.path.write_bytes(self._object)
                self._changed = False

    def filter(self, keep: Callable[[str], bool]) -> int:
        """Drops the lines for which `keep(line)` is false, atomically. Returns how many were dropped."""
        with storage_errors("read", self.path):
            data = self._object if self._file is None else self.path.read_bytes()
        lines = data.split(b"\n")[:-1]
        kept = [line for line in lines if keep(line.decode("utf-8", errors="replace"))]
        if len(kept) < len(lines):
            data = b"".join(line + b"\n" for line in kept)
            write_bytes_atomic(self.path, data)
            if self._file is None:
                self._object, self._changed = data, False
            else:
                os.close(self._file)
                self._open()
        return len(lines) - len(kept)

    def close(self) -> None:
        """Flushes and closes."""
        self.flush()
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def __enter__(self) -> Appender:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _cut_torn_line(file: int) -> int:
    """Cuts off what follows the last line's end. Returns how many bytes that were."""
    size = end = os.fstat(file).st_size
    while end:
        start = max(0, end - (1 << 16))
        found = os.pread(file, end - start, start).rfind(b"\n")
        if found >= 0:
            end = start + found + 1
            break
        end = start
    if end < size:
        os.ftruncate(file, end)
        os.fsync(file)
    return size - end


# ------------------------------------------------------------------------------------------------------------- the lock

_held: set[int] = set()  # descriptors of the locks that this process holds


def _drop_inherited_locks() -> None:
    # A lock belongs to all processes that have its descriptor: a forked worker that outlives its parent would keep it.
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_drop_inherited_locks)


class Lock:
    """A directory that one process at a time may write. Released by `release`, at the end of a `with`, and when the
    process ends in any way."""

    def __init__(self, directory: epath.Path, descriptor: int | None) -> None:
        self.directory = directory
        self._descriptor = descriptor

    @property
    def held(self) -> bool:
        """False on an object store, and after `release`."""
        return self._descriptor is not None

    def release(self) -> None:
        """Lets the next process in."""
        if self._descriptor is not None:
            _held.discard(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def lock(directory: epath.Path, report: Callable[[str], Any] = _to_stderr) -> Lock:
    """Takes the directory (made if it is not there) for this process. Of one job's processes, the first alone calls it.

    Args:
      directory: what to lock. On an object store nothing is locked, and `report` gets a line that says so.
      report: what gets that line.

    Raises:
      UserError: where another process has it; names its process id and host.
      StorageError: where the directory cannot be written.
    """
    if not is_local(directory):
        report(f"{directory} is in an object store, which has no locks: see to it that one job at a time writes there")
        return Lock(directory, None)
    make_directory(directory)
    path = directory / LOCK_FILE
    with storage_errors("write", path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        except OSError as e:
            holder = os.pread(descriptor, 200, 0).decode("utf-8", errors="replace").strip()
            os.close(descriptor)
            if e.errno in (errno.EWOULDBLOCK, errno.EACCES):
                who = holder or "another process"
                raise UserError(
                    f"{directory} is in use by {who}\nwait for it to end, or give another directory"
                ) from None
            raise
    _held.add(descriptor)
    return Lock(directory, descriptor)
