"""Several sets of documents as one: readers side by side, and a corpus that is kept in shards."""

from __future__ import annotations

import bisect
import collections
import itertools
import json
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lm_jax.data import cache
from lm_jax.data.fim import FillInTheMiddle, FimReader, plan_of
from lm_jax.data.packing import Pieces, Plan, TokenReader, by_group, key, permutation, way_of
from lm_jax.data.progress import Progress
from lm_jax.data.store import MANIFEST, Store, spread, whole
from lm_jax.errors import UserError

SHARDED = 2  # the format of a corpus in shards, in its manifest
OPEN = 4  # shards whose lengths and plans stay in memory: readers cross from one into the next


class Joined:
    """Readers side by side: a document's number is its own plus how many all readers before have."""

    def __init__(self, sizes: Sequence[int], reader: Callable[[int], TokenReader]) -> None:
        """Args: how many documents each reader has, and what gives the reader of a number."""
        self._firsts = np.cumsum([0, *sizes])
        self._reader = reader

    def read(self, documents: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
        """The tokens [start, stop) of each document, one after the other."""
        readers = self._firsts.searchsorted(documents, side="right") - 1
        documents = documents - self._firsts[readers]
        asked = np.unique(readers)
        if len(asked) == 1:
            return self._reader(int(asked[0])).read(documents, starts, stops)
        sizes = stops - starts
        ends = np.cumsum(sizes)
        out = np.empty(ends[-1] if len(ends) else 0, np.int32)
        for which in asked.tolist():
            here = np.flatnonzero(readers == which)
            ids = self._reader(which).read(documents[here], starts[here], stops[here])
            out[spread((ends - sizes)[here], sizes[here])] = ids
        return out


class Shards:
    """A corpus that is kept as a folder of stores, which are opened when they are read.

    Attributes:
      manifest: of the whole: `shards`, the names in order, and the sums of what their manifests count.
      parts: each shard's manifest.
      content: a hash of what the tokens are.
    """

    def __init__(self, directory: Path) -> None:
        """Raises UserError where a shard is missing or cut short."""
        self.directory = directory
        self.manifest: dict[str, Any] = json.loads((directory / MANIFEST).read_bytes())
        names = self.manifest.get("shards")
        if not isinstance(names, list) or not names:
            raise UserError(f"{directory / MANIFEST} names no shards: it is damaged\nprepare the corpus again")
        broken = [name for name in names if not whole(directory / name)]
        if broken:
            raise UserError(
                f"{directory}: {broken[0]} is missing or damaged ({len(broken)} of {len(names)} shards)\n"
                "prepare the corpus again: what is whole stays"
            )
        self.parts: list[dict[str, Any]] = [json.loads((directory / name / MANIFEST).read_bytes()) for name in names]
        if old := [name for name, part in zip(names, self.parts, strict=True) if "content" not in part]:
            raise UserError(f"{directory}: {old[0]} does not say what its tokens are\nprepare the corpus again")
        self.content = cache.digest(*(part["content"] for part in self.parts))
        self._open: collections.OrderedDict[int, Store] = collections.OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.parts)

    @property
    def sizes(self) -> list[int]:
        """Documents of each shard, on all sides."""
        return [sum(n for side, n in part["documents"].items() if side != "altered") for part in self.parts]

    def store(self, number: int) -> Store:
        """The store of a shard; the `OPEN` that were used last stay open."""
        with self._lock:
            if number not in self._open:
                while len(self._open) >= OPEN:
                    self._open.popitem(last=False)
                self._open[number] = Store(self.directory / self.manifest["shards"][number])
            self._open.move_to_end(number)
            return self._open[number]

    def reader(self, fim: FillInTheMiddle | None = None) -> Joined:
        """What reads the documents, numbered through all shards, rewritten where there is a way to."""

        def of_shard(number: int) -> TokenReader:
            store = self.store(number)
            return store if fim is None else FimReader(fim.of_shard(number), store, store.lengths)

        return Joined(self.sizes, of_shard)


