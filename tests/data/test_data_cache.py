"""Entries are whole or not there, whoever dies or races; hashes follow the content."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lm_jax.data import cache
from lm_jax.errors import ConfigError, UserError
from tests.support.processes import environment


def build_into(text: str = "x", calls: list[Path] | None = None) -> Callable[[Path], None]:
    def build(directory: Path) -> None:
        if calls is not None:
            calls.append(directory)
        (directory / "content").write_text(text)

    return build


def has_content(directory: Path) -> bool:
    return (directory / "content").exists() and (directory / "content").read_text() != ""


def test_an_entry_is_built_once(tmp_path: Path) -> None:
    calls: list[Path] = []
    first = cache.entry(tmp_path, "key", build_into(calls=calls), has_content)
    assert cache.entry(tmp_path, "key", build_into(calls=calls), has_content) == first == tmp_path / "data" / "key"
    assert len(calls) == 1 and [p.name for p in first.parent.iterdir()] == ["key"]


def test_a_damaged_entry_is_built_again_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entry = cache.entry(tmp_path, "key", build_into(), has_content)
    (entry / "content").write_text("")
    cache.entry(tmp_path, "key", build_into("again"), has_content)
    assert (entry / "content").read_text() == "again"
    assert "damaged" in capsys.readouterr().err


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    def fail(directory: Path) -> None:
        (directory / "half").write_text("x")
        raise UserError("no")

    with pytest.raises(UserError, match="no"):
        cache.entry(tmp_path, "key", fail, has_content)
    assert list((tmp_path / "data").iterdir()) == []


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"data\.cache: .*file cannot be written"):
        cache.entry(tmp_path / "file", "key", build_into(), has_content)

    def full(directory: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(ConfigError, match=r"No space left on device\nfree the disk"):
        cache.entry(tmp_path, "key", full, has_content)


BUILDER = """
import pathlib, sys, time
from lm_jax.data import cache
def build(directory):
    (directory / "half").write_text("x")
    print("building", flush=True)
    time.sleep(float(sys.argv[2]))
    (directory / "content").write_text("x")
cache.entry(pathlib.Path(sys.argv[1]), "key", build, lambda d: (d / "content").exists())
"""


def start(root: Path, seconds: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", BUILDER, str(root), str(seconds)]
    return subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True)


def test_a_killed_build_leaves_no_entry_and_the_next_clears_up(tmp_path: Path) -> None:
    process = start(tmp_path, 60)
    assert process.stdout is not None and process.stdout.readline() == "building\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    (left,) = (tmp_path / "data").iterdir()
    assert left.name.startswith("key.tmp-")
    cache.entry(tmp_path, "key", build_into(), has_content)
    assert [p.name for p in (tmp_path / "data").iterdir()] == ["key"]


def test_processes_at_once_build_once(tmp_path: Path) -> None:
    processes = [start(tmp_path, 0.3) for _ in range(4)]
    outputs = [p.communicate(timeout=60)[0] for p in processes]
    assert [p.returncode for p in processes] == [0] * 4
    assert sorted(outputs) == ["", "", "", "building\n"]


def age(path: Path, seconds: float = 60) -> None:
    """Sets a file's time of writing back."""
    then = time.time() - seconds
    os.utime(path, (then, then))


def test_hashes_follow_the_content_not_the_place(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    a.write_text("same")
    b.write_text("same")
    first, second = cache.content_hashes([a, b], tmp_path / "cache")
    assert first == second
    b.write_text("else")
    age(b)
    assert cache.content_hashes([a, b], tmp_path / "cache")[1] != first
    with pytest.raises(UserError, match="gone: cannot be read"):
        cache.content_hashes([tmp_path / "gone"], tmp_path / "cache")


def test_settled_files_are_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    path.write_text("one")
    root = tmp_path / "cache"
    hashed: list[Path] = []
    hash_all = cache._hash_all
    monkeypatch.setattr(cache, "_hash_all", lambda paths, progress: hashed.extend(paths) or hash_all(paths, progress))
    before = cache.content_hashes([path], root)
    cache.content_hashes([path], root)
    assert len(hashed) == 2  # written a moment ago: another write in the same tick would not show
    now = time.time_ns()
    monkeypatch.setattr(cache.time, "time_ns", lambda: now + 3 * 10**9)
    cache.content_hashes([path], root)
    cache.content_hashes([path], root)
    assert len(hashed) == 3
    path.write_text("two")  # the same size
    assert cache.content_hashes([path], root) != before and len(hashed) == 4


@pytest.mark.parametrize("junk", ["", "[]", "{", '{"/a": 3}', '{"/a": [1]}'])
def test_a_damaged_memo_is_only_a_slower_start(tmp_path: Path, junk: str) -> None:
    path = tmp_path / "a"
    path.write_text("one")
    expected = cache.content_hashes([path], tmp_path / "cache")
    (memo,) = (tmp_path / "cache" / "hashes").iterdir()
    json.loads(memo.read_text())
    memo.write_text(junk)
    assert cache.content_hashes([path], tmp_path / "cache") == expected


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LM_JAX_CACHE", "/some/where")
    assert cache.cache_root(None) == Path("/some/where")
    assert cache.cache_root("~/else") == Path.home() / "else"
    monkeypatch.delenv("LM_JAX_CACHE")
    assert cache.cache_root(None) == Path.home() / ".cache" / "lm_jax"
