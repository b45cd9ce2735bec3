"""What lies in an output's folder from before: it is taken where it is this plan's and whole, and refused otherwise."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from lm_jax.corpus import finish, folders, stages
from lm_jax.corpus.config import (
    CleaningConfig,
    DecontaminationConfig,
    PrepareConfig,
    RawConfig,
    TokensConfig,
    WorkConfig,
)
from lm_jax.data import tokenizers
from lm_jax.data.joined import Shards
from lm_jax.errors import UserError
from tests.corpus.texts import planned, prose, work_on, write_jsonl


def config(folder: Path, **changes: Any) -> PrepareConfig:
    sections: dict[str, Any] = {
        "raw": RawConfig(sources=str(folder)),
        "cleaning": CleaningConfig(rules=("unicode",)),
        "tokens": TokensConfig(tokenizer="bytes"),
        "work": WorkConfig(part_bytes=6_000),
    }
    return PrepareConfig(**{**sections, **changes})


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    (tmp_path / "raw").mkdir()
    for number in range(3):
        write_jsonl(tmp_path / "raw" / f"{number}.jsonl", [prose(10 * number + i, 15) for i in range(6)])
    return tmp_path / "raw"


@pytest.fixture
def done(raw: Path, tmp_path: Path) -> folders.Plan:
    plan = planned(tmp_path / "out", config(raw))
    work_on(plan)
    return plan


def other(raw: Path) -> PrepareConfig:
    return config(raw, tokens=TokensConfig(tokenizer="bytes", boundary=False))


def test_another_config_is_refused_when_the_work_is_gone(done: folders.Plan, raw: Path) -> None:
    shutil.rmtree(done.work)
    assert finish.finished(planned(done.out, config(raw)))
    with pytest.raises(UserError, match=r"tokens\.boundary: True -> False"):
        planned(done.out, other(raw))


@pytest.mark.parametrize("gone", [["plan.json"], ["plan.json", "manifest.json"], ["plan.json", "manifest.json", "s"]])
def test_what_is_there_without_a_plan_is_refused(gone: list[str], done: folders.Plan, raw: Path) -> None:
    for name in gone:
        for path in [done.out / name] if name != "s" else done.out.glob("shard-*"):
            path.unlink() if path.is_file() else shutil.rmtree(path)
    with pytest.raises(UserError, match=r"but no plan\.json"):
        planned(done.out, other(raw))


def test_shards_and_a_manifest_of_another_plan_are_refused(done: folders.Plan, raw: Path, tmp_path: Path) -> None:
    plan = planned(tmp_path / "second", other(raw))
    shutil.copytree(done.out / "shard-00000", plan.out / "shard-00000")
    with pytest.raises(UserError, match="shard-00000 was made by another config"):
        work_on(plan)
    shutil.copy(done.out / "manifest.json", plan.out)
    with pytest.raises(UserError, match=r"manifest\.json was made by another config"):
        finish.finished(plan)


@pytest.mark.parametrize("keep", [True, False])
def test_a_shard_that_is_lost_or_damaged_is_made_again(done: folders.Plan, raw: Path, keep: bool) -> None:
    manifest = (done.out / "manifest.json").read_bytes()
    assert len(json.loads(manifest)["shards"]) > 2
    if not keep:
        shutil.rmtree(done.work)
    shutil.rmtree(done.out / "shard-00001")
    (done.out / "shard-00002" / "documents.npz").write_bytes(b"")
    plan = planned(done.out, config(raw))
    assert finish.finished(plan) is None and not (done.out / "manifest.json").exists()
    work_on(plan)
    assert (done.out / "manifest.json").read_bytes() == manifest and finish.finished(plan)
    assert len(Shards(done.out).sizes) == len(json.loads(manifest)["shards"])


def test_a_shard_cut_short_is_replaced_by_whoever_writes_it_anew(done: folders.Plan, raw: Path) -> None:
    shutil.rmtree(done.work)
    (done.out / "manifest.json").unlink()
    (done.out / "shard-00000" / "documents.npz").write_bytes(b"")
    work_on(done)
    assert finish.finished(done)


@pytest.mark.parametrize("text", ["", "[]", "3", '{"format": 1}', '{"format": 2}', '{"format": 2, "shards": ["../x"]}'])
def test_a_manifest_that_is_none_is_refused(text: str, done: folders.Plan) -> None:
    (done.out / "manifest.json").write_text(text)
    with pytest.raises(UserError, match=r"manifest\.json is (not one|damaged)"):
        finish.finished(done)


# ---------------------------------------------------------------------------------------------- what changes meanwhile


def test_an_evaluation_set_that_changes_is_noticed(raw: Path, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "eval.jsonl", [prose(500, 15)])
    c = config(raw, decontamination=DecontaminationConfig(sets={"a": str(file)}))
    plan = planned(tmp_path / "out", c)
    planned(plan.out, c)
    write_jsonl(file, [prose(500, 15), prose(501, 15)])
    with pytest.raises(UserError, match=r"decontamination\.sets\.a is not what .* was begun with: .*eval\.jsonl"):
        planned(plan.out, c)
    with pytest.raises(UserError, match=r"decontamination\.sets\.a is not what"):
        stages.run_task(plan.out, "index", 0)


def test_a_tokenizer_that_changes_is_noticed(raw: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    texts = [prose(seed, 60) for seed in range(4)]
    tokenizers.train_sentencepiece(texts, 320, True).save(folder)
    c = config(raw, tokens=TokensConfig(tokenizer=str(folder)))
    plan = planned(tmp_path / "out", c)
    planned(plan.out, c)
    tokenizers.train_sentencepiece(texts, 330, True).save(folder)
    with pytest.raises(UserError, match=r"tokens\.tokenizer is not what"):
        planned(plan.out, c)


@pytest.mark.parametrize("change", ["longer", "touched", "gone"])
def test_a_raw_file_that_changes_after_the_plan_is_noticed(change: str, raw: Path, tmp_path: Path) -> None:
    plan = planned(tmp_path / "out", config(raw))
    path = Path(plan.parts[0][0].path)
    if change == "longer":
        with path.open("a") as file:
            file.write(json.dumps({"text": prose(900, 15)}) + "\n")
    elif change == "touched":
        os.utime(path, ns=(1, 1))
    else:
        path.unlink()
    with pytest.raises(UserError, match=r"changed while it was being read|is gone"):
        stages.run_task(plan.out, "clean", 0)
    assert not plan.folder("clean", 0).exists()


def test_names_that_are_not_utf8_reach_the_report(raw: Path, tmp_path: Path) -> None:
    folder = raw.rename(tmp_path / os.fsdecode(b"caf\xe9"))
    (folder / "bad.jsonl").write_bytes(b"nonsense\n")
    plan = planned(tmp_path / "out", config(folder))
    work_on(plan)
    planned(plan.out, config(folder))
    assert finish.finished(plan)
    numbers = json.loads((plan.out / "report.json").read_bytes())
    assert "caf\\xe9" in json.dumps(numbers["ledger"], ensure_ascii=False).replace("\\\\", "\\")