class ShardedPlan:
    """Rows of a corpus in shards: each shard is packed by itself, and an epoch takes them in another order.

    So a row is found, and a shard packed, without looking at the others, and memory holds the lengths of `OPEN` shards,
    however many there are. How many rows a shard has is counted once and kept.

    Attributes: as of `Rows`.
    """

    def __init__(
        self,
        shards: Shards,
        side: str,
        fim: FillInTheMiddle | None,
        root: Path,
        *,
        length: int,
        seed: int | None,
        **packed: Any,
    ) -> None:
        """Args:
          shards: the corpus.
          side: which of its documents.
          fim: how they are rewritten; None: not at all.
          root: of the cache.
          length, seed, packed: as of `Plan`.

        Raises:
          UserError: where no document has two tokens.
        """
        self.shards, self.side, self.length, self.seed = shards, side, length, seed
        self._fim = fim
        self._packed, self._plans = packed, collections.OrderedDict[int, Plan]()
        self._lock = threading.Lock()
        counts = self._counted(root)
        self.pairs, self.left_out = int(counts[:, 1].sum()), int(counts[:, 2].sum())
        if self.pairs == 0:
            raise UserError("there is no document of two tokens or more: nothing can be predicted")
        self._rows = counts[:, 0]
        self.rows_per_epoch = int(self._rows.sum())
        self._firsts = [0, *itertools.accumulate(shards.sizes)]
        self._orders: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    @property
    def fingerprint(self) -> str:
        return cache.digest(
            f"sharded plan 1, {self.side}, length {self.length}, seed {self.seed}{self.way}", self.shards.content
        )

    @property
    def way(self) -> str:
        rewritten = "" if self._fim is None else self._fim.way
        return way_of(self._packed.get("packing", "split"), self._packed.get("truncate", False), rewritten)

    def name_of(self, document: int) -> str:
        shard = bisect.bisect_right(self._firsts, document) - 1
        return f"document {document - self._firsts[shard]} of {self.shards.manifest['shards'][shard]}"

    def pieces(self, rows: np.ndarray) -> Pieces:
        epochs, places = np.divmod(np.asarray(rows, np.int64), self.rows_per_epoch)
        shards, turns = np.zeros_like(places), np.zeros_like(places)  # each row's shard, and which row of it it is
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            order, ends = self._order(epoch)
            at = ends.searchsorted(places[here], side="right")
            shards[here] = order[at]
            turns[here] = places[here] - ends[at] + (epoch + 1) * self._rows[order[at]]
        first = self._firsts

        def of_shard(shard: int, here: np.ndarray) -> Pieces:
            found = self._plan(shard).pieces(turns[here])
            return found._replace(documents=found.documents + first[shard])

        return by_group(shards, of_shard)

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The shards in the order of an epoch, and the row in which each ends."""
        with self._lock:
            if epoch not in self._orders:
                while len(self._orders) > 1:
                    del self._orders[next(iter(self._orders))]
                n = len(self._rows)
                order = np.arange(n) if self.seed is None else permutation(n, key(self.seed, epoch, "shards"))
                self._orders[epoch] = order, np.cumsum(self._rows[order])
            return self._orders[epoch]

    def _plan(self, shard: int) -> Plan:
        with self._lock:
            if shard not in self._plans:
                while len(self._plans) >= OPEN:
                    self._plans.popitem(last=False)
                self._plans[shard] = self._make(shard)
            self._plans.move_to_end(shard)
            return self._plans[shard]

    def _make(self, shard: int) -> Plan:
        store = self.shards.store(shard)
        # Each shard has an order of its own, also beside one of the same lengths.
        seed = None if self.seed is None else key(self.seed, shard, "shard")
        fim = self._fim and self._fim.of_shard(shard)
        return plan_of(store, self.side, fim, length=self.length, seed=seed, **self._packed)

    def _counted(self, root: Path) -> np.ndarray:
        """Of each shard its rows, pairs and pairs left out `[shards, 3]`; from the cache where they were counted."""
        about = f"rows 1, {self.side}, length {self.length}{self.way}, {self._fim and self._fim.seed}"
        path = root / "rows" / f"{cache.digest(about, self.shards.content)}.npy"
        try:
            counts = np.load(path, allow_pickle=False)
            if counts.shape == (len(self.shards), 3):
                return counts
        except (OSError, ValueError, EOFError):
            pass
        found = []
        with Progress("counting rows", len(self.shards)) as progress:
            for shard in range(len(self.shards)):
                part = self.shards.parts[shard]
                if part["tokens"].get(self.side, 0) > part["documents"].get(self.side, 0):
                    plan = self._make(shard)
                    found.append((plan.rows_per_epoch, plan.pairs, plan.left_out))
                else:  # nothing of this side in it, or documents of a single token
                    found.append((0, 0, 0))
                progress.advance(1)
        counts = np.array(found, np.int64).reshape(-1, 3)
        cache.save_array(path, counts)
        return counts


def is_sharded(source: object) -> bool:
    """Whether a source is the folder of a corpus in shards."""
    if not isinstance(source, str):
        return False
    try:
        return json.loads((Path(source).expanduser() / MANIFEST).read_bytes()).get("format") == SHARDED
    except (OSError, ValueError, AttributeError):
        return False
