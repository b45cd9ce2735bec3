"""Loading of packed rows: `python -m benchmarks.loading`.

Documents of log-normal lengths (median 400) in rows of 2,048, batches of 64, through the loader's own reading with two
threads: tokens, targets, segments, positions and loss mask. Beside it grain reading records of 2,049 tokens that were
packed before, which have none of that; and a memory map of the same. They take turns, and medians are compared.
`first pass`: nothing is in the process's memory yet, though the files may be in the system's.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import grain
import numpy as np

from lm_jax.data import loader, store
from lm_jax.data.packing import Plan
from lm_jax.data.store import Store, Writer

DOCUMENTS, LENGTH, BATCH, THREADS, ROUNDS = 60_000, 2048, 64, 2, 5


def main() -> None:
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(400), 1, DOCUMENTS), 2, 50_000).astype(int)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        writer = Writer(folder, 32_000)
        for n in lengths:
            writer.write(rng.integers(0, 32_000, n))
        writer.finish(np.zeros(DOCUMENTS, bool), {})
        rows = int((lengths - 1).sum()) // LENGTH // BATCH * BATCH
        _write_fixed(folder, rows)
        print(
            f"{rows * LENGTH / 1e6:.0f} M tokens, batches of {BATCH} x {LENGTH}, {THREADS} threads, {os.cpu_count()} "
            f"cores; grain {version('grain')}, array_record {version('array_record')}, numpy {version('numpy')}"
        )
        ways: dict[str, Callable[[], Iterator[Any]]] = {}
        for packing in ("split", "best_fit"):
            plan = Plan(np.arange(DOCUMENTS), lengths, length=LENGTH, seed=0, packing=packing)
            plan.pieces(np.arange(1))
            ways[f"{packing}, first pass"] = lambda plan=plan: _ours(plan, Store(folder), rows)  # type: ignore[misc]
            warm = Store(folder)
            for _ in _ours(plan, warm, rows):
                pass
            ways[packing] = lambda plan=plan, warm=warm: _ours(plan, warm, rows)  # type: ignore[misc]
        ways["grain alone"] = lambda: _grain(folder, rows)
        ways["memory map"] = lambda: _mapped(folder, rows)
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(ROUNDS):
            for name, way in ways.items():
                began = time.perf_counter()
                count = sum(1 for _ in way())
                times[name].append(time.perf_counter() - began)
                assert count == rows // BATCH
        for name, seconds in times.items():
            speeds = sorted(rows * LENGTH / 1e6 / s for s in seconds)
            print(f"{name:<22} {statistics.median(speeds):7.1f} M tokens/s ({speeds[0]:.1f} to {speeds[-1]:.1f})")


def _write_fixed(folder: Path, rows: int) -> None:
    """The same amount of text as records of a row each, and as a file to map."""
    from array_record.python.array_record_module import ArrayRecordWriter

    tokens = np.random.default_rng(1).integers(0, 32_000, (rows, LENGTH + 1)).astype("<u2")
    tokens.tofile(folder / "tokens.bin")
    writer = ArrayRecordWriter(str(folder / "fixed.arrayrecord"), "group_size:1,uncompressed")
    for row in tokens:
        writer.write(row.tobytes())
    writer.close()


def _ours(plan: Plan, tokens: Store, rows: int) -> Iterator[Any]:
    source = loader._Rows(plan, tokens, BATCH, 0, rows, np.arange(BATCH))
    options = grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=loader.AHEAD)
    return iter(grain.MapDataset.source(source).to_iter_dataset(options))


def _grain(folder: Path, rows: int) -> Iterator[Any]:
    source = grain.sources.ArrayRecordDataSource(str(folder / "fixed.arrayrecord"))

    def row(record: bytes) -> dict[str, np.ndarray]:
        ids = np.frombuffer(record, "<u2").astype(np.int32)
        return {"tokens": ids[:-1], "targets": ids[1:]}

    options = grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=loader.AHEAD * BATCH)
    shuffled = grain.MapDataset.source(source).shuffle(seed=0).map(row)
    return iter(shuffled.to_iter_dataset(options).batch(BATCH, drop_remainder=True))


def _mapped(folder: Path, rows: int) -> Iterator[Any]:
    tokens = np.memmap(folder / "tokens.bin", "<u2", mode="r").reshape(rows, LENGTH + 1)
    order = np.random.default_rng(2).permutation(rows)
    for i in range(0, rows, BATCH):
        ids = tokens[np.sort(order[i : i + BATCH])].astype(np.int32)
        yield {"tokens": ids[:, :-1], "targets": ids[:, 1:]}


if __name__ == "__main__":
    assert store.CHUNK > LENGTH
    sys.exit(main())
