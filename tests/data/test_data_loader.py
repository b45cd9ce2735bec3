"""Batches on the mesh are the plan's rows, whoever reads them."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest

from lm_jax.data.loader import Batches, batch_hash
from lm_jax.data.packing import Plan, read_rows
from tests.support.processes import ROOT, environment, run_python


class Numbers:
    """Documents of numbers."""

    def __init__(self) -> None:
        self.rows_read = 0

    def read(self, documents: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
        return np.concatenate([np.arange(a, b) + 100 * d for d, a, b in zip(documents, starts, stops, strict=True)])


def plan(seed: int | None = 0, length: int = 8) -> Plan:
    return Plan(np.arange(9), np.arange(5, 50, 5), length=length, seed=seed)


def same(batch: dict[str, jax.Array], expected: dict[str, np.ndarray]) -> None:
    assert batch.keys() == expected.keys()
    for name, values in expected.items():
        assert batch[name].dtype == values.dtype
        np.testing.assert_array_equal(np.asarray(batch[name]), values)


def test_batches_are_the_rows_in_order(mesh: jax.sharding.Mesh) -> None:
    with Batches(plan(), Numbers(), mesh, batch_size=4, start=7) as batches:
        for step in range(30):  # over epochs
            same(next(batches), read_rows(plan(), Numbers(), range(7 + 4 * step, 11 + 4 * step)))


def test_the_batch_size_may_change_on_the_way(mesh: jax.sharding.Mesh) -> None:
    with Batches(plan(), Numbers(), mesh, batch_size=4) as batches:
        first = [np.asarray(next(batches)["tokens"]) for _ in range(3)]
    with Batches(plan(), Numbers(), mesh, batch_size=6, start=12) as batches:
        rest = [np.asarray(next(batches)["tokens"]) for _ in range(2)]
    np.testing.assert_array_equal(np.concatenate(first + rest), read_rows(plan(), Numbers(), range(24))["tokens"])


def test_an_end_is_filled_with_padding(mesh: jax.sharding.Mesh) -> None:
    ordered = plan(None)
    stop = ordered.rows_per_epoch
    assert stop % 4 == 3
    with Batches(ordered, Numbers(), mesh, batch_size=4, stop=stop) as batches:
        got = list(batches)
    assert len(got) == stop // 4 + 1
    assert sum(int(b["loss_mask"].sum()) for b in got) == ordered.pairs
    same(got[-1], read_rows(ordered, Numbers(), [stop - 3, stop - 2, stop - 1, None]))


def test_an_error_of_a_reader_reaches_the_loop(mesh: jax.sharding.Mesh) -> None:
    class Broken(Numbers):
        def read(self, documents: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
            self.rows_read += 1
            if self.rows_read > 3:
                raise OSError("the disk is gone")
            return super().read(documents, starts, stops)

    with (
        Batches(plan(), Broken(), mesh, batch_size=2, threads=1) as batches,
        pytest.raises(OSError, match="disk is gone"),
    ):
        for _ in range(9):
            next(batches)
    with pytest.raises(StopIteration):
        next(batches)


def test_closing_stops_the_threads(mesh: jax.sharding.Mesh) -> None:
    before = threading.active_count()
    for _ in range(3):
        with Batches(plan(), Numbers(), mesh, batch_size=2) as batches:
            next(batches)
    assert threading.active_count() <= before + 2  # grain's own pool may end a moment later
    batches.close()


def test_the_hash_sees_every_element_and_order(mesh: jax.sharding.Mesh) -> None:
    batch = {k: jax.numpy.asarray(v) for k, v in read_rows(plan(), Numbers(), range(4)).items()}
    of = jax.jit(batch_hash)
    hashes = {int(of(batch))}
    changes = 0
    for name, values in batch.items():
        for b, t in ((0, 0), (3, 7), (1, 5)):
            hashes.add(int(of({**batch, name: values.at[b, t].set((1 - values[b, t]).astype(values.dtype))})))
            changes += 1
    turned = {k: v[::-1] for k, v in batch.items()}
    swapped = {**batch, "tokens": batch["targets"], "targets": batch["tokens"]}
    hashes |= {int(of(turned)), int(of(swapped)), int(of({k: v[:, ::-1] for k, v in batch.items()}))}
    assert len(hashes) == 1 + changes + 3
    assert int(of(batch)) == 1893223110  # written down: the same on every version and machine


LAYOUTS = """
import jax, numpy as np
from lm_jax.data.loader import Batches, batch_hash
from lm_jax.data.packing import Plan, read_rows
from lm_jax.sharding import MeshConfig, make_mesh
class Numbers:
    def read(self, *ranges): return np.concatenate([np.arange(a, b) + 100 * d for d, a, b in zip(*ranges)])
