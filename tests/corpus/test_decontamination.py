"""Every planted overlap of 13 words is found, and no clean document is dropped."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lm_jax.corpus import decontamination
from lm_jax.corpus import words as W
from lm_jax.corpus.config import DecontaminationConfig
from lm_jax.errors import ConfigError
from tests.corpus.texts import prose, write_jsonl


def index(folder: Path, sets: dict[str, str], words: int = 13) -> decontamination.Index:
    c = DecontaminationConfig(sets=sets, words=words)
    decontamination.build(c, folder)
    return decontamination.load(folder, c)


def overlap(found: decontamination.Index, text: str) -> str | None:
    hit = found.overlap(W.normalised(text).hashes)
    return hit[0] if hit else None


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> tuple[decontamination.Index, list[str]]:
    folder = tmp_path_factory.mktemp("sets")
    texts = [prose(seed, 6) for seed in range(40)]
    return index(folder, {"held": str(write_jsonl(folder / "eval.jsonl", texts))}), texts


def test_every_planted_overlap_is_found(sets: tuple[decontamination.Index, list[str]]) -> None:
    found, texts = sets
    rng = random.Random(0)
    for trial in range(300):
        words = texts[trial % 40].split()
        length = rng.randint(13, 20)
        start = rng.randrange(len(words) - length + 1)
        piece = words[start : start + length]
        if trial % 3 == 1:  # other layout, case and punctuation
            piece = [rng.choice((w.upper(), f"({w})", f"{w},", f'"{w}"')) for w in piece]
        host = prose(1000 + trial, 6).split()
        at = rng.randrange(len(host))
        text = (" \n" if trial % 3 == 2 else " ").join([*host[:at], *piece, *host[at:]])
        assert overlap(found, text) == "held"


def test_twelve_words_are_no_overlap(sets: tuple[decontamination.Index, list[str]]) -> None:
    found, texts = sets
    for trial in range(100):
        words = texts[trial % 40].split()
        piece = words[trial % (len(words) - 12) :][:12]
        assert overlap(found, f"Before it zzzz {' '.join(piece)} qqqq behind it") is None


def test_clean_documents_of_the_same_words_are_kept(sets: tuple[decontamination.Index, list[str]]) -> None:
    found, _ = sets
    assert [seed for seed in range(1000, 1400) if overlap(found, prose(seed, 30))] == []
    assert overlap(found, "") is None


def test_every_text_of_a_record_counts_and_texts_do_not_run_together(tmp_path: Path) -> None:
    question, answer = prose(1, 3), prose(2, 3)
    record = {"q": question, "n": 7, "choices": [{"text": answer}, None], "id": "x"}
    (tmp_path / "a.jsonl").write_text(json.dumps(record) + "\n")
    pq.write_table(pa.table({"q": [prose(3, 3)], "n": [1]}), tmp_path / "b.parquet")
    (tmp_path / "c.txt").write_text(prose(4, 3))
    found = index(tmp_path, {name: str(tmp_path / file) for name, file in
                             (("json", "a.jsonl"), ("table", "b.parquet"), ("text", "c.txt"))})  # fmt: skip
    of = {1: "json", 2: "json", 3: "table", 4: "text"}
    assert {seed: overlap(found, prose(seed, 3)) for seed in of} == of
    across = " ".join(question.split()[-8:] + answer.split()[:8])
    assert overlap(found, across) is None


def test_a_set_that_would_protect_nothing_is_refused(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "short.jsonl", ["two words", "and three more"])
    with pytest.raises(ConfigError, match=r"decontamination\.sets\.s: .* no text of 13 words"):
        index(tmp_path, {"s": str(tmp_path / "short.jsonl")})
    assert overlap(index(tmp_path, {"s": str(tmp_path / "short.jsonl")}, 3), "x AND, three more y") == "s"


def test_how_many_texts_are_too_short_is_told(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", ["two words", prose(1, 3)])
    told = decontamination.build(DecontaminationConfig(sets={"s": str(tmp_path / "a.jsonl")}), tmp_path)
    words = len(prose(1, 3).split())
    assert told == {"s": {"texts": 2, "too short": 1, "runs": words - 12}}


def test_chinese_has_a_word_a_character(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("满纸荒唐言，一把辛酸泪！都云作者痴，谁解其中味？")
    found = index(tmp_path, {"poem": str(tmp_path / "a.txt")})
    assert overlap(found, "他说：满纸荒唐言一把辛酸泪都云作，然后") == "poem"
    assert overlap(found, "他说：满纸荒唐言一把辛酸泪，然后") is None
