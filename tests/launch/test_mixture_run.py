"""A run on a mixture, as it is started: what the log says of each source, a resume, and the text kept for a test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launch import cli
from lm_jax.config import build
from lm_jax.data.config import DataConfig
from lm_jax.data.pipeline import prepare
from tests.support import jobs
from tests.support.processes import run_module


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixture")
    for name, words in (("prose", "the old dog ran over green hills"), ("code", "for x in range(10): print(x)")):
        lines = [json.dumps({"text": f"{words} {n} " * (n % 5 + 1)}) for n in range(120)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "mixed.py").write_text(
        f"""
from tests.support.small_run import get_config as small

def get_config():
    config = small()
    config.data.mixture = {{
        "prose": {{"source": {str(folder / "prose.jsonl")!r}, "weight": 0.75}},
        "code": {{"source": {str(folder / "code.jsonl")!r}, "weight": [(0, 0.25), (40 * 4 * 32, 2.25)]}},
    }}
    config.data.test = 0.1
    config.data.packing = "best_fit"
    return config
"""
    )
    return folder / "mixed.py"


def evaluations(run: Path) -> list[dict[str, Any]]:
    return [r for r in jobs.records(run) if r["kind"] == "evaluation"]


def test_a_mixture_is_trained_on_resumed_and_tested(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [f"--config={config}", f"--workdir={run}"]
    first = run_module("launch.train", *command, "--config.train.steps=40")
    assert "2 sources, vocabulary 257 (bytes), mixed code 1, prose 3; from row 160 code 3, prose 1" in first.stderr
    assert "step 40: tokens of code 1,280 (25.0%), prose 3,840 (75.0%)" in first.stderr
    # A resume under other weights is another run; with another batch size it goes on at the same row.
    refused = run_module("launch.train", *command, "--config.data.mixture.prose.weight=0.5", check=False)
    assert refused.returncode == 2 and "code 1, prose 3; from row" in refused.stderr
    assert "code 1, prose 2; from row" in refused.stderr
    again = run_module("launch.train", *command, "--config.train.batch_size=8", "--config.train.steps=60")
    assert "going on from checkpoint 40\n" in again.stderr
    last = evaluations(run)[-1]
    # 160 rows of 3 : 1, then as many of 1 : 3.
    assert (last["step"], last["prose_tokens"], last["code_tokens"]) == (60, 160 * 32, 160 * 32)
    assert last["tokens"] == 320 * 32 and {"eval_loss", "prose/eval_loss", "code/eval_loss"} <= last.keys()
    lower, upper = sorted((last["prose/eval_loss"], last["code/eval_loss"]))
    assert lower < last["eval_loss"] < upper
    tested = json.loads(run_module("launch.evaluate", f"--workdir={run}", "--split=test", "--json").stdout)
    text = build(DataConfig, cli.load(str(config)).data, "data")
    kept = prepare(text, length=32, seed=0).test
    assert kept is not None and tested["targets"] == kept.targets and abs(tested["eval_loss"] - last["eval_loss"]) < 1
    shown = run_module("launch.inspect_data", command[0], f"--workdir={run}", "--step=42", "--rows=9")
    # 40 steps of 4 rows, then of 8.
    assert "step 42: rows 168 on, before them 46 of code, 122 of prose" in shown.stdout
    assert shown.stdout.count("row ") == 8 and "code, document" in shown.stdout
    shown = run_module("launch.inspect_data", command[0], f"--workdir={run}", "--step=99", check=False)
    assert shown.returncode == 2 and "it has steps 1 to 60" in shown.stderr


def test_a_cap_that_would_be_reached_ends_the_run_before_it_starts(config: Path, tmp_path: Path) -> None:
    cap = ["--config.data.mixture.code.max_epochs=1", "--config.train.steps=2000"]
    done = run_module("launch.train", f"--config={config}", f"--workdir={tmp_path / 'run'}", *cap, check=False)
    assert done.returncode == 2 and "data.mixture.code.max_epochs" in done.stderr
    assert "1 are allowed, which" in done.stderr and "Traceback" not in done.stderr
    assert jobs.checkpoints(tmp_path / "run") == []


def test_one_text_to_evaluate_is_named(tmp_path: Path) -> None:
    done = run_module("launch.evaluate", f"--workdir={tmp_path}", check=False)
    assert done.returncode == 2 and "either --source=.. or --split=test" in done.stderr
