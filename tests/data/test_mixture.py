"""Rows of several sources: shares, what each source gives, and what cannot be met."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import grain
import numpy as np
import pytest

from lm_jax.data import loader
from lm_jax.data.config import DataConfig
from lm_jax.data.mixture import Mixture, MixtureSource
from lm_jax.data.packing import read_rows
from lm_jax.data.pipeline import Prepared, prepare
from lm_jax.errors import ConfigError


def write(path: Path, letter: str, documents: int, size: int = 40) -> str:
    """Documents of one letter and their number, so that a row says whose it is."""
    rng = np.random.default_rng(ord(letter))
    lines = [f"{n} " + letter * int(rng.integers(1, 2 * size)) for n in range(documents)]
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return str(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for letter, documents in (("a", 200), ("b", 120), ("c", 60)):
        write(tmp_path / f"{letter}.jsonl", letter, documents)
    return tmp_path


def config(folder: Path, weights: dict[str, Any], **changes: Any) -> DataConfig:
    mixture = {
        name: MixtureSource(source=str(folder / f"{name}.jsonl"), **(w if isinstance(w, dict) else {"weight": w}))
        for name, w in weights.items()
    }
    return DataConfig(**{"mixture": mixture, "tokenizer": "bytes", "cache": str(folder / "cache"), **changes})


def ready(folder: Path, weights: dict[str, Any], *, length: int = 32, seed: int = 0, **changes: Any) -> Prepared:
    return prepare(config(folder, weights, **changes), length=length, seed=seed)


def letters(made: Prepared, rows: range) -> list[str]:
    """Whose each row is, by what stands in it."""
    batch = read_rows(made.train.plan, made.train.store, list(rows))
    found = []
    for row in batch["tokens"]:
        (letter,) = set(made.tokenizer.decode(row)) & set("abc")
        found.append(letter)
    return found


def test_each_source_has_its_share_of_the_rows_at_any_time(folder: Path) -> None:
    made = ready(folder, {"a": 0.5, "b": 0.3, "c": 0.2})
    seen = letters(made, range(300))
    for n in range(1, 301):
        for letter, share in (("a", 0.5), ("b", 0.3), ("c", 0.2)):
            assert abs(seen[:n].count(letter) - share * n) < 1
    assert made.consumed(300) == {"a": 150, "b": 90, "c": 60}


def test_a_source_gives_the_rows_that_it_gives_alone(folder: Path) -> None:
    alone = prepare(
        DataConfig(source=str(folder / "b.jsonl"), tokenizer="bytes", cache=str(folder / "cache")), length=32, seed=3
    )
    mixed = ready(folder, {"a": 3.0, "b": 1.0}, seed=3)
    plan = mixed.train.plan
    assert isinstance(plan, Mixture)
    turns = [n for n in range(200) if plan.quota.turn(n)[0] == 1]
    assert len(turns) == 50
    ours = read_rows(plan, mixed.train.store, turns)
    theirs = read_rows(alone.train.plan, alone.train.store, range(50))
    assert all((ours[name] == theirs[name]).all() for name in ours)


def test_weights_change_on_a_schedule(folder: Path) -> None:
    length = 32
    made = ready(folder, {"a": 1.0, "b": {"weight": ((0, 0.0), (100 * length, 1.0), (200 * length, 3.0))}})
    counts = [made.consumed(n)["b"] for n in (100, 200, 300)]
    assert counts[0] == 0 and abs(counts[1] - 50) < 1 and abs(counts[2] - 125) < 1
    later = ready(folder, {"a": 1.0, "b": {"weight": ((0, 0.0), (100 * length, 1.0))}})
    assert letters(made, range(190)) == letters(later, range(190))  # a change to come moves nothing long before it


def test_weights_by_documents(folder: Path) -> None:
    made = ready(folder, {"a": 1.0, "b": 1.0}, weights_by="documents", packing="best_fit", held_out=0.0)
    write(folder / "b.jsonl", "b", 120, size=400)  # ten times as long
    longer = ready(folder, {"a": 1.0, "b": 1.0}, weights_by="documents", packing="best_fit", held_out=0.0)
    shares = []
    for one in (made, longer):
        assert isinstance(one.train.plan, Mixture)
        rows = [part.rows_per_epoch for part in one.train.plan.parts]
        expected = (rows[1] / 120) / (rows[0] / 200 + rows[1] / 120)
        shares.append(one.consumed(1000)["b"] / 1000)
        assert abs(shares[-1] - expected) < 2e-3
    assert shares[1] > 0.85 > 0.55 > shares[0]


def test_what_is_held_out_is_all_there_once_and_by_source(folder: Path) -> None:
    made = ready(folder, {"a": 0.9, "b": 0.1})
    assert made.held_out is not None and set(made.held_out_by_source) == {"a", "b"}
    together = read_rows(made.held_out.plan, made.held_out.store, range(made.held_out.plan.rows_per_epoch))
    apart = [read_rows(one.plan, one.store, range(one.plan.rows_per_epoch)) for one in made.held_out_by_source.values()]
    assert sorted(map(bytes, together["tokens"])) == sorted(bytes(row) for one in apart for row in one["tokens"])
    assert together["loss_mask"].sum() == sum(one["loss_mask"].sum() for one in apart)
    half = {
        letter for row in together["tokens"][: len(together["tokens"]) // 2] for letter in made.tokenizer.decode(row)
    }
    assert {"a", "b"} <= half


def test_one_vocabulary_is_learnt_from_all_sources(folder: Path) -> None:
    made = ready(folder, {"a": 1.0, "b": 1.0, "c": 1.0}, tokenizer="characters")
    assert set("abc") <= set(made.tokenizer.decode(list(range(made.tokenizer.vocab_size - 1))))
    again = ready(folder, {"a": 1.0, "b": 5.0, "c": 1.0}, tokenizer="characters")
    assert again.data == made.data and again.fingerprint != made.fingerprint
    learnt = ready(folder, {"a": 1.0, "b": 1.0}, tokenizer="sentencepiece", vocab_size=300)
    assert len(learnt.tokenizer.encode("a" * 16)) < 16 > len(learnt.tokenizer.encode("b" * 16))


def test_an_epoch_cap_that_a_run_would_reach_is_named_before_it_starts(folder: Path) -> None:
    made = ready(folder, {"a": 0.5, "c": {"weight": 0.5, "max_epochs": 2}})
    plan = made.train.plan
    assert isinstance(plan, Mixture)
    cap = 2 * plan.parts[1].rows_per_epoch
    reached = next(n for n in range(10**6) if made.consumed(n)["c"] == cap + 1) - 1
    made.check_epochs(reached)
    with pytest.raises(ConfigError, match=rf"mixture\.c\.max_epochs: .* 2 are allowed, which {reached * 32:,} of"):
        made.check_epochs(reached + 1)
    made.check_epochs(0)


@pytest.mark.parametrize(
    ("weights", "changes", "words"),
    [
        ({"a": -1.0}, {}, r"data\.mixture\.a\.weight: -1\.0 is no weight"),
        ({"a": 0.0, "b": 1.0}, {}, r"data\.mixture\.a\.weight: is always 0"),
        ({"a": {"weight": ((10, 1.0),)}}, {}, "is no schedule"),
        ({"a": {"weight": ((0, 1.0), (0, 2.0))}}, {}, "is no schedule"),
        ({"a": {"weight": ((0, 1.0), (64, 0.0))}}, {}, "all weights are 0 from 64 tokens on"),
        ({"a b": 1.0}, {}, "is no name"),
        ({"a": {"max_epochs": 0}}, {}, r"data\.mixture\.a\.max_epochs: 0 is too small"),
        ({"a": 1.0}, {"source": "x.txt"}, "is given beside data.mixture"),
        ({"a": 1.0}, {"weights_by": "bytes"}, "data.weights_by: 'bytes' is unknown"),
    ],
)
def test_what_cannot_be_met_is_refused(
    folder: Path, weights: dict[str, Any], changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        config(folder, weights, **changes)


def test_a_source_that_is_not_there_is_named_by_its_key(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.mixture\.z\.source: .*z\.jsonl' does not exist"):
        ready(folder, {"a": 1.0, "z": 1.0})


@pytest.mark.parametrize("threads", [0, 2])
def test_hosts_and_workers_do_not_show_in_the_global_batches(folder: Path, threads: int) -> None:
    """Shuffled, mixed and packed: what 1 to 16 hosts read is one batch, and nothing of an epoch is lost or repeated."""
    made = ready(folder, {"a": 0.6, "b": 0.4}, packing="best_fit", seed=5)
    plan, size = made.train.plan, 16
    rows = 6 * size
    expected = read_rows(plan, made.train.store, range(rows))
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    for hosts in (1, 2, 4, 8, 16):
        share = size // hosts
        parts = []
        for host in range(hosts):
            needed = np.arange(host * share, (host + 1) * share)
            source = loader._Rows(plan, made.train.store, size, 0, rows, needed)
            parts.append(list(grain.MapDataset.source(source).to_iter_dataset(options)))
        for name, values in expected.items():
            whole = np.concatenate([np.concatenate([part[step][name] for part in parts]) for step in range(6)])
            np.testing.assert_array_equal(whole, values)
    half = loader._Rows(plan, made.train.store, 12, 3 * size, rows, np.arange(12))  # goes on with another batch size
    rest = np.concatenate([batch["tokens"] for batch in grain.MapDataset.source(half)])
    np.testing.assert_array_equal(rest[: rows - 3 * size], expected["tokens"][3 * size :])


def test_an_epoch_of_a_source_loses_and_repeats_nothing(folder: Path) -> None:
    made = ready(folder, {"a": 0.6, "c": 0.4}, packing="best_fit", held_out=0.0)
    plan = made.train.plan
    assert isinstance(plan, Mixture)
    epoch = plan.parts[1].rows_per_epoch
    turns = [n for n in range(5 * epoch) if plan.quota.turn(n)[0] == 1]
    texts = [json.loads(line)["text"] for line in (folder / "c.jsonl").read_text().splitlines()]
    pairs = sorted(pair for t in texts for pair in itertools.pairwise([256, *t.encode(), 256]))
    for number in range(2):
        batch = read_rows(plan, made.train.store, turns[number * epoch : (number + 1) * epoch])
        mask = batch["loss_mask"]
        found = zip(batch["tokens"][mask].tolist(), batch["targets"][mask].tolist(), strict=True)
        assert sorted(found) == pairs


def test_a_file_in_two_sources_is_refused(folder: Path) -> None:
    """What one source holds out of it the other would train on."""
    both = {
        "a": MixtureSource(source=str(folder / "a.jsonl")),
        "all": MixtureSource(source=str(folder / "*.jsonl"), weight=2),
    }
    with pytest.raises(ConfigError, match=r"data\.mixture\.all\.source: .*a\.jsonl is in a as well"):
        prepare(DataConfig(mixture=both, tokenizer="bytes", cache=str(folder / "cache")), length=32, seed=0)


def test_a_weight_that_holds_for_less_than_a_row_is_refused(folder: Path) -> None:
    short = {"a": 1.0, "b": {"weight": ((0, 0.0), (10, 5.0), (20, 0.0))}}
    with pytest.raises(ConfigError, match=r"data\.mixture\.b\.weight: is above 0 for less than a row of 32 tokens"):
        ready(folder, short)


def test_bytes_of_all_sources_are_of_what_the_loss_counts(tmp_path: Path) -> None:
    """Prompts are many and count for nothing: sources are pooled by their targets."""
    asked = [{"question": "q" * 200, "answer": "a" * (1 + n % 3)} for n in range(60)]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(r) + "\n" for r in asked))
    write(tmp_path / "b.jsonl", "b", 60)
    mixture = {
        "asked": MixtureSource(source=str(tmp_path / "asked.jsonl"), field="answer", prompt_field="question"),
        "plain": MixtureSource(source=str(tmp_path / "b.jsonl")),
    }
    config = DataConfig(mixture=mixture, tokenizer="bytes", held_out=0.3, cache=str(tmp_path / "cache"))
    held = prepare(config, length=32, seed=0).held_out
    assert held is not None
    batch = read_rows(held.plan, held.store, range(held.plan.rows_per_epoch))
    counted = batch["targets"][batch["loss_mask"]]
    assert held.targets == len(counted)
    assert held.bytes_per_target == pytest.approx((counted < 256).sum() / len(counted), rel=1e-12)
    assert not (counted == ord("q")).any() and (counted == ord("a")).any()
