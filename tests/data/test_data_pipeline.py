"""From a config to rows: the second start reads the cache, mistakes name their key."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lm_jax.data import opened, sources
from lm_jax.data.packing import read_rows
from lm_jax.data.pipeline import DataConfig, Prepared, prepare, prepare_evaluation
from lm_jax.data.store import shard_name
from lm_jax.errors import ConfigError, UserError
from tests.support.processes import run_python


def text_file(path: Path, characters: int = 5000) -> Path:
    rng = np.random.default_rng(0)
    words = ["lorem", "ipsum", "dolor", "sit", "amet", "elit\n"]
    path.write_text(" ".join(words[i] for i in rng.integers(0, 6, characters))[:characters])
    return path


def ready(tmp_path: Path, length: int = 16, seed: int = 0, **changes: Any) -> Prepared:
    settings: dict[str, Any] = {
        "tokenizer": "bytes",
        "cache": str(tmp_path / "cache"),
        "source": str(tmp_path / "x.txt"),
    }
    return prepare(DataConfig(**{**settings, **changes}), length=length, seed=seed)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("source", ""),
        ("source", ()),
        ("source", ("a", "")),
        ("field", ""),
        ("tokenizer", "byte"),
        ("tokenizer", ""),
        ("vocab_size", 10),
        ("vocab_size", 2**31),
        ("held_out", -0.1),
        ("held_out", 0.9),
        ("held_out", float("nan")),
        ("max_epochs", 0),
        ("threads", 0),
        ("max_document_bytes", 0),
        ("bad_documents", "ignore"),
        ("packing", "best-fit"),
        ("truncate", True),
    ],
)
def test_wrong_values_name_their_key(key: str, value: Any) -> None:
    with pytest.raises(ConfigError) as error:
        DataConfig(**{key: value})
    assert error.value.key == f"data.{key}"
    assert len(str(error.value).splitlines()) <= 3


def test_the_embedded_default_is_ready_for_a_first_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    embedded = sources._embedded_files
    monkeypatch.setattr(sources, "_embedded_files", lambda key: embedded(key)[::8])  # a part, for speed
    made = prepare(DataConfig(cache=str(tmp_path), vocab_size=1024), length=256, seed=0)
    assert made.tokenizer.vocab_size == 1024
    assert "Python's standard library (embedded default)" in made.description
    manifest = made.train.store.manifest
    assert manifest["documents"]["altered"] == 0
    assert 0.02 < manifest["documents"]["held_out"] / made.train.store.lengths.size < 0.3
    batch = read_rows(made.train.plan, made.train.store, [0, 1, 2])
    assert batch["loss_mask"].all() and batch["tokens"].max() < 1024
    text = made.tokenizer.decode(batch["tokens"][0])
    assert any(word in text for word in ("self", "def", "import", "return"))
    assert made.held_out is not None and made.held_out.bytes_per_target > 2


def test_shakespeare_as_nanogpt_cuts_it(tmp_path: Path) -> None:
    """Characters without boundaries, the last tenth of the text in windows of 64 at stride 64, all targets counting."""
    text = text_file(tmp_path / "x.txt", 11_153).read_text()
    made = ready(tmp_path, 64, tokenizer="characters", boundary=False)
    assert made.tokenizer.vocab_size == len(set(text)) and made.tokenizer.boundary is None
    cut = int(0.9 * len(text))
    assert made.held_out is not None
    plan, store = made.held_out.plan, made.held_out.store
    rows = read_rows(plan, store, range(plan.rows_per_epoch))
    held = text[cut:]
    assert (
        made.tokenizer.decode(rows["tokens"][0]) == held[:64]
        and made.tokenizer.decode(rows["targets"][0]) == held[1:65]
    )
    assert made.tokenizer.decode(rows["tokens"][1]) == held[64:128]
    assert int(rows["loss_mask"].sum()) == len(held) - 1 == plan.pairs
    assert made.train.plan.pairs == cut - 1
    assert made.held_out.bytes_per_target == made.train.bytes_per_target == 1.0


def test_the_second_start_takes_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text_file(tmp_path / "x.txt")
    first = ready(tmp_path, tokenizer="sentencepiece", vocab_size=300)

    def never(*_: Any) -> None:
        raise AssertionError("built again")

    monkeypatch.setattr(opened, "tokenise", never)
    again = ready(tmp_path, tokenizer="sentencepiece", vocab_size=300)
    assert again.fingerprint == first.fingerprint and again.description == first.description
    assert again.tokenizer.fingerprint == first.tokenizer.fingerprint
    other_rows = ready(tmp_path, length=8, seed=1, tokenizer="sentencepiece", vocab_size=300)
    assert other_rows.data == first.data and other_rows.fingerprint != first.fingerprint
    (tmp_path / "moved").mkdir()
    shutil.move(tmp_path / "x.txt", tmp_path / "moved" / "y.txt")
    moved = ready(tmp_path, tokenizer="sentencepiece", vocab_size=300, source=str(tmp_path / "moved"))
    assert moved.fingerprint == first.fingerprint


def test_whatever_decides_the_tokens_decides_the_fingerprint(tmp_path: Path) -> None:
    text_file(tmp_path / "x.txt")
    variants: list[dict[str, Any]] = [{}, {"boundary": False}, {"held_out": 0.2}, {"tokenizer": "characters"}]
    variants += [{"bad_documents": "drop"}, {"tokenizer": "sentencepiece", "vocab_size": 300}]
    variants += [{"tokenizer": "sentencepiece", "vocab_size": 310}]
    prints = [ready(tmp_path, **v).data for v in variants]
    (tmp_path / "x.txt").write_text((tmp_path / "x.txt").read_text() + "!")
    prints.append(ready(tmp_path).data)
    assert len(set(prints)) == len(prints)


def test_nothing_held_out(tmp_path: Path) -> None:
    text_file(tmp_path / "x.txt")
    made = ready(tmp_path, held_out=0.0)
    assert made.held_out is None and made.train.plan.pairs == 5001 and "held out" not in made.description


def test_too_many_epochs_are_refused_with_the_numbers(tmp_path: Path) -> None:
    text_file(tmp_path / "x.txt")
    made = ready(tmp_path, max_epochs=3)
    rows = made.train.plan.rows_per_epoch
    made.check_epochs(3 * rows)
    with pytest.raises(
        ConfigError, match=r"data\.max_epochs: the run asks for 4\.0 passes over .* 4,501 tokens; 3 are"
    ):
        made.check_epochs(4 * rows)


def test_notes_tell_what_was_left_out(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    lines = [json.dumps({"text": f"text {n}"}) for n in range(50)]
    (tmp_path / "d" / "x.jsonl").write_text("\n".join([*lines, "{", '{"text": ""}']))
    (tmp_path / "d" / "LICENSE").write_text("")
    made = ready(tmp_path, source=str(tmp_path / "d"), bad_documents="drop", tokenizer="sentencepiece", vocab_size=4000)
    assert made.notes[0] == "left out: 1 empty, 1 not JSON"
    assert made.notes[1].startswith("passed over 1 file of other kinds")
    assert "too small for 4,000 pieces" in made.notes[2]
    with pytest.raises(UserError, match="line 51"):
        ready(tmp_path, source=str(tmp_path / "d"))


def test_a_given_model(tmp_path: Path) -> None:
    import sentencepiece

    text_file(tmp_path / "x.txt")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter((tmp_path / "x.txt").read_text().splitlines()),
        model_writer=model,
        vocab_size=40,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (tmp_path / "their.model").write_bytes(model.getvalue())
    given = str(tmp_path / "their.model")
    with pytest.raises(UserError, match=r"x\.txt: .*character 4, '\\n.*comes back as"):
        ready(tmp_path, tokenizer=given)
    made = ready(tmp_path, tokenizer=given, altered_documents="accept")
    with pytest.raises(UserError, match="does not give the text back"):  # though its tokens are there by now
        ready(tmp_path, tokenizer=given)
    assert any("may alter text: it has no bytes to fall back on" in note for note in made.notes)
    assert made.tokenizer.vocab_size < 40 and made.tokenizer.boundary == 2
    assert any("does not give 2 documents back" in note for note in made.notes)  # it drops line ends
    (tmp_path / "copy.model").write_bytes(model.getvalue())
    copy = ready(tmp_path, tokenizer=str(tmp_path / "copy.model"), altered_documents="accept")
    assert copy.data == made.data
    with pytest.raises(ConfigError, match=r"data\.tokenizer"):
        ready(tmp_path, tokenizer=str(tmp_path / "none.model"))


def test_evaluation_of_another_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text_file(tmp_path / "x.txt")
    (tmp_path / "y.txt").write_text("lorem żółw")
    made = ready(tmp_path)
    other = prepare_evaluation(made.config, made.tokenizer, str(tmp_path / "y.txt"), length=8)
    assert other.plan.rows_per_epoch == 2 and other.bytes_per_target == 13 / 14
    rows = read_rows(other.plan, other.store, [0, 1])
    assert made.tokenizer.decode(rows["targets"].reshape(-1)[:13]) == "lorem żółw"
    characters = ready(tmp_path, tokenizer="characters")
    with pytest.raises(UserError, match=r"y\.txt: character 'ż'"):
        prepare_evaluation(characters.config, characters.tokenizer, str(tmp_path / "y.txt"), length=8)
    with pytest.raises(ConfigError, match=r"evaluation\.sets\.mine: .*does not exist"):
        prepare_evaluation(made.config, made.tokenizer, "no.txt", length=8, key="evaluation.sets.mine")
    (tmp_path / "z.jsonl").write_text('{"text": "a"}\n{"text": ""}\n')
    prepare_evaluation(made.config, made.tokenizer, str(tmp_path / "z.jsonl"), length=8)
    assert "left out: 1 empty" in capsys.readouterr().err


def test_too_little_text(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("abc")
    with pytest.raises(UserError, match="what is held out is too short"):
        ready(tmp_path, boundary=False)
    (tmp_path / "x.txt").write_text("")
    with pytest.raises(UserError, match=r"x\.txt has no text: left out were 1 empty"):
        ready(tmp_path)


def test_a_truncated_entry_is_built_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text_file(tmp_path / "x.txt")
    made = ready(tmp_path)
    shard = made.train.store.directory / shard_name(0)
    shard.write_bytes(shard.read_bytes()[:100])
    again = ready(tmp_path)
    assert "damaged" in capsys.readouterr().err and again.fingerprint == made.fingerprint
    assert read_rows(again.train.plan, again.train.store, [0])["loss_mask"].all()


def test_config_is_plain() -> None:
    assert json.loads(json.dumps(dataclasses.asdict(DataConfig(source=("a", "b")))))["source"] == ["a", "b"]


def test_data_tools_do_not_need_jax() -> None:
    run_python(
        "import sys, lm_jax.data.pipeline; assert not {'jax', 'grain', 'pyarrow'} & set(sys.modules)", devices=None
    )


def test_packing_is_a_choice_of_training_and_says_what_it_costs(tmp_path: Path) -> None:
    lines = [json.dumps({"text": "x" * n}) for n in (3, 40, 7, 9, 100, 12, 30, 5, 8, 21)]
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    given: dict[str, Any] = {"source": str(tmp_path / "x.jsonl"), "held_out": 0.0, "length": 32}
    split, fit = ready(tmp_path, **given), ready(tmp_path, packing="best_fit", **given)
    short = ready(tmp_path, packing="first_fit", truncate=True, **given)
    assert split.notes == () and split.fingerprint != fit.fingerprint
    assert split.data == fit.data  # the tokens are the same, and made once
    full = fit.train.plan.pairs / (fit.train.plan.rows_per_epoch * 32)
    assert fit.notes == (f"packed by best_fit: {fit.train.plan.rows_per_epoch} rows an epoch, {full:.1%} full",)
    # With its boundaries a document of n bytes has n + 2 tokens, n + 1 pairs.
    beyond, total = (41 - 32) + (101 - 32), sum(n + 1 for n in (3, 40, 7, 9, 100, 12, 30, 5, 8, 21))
    assert short.notes[1] == f"truncated: {beyond} of {total} tokens are beyond their row and never trained on"
    held = ready(tmp_path, packing="best_fit", **(given | {"held_out": 0.3})).held_out
    assert held is not None and held.plan.packing == "split"  # all of what is held out counts, in order
