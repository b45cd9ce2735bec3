"""From raw files to shards: everything is accounted for, and neither processes, nor parts of a run, nor kills show."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launch import cli, prepare_data
from lm_jax import paths
from lm_jax.corpus import finish, folders, local, stages
from lm_jax.corpus.config import (
    CleaningConfig,
    DecontaminationConfig,
    LinesConfig,
    PrepareConfig,
    RawConfig,
    TokensConfig,
    WorkConfig,
)
from lm_jax.corpus.ledger import Ledger
from lm_jax.data import pipeline, tokenizers
from lm_jax.data.config import DataConfig
from lm_jax.data.corpus import hold_out, text_hash
from lm_jax.data.store import Store, whole
from lm_jax.errors import UserError
from tests.corpus.texts import edited, planned, prose, work_on, write_jsonl
from tests.support.processes import ROOT, environment, run_module

RULES = ("html", "unicode", "language", "repeated_lines", "gopher_quality", "gopher_repetition", "personal_data")


def raw(folder: Path, documents: int = 60) -> Path:
    """Files of several kinds with planted trouble of every sort."""
    folder.mkdir(parents=True)
    texts = [prose(seed, 15) for seed in range(documents)]
    texts += [
        edited(texts[0], 1, 1),
        texts[1],
        "too short",
        "the and to with " * 60,
        f"Mail ada@corp.org. {prose(800, 15)}",
    ]
    texts += [f"{texts[5]} {QUESTION}", f"All rights are reserved by nobody.\n{prose(900, 15)}"]
    texts += [f"All rights are reserved by nobody.\n{prose(900 + i, 15)}" for i in range(1, 6)]
    random.Random(0).shuffle(texts)
    third = len(texts) // 3
    write_jsonl(folder / "a.jsonl", texts[:third])
    with (folder / "a.jsonl").open("ab") as file:
        file.write(b'{"text": "\xff\xfe"}\n{"body": 1}\nnonsense\n')
    with gzip.open(folder / "b.jsonl.gz", "wt") as out:
        out.writelines(json.dumps({"text": text}) + "\n" for text in texts[third : 2 * third])
    for number, text in enumerate(texts[2 * third :]):
        (folder / f"c{number:03d}.txt").write_text(text)
    paragraphs = "".join(f"<p>{p}</p>" for p in prose(700, 15).split("\n\n"))
    page = f"<html><body><nav><a href='/'>Home</a></nav><article>{paragraphs}</article></body></html>"
    (folder / "d.html").write_text(page)
    return folder


QUESTION = "Natalia sold clips to forty eight of her friends in april and then she sold half as many in may."


def config(folder: Path, **changes: Any) -> PrepareConfig:
    sets = write_jsonl(folder.parent / "eval.jsonl", [QUESTION])
    sections: dict[str, Any] = {
        "raw": RawConfig(sources=str(folder)),
        "cleaning": CleaningConfig(rules=RULES),
        "lines": LinesConfig(max_documents=3),
        "decontamination": DecontaminationConfig(sets={"clips": str(sets)}),
        "tokens": TokensConfig(tokenizer="bytes"),
        "work": WorkConfig(part_bytes=12_000, keep=True),
    }
    return PrepareConfig(**{**sections, **changes})


def prepare(out: Path, c: PrepareConfig) -> folders.Plan:
    plan = planned(out, c)
    work_on(plan)
    return plan


def contents(out: Path) -> dict[str, str]:
    """A hash of every file that is the same whenever the input is."""
    files = [p for p in sorted(out.rglob("*")) if p.is_file() and "work" not in p.relative_to(out).parts]
    files = [p for p in files if p.name not in ("plan.json", ".lock")]
    found = {str(p.relative_to(out)): hashlib.sha256(_without_plan(p)).hexdigest() for p in files}
    return {name: value for name, value in found.items() if name not in ("timings.json", "report.html")}


def _without_plan(path: Path) -> bytes:
    """A file's bytes; of those that have it in them, without the plan's hash: it knows where the raw files lie."""
    if path.name not in ("manifest.json", "report.json"):
        return path.read_bytes()
    values = json.loads(path.read_bytes())
    values.pop("plan", None)
    values.get("manifest", {}).pop("plan", None)
    return json.dumps(values).encode()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> folders.Plan:
    folder = tmp_path_factory.mktemp("prepared")
    return prepare(folder / "out", config(raw(folder / "raw")))


def ledger(plan: folders.Plan) -> Ledger:
    return Ledger.from_json(json.loads((plan.out / "report.json").read_text())["ledger"])


# ------------------------------------------------------------------------------------------------------- what comes out


def test_the_folder_is_as_its_reader_expects_it(prepared: folders.Plan) -> None:
    manifest = json.loads((prepared.out / "manifest.json").read_text())
    keys = ("documents", "dropped", "tokens", "targets", "bytes", "predicted_bytes")
    assert set(manifest) == {"format", "shards", *keys, "vocab_size", "dtype", "plan"}
    assert manifest["format"] == 2 and len(manifest["shards"]) > 2
    assert manifest["shards"] == [f"shard-{i:05d}" for i in range(len(manifest["shards"]))]
    tokenizer = tokenizers.load(prepared.out)
    assert manifest["vocab_size"] == tokenizer.vocab_size and manifest["dtype"] == "<u2"
    sums: dict[str, dict[str, int]] = {key: {} for key in keys}
    for name in manifest["shards"]:
        assert whole(prepared.out / name)
        for key, counts in Store(prepared.out / name).manifest.items():
            if key in sums:
                for side, n in counts.items():
                    sums[key][side] = sums[key].get(side, 0) + n
    assert sums == {key: manifest[key] for key in sums}


def test_a_run_trains_on_the_folder(prepared: folders.Plan) -> None:
    found = pipeline.prepare(DataConfig(source=str(prepared.out)), length=64, seed=0)
    manifest = json.loads((prepared.out / "manifest.json").read_text())
    assert found.tokenizer.vocab_size == manifest["vocab_size"]
    assert found.train.plan.pairs == manifest["targets"]["train"]
    assert found.held_out is not None and found.held_out.plan.pairs == manifest["targets"]["held_out"]


def test_the_tokens_are_those_of_the_documents_that_are_kept(prepared: folders.Plan) -> None:
    tokenizer = tokenizers.load(prepared.out)
    texts, held = [], []
    for name in json.loads((prepared.out / "manifest.json").read_text())["shards"]:
        store = Store(prepared.out / name)
        ids = store.read(np.arange(len(store.lengths)), np.zeros_like(store.lengths), store.lengths)
        texts += [tokenizer.decode(x) for x in np.split(ids, np.cumsum(store.lengths)[:-1])]
        held += store.held_out.tolist()
    assert len(texts) == len(set(texts)) > 60
    hashes = np.array([text_hash(text)[0] for text in texts], np.uint64)
    assert held == hold_out(hashes, 0.1).tolist() and 0 < sum(held) < len(held)
    everything = "\n".join(texts)
    assert "rights are reserved by nobody" not in everything and "ada@corp.org" not in everything
    assert "forty eight of her friends" not in everything and "Home" not in everything
    assert "someone@example.com" in everything


def test_every_document_and_byte_is_accounted_for(prepared: folders.Plan) -> None:
    found = ledger(prepared)
    found.check()
    assert list(found.steps) == [
        "read", *RULES, "shared_lines", "decontamination", "exact_duplicates", "near_duplicates", "tokenise"
    ]  # fmt: skip
    read = found.steps["read"]
    assert {reason: n for reason, (n, _) in read.dropped.items()} == {
        "not UTF-8": 1, "no field 'text'": 1, "not JSON": 1
    }  # fmt: skip
    assert read.documents_in == 60 + 7 + 5 + 3 + 1
    assert found.steps["gopher_quality"].dropped["fewer than 50 words"][0] == 1
    assert found.steps["gopher_repetition"].dropped_documents == 1
    assert found.steps["decontamination"].dropped == {
        "overlaps clips": [1, found.steps["decontamination"].dropped_bytes]
    }
    assert found.steps["shared_lines"].pieces == {"lines that others share": 6}
    assert found.steps["exact_duplicates"].dropped_documents == 1
    assert found.steps["near_duplicates"].dropped_documents >= 1
    manifest = json.loads((prepared.out / "manifest.json").read_text())
    tokens = manifest["tokens"]
    assert tokens["in"] == tokens["out"] + tokens["dropped"] and tokens["out"] == tokens["train"] + tokens["held_out"]
    assert found.steps["tokenise"].bytes_out == sum(manifest["bytes"].values())


def test_the_mixture_that_results_is_that_of_the_sources(tmp_path: Path) -> None:
    """Two sources, of which the second repeats the first's first ten documents and has five of its own."""
    texts = [prose(seed, 15) for seed in range(30)]
    names = tuple(str(write_jsonl(tmp_path / f"{name}.jsonl", some)) for name, some in (
        ("first", texts[:25]), ("second", [*texts[:10], *texts[25:]])
    ))  # fmt: skip
    rules = CleaningConfig(rules=("unicode",))
    plan = prepare(tmp_path / "out", config(tmp_path, raw=RawConfig(sources=names), cleaning=rules))
    first, second = json.loads((plan.out / "report.json").read_text())["sources"].values()
    assert (first["files"], first["documents_in"], first["documents"]) == (1, 25, 25)
    assert (second["files"], second["documents_in"], second["documents"]) == (1, 15, 5)
    sizes = [len(text.encode()) for text in texts]
    assert (first["bytes_in"], second["bytes_in"]) == (sum(sizes[:25]), sum(sizes[:10]) + sum(sizes[25:]))
    assert (first["bytes"], second["bytes"]) == (sum(sizes[:25]), sum(sizes[25:]))
    assert second["tokens"] == sum(sizes[25:]) + 2 * 5  # bytes, and a boundary on either side
    tokens = json.loads((plan.out / "manifest.json").read_text())["tokens"]
    assert first["tokens"] + second["tokens"] == tokens["out"]
    page = (plan.out / "report.html").read_text()
    assert "The mixture that results" in page and all(f">{name}<" in page for name in names)
    assert f"| {names[1]} | {second['bytes_in']:,} | {second['tokens']:,} |" in (plan.out / "report.md").read_text()


