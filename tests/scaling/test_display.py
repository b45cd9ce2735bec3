"""What a sweep shows while it runs."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from configs.sweeps import mup_tiny
from lm_jax.paths import run_path
from lm_jax.scaling.display import Live, last_step, listing, table
from lm_jax.scaling.pool import State
from lm_jax.scaling.sweep import plan

RUNS = plan(mup_tiny.get_config(), mup_tiny.sweep).runs[:3]


def test_columns_line_up() -> None:
    assert table(("run", "loss"), [("a", "1.25"), ("longer", "3")]) == "run     loss\na       1.25\nlonger     3"


def test_the_listing_adds_up() -> None:
    lines = listing(RUNS, {run.name: 0.5 for run in RUNS}, {RUNS[1].name: "finished"}).splitlines()
    assert lines[-1] == f"3 runs, {sum(r.flops for r in RUNS):.2e} FLOPs, 1.5 hours one after the other"
    assert lines[2].endswith("finished") and not lines[1].rstrip().endswith("finished")


def test_the_last_whole_record_of_a_step_counts(tmp_path: Path) -> None:
    assert last_step(run_path(tmp_path)) is None
    records = [{"kind": "step", "step": s, "loss": 2.0, "padding": "x" * 100} for s in range(1, 101)]
    text = "".join(json.dumps(r) + "\n" for r in records)
    text += json.dumps({"kind": "evaluation", "step": 100}) + "\n" + '{"kind": "step", "step": 101, "lo'
    (tmp_path / "metrics.jsonl").write_text(text)
    record = last_step(run_path(tmp_path))
    assert record is not None and record["step"] == 100


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    def fileno(self) -> int:
        raise io.UnsupportedOperation


def shown(stream: io.StringIO, tmp_path: Path) -> str:
    names = [run.name for run in RUNS]
    states = {name: State() for name in names}
    folders = {name: run_path(tmp_path / name) for name in names}
    live = Live({r.name: r for r in RUNS}, folders, SimpleNamespace(states=states), done=1, stream=stream)  # type: ignore[arg-type]
    states[names[0]] = State("running", began=10.0)
    folders[names[0]].mkdir()
    (folders[names[0]] / "metrics.jsonl").write_text('{"kind": "step", "step": 60, "loss": 2.5}\n')
    live.update()
    states[names[0]] = State("finished", began=10.0, ended=75.0)
    states[names[1]] = State("failed", "out of luck", began=10.0, ended=11.0)
    live.update()
    live.close()
    return stream.getvalue()


def test_elsewhere_a_line_as_each_run_ends(tmp_path: Path) -> None:
    assert shown(io.StringIO(), tmp_path).splitlines() == [
        f"finished {RUNS[0].name} (1m05s)",
        f"failed {RUNS[1].name} (1s): out of luck",
    ]


def test_on_a_terminal_drawn_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    text = shown(Terminal(), tmp_path)
    line = f"  {RUNS[0].name}: step 60/{RUNS[0].config.train.total_steps}, loss 2.500"
    assert line[:79] + "\n" in text  # cut: one that wraps could not be taken away again
    assert "1 of 4 runs finished, 1 running" in text and "2 of 4 runs finished, 1 failed" in text
    assert text.endswith("\x1b[1A\x1b[J")  # nothing is left of what was drawn in place
