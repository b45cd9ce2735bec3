"""Prompts are read and not learnt: the loss mask, bits per byte, and records that have none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lm_jax.data.config import DataConfig
from lm_jax.data.inspection import rows_of
from lm_jax.data.packing import read_rows
from lm_jax.data.pipeline import Prepared, prepare
from lm_jax.errors import ConfigError, UserError

RECORDS = [{"question": "Q" * (n % 7), "answer": f"a{n}" * (n % 5 + 1)} for n in range(80)]


def write(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def ready(source: Path, **changes: Any) -> Prepared:
    given_ = {"source": str(source), "field": "answer", "prompt_field": "question", "tokenizer": "bytes", **changes}
    return prepare(DataConfig(cache=str(source.parent / "cache"), **given_), length=16, seed=0)


@pytest.mark.parametrize("packing", ["split", "best_fit"])
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_the_loss_counts_answers_alone(tmp_path: Path, packing: str, kind: str) -> None:
    source = tmp_path / f"x.{kind}"
    if kind == "jsonl":
        write(source, RECORDS)
    else:
        pq.write_table(pa.Table.from_pylist(RECORDS), source)
    made = ready(source, packing=packing, held_out=0.0)
    plan = made.train.plan
    for epoch in range(2):
        batch = read_rows(plan, made.train.store, range(epoch * plan.rows_per_epoch, (epoch + 1) * plan.rows_per_epoch))
        targets = batch["targets"]
        is_prompt = targets == ord("Q")
        assert (batch["loss_mask"] == ((batch["segment_ids"] >= 0) & ~is_prompt)).all()
        assert is_prompt.sum() == sum(len(r["question"]) for r in RECORDS)  # they are read
        counted = sorted(targets[batch["loss_mask"]].tolist())
        assert counted == sorted(b for r in RECORDS for b in [*r["answer"].encode(), 256])


def test_bits_per_byte_are_of_what_is_counted(tmp_path: Path) -> None:
    write(tmp_path / "x.jsonl", RECORDS)
    made = ready(tmp_path / "x.jsonl", held_out=0.3)
    assert made.held_out is not None
    batch = read_rows(made.held_out.plan, made.held_out.store, range(made.held_out.plan.rows_per_epoch))
    counted = batch["targets"][batch["loss_mask"]]
    assert made.held_out.bytes_per_target == (counted < 256).sum() / len(counted)


def test_a_prompt_is_cut_off_from_its_answer_by_the_tokenizer_too(tmp_path: Path) -> None:
    """No token lies across: what the loss counts begins with the answer's first byte."""
    write(tmp_path / "x.jsonl", [{"question": "ab" * 9, "answer": "ab" * 9} for _ in range(50)] + RECORDS)
    made = ready(tmp_path / "x.jsonl", tokenizer="sentencepiece", vocab_size=300, held_out=0.0, packing="best_fit")
    batch = read_rows(made.train.plan, made.train.store, range(made.train.plan.rows_per_epoch))
    texts = set()
    for b in range(len(batch["tokens"])):
        for segment in range(batch["segment_ids"][b].max() + 1):
            here = (batch["segment_ids"][b] == segment) & batch["loss_mask"][b]
            texts.add(made.tokenizer.decode(batch["targets"][b][here]))
    assert "ab" * 9 in texts and texts <= {"ab" * 9, *(r["answer"] for r in RECORDS)}


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"answer": "x"}, r"line 3: has no field 'question' \(data\.prompt_field\); it has answer"),
        ({"question": "x"}, r"line 3: has no field 'answer' \(data\.field\); it has question"),
        ({"question": 3, "answer": "x"}, "line 3: holds int in 'question', not text"),
    ],
)
def test_records_without_a_prompt_are_named(tmp_path: Path, record: dict[str, Any], words: str) -> None:
    write(tmp_path / "x.jsonl", [*RECORDS[:2], record])
    with pytest.raises(UserError, match=words):
        ready(tmp_path / "x.jsonl")


def test_prompts_need_fields(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("some text")
    with pytest.raises(UserError, match=r"x\.txt: a file of text has no field 'question'"):
        ready(tmp_path / "x.txt")
    pq.write_table(pa.Table.from_pylist([{"answer": "x"}]), tmp_path / "x.parquet")
    with pytest.raises(UserError, match=r"no column 'question'\nset data\.prompt_field"):
        ready(tmp_path / "x.parquet")
    with pytest.raises(ConfigError, match=r"data\.prompt_field: 'text' is no other field"):
        DataConfig(prompt_field="text")


def test_a_mask_that_counts_everything_is_not_shown_as_right(tmp_path: Path) -> None:
    write(tmp_path / "x.jsonl", [{"question": "", "answer": f"a{n}"} for n in range(40)])
    made = ready(tmp_path / "x.jsonl")
    rows = range(2)
    batch = read_rows(made.train.plan, made.train.store, list(rows))
    with pytest.raises(UserError, match="the prompts are empty"):
        rows_of(batch, made.train.plan, rows, made.tokenizer, prompts=True)
    rows_of(batch, made.train.plan, rows, made.tokenizer)


def test_what_has_no_prompts_is_as_it_was(tmp_path: Path) -> None:
    write(tmp_path / "x.jsonl", RECORDS)
    plain = prepare(
        DataConfig(source=str(tmp_path / "x.jsonl"), field="answer", tokenizer="bytes", cache=str(tmp_path / "cache")),
        length=16,
        seed=0,
    )
    batch = read_rows(plain.train.plan, plain.train.store, range(plain.train.plan.rows_per_epoch))
    assert (batch["loss_mask"] == (batch["segment_ids"] >= 0)).all()
