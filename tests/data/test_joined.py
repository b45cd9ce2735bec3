"""A corpus in shards: every pair once an epoch, shards opened as they are read, rows counted once."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lm_jax.data import joined
from lm_jax.data.config import DataConfig
from lm_jax.data.joined import OPEN, ShardedPlan, Shards, is_sharded
from lm_jax.data.packing import read_rows
from lm_jax.data.pipeline import Prepared, prepare, prepare_evaluation
from lm_jax.data.store import Writer
from lm_jax.data.tokenizers import Bytes
from lm_jax.errors import ConfigError, UserError
from tests.support.rows import row

SIDES = ("train", "held_out")


def texts(shard: int, documents: int) -> list[str]:
    rng = np.random.default_rng(shard)
    return [f"{shard}/{n} " + "x" * int(rng.integers(0, 80)) for n in range(documents)]


def write_corpus(folder: Path, sizes: Sequence[int]) -> list[list[str]]:
    """A corpus of shards with so many documents each; every tenth is held out."""
    tokenizer, written = Bytes(True), []
    folder.mkdir()
    for shard, documents in enumerate(sizes):
        written.append(texts(shard, documents))
        name = folder / f"shard-{shard:05d}"
        name.mkdir()
        writer = Writer(name, tokenizer.vocab_size)
        edge = np.array([tokenizer.boundary])
        for text in written[-1]:
            writer.write(np.concatenate([edge, tokenizer.encode(text), edge]))
        held = np.arange(documents) % 10 == 9
        lengths, sizes_ = np.array(writer.lengths), np.array([len(t) for t in written[-1]])
        sides = {"train": ~held, "held_out": held}
        counted: dict[str, Any] = {
            "documents": {**{s: int(m.sum()) for s, m in sides.items()}, "altered": 0},
            "dropped": {},
            "tokens": {s: int(lengths[m].sum()) for s, m in sides.items()},
            "targets": {s: int((lengths[m] - 1).sum()) for s, m in sides.items()},
            "bytes": {s: int(sizes_[m].sum()) for s, m in sides.items()},
            "predicted_bytes": {s: int(sizes_[m].sum()) for s, m in sides.items()},
        }
        writer.finish(held, counted)
    tokenizer.save(folder)
    parts = [json.loads((folder / f"shard-{i:05d}" / "manifest.json").read_text()) for i in range(len(sizes))]
    sums = {
        key: {side: sum(part[key].get(side, 0) for part in parts) for side in (*SIDES, "altered")}
        for key in ("documents", "tokens", "targets", "bytes", "predicted_bytes")
    }
    for key in ("tokens", "targets", "bytes", "predicted_bytes"):
        del sums[key]["altered"]
    top = {"format": 2, "shards": [f"shard-{i:05d}" for i in range(len(sizes))], "dropped": {}, **sums}
    (folder / "manifest.json").write_text(json.dumps(top))
    return written


def ready(folder: Path, *, length: int = 32, seed: int = 0, **changes: Any) -> Prepared:
    return prepare(
        DataConfig(**{"source": str(folder), "cache": str(folder.parent / "cache"), **changes}),
        length=length,
        seed=seed,
    )


@pytest.mark.parametrize("packing", ["split", "best_fit"])
def test_every_pair_is_in_one_row_an_epoch_and_shards_take_turns(tmp_path: Path, packing: str) -> None:
    sizes = [40, 7, 25, 60, 1, 33, 18]
    written = write_corpus(tmp_path / "corpus", sizes)
    made = ready(tmp_path / "corpus", packing=packing)
    plan = made.train.plan
    assert isinstance(plan, ShardedPlan)
    orders = []
    for epoch in range(3):
        batch = read_rows(plan, made.train.store, range(epoch * plan.rows_per_epoch, (epoch + 1) * plan.rows_per_epoch))
        assert batch["loss_mask"].sum() == plan.pairs
        found = sorted(
            zip(
                batch["tokens"][batch["loss_mask"]].tolist(), batch["targets"][batch["loss_mask"]].tolist(), strict=True
            )
        )
        expected = []
        for shard in written:
            for n, text in enumerate(shard):
                if n % 10 != 9:
                    ids = [256, *text.encode(), 256]
                    expected += list(itertools.pairwise(ids))
        assert found == sorted(expected)
        where = [
            plan.name_of(p.document).split()[-1]
            for n in range(plan.rows_per_epoch)
            for p in row(plan, epoch * plan.rows_per_epoch + n)
        ]
        order = list(dict.fromkeys(where))
        assert len(order) == len(sizes) and where == sorted(where, key=order.index)  # one shard after the other
        orders.append(order)
    assert len({tuple(order) for order in orders}) == 3


def test_a_row_anywhere_opens_its_own_shard_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_corpus(tmp_path / "corpus", [30] * 12)
    first = ready(tmp_path / "corpus", packing="best_fit", held_out=0.0)
    everything = [row(first.train.plan, n) for n in range(first.train.plan.rows_per_epoch)]
    opened = []
    original = joined.Store
    monkeypatch.setattr(joined, "Store", lambda path: opened.append(path.name) or original(path))
    again = ready(tmp_path / "corpus", packing="best_fit", held_out=0.0)
    n = len(everything) // 2
    assert not opened  # how many rows there are is known
    assert row(again.train.plan, n) == everything[n] and len(opened) == 1
    read_rows(again.train.plan, again.train.store, range(len(everything)))
    assert isinstance(again.train.plan, ShardedPlan)
    assert len(again.train.plan._plans) <= OPEN and len(again.train.plan.shards._open) <= OPEN
    assert again.fingerprint == first.fingerprint


def test_a_corpus_in_shards_brings_its_tokenizer_and_what_is_held_out(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus", [40, 40])
    made = ready(tmp_path / "corpus")
    assert made.tokenizer.kind == "bytes" and made.held_out is not None
    held = read_rows(made.held_out.plan, made.held_out.store, range(made.held_out.plan.rows_per_epoch))
    expected = "".join(t for shard in (0, 1) for n, t in enumerate(texts(shard, 40)) if n % 10 == 9)
    assert made.tokenizer.decode(held["tokens"][held["loss_mask"]]) == expected
    assert ready(tmp_path / "corpus", held_out=0.0).held_out is None
    with pytest.raises(ConfigError, match=r"data\.tokenizer: 'characters' is not what .* bytes of 257 ids"):
        ready(tmp_path / "corpus", tokenizer="characters")
    with pytest.raises(ConfigError, match="was prepared with another tokenizer"):
        prepare_evaluation(made.config, Bytes(False), str(tmp_path / "corpus"), length=32)


def test_a_corpus_in_shards_is_mixed_with_text(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus", [40, 40])
    (tmp_path / "more.jsonl").write_text("".join(json.dumps({"text": f"more {n}"}) + "\n" for n in range(50)))
    mixture = {
        "old": {"source": str(tmp_path / "corpus"), "weight": 3.0},
        "new": {"source": str(tmp_path / "more.jsonl")},
    }
    from lm_jax.config import build

    made = prepare(build(DataConfig, {"mixture": mixture, "cache": str(tmp_path / "cache")}, "data"), length=16, seed=0)
    assert made.consumed(40) == {"old": 30, "new": 10} and made.tokenizer.kind == "bytes"
    batch = read_rows(made.train.plan, made.train.store, range(40))
    assert sum("more" in made.tokenizer.decode(row) for row in batch["tokens"]) == 10


def test_a_shard_that_is_missing_is_named(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus", [5, 5])
    assert is_sharded(str(tmp_path / "corpus")) and not is_sharded(str(tmp_path))
    (tmp_path / "corpus" / "shard-00001" / "documents.npz").unlink()
    with pytest.raises(UserError, match=r"shard-00001 is missing or damaged \(1 of 2 shards\)"):
        Shards(tmp_path / "corpus")


def test_other_tokens_or_other_documents_are_another_corpus(tmp_path: Path) -> None:
    """Also where all that is counted is the same: rows would be lost, and a resume go on with other text."""
    contents = set()
    for name, words in (("a", ["xx", "xxxx"]), ("b", ["yy", "yyyy"]), ("c", ["xxxx", "xx"]), ("d", ["xxx", "xxx"])):
        folder = tmp_path / name
        write_corpus(folder, [1])
        writer = Writer(folder / "shard-00000", 257)
        for word in words:
            writer.write(np.frombuffer(word.encode(), np.uint8).astype(np.int32))
        writer.finish(np.zeros(2, bool), json.loads((folder / "shard-00000" / "manifest.json").read_text()))
        contents.add(Shards(folder).content)
    assert len(contents) == 4


def test_what_a_corpus_in_shards_cannot_give_is_refused(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus", [40])
    for changes in ({"test": 0.1}, {"prompt_field": "question"}):
        with pytest.raises(ConfigError, match="was prepared without: it has none"):
            ready(tmp_path / "corpus", **changes)
    assert "held out is what was when it was prepared" in " ".join(ready(tmp_path / "corpus").notes)
