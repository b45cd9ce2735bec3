"""Fill-in-the-middle: documents come back from their parts, at the rates asked for; rows know it from lengths alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm_jax.data.config import DataConfig
from lm_jax.data.fim import FillInTheMiddle, FimReader
from lm_jax.data.packing import read_rows
from lm_jax.data.pipeline import Prepared, prepare
from lm_jax.errors import ConfigError
from tests.support.rows import read

PRE, SUF, MID, EDGE = 1000, 1001, 1002, 1003


class Documents:
    """Documents of 0, 1, .. between boundaries."""

    def __init__(self, inner: list[int]) -> None:
        self.ids = [np.array([EDGE, *range(n), EDGE]) for n in inner]
        self.lengths = np.array([len(ids) for ids in self.ids])

    def read(self, documents: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
        return np.concatenate([self.ids[d][a:b] for d, a, b in zip(documents, starts, stops, strict=True)])


def put_back(ids: list[int]) -> tuple[list[int], str]:
    """A rewritten document as it was, and which order it had."""
    assert ids[0] == EDGE == ids[-1]
    inner = ids[1:-1]
    if PRE not in inner:
        return inner, "none"
    assert inner[0] == PRE and inner.count(SUF) == inner.count(MID) == 1
    at, end = inner.index(SUF), inner.index(MID)
    if at == 1:  # the suffix first: prefix and middle follow one another
        return inner[end + 1 :] + inner[at + 1 : end], "spm"
    return inner[1:at] + inner[end + 1 :] + inner[at + 1 : end], "psm"


def fim(rate: float = 0.6, spm_rate: float = 0.5, seed: int = 0) -> FillInTheMiddle:
    return FillInTheMiddle(rate, spm_rate, PRE, SUF, MID, 1, seed)


def test_documents_come_back_from_their_parts() -> None:
    documents, way = Documents([n % 37 for n in range(1000)]), fim()
    lengths = way.lengths(np.arange(1000), documents.lengths)
    rewritten = read(FimReader(way, documents, documents.lengths), [(d, 0, int(lengths[d])) for d in range(1000)])
    for n, ids in enumerate(rewritten):
        inner, order = put_back(ids.tolist())
        assert inner == list(range(n % 37)) and (n % 37 >= 2 or order == "none")


def test_rates_are_those_asked_for_and_cuts_anywhere() -> None:
    documents, way = Documents([500] * 2000), fim(0.6, 0.25)  # an order cannot be told where the prefix is empty
    lengths = way.lengths(np.arange(2000), documents.lengths)
    rewritten = read(FimReader(way, documents, documents.lengths), [(d, 0, int(lengths[d])) for d in range(2000)])
    orders = [put_back(ids.tolist())[1] for ids in rewritten]
    share = 1 - orders.count("none") / 2000
    assert abs(share - 0.6) < 0.03 and abs(orders.count("spm") / (share * 2000) - 0.25) < 0.03
    suffixes = [ids.tolist().index(MID) - ids.tolist().index(SUF) - 1 for ids in rewritten if MID in ids]
    # Of two cuts anywhere, the later one leaves a third of the document behind it.
    assert abs(np.mean(suffixes) - 500 / 3) < 12 and min(suffixes) < 10 and max(suffixes) > 450


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(0, 99), st.data())
def test_any_range_is_a_part_of_the_whole(inner: list[int], seed: int, data: st.DataObject) -> None:
    documents, way = Documents(inner), fim(0.8, seed=seed)
    reader = FimReader(way, documents, documents.lengths)
    lengths = way.lengths(np.arange(len(inner)), documents.lengths).tolist()
    whole = read(reader, [(d, 0, n) for d, n in enumerate(lengths)])
    ranges = []
    for _ in range(5):
        d = data.draw(st.integers(0, len(inner) - 1))
        start = data.draw(st.integers(0, lengths[d] - 1))
        ranges.append((d, start, data.draw(st.integers(start + 1, lengths[d]))))
    for (d, start, stop), ids in zip(ranges, read(reader, ranges), strict=True):
        assert ids.tolist() == whole[d][start:stop].tolist()


def ready(tmp_path: Path, **changes: Any) -> Prepared:
    rng = np.random.default_rng(0)
    lines = [" ".join(f"w{n}" for n in rng.integers(0, 50, int(rng.integers(3, 60)))) for _ in range(200)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    given_ = {"source": str(tmp_path / "x.jsonl"), "cache": str(tmp_path / "cache"), "vocab_size": 320, **changes}
    return prepare(DataConfig(**given_), length=64, seed=0)


@pytest.mark.parametrize("packing", ["split", "best_fit"])
def test_a_config_trains_on_rewritten_documents_and_holds_out_plain_ones(tmp_path: Path, packing: str) -> None:
    plain, made = ready(tmp_path, packing=packing), ready(tmp_path, packing=packing, fim_rate=0.5)
    special = made.tokenizer.special
    ids = {special[name] for name in DataConfig().fim_tokens}
    assert len(ids) == 3
    batch = read_rows(made.train.plan, made.train.store, range(made.train.plan.rows_per_epoch))
    marks = np.isin(batch["targets"], list(ids)) & batch["loss_mask"]
    assert 0.35 * 180 * 3 < marks.sum() < 0.65 * 180 * 3 and marks.sum() % 3 == 0
    assert batch["loss_mask"].sum() == made.train.plan.pairs
    assert made.held_out is not None
    held = read_rows(made.held_out.plan, made.held_out.store, range(made.held_out.plan.rows_per_epoch))
    assert not np.isin(held["tokens"], list(ids)).any()
    assert made.fingerprint != plain.fingerprint and "fill-in-the-middle 0.5" in made.train.plan.way
    assert not {*plain.tokenizer.special} & {*DataConfig().fim_tokens}


def test_a_tokenizer_without_the_tokens_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.fim_tokens: .* no special token '<\|fim_prefix\|>'; it has none"):
        ready(tmp_path, fim_rate=0.5, tokenizer="bytes")
    with pytest.raises(ConfigError, match=r"data\.fim_rate: 2 is no share"):
        DataConfig(fim_rate=2)
    with pytest.raises(ConfigError, match=r"does not go with data\.prompt_field"):
        DataConfig(fim_rate=0.1, prompt_field="prompt")


def test_all_that_decides_the_rewriting_is_part_of_what_the_rows_are(tmp_path: Path) -> None:
    ways = {fim().way, fim(0.6000001).way, fim(spm_rate=0.5000001).way}
    ways.add(FillInTheMiddle(0.6, 0.5, SUF, PRE, MID, 1, 0).way)
    assert len(ways) == 4
    with pytest.raises(ConfigError, match=r"data\.fim_rate: does not go with data\.truncate"):
        DataConfig(fim_rate=0.1, truncate=True, packing="best_fit")
    with pytest.raises(ConfigError, match="are not three tokens"):
        DataConfig(fim_tokens=("<a>", "<a>", "<b>"))