plan = Plan(np.arange(9), np.arange(5, 50, 5), length=8, seed=0)
expected = read_rows(plan, Numbers(), range(8, 16))
hashes = set()
for sizes in ((8, 1, 1, 1), (2, 2, 2, 1), (1, 1, 8, 1), (1, 2, 2, 2)):
    mesh = make_mesh(MeshConfig(**dict(zip(("data", "fsdp", "sequence", "tensor"), sizes))))
    with jax.set_mesh(mesh), Batches(plan, Numbers(), mesh, batch_size=8) as batches:
        next(batches)
        batch = next(batches)
        hashes.add(int(jax.jit(batch_hash)(batch)))
    assert batch["tokens"].sharding.shard_shape((8, 8)) == (8 // sizes[0] // sizes[1], 8 // sizes[2])
    for name, values in expected.items():
        np.testing.assert_array_equal(np.asarray(batch[name]), values)
assert len(hashes) == 1, hashes
mesh = make_mesh(MeshConfig(data=8))
try:
    Batches(plan, Numbers(), mesh, batch_size=9)
    raise SystemExit("9 rows on 8 devices")
except ValueError as error:
    assert "batch = 9" in str(error)
print(hashes.pop())
"""


def test_every_layout_gives_the_same_batch_and_hash() -> None:
    run_python(LAYOUTS, devices=8)


PROCESS = """
import sys, jax, numpy as np
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
from lm_jax.data.loader import Batches, batch_hash
from lm_jax.data.packing import Plan, read_rows
from tests.support.rows import row
from lm_jax.sharding import MeshConfig, make_mesh
read = set()
class Numbers:
    def read(self, *ranges):
        read.update(zip(*(values.tolist() for values in ranges)))
        return np.concatenate([np.arange(a, b) + 100 * d for d, a, b in zip(*ranges)])
plan = Plan(np.arange(9), np.arange(5, 50, 5), length=8, seed=0)
mesh = make_mesh(MeshConfig(data=2, sequence=2))
assert len(mesh.local_devices) == 2
with jax.set_mesh(mesh):
    with Batches(plan, Numbers(), mesh, batch_size=4, stop=8) as batches:
        got = list(batches)
    mine = {(p.document, p.start, p.stop + 1) for r in range(8) if r % 4 // 2 == int(sys.argv[2]) for p in row(plan, r)}
    assert read == mine, (read, mine)
    for step, batch in enumerate(got):
        expected = read_rows(plan, Numbers(), range(4 * step, 4 * step + 4))
        for name, values in expected.items():
            for shard in batch[name].addressable_shards:
                np.testing.assert_array_equal(np.asarray(shard.data), values[shard.index])
    alone = {k: jax.numpy.asarray(v) for k, v in expected.items()}
    hashed = int(jax.jit(batch_hash)(got[1]))
with jax.set_mesh(jax.make_mesh((1,), ("x",), devices=jax.local_devices()[:1])):
    alone = int(jax.jit(batch_hash)({k: jax.numpy.asarray(v) for k, v in expected.items()}))
assert hashed == alone, (hashed, alone)
"""


@pytest.mark.slow
def test_two_processes_read_their_own_rows_and_agree_on_the_hash() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-c", PROCESS, address]
    both = [
        subprocess.Popen([*command, str(i)], env=environment(2), cwd=ROOT, stderr=subprocess.PIPE, text=True)
        for i in range(2)
    ]
    errors = [p.communicate(timeout=120)[1] for p in both]
    assert [p.returncode for p in both] == [0, 0], "\n".join(errors)
