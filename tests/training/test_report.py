"""What a run leaves for people."""

from __future__ import annotations

import io
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from etils import epath

from lm_jax.training import report
from lm_jax.training.metrics import History


def history(steps: int = 60, bad: tuple[int, ...] = ()) -> History:
    found = History()
    for n in range(steps + 1):
        loss = 2.0 + 4.0 / (1 + n / 10)
        if n:
            record = {
                "kind": "step",
                "step": n,
                "tokens": 1000 * n,
                "loss": None if n in bad else loss,
                "step_seconds": 0.5,
            }
            found.add(
                {**record, "data_wait_seconds": 0.001, "bad_step": n in bad, "mfu": 0.41, "peak_memory_bytes": 3 << 30}
            )
        if n % 20 == 0:
            found.add(
                {"kind": "evaluation", "step": n, "tokens": 1000 * n, "eval_loss": loss, "wiki/eval_loss": loss + 1}
            )
    return found


def pixels(png: bytes) -> np.ndarray:
    from matplotlib import image

    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    return image.imread(io.BytesIO(png))[..., :3]


def has_color(picture: np.ndarray, color: str) -> bool:
    rgb = np.array([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return bool((np.abs(picture - rgb).max(-1) < 0.02).any())


def test_config_is_strict_json(tmp_path: Path) -> None:
    report.write_config(epath.Path(tmp_path), {"train": {"steps": 3, "betas": (0.9, 0.95)}, "seed": None})
    assert json.loads((tmp_path / "config.json").read_text()) == {
        "train": {"steps": 3, "betas": [0.9, 0.95]},
        "seed": None,
    }
    with pytest.raises(ValueError):
        report.write_config(epath.Path(tmp_path), {"rate": math.nan})


def test_the_picture_shows_every_curve() -> None:
    picture = pixels(report.draw_loss(history(bad=(30,)), "tiny"))
    assert picture.shape[0] > 500 and picture.shape[1] > 1000
    assert all(has_color(picture, color) for color in ("#4c78a8", "#e45756", "#54a24b", "#d62728"))
    assert not has_color(pixels(report.draw_loss(history(), "tiny")), "#d62728")  # no bad step, no mark


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_the_picture_of_a_short_run(steps: int) -> None:
    pixels(report.draw_loss(history(steps), "tiny"))


def test_the_picture_where_nothing_was_finite() -> None:
    pixels(report.draw_loss(history(5, bad=(1, 2, 3, 4, 5)), "tiny"))


def test_smoothing_keeps_a_constant_and_leaves_out_nan() -> None:
    values = np.full(500, 3.0)
    values[[0, 100, 499]] = np.nan
    assert np.allclose(report.smoothed(values), 3.0)
    noisy = 3.0 + np.random.default_rng(0).normal(size=5000)
    assert np.abs(report.smoothed(noisy)[4000:] - 3.0).max() < 0.4
    assert np.array_equal(report.smoothed(np.arange(5.0)), np.arange(5.0))  # too few to smooth


def test_extremes_keep_the_spikes_of_long_runs() -> None:
    x, y = np.arange(100_000.0), np.zeros(100_000)
    y[12_345], y[54_321], y[700] = 9.0, -9.0, np.nan
    px, py = report._extremes(x, y)
    assert len(px) <= 3100 and px[py == 9.0] == [12_345] and px[py == -9.0] == [54_321]
    assert (np.diff(px) >= 0).all() and np.isfinite(py).all()


def test_report_says_what_was_done(tmp_path: Path) -> None:
    run = epath.Path(tmp_path) / "tiny"
    run.mkdir()
    page = report.Report(
        run, config={"train": {"steps": 60, "clip": None}}, command="python -m x --a=1", facts={"parameters": "2M"}
    )
    page.update(history(bad=(30,)), "finished", final=True)
    text = (run / "report.md").read_text()
    assert text.startswith(
        "# tiny\n\nFinished at step 60, 60.0k tokens, training loss 2.571, held-out loss **2.571**; 1 steps"
    )
    for part in (
        "| parameters | 2M |",
        "![The loss against tokens](loss.png)",
        "| 20 | 20.0k | 3.333 | 4.333 |",
        "| tokens a second | 2.00k |",
        "| waiting for data | 0.20% of the time |",
        "| MFU of the last step | 41.0% |",
        "| peak memory | 3.00 GiB a device |",
        "```sh\npython -m x --a=1\n```",
        "- **train**: `steps = 60`\n",
        f"| python | {sys.version.split()[0]} |",
        "| jax | ",
    ):
        assert part in text, part
    pixels((run / "loss.png").read_bytes())


def test_report_before_the_first_step(tmp_path: Path) -> None:
    report.Report(epath.Path(tmp_path), config={}, command="x").update(history(0))
    assert (tmp_path / "report.md").read_text().splitlines()[2] == "Running, held-out loss **6.000**."
    assert not (tmp_path / "loss.png").exists()


def test_the_picture_is_drawn_at_most_once_a_minute_and_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []
    monkeypatch.setattr(report, "draw_loss", lambda h, title: drawn.append(len(h.steps)) or b"png")
    page = report.Report(epath.Path(tmp_path), config={}, command="x")
    for steps in (10, 20, 30):
        page.update(history(steps))
    page.update(history(40), final=True)
    assert drawn == [10, 40]


def test_long_tables_are_thinned_but_keep_first_and_last() -> None:
    evaluations = [{"kind": "evaluation", "step": 10 * n, "tokens": n, "eval_loss": 1.0} for n in range(500)]
    rows = report._evaluations(evaluations).splitlines()[2:]
    assert len(rows) == 15 and rows[0].startswith("| 0 |") and rows[-1].startswith("| 4990 |")


def test_samples_are_appended_and_a_resume_drops_what_comes_again(tmp_path: Path) -> None:
    run = epath.Path(tmp_path)
    samples = report.Samples(run)
    samples.add(0, "def ", "x\x1b[2J")
    samples.add(10, "def ", "f():\n## step 5\n")
    samples.add(20, "def ", "late")
    again = report.Samples(run, start_step=10)
    again.add(20, "def ", "again")
    text = (tmp_path / "samples.md").read_text()
    headings = [line for line in text.splitlines() if line.startswith("#")]
    assert headings == ["# Samples", "## step 0", "## step 10", "## step 20"]
    assert "    ## step 5\n" in text and "    def again\n" in text and "late" not in text and "\x1b" not in text
    report.Samples(run).add(0, "", "anew")
    assert "step 10" not in (tmp_path / "samples.md").read_text()


def test_command_can_be_typed_again_and_tells_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    words = [
        "/opt/python3",
        "-m",
        "launch.train",
        "--config=configs/tiny.py",
        "--workdir=a b",
        "--config.data.api_key=sesame",
    ]
    monkeypatch.setattr(sys, "orig_argv", words)
    line = report.command_line()
    assert line.startswith("python -m launch.train --config=configs/tiny.py '--workdir=a b' ")
    assert "sesame" not in line and "api_key" in line


def test_versions_name_what_the_run_stands_on() -> None:
    found = report.versions()
    assert {
        "python",
        "jax",
        "jaxlib",
        "flax",
        "optax",
        "orbax-checkpoint",
        "grain",
        "numpy",
        "platform",
        "devices",
    } <= found.keys()
    assert "not installed" not in found.values()


def test_commit_of_the_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("git") is None:
        pytest.skip("git is not there")
    package = tmp_path / "lm_jax"
    package.mkdir()
    (package / "__init__.py").write_text("")
    monkeypatch.setattr(report.lm_jax, "__file__", str(package / "__init__.py"))
    assert report.git_commit() is None  # no repository

    def git(*words: str, at: Path = tmp_path) -> str:
        user = [
            "-c",
            "user.name=a",
            "-c",
            "user.email=a@b",
            "-c",
            "commit.gpgsign=false",
            "-c",
            "core.hooksPath=/dev/null",
        ]
        return subprocess.run(
            ["git", "-C", at, *user, *words], check=True, capture_output=True, text=True
        ).stdout.strip()

    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    commit = git("rev-parse", "HEAD")
    assert report.git_commit() == commit
    (package / "__init__.py").write_text("changed = 1\n")
    assert report.git_commit() == commit + "-dirty"
    inner = tmp_path / "site-packages" / "lm_jax"
    inner.mkdir(parents=True)
    monkeypatch.setattr(report.lm_jax, "__file__", str(inner / "__init__.py"))
    assert report.git_commit() is None  # installed inside somebody else's repository
