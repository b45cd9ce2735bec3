"""Rows of a plan as global arrays on the mesh, ready before a step asks for them.

Every process reads the rows that its own devices need, and no others. Threads of grain read and assemble batches, one
more lays them out on the devices; the loop only takes what is ready.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from lm_jax.data.packing import Rows, TokenReader, read_rows
from lm_jax.sharding import partition

READY = 2  # batches on the devices ahead of the step
AHEAD = 4  # batches in memory ahead of those

_END = object()


class _Rows:
    """Batches of a plan by number, for grain: of each the rows that this process needs, as numpy arrays."""

    def __init__(
        self, plan: Rows, store: TokenReader, batch_size: int, start: int, stop: int | None, needed: np.ndarray
    ):
        self.plan, self.store, self.batch_size = plan, store, batch_size
        self.start, self.stop, self.needed = start, stop, needed

    def __len__(self) -> int:
        return 2**31 if self.stop is None else -(-(self.stop - self.start) // self.batch_size)

    def __getitem__(self, index: Any) -> dict[str, np.ndarray]:
        first = self.start + int(index) * self.batch_size
        rows = [first + int(b) for b in self.needed]
        stop = self.stop
        return read_rows(self.plan, self.store, [n if stop is None or n < stop else None for n in rows])

    def __repr__(self) -> str:
        return f"rows of {self.plan.fingerprint} from {self.start}"


class Batches(Iterator[dict[str, jax.Array]]):
    """Global batches `[B, T]`, in order. Close it, or use it as a context manager, to stop its threads."""

    def __init__(
        self,
        plan: Rows,
        store: TokenReader,
        mesh: Mesh,
        *,
        batch_size: int,
        start: int = 0,
        stop: int | None = None,
        threads: int = 2,
    ) -> None:
        """Args:
          plan, store: the rows and their tokens.
          mesh: what the batch is laid out on: rows over the axes of `batch`, their length over those of `length`.
          batch_size: rows of the global batch.
          start: the first row: the rows consumed so far.
          stop: the row to stop before; a last batch that is not full is filled with rows of padding. None: never.
          threads: threads that read.

        Raises:
          ValueError: where the mesh does not divide the batch or the rows' length.
        """
        self.shape = (batch_size, plan.length)
        self.sharding = NamedSharding(mesh, partition("batch", "length", shape=self.shape, mesh=mesh))
        places = [i for i in self.sharding.addressable_devices_indices_map(self.shape).values() if i is not None]
        self._needed = np.array(sorted({b for place in places for b in range(*place[0].indices(batch_size))}))
        source = _Rows(plan, store, batch_size, start, stop, self._needed)
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=AHEAD)
        self._source = iter(grain.MapDataset.source(source).to_iter_dataset(options))
        # Two queues in C rather than one with a bound in Python: whoever holds that one's lock may have to wait for the
        # interpreter, and the loop with it.
        self._ready: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._places: queue.SimpleQueue[None] = queue.SimpleQueue()
        for _ in range(READY):
            self._places.put(None)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._pump, name="batches", daemon=True)
        self._thread.start()

    def __next__(self) -> dict[str, jax.Array]:
        if self._closed.is_set():
            raise StopIteration
        item = self._ready.get()
        if item is _END or isinstance(item, BaseException):
            self.close()
            if isinstance(item, BaseException):
                raise item
            raise StopIteration
        self._places.put(None)
        return item

    def close(self) -> None:
        """Stops the threads. Batches that were handed out stay good."""
        self._closed.set()
        self._places.put(None)  # the thread may be waiting for one
        self._thread.join()

    def __enter__(self) -> Batches:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _pump(self) -> None:
        """Takes batches from grain's threads, puts them on the devices, and keeps `READY` of them waiting."""
        try:
            for rows in self._source:
                self._places.get()
                if self._closed.is_set():
                    break
                self._ready.put(self._on_devices(rows))
            self._ready.put(_END)
        except BaseException as error:  # whoever takes the next batch raises it
            self._ready.put(error)
        finally:
            self._source.close()

    def _on_devices(self, rows: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        def one(local: np.ndarray) -> jax.Array:
            def part(index: tuple[slice, ...] | None) -> np.ndarray:
                assert index is not None  # asked for addressable devices only
                begin, end, _ = index[0].indices(self.shape[0])
                first = int(np.searchsorted(self._needed, begin))
                return local[first : first + end - begin, index[1]]

            return jax.make_array_from_callback(self.shape, self.sharding, part)

        return {name: one(local) for name, local in rows.items()}


def batch_hash(batch: dict[str, jax.Array]) -> jax.Array:
    """A hash of a global batch, uint32 scalar: the same on every mesh and for any number of processes.

    Each element of each array is multiplied by an odd number of its own, by name, row and position; the products are
    added modulo 2^32. So one changed element always shows, and the order of rows and of tokens counts. To be called in
    a jitted function, where it costs next to nothing.

    Args:
      batch: arrays `[B, ..]` of integers of 32 bits or fewer, or bools; None counts as nothing.
    """
    total = jnp.uint32(0)
    for salt, name in enumerate(sorted(name for name, x in batch.items() if x is not None)):
        x = batch[name].astype(jnp.uint32)
        place = jnp.zeros((), jnp.uint32)
        for dim, size in enumerate(x.shape):
            shape = [size if d == dim else 1 for d in range(x.ndim)]
            place = place * jnp.uint32(size) + jnp.arange(size, dtype=jnp.uint32).reshape(shape)
        total += jnp.sum(
            x * (_mix(place + jnp.uint32(salt * 0x9E3779B9 & 0xFFFFFFFF)) | jnp.uint32(1)), dtype=jnp.uint32
        )
    return total


def _mix(x: jax.Array) -> jax.Array:
    """The finaliser of MurmurHash3."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
