"""Every planted overlap of 13 words is found, and no clean document is dropped."""

from __future__ import annotations

import json
import random
import unicodedata
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from lm_jax.corpus import decontamination
from lm_jax.corpus import words as W
from lm_jax.corpus.config import CleaningConfig, DecontaminationConfig
from lm_jax.corpus.rules import RULES, Document
from lm_jax.errors import ConfigError, UserError
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


def test_what_cleaning_and_unicode_change_hides_nothing(tmp_path: Path) -> None:
    words = prose(5, 2).split()
    mail = " ".join([*words[:7], "joe@corp.org", *words[7:13]])
    accents = "Le café où Zoé a bu était fermé, à côté du marché déjà rénové"
    write_jsonl(tmp_path / "a.jsonl", [mail, unicodedata.normalize("NFD", accents)])
    found = index(tmp_path, {"s": str(tmp_path / "a.jsonl")})
    cleaned = RULES["personal_data"](Document(mail, ""), CleaningConfig())
    assert isinstance(cleaned, str) and "joe" not in cleaned
    assert overlap(found, mail) == overlap(found, cleaned) == overlap(found, accents) == "s"
    assert overlap(found, accents.replace("marché", "mar\u00adché")) == "s"


def test_pages_are_indexed_without_tags_and_records_of_json_without_keys(tmp_path: Path) -> None:
    paragraphs = [p.replace("\n", " ") for p in prose(6, 12).split("\n\n")]
    body = "".join(f"<p>{p.replace(' ', ' <b>', 1).replace('.', '</b>.', 1)}</p>" for p in paragraphs)
    (tmp_path / "a.html").write_text(f"<html><body><article>{body}</article></body></html>")
    question, answer = prose(7, 3).split()[:13], prose(8, 3).split()[:13]
    writer = ArrayRecordWriter(str(tmp_path / "b.arrayrecord"), "group_size:1")
    writer.write(
        json.dumps({"a": f"{' '.join(question[:6])}\n{' '.join(question[6:])}", "b": " ".join(answer)}).encode()
    )
    writer.write(prose(9, 3).encode())
    writer.close()
    found = index(tmp_path, {"page": str(tmp_path / "a.html"), "records": str(tmp_path / "b.arrayrecord")})
    assert overlap(found, paragraphs[0]) == "page"
    assert [overlap(found, t) for t in (" ".join(question), " ".join(answer), prose(9, 3))] == ["records"] * 3


def test_a_record_without_text_is_too_short_and_a_broken_one_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"id": 7}) + "\n" + json.dumps({"q": prose(1, 3)}) + "\n")
    told = decontamination.build(DecontaminationConfig(sets={"s": str(path)}), tmp_path)
    assert told["s"]["texts"] == 2 and told["s"]["too short"] == 1
    path.write_text("{no json\n")
    with pytest.raises(UserError, match="line 1: not JSON\nmend it: an evaluation set"):
        index(tmp_path, {"s": str(path)})


def test_a_set_of_the_hub_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"decontamination\.sets\.s: .*read from files"):
        index(tmp_path, {"s": "hf:openai/gsm8k:main:test"})
