"""The launcher of numbers: its page, its JSON, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launch import cli, numbers
from lm_jax import numbers as lib

ROOT = Path(__file__).resolve().parents[2]
CONFIG = "--config=configs/tiny.py"


def status(*arguments: str) -> int:
    numbers.FLAGS.unparse_flags()
    for name in numbers.FLAGS:
        numbers.FLAGS[name].value = numbers.FLAGS[name].default
    return cli.status(numbers.main, numbers.FLAGS, ["x", CONFIG, *arguments], config=True, file=True)


@pytest.fixture
def untraced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Activations are given, not asked of JAX: that takes seconds."""
    kept = {"bytes": 100.0, "weight_bytes": 0}
    monkeypatch.setattr(lib, "activations", lambda c, length, chip: dict.fromkeys(lib.POLICIES, kept))


@pytest.mark.usefixtures("untraced")
def test_the_page_has_every_number_and_fits_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "numbers.json"
    asked = ["--chip=h100", "--chips=8", "--tokens=1e9", "--chip_hours=2", "--price=3", f"--json={file}"]
    assert status("--config.optimizer.ema=0.99", *asked) == 0
    page = capsys.readouterr().out
    lines = page.splitlines()
    assert len(lines) <= 60 and max(map(len, lines)) <= 100
    found = json.loads(file.read_text())
    t, flops = found["training"], found["flops_per_token"]
    assert found["parameters"]["total"] == 2_410_176 and "2,410,176" in page
    assert t["flops"] == 1e9 * flops["causal"]
    assert t["hours"] == pytest.approx(1e9 * flops["causal"] / (8 * 989e12 * 0.4) / 3600)
    assert t["cost"] == pytest.approx(8 * t["hours"] * 3)
    assert t["implied_mfu"] == pytest.approx(1e9 * flops["causal"] / (2 * 3600 * 989e12))
    assert f"MFU {t['implied_mfu']:.1%}" in page
    assert set(found["activations"]) == {"none", "dots", "attention", "full"}
    assert "100 B" in page and "102 kB" in page  # a token and layer; 4 layers of 256 tokens
    assert found["cache_bytes_per_token"] == {
        "own": 2 * 4 * 2 * 48 * 2,
        "MHA": 2 * 4 * 4 * 48 * 2,
        "MQA": 2 * 4 * 48 * 2,
    }
    assert "muon (config's)" in page and "4 for the average" in page and "assumed" in page


@pytest.mark.usefixtures("untraced")
def test_a_budget_may_be_hours_of_all_chips(capsys: pytest.CaptureFixture[str]) -> None:
    assert status("--chips=4", "--tokens=1e18", "--hours=0.5") == 0
    page = capsys.readouterr().out
    assert "2 chip-hours imply" in page and "no such training can be" in page


def test_a_launcher_run_as_a_file_finds_the_standard_library() -> None:
    code = "import sys; sys.path.insert(0, 'launch'); import launch, numbers; assert numbers.Integral"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.usefixtures("untraced")
def test_float32_has_no_time(capsys: pytest.CaptureFixture[str]) -> None:
    assert status("--config.model.dtype=float32") == 0
    assert "no time" in capsys.readouterr().out


@pytest.mark.usefixtures("untraced")
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--chip=v55"], ["--chip", "'v55'", "v5"]),
        (["--mfu=40"], ["--mfu", "40", "at most 1"]),
        (["--mfu=0"], ["--mfu", "at most 1"]),
        (["--chips=0"], ["--chips", "1 or more"]),
        (["--chip_hours=0"], ["--chip_hours", "above 0"]),
        (["--hours=1", "--chip_hours=1"], ["--hours", "one of them"]),
        (["--tokens=many"], ["--tokens", "'many'", "whole number"]),
        (["--tokens=0"], ["--tokens", "'0'", "above 0"]),
        (["--tokens=inf"], ["--tokens", "'inf'"]),
        (["--price=-1"], ["price"]),
        (["--config.model.vocab=1"], ["model.vocab", "2 or more"]),
    ],
)
def test_mistakes_are_told_in_three_lines(
    arguments: list[str], says: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert status(*arguments) == 2
    told: Any = capsys.readouterr()
    assert told.out == "" and len(told.err.splitlines()) <= 3
    assert all(word in told.err for word in says), told.err
