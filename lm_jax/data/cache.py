"""What is worked out once and kept: finished folders under a key, and the content hashes of files.

A folder is made under another name and renamed when it is whole, so a process that dies leaves a finished entry or
none. Processes of one machine that want the same entry wait for the first.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import fcntl
import hashlib
import io
import json
import os
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lm_jax.data.progress import Progress
from lm_jax.errors import ConfigError, UserError


def digest(*parts: bytes | str) -> str:
    """A 128-bit hash, in hex, of a sequence of strings (where one ends counts)."""
    h = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part.encode("utf-8") if isinstance(part, str) else part
        h.update(len(data).to_bytes(8, "little"))
        h.update(data)
    return h.hexdigest()


def cache_root(configured: str | None) -> Path:
    """The cache's folder: what the config says, else $LM_JAX_CACHE, else ~/.cache/lm_jax."""
    name = configured or os.environ.get("LM_JAX_CACHE") or "~/.cache/lm_jax"
    return Path(name).expanduser().absolute()


def write_atomic(path: Path, data: bytes) -> None:
    """Writes a file so that it is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def save_array(path: Path, array: np.ndarray) -> None:
    """Keeps an array that is quickly worked out again: where it cannot be written, it is not kept."""
    content = io.BytesIO()
    np.save(content, array, allow_pickle=False)
    with contextlib.suppress(OSError):
        write_atomic(path, content.getvalue())


# ------------------------------------------------------------------------------------------------------------- entries


def entry(root: Path, key: str, build: Callable[[Path], None], whole: Callable[[Path], bool]) -> Path:
    """The folder of a key, built first where it is not there.

    Args:
      root: the cache's folder.
      key: names the entry.
      build: fills an empty folder.
      whole: whether a folder that is there is undamaged; one that is not is said so, removed and built again.

    Raises:
      ConfigError: where the cache cannot be written.
    """
    final = root / "data" / key
    if final.is_dir() and whole(final):
        return final
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with _locked(root / "locks" / f"{key}.lock"):
            if final.is_dir() and whole(final):  # another process built it while this one waited
                return final
            for left_behind in final.parent.glob(f"{key}.tmp-*"):  # by a process that was killed
                shutil.rmtree(left_behind, ignore_errors=True)
            temporary = final.with_name(f"{key}.tmp-{os.getpid()}-{secrets.token_hex(4)}")
            temporary.mkdir()
            try:
                build(temporary)
                if final.exists():
                    print(f"{final} is damaged: it is built again", file=sys.stderr)
                    shutil.rmtree(final)
                _sync(temporary)
                temporary.rename(final)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        problem = f"{root} cannot be written: {error.strerror or error}"
        raise ConfigError("data.cache", problem, "free the disk, or set data.cache to another folder") from error
    return final


def _sync(folder: Path) -> None:
    """The folder's files on the disk before the name that says they are whole."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds a lock among the processes of this machine; says so when it has to wait."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        start, told = time.monotonic(), False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not told and time.monotonic() - start > 2:
                    print("waiting for another process that prepares the same data", file=sys.stderr)
                    told = True
                time.sleep(0.05)
        yield  # closing the file lets go of the lock


# -------------------------------------------------------------------------------------------------- hashes of contents


def content_hashes(paths: Sequence[Path], root: Path) -> list[str]:
    """Each file's hash of its content.

    A file whose size, times and inode are those of its last hashing is not read again. Times cannot tell two writes in
    one tick of the clock apart, so a file that had changed just before it was hashed is not remembered.

    Raises:
      UserError: where a file cannot be read.
    """
    memo_path = root / "hashes" / f"{digest(*map(str, paths))}.json"
    memo = _read_memo(memo_path)
    try:
        states = [_state(p) for p in paths]
        stale = [p for p, s in zip(paths, states, strict=True) if memo.get(str(p), [None])[:-1] != s]
        started = time.time_ns()
        with Progress("reading the source", sum(p.stat().st_size for p in stale)) as progress:
            fresh = dict(zip(stale, _hash_all(stale, progress), strict=True))
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read: {error.strerror or error}") from error
    hashes = [fresh[p] if p in fresh else memo[str(p)][-1] for p in paths]
    if stale:
        settled = {
            str(p): [*s, h]
            for p, s, h in zip(paths, states, hashes, strict=True)
            if max(s[1], s[2]) < started - 2 * 10**9
        }
        with contextlib.suppress(OSError):  # without it the next run only reads the files again
            write_atomic(memo_path, json.dumps(settled).encode())
    return hashes


def _state(path: Path) -> list[int]:
    s = path.stat()
    return [s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino]


def _hash_all(paths: Sequence[Path], progress: Progress) -> list[str]:
    def one(path: Path) -> str:
        with path.open("rb") as file:
            value = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
            progress.advance(file.tell())
        return value

    with concurrent.futures.ThreadPoolExecutor(4) as pool:  # hashing lets other threads run
        return list(pool.map(one, paths))


def _read_memo(path: Path) -> dict[str, list[Any]]:
    try:
        memo = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return memo if isinstance(memo, dict) and all(isinstance(v, list) and len(v) == 5 for v in memo.values()) else {}
