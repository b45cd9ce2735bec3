"""The path layer: what is written stays, whole, and one process at a time writes."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem

from lm_jax import paths
from lm_jax.errors import UserError
from lm_jax.paths import Appender, StorageError


class _Bucket(MemoryFileSystem):
    """An object store in memory, under the name of a real one."""

    protocol = "s3"
    store = {}  # noqa: RUF012 (the base class has it so)
    pseudo_dirs = [""]  # noqa: RUF012


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> epath.Path:
    fsspec.register_implementation("s3", _Bucket, clobber=True)
    _Bucket.store.clear()
    monkeypatch.setitem(paths.SCHEMES, "s3", ("s3", "fsspec"))
    return paths.run_path("s3://bucket/run")


def _lines(path: epath.Path) -> list[str]:
    return path.read_text().splitlines()


def test_paths_are_absolute_or_of_a_known_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert os.fspath(paths.run_path("runs/a")) == str(tmp_path / "runs/a")
    assert os.fspath(paths.run_path("~/a")) == os.path.expanduser("~/a")
    monkeypatch.setitem(paths.SCHEMES, "gs", ("gcs", "fsspec"))
    store = paths.run_path("gs://bucket/run")
    assert os.fspath(store / "a") == "gs://bucket/run/a" and not paths.is_local(store)
    assert paths.is_local(paths.run_path("a"))


@pytest.mark.parametrize("text", ["", "http://x/y", "s3://", "file:///tmp/x"])
def test_other_paths_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="s3://bucket"):
        paths.run_path(text)


def test_a_store_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"s3fs.*\n.*lm_jax\[s3\]"):
        paths.run_path("s3://bucket/run")


def test_writing_replaces_whole_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = epath.Path(tmp_path) / "a" / "config.json"
    paths.write_text_atomic(path, "first\r\n")
    paths.write_text_atomic(path, "héllo\n")
    assert paths.read_text(path) == "héllo\n"
    assert [p.name for p in path.parent.iterdir()] == ["config.json"]


def test_line_ends_are_left_as_they_are(tmp_path: Path) -> None:
    path = epath.Path(tmp_path) / "a"
    paths.write_text_atomic(path, "a\r\nb\n")
    assert paths.read_text(path) == "a\r\nb\n"


def test_a_failed_write_keeps_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = epath.Path(tmp_path) / "a"
    paths.write_text_atomic(path, "old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"cannot write .*/a: No space left on device"):
        paths.write_text_atomic(path, "new")
    assert [p.name for p in tmp_path.iterdir()] == ["a"] and path.read_text() == "old"


def test_a_missing_file_stays_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        paths.read_text(epath.Path(tmp_path) / "none")
    with pytest.raises(StorageError, match="cannot read"):
        paths.read_text(epath.Path(tmp_path))


def test_lines_are_added_to_those_that_are_there(tmp_path: Path) -> None:
    path = epath.Path(tmp_path) / "run" / "metrics.jsonl"
    with Appender(path) as first:
        first.append("a")
        assert _lines(path) == ["a"]  # at once
    with Appender(path) as second:
        second.append("b")
        second.flush(durable=True)
        assert second.torn == 0
    assert path.read_bytes() == b"a\nb\n"
    with pytest.raises(ValueError, match="one line"):
        second.append("a\nb")


@pytest.mark.parametrize("torn", [b'{"step": 3', b"x" * 200_000])
def test_a_torn_last_line_is_cut_off(tmp_path: Path, torn: bytes) -> None:
    path = epath.Path(tmp_path) / "m"
    path.write_bytes(b"a\nb\n" + torn)
    with Appender(path) as log:
        assert log.torn == len(torn)
        log.append("c")
    assert _lines(path) == ["a", "b", "c"]


def test_a_file_that_is_one_torn_line_becomes_empty(tmp_path: Path) -> None:
    path = epath.Path(tmp_path) / "m"
    path.write_bytes(b"abc")
    with Appender(path) as log:
        assert log.torn == 3
    assert path.read_bytes() == b""


def _up_to_step(step: int) -> Callable[[str], bool]:
    """Keeps the records whose step is at most this, and nothing that is no record."""
    return lambda line: line.startswith("{") and json.loads(line)["step"] <= step


def test_records_after_a_step_are_dropped(tmp_path: Path) -> None:
    path = epath.Path(tmp_path) / "m"
    with Appender(path) as log:
        for step in (1, 2, 3, 4):
            log.append(json.dumps({"step": step}))
        log.append("no record")
        assert log.filter(_up_to_step(2)) == 3
        log.append(json.dumps({"step": 3, "again": True}))
        assert log.filter(_up_to_step(9)) == 0
    assert [json.loads(line)["step"] for line in _lines(path)] == [1, 2, 3]


def test_a_write_cut_short_by_a_full_disk_leaves_no_part_of_the_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = epath.Path(tmp_path) / "m"
    log = Appender(path)
    log.append("whole")
    write, calls = os.write, []

    def full(descriptor: int, data: bytes) -> int:
        calls.append(data)
        if len(calls) == 1:
            return write(descriptor, data[:3])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(StorageError, match="No space left on device"):
            log.append("never there")
    log.append("next")
    assert _lines(path) == ["whole", "next"]


def test_an_object_store_gets_the_whole_object(bucket: epath.Path) -> None:
    path = bucket / "m"
    with Appender(path) as log:
        log.append(json.dumps({"step": 1}))
        assert not path.exists()
        log.flush()
        log.append(json.dumps({"step": 2}))
    path.write_bytes(path.read_bytes() + b"torn")
    with Appender(path) as log:
        assert log.torn == 4
        assert log.filter(_up_to_step(1)) == 1
        log.append(json.dumps({"step": 2, "again": True}))
    assert [json.loads(line) for line in _lines(path)] == [{"step": 1}, {"step": 2, "again": True}]
    paths.write_text_atomic(bucket / "deep" / "config.json", "{}")
    assert paths.read_text(bucket / "deep" / "config.json") == "{}"


def test_an_object_store_has_no_lock_and_says_so(bucket: epath.Path) -> None:
    said: list[str] = []
    with paths.lock(bucket, said.append) as lock:
        assert not lock.held
    assert len(said) == 1 and "no locks" in said[0]


_HOLD = "import sys, time; from etils import epath; from lm_jax import paths; l = paths.lock(epath.Path(sys.argv[1])); "


def _hold(directory: Path, then: str) -> subprocess.Popen[str]:
    """A process that locks the directory and says `ready`."""
    command = [sys.executable, "-c", _HOLD + then, str(directory)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("ready")
    return process


def test_a_second_process_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    process = _hold(tmp_path, "print('ready', flush=True); time.sleep(60)")
    try:
        with pytest.raises(UserError, match=f"in use by process {process.pid} on "):
            paths.lock(epath.Path(tmp_path))
    finally:
        process.kill()
        process.wait()
    lock = paths.lock(epath.Path(tmp_path))
    assert lock.held
    lock.release()
    paths.lock(epath.Path(tmp_path)).release()


def test_a_forked_child_does_not_keep_the_lock(tmp_path: Path) -> None:
    then = "import os; child = os.fork(); print('ready', child, flush=True) if child else None; time.sleep(20)"
    process = _hold(tmp_path, then)
    process.kill()
    process.wait()
    for _ in range(50):  # the child lives on; give it the time to have run its first lines
        try:
            paths.lock(epath.Path(tmp_path)).release()
            return
        except UserError:
            time.sleep(0.1)
    pytest.fail("the lock of a killed process is still held by its child")
