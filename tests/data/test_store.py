"""What is written is read, whatever lies across records and files; damage shows."""

from __future__ import annotations

import resource
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lm_jax import paths
from lm_jax.data import store
from lm_jax.data.store import Store, Writer, whole
from lm_jax.errors import UserError
from tests.support.rows import read


def write(directory: Path, documents: list[np.ndarray], vocab_size: int = 1000) -> Store:
    writer = Writer(directory, vocab_size)
    for ids in documents:
        writer.write(ids)
    writer.finish(np.zeros(len(documents), bool), {"told": 1})
    return Store(directory)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=40)
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=12), data=st.data())
def test_any_range_is_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, lengths: list[int], data: st.DataObject
) -> None:
    monkeypatch.setattr(store, "CHUNK", 7)
    monkeypatch.setattr(store, "SHARD", 5)
    documents = [np.arange(n, dtype=np.int32) + 50 * d for d, n in enumerate(lengths)]
    made = write(tmp_path_factory.mktemp("store"), documents)
    assert made.lengths.tolist() == lengths and made.manifest["told"] == 1
    ranges = []
    for _ in range(data.draw(st.integers(0, 8))):
        d = data.draw(st.integers(0, len(lengths) - 1))
        start = data.draw(st.integers(0, lengths[d] - 1))
        ranges.append((d, start, data.draw(st.integers(start + 1, lengths[d]))))
    for _ in range(2):  # the second time from memory
        for (d, start, stop), ids in zip(ranges, read(made, ranges), strict=True):
            assert ids.tolist() == documents[d][start:stop].tolist()


def test_reading_does_not_need_memory_for_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "KEEP", 0)
    documents = [np.arange(n, dtype=np.int32) for n in (3, 20_000, 5)]
    made = write(tmp_path, documents, 20_000)
    for _ in range(2):
        assert [r.tolist() for r in read(made, [(1, 8000, 17_000), (2, 0, 5)])] == [
            list(range(8000, 17_000)),
            [0, 1, 2, 3, 4],
        ]
    assert made._kept is None


def test_large_vocabularies_keep_their_ids(tmp_path: Path) -> None:
    for vocab_size, dtype in ((2**16, "<u2"), (2**16 + 1, "<u4")):
        folder = tmp_path / str(vocab_size)
        folder.mkdir()
        ids = np.array([0, vocab_size - 1], np.int32)
        made = write(folder, [ids], vocab_size)
        assert made.manifest["dtype"] == dtype and read(made, [(0, 0, 2)])[0].tolist() == ids.tolist()


@pytest.mark.parametrize("wrong", [-1, 1000, 70_000])
def test_ids_beyond_the_vocabulary_are_refused(tmp_path: Path, wrong: int) -> None:
    with pytest.raises(ValueError, match=r"not in 0 \.\. 999"):
        write(tmp_path, [np.array([1, wrong, 2], np.int32)])


def test_whole_sees_missing_and_short_files(tmp_path: Path) -> None:
    assert not whole(tmp_path)
    write(tmp_path, [np.arange(900, dtype=np.int32)])
    assert whole(tmp_path)
    shard = tmp_path / store.shard_name(0)
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    assert not whole(tmp_path)
    shard.unlink()
    assert not whole(tmp_path)
    shard.write_bytes(content)
    assert whole(tmp_path)
    (tmp_path / store.MANIFEST).write_text("{}")
    assert not whole(tmp_path)


def test_a_flipped_bit_is_never_read(tmp_path: Path) -> None:
    documents = [np.arange(900, dtype=np.int32)]
    write(tmp_path, documents)
    shard = tmp_path / store.shard_name(0)
    content = bytearray(shard.read_bytes())
    at = content.find(np.arange(400, 410, dtype="<u2").tobytes())
    assert at > 0
    content[at] ^= 4
    shard.write_bytes(content)
    with pytest.raises(UserError, match="is damaged"):
        read(Store(tmp_path), [(0, 0, 5)])


def test_a_file_that_cannot_be_written_says_why(tmp_path: Path) -> None:
    writer = Writer(tmp_path, 1000)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**17, limits[1]))
    try:
        with pytest.raises(OSError) as caught:
            for _ in range(20):
                writer.write(np.arange(20_000) % 1000)
            writer.finish(np.zeros(20, bool), {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "File too large" in paths.reason(caught.value)
