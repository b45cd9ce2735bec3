"""Event files: framing byte for byte, and read back by TensorBoard itself."""

from __future__ import annotations

import math
import struct
from pathlib import Path

import pytest
from etils import epath

from lm_jax.training import events


def payloads(data: bytes) -> list[bytes]:
    """The payloads of a TFRecord file; asserts both checksums of each."""
    found = []
    while data:
        (size,) = struct.unpack("<Q", data[:8])
        assert struct.unpack("<I", data[8:12])[0] == events.masked_crc32c(data[:8])
        body, data = data[12 : 12 + size], data[12 + size :]
        assert len(body) == size and struct.unpack("<I", data[:4])[0] == events.masked_crc32c(body)
        found.append(body)
        data = data[4:]
    return found


def test_checksum_has_the_known_answers() -> None:
    def masked(crc: int) -> int:
        return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF

    assert events.masked_crc32c(b"123456789") == masked(0xE3069283)  # the check value of CRC-32C
    assert events.masked_crc32c(bytes(32)) == masked(0x8A9136AA)  # RFC 3720, B.4


def test_only_numbers_become_scalars_under_grouped_names() -> None:
    step = {
        "kind": "step",
        "step": 3,
        "loss": 2.5,
        "tokens": 10,
        "batch_hash": "ab",
        "bad_step": True,
        "grad_norm": None,
    }
    assert events.tagged(step) == {"train/loss": 2.5, "train/tokens": 10.0}
    held = {"kind": "evaluation", "step": 3, "eval_loss": 2.0, "wiki/eval_loss": 3.0}
    assert events.tagged(held) == {"evaluation/eval_loss": 2.0, "wiki/eval_loss": 3.0}


def test_each_record_is_on_disk_at_once(tmp_path: Path) -> None:
    writer = events.EventsWriter(epath.Path(tmp_path))
    (file,) = tmp_path.iterdir()
    for step in (1, 2, 300):
        before = len(payloads(file.read_bytes()))
        writer.write({"kind": "step", "step": step, "loss": 1.0})
        assert len(payloads(file.read_bytes())) == before + 1
    assert b"\x10\xac\x02" in payloads(file.read_bytes())[-1]  # step 300 as a varint


def test_tensorboard_reads_it_and_forgets_what_a_resume_does_again(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    first = events.EventsWriter(epath.Path(tmp_path))
    for step in range(1, 6):
        first.write({"kind": "step", "step": step, "loss": 10.0 + step, "learning_rate": 1e-3})
    first.write({"kind": "evaluation", "step": 5, "wiki/eval_loss": 2.5})
    first.close()
    (file,) = tmp_path.iterdir()
    file.rename(file.with_name(file.name.replace("tfevents.", "tfevents.0")))  # the second start comes later
    second = events.EventsWriter(epath.Path(tmp_path), start_step=3)
    second.write({"kind": "step", "step": 4, "loss": 24.0})
    second.close()

    read = accumulator.EventAccumulator(str(tmp_path))
    read.Reload()
    seen = [(e.step, e.value) for e in read.Scalars("train/loss")]
    assert seen == [(1, 11.0), (2, 12.0), (3, 13.0), (4, 24.0)]
    assert "wiki/eval_loss" in read.Tags()["scalars"]


def test_an_object_store_gets_whole_files_and_new_ones_when_they_are_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events.paths, "is_local", lambda path: False)
    monkeypatch.setattr(events, "_OBJECT_BYTES", 400)
    writer = events.EventsWriter(epath.Path(tmp_path))
    for step in range(1, 21):
        writer.write({"kind": "step", "step": step, "loss": 1.0})
        if step % 4 == 0:
            writer.flush()
    writer.close()
    files = sorted(tmp_path.iterdir())
    assert len(files) > 1
    found = [body for file in files for body in payloads(file.read_bytes())]
    assert len(found) == 2 + 20  # version, start, and each record once


def test_no_number_means_no_event(tmp_path: Path) -> None:
    writer = events.EventsWriter(epath.Path(tmp_path))
    (file,) = tmp_path.iterdir()
    size = file.stat().st_size
    writer.write({"kind": "step", "step": 1, "loss": None, "nonfinite": {"loss": str(math.nan)}})
    assert file.stat().st_size == size
