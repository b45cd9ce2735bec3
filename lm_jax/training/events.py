"""TensorBoard event files of scalars, without TensorFlow and without TensorBoard.

The format is small and has been stable for years: `Event` protocol buffers framed as TFRecords with masked CRC-32C. It
is written here, in the caller's thread, because the writers of `tensorboard` and `tensorboardX` write in a thread of
their own (a full disk shows late or never), reach object stores only through clients of their own, and take half a
second to import. The tests read the files back with TensorBoard itself.
"""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Mapping
from typing import Any, BinaryIO

from etils import epath

from lm_jax import paths

_OBJECT_BYTES = 1 << 20  # on an object store a file is rewritten whole, so a new one is begun at this size


def _crc_table() -> list[int]:
    table = []
    for byte in range(256):
        crc = byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
        table.append(crc)
    return table


_CRC_TABLE = _crc_table()


def masked_crc32c(data: bytes) -> int:
    """CRC-32C (Castagnoli) rotated and offset, as TFRecord files want it."""
    crc, table = 0xFFFFFFFF, _CRC_TABLE
    for byte in data:
        crc = table[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _frame(data: bytes) -> bytes:
    header = struct.pack("<Q", len(data))
    return header + struct.pack("<I", masked_crc32c(header)) + data + struct.pack("<I", masked_crc32c(data))


def _varint(n: int) -> bytes:
    out = bytearray()
    while n > 0x7F:
        out.append(n & 0x7F | 0x80)
        n >>= 7
    out.append(n)
    return bytes(out)


def _field(number: int, data: bytes) -> bytes:
    """A length-delimited protocol buffer field."""
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _event(step: int, body: bytes) -> bytes:
    """An `Event` (wall_time = 1, step = 2, then `body`: its other fields, encoded)."""
    return _frame(b"\x09" + struct.pack("<d", time.time()) + b"\x10" + _varint(step) + body)


def _summary(values: Mapping[str, float]) -> bytes:
    """`Event.summary` = 5: repeated `Summary.Value` = 1 of (tag = 1, simple_value = 2)."""
    each = (_field(1, tag.encode()) + b"\x15" + struct.pack("<f", value) for tag, value in values.items())
    return _field(5, b"".join(_field(1, value) for value in each))


def tagged(record: Mapping[str, Any]) -> dict[str, float]:
    """A record's numbers by names that dashboards group: `train/loss`, `evaluation/eval_loss`, `wiki/eval_loss`."""
    group = "train" if record.get("kind") == "step" else "evaluation"
    return {
        key if "/" in key else f"{group}/{key}": float(value)
        for key, value in record.items()
        if key != "step" and isinstance(value, (int, float)) and not isinstance(value, bool)
    }


class EventsWriter:
    """Writes the numbers of metrics records as TensorBoard scalars.

    Every start of a run begins a file of its own, with a mark that lets TensorBoard forget the points after
    `start_step` of earlier files. On a local disk each record is handed to the system at once; on an object store at
    `flush()`.

    Raises:
      StorageError: from any method, where nothing can be written.
    """

    def __init__(self, directory: epath.Path, *, start_step: int = 0) -> None:
        self._directory = directory
        self._name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"
        self._file: BinaryIO | None = None
        self._pending = bytearray()  # object stores only: the object begun and not yet full
        self._changed = False
        self._part = 0
        paths.make_directory(directory)
        if paths.is_local(directory):
            with paths.storage_errors("write", directory):
                self._file = open(directory / self._name, "ab", buffering=0)  # noqa: SIM115 (closed by close)
        self._put(_event(0, _field(3, b"brain.Event:2")))
        # SessionLog = 7 with status START = 1: "what follows begins here".
        self._put(_event(start_step + 1 if start_step else 0, _field(7, b"\x08\x01")))

    def _put(self, data: bytes) -> None:
        if self._file is not None:
            with paths.storage_errors("write", self._directory / self._name):
                self._file.write(data)
        else:
            self._pending += data
            self._changed = True

    def write(self, record: Mapping[str, Any]) -> None:
        values = tagged(record)
        if values:
            self._put(_event(record["step"], _summary(values)))

    def flush(self) -> None:
        if self._file is not None or not self._changed:
            return
        paths.write_bytes_atomic(self._directory / f"{self._name}.{self._part:04d}", bytes(self._pending))
        self._changed = False
        if len(self._pending) >= _OBJECT_BYTES:
            self._pending.clear()
            self._part += 1

    def close(self) -> None:
        self.flush()
        if self._file is not None:
            self._file.close()