def test_a_ledger_that_does_not_add_up_is_seen(prepared: folders.Plan) -> None:
    found = ledger(prepared)
    found.steps["language"].bytes_out -= 1
    with pytest.raises(RuntimeError, match="language"):
        found.check()
    found = ledger(prepared)
    del found.steps["gopher_quality"]
    with pytest.raises(RuntimeError, match="gopher_repetition"):
        found.check()


def test_the_page_is_one_file_with_its_pictures_and_examples(prepared: folders.Plan) -> None:
    page = (prepared.out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 4
    assert 'src="http' not in page and "<script" not in page and "<link" not in page
    for words in ("fewer than 50 words", "overlaps clips", "a cluster of 2", "tokens in =", "ada@corp.org"):
        assert words in page
    assert "0 tokens dropped" in (prepared.out / "report.md").read_text()


# ------------------------------------------------------------------------------------------- who does it shows nowhere


def test_processes_and_order_of_tasks_change_nothing(prepared: folders.Plan, tmp_path: Path) -> None:
    plan = planned(tmp_path / "out", prepared.config)
    for stage in ("index", "clean"):  # the tasks of a stage in any order, some twice
        for task in reversed(range(stages.tasks_of(plan, stage))):
            stages.run_task(plan.out, stage, task)
            assert stages.run_task(plan.out, stage, task) == 0.0
    local.run(plan, 2)
    assert contents(plan.out) == contents(prepared.out)
    local.clear(plan)
    assert not plan.work.exists() and finish.finished(plan)


def test_another_config_or_other_files_are_refused(tmp_path: Path) -> None:
    c = config(raw(tmp_path / "raw", 10))
    planned(tmp_path / "out", c)
    planned(tmp_path / "out", PrepareConfig(**{**vars(c), "work": WorkConfig(part_bytes=12_000, processes=1)}))
    with pytest.raises(UserError, match=r"lines.max_documents: 3 -> 0"):
        planned(tmp_path / "out", PrepareConfig(**{**vars(c), "lines": LinesConfig()}))
    (tmp_path / "raw" / "c000.txt").write_text("another text")
    with pytest.raises(UserError, match=r"c000\.txt"):
        planned(tmp_path / "out", c)


def test_where_nothing_is_left_it_says_what_took_it(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    write_jsonl(tmp_path / "raw" / "a.jsonl", ["short", "also short"])
    with pytest.raises(UserError, match=r"no document is left\n.*2 fewer than 50 words \(gopher_quality\)"):
        prepare(tmp_path / "out", config(tmp_path / "raw"))


def test_where_tokenising_leaves_nothing_there_is_no_corpus(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ["a", "b"])
    c = config(tmp_path, raw=RawConfig(sources=str(source)), cleaning=CleaningConfig(rules=()))
    c = PrepareConfig(**{**vars(c), "tokens": TokensConfig(tokenizer="bytes", boundary=False, held_out=0.0)})
    with pytest.raises(UserError, match="no document is left: tokenising dropped 2 fewer than two tokens"):
        prepare(tmp_path / "out", c)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_two_at_once_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw(tmp_path / "raw", 10)
    config(tmp_path / "raw")
    out = tmp_path / "out"
    with paths.lock(paths.run_path(out)):
        assert started(command(tmp_path, out)) == 2
        assert "in use by process" in capsys.readouterr().err
        assert not (out / "plan.json").exists()  # the one who works there may be about to write another


# ------------------------------------------------------------------------------------------------ the command and kills


def command(folder: Path, out: Path) -> list[str]:
    file = folder / "config.py"
    file.write_text(
        "from lm_jax.config import defaults\nfrom lm_jax.corpus.config import PrepareConfig\n"
        "def get_config():\n    c = defaults(PrepareConfig)\n"
        f"    c.raw.sources = {str(folder / 'raw')!r}\n    c.cleaning.rules = {RULES!r}\n"
        "    c.lines.max_documents = 3\n    c.tokens.tokenizer = 'bytes'\n    c.work.part_bytes = 12_000\n"
        f"    c.decontamination.sets = {{'clips': {str(folder / 'eval.jsonl')!r}}}\n    return c\n"
    )
    return [f"--config={file}", f"--out={out}", "--processes=2"]


def started(arguments: list[str]) -> int:
    """The command in this process; its exit status."""
    prepare_data.FLAGS.unparse_flags()
    return cli.status(prepare_data.main, prepare_data.FLAGS, ["prepare_data", *arguments], config=True)


def check_nothing_half_done(out: Path) -> None:
    """Whatever has its name is whole: shards, tasks, and, where there is one, the manifest's folder."""
    assert all(whole(shard) for shard in out.glob("shard-*"))
    assert all((task / "record.json").is_file() for task in out.glob("work/*/part-*"))
    if (out / "manifest.json").exists():
        manifest = json.loads((out / "manifest.json").read_text())
        assert all(whole(out / name) for name in manifest["shards"])


def killed(arguments: list[str], after: float, stage: str, out: Path) -> None:
    """Starts the command and kills it, and it alone, `after` seconds from when a stage has begun."""
    process = subprocess.Popen(
        [sys.executable, "-m", "launch.prepare_data", *arguments],
        env=environment(), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None and not any(out.glob(f"work/{stage}/*")):
        time.sleep(0.01)
    time.sleep(after)
    process.send_signal(signal.SIGKILL)
    process.wait()


def kill_and_compare(tmp_path: Path, reference: folders.Plan, moments: list[tuple[str, float]]) -> None:
    raw(tmp_path / "raw")
    config(tmp_path / "raw")  # writes the evaluation set
    out = tmp_path / "out"
    arguments = command(tmp_path, out)
    for stage, after in moments:
        killed(arguments, after, stage, out)
        check_nothing_half_done(out)
    done = run_module("launch.prepare_data", *arguments)
    assert "shards:" in done.stdout
    check_nothing_half_done(out)
    assert not list(out.rglob(".tmp-*"))
    ours, theirs = contents(out), contents(reference.out)
    del ours["report.json"], theirs["report.json"]  # has the folder's name in it
    assert {k: v for k, v in ours.items() if k != "report.md"} == {k: v for k, v in theirs.items() if k != "report.md"}
    again = run_module("launch.prepare_data", *arguments)  # all is done: it says so, and does nothing
    assert again.stdout == done.stdout and contents(out)["manifest.json"] == ours["manifest.json"]


def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path: Path, prepared: folders.Plan) -> None:
    kill_and_compare(tmp_path, prepared, [("clean", 0.0), ("shards", 0.0)])


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_kills_at_any_moment_leave_no_trace(seed: int, tmp_path: Path, prepared: folders.Plan) -> None:
    rng = random.Random(seed)
    names = ["index", "clean", "lines", "sign", "duplicates", "tokenizer", "shards", "report"]
    moments = [(rng.choice(names), rng.random() * 0.5) for _ in range(4)]
    kill_and_compare(tmp_path, prepared, moments)


def test_ctrl_c_is_one_line_and_leaves_what_is_done(tmp_path: Path) -> None:
    raw(tmp_path / "raw")
    config(tmp_path / "raw")
    out = tmp_path / "out"
    # Who runs the tests in the background may have them ignore Ctrl-C, and so all that they start.
    heed = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
    process = subprocess.Popen(
        [sys.executable, "-c", heed, sys.executable, "-m", "launch.prepare_data", *command(tmp_path, out)],
        env=environment(), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None and not any(out.glob("work/clean/*")):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all processes at once
    told = process.communicate(timeout=60)[1]
    assert process.returncode == 130, told
    assert "Traceback" not in told and told.strip().splitlines()[-1] == "stopped; the same command goes on where it was"
    check_nothing_half_done(out)


def test_workers_end_when_the_command_is_killed(tmp_path: Path) -> None:
    raw(tmp_path / "raw")
    config(tmp_path / "raw")
    out = tmp_path / "out"
    mark = f"corpus-test-{os.getpid()}-{time.monotonic_ns()}"
    os.environ["CORPUS_TEST_MARK"] = mark
    try:
        killed(command(tmp_path, out), 0.0, "clean", out)
    finally:
        del os.environ["CORPUS_TEST_MARK"]

    def left() -> list[str]:
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                if mark.encode() in path.read_bytes():
                    found.append(path.parent.name)
            except OSError:
                continue
        return found

    deadline = time.monotonic() + 20
    while left() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert left() == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.cleaning.rules=('unicod',)"], "did you mean unicode?"),
        (["--config.raw.sources=no/such/folder"], "does not exist"),
        (["--config.tokens.tokenizer=no/such.model"], "tokens.tokenizer"),
        (["--config.duplicates.threshold=1.5"], "duplicates.threshold: 1.5 is out of range"),
        (["--out=gs://bucket/x"], "--out=gs://bucket/x is not on a disk"),
        (["--executor=slurm"], "--partition is missing"),
        (["--config.decontamination.sets.x=no.jsonl"], "decontamination.sets.x"),
    ],
)
def test_mistakes_are_told_in_three_lines(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "raw").mkdir()
    write_jsonl(tmp_path / "raw" / "a.jsonl", [prose(1, 15), prose(2, 15)])
    line = [f"--config={ROOT / 'configs' / 'data' / 'example.py'}", f"--config.raw.sources={tmp_path / 'raw'}"]
    line.append(f"--out={tmp_path / 'out'}")
    assert started([*line, *arguments]) == 2
    told = capsys.readouterr().err
    assert message in told and len(told.strip().splitlines()) <= 3
    assert not (tmp_path / "out").exists()


def test_a_summary_names_what_there_is(prepared: folders.Plan) -> None:
    manifest = finish.finished(prepared)
    assert manifest is not None and f"{manifest['tokens']['train']:,} tokens" in finish.summary(manifest)
