"""The sweeps that are shipped: each can be planned, and is what its docstring says."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.cli import load_file
from lm_jax.scaling.reports.make import KINDS
from lm_jax.scaling.sweep import plan

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted([*(ROOT / "configs" / "sweeps").glob("*_*.py"), *(ROOT / "configs" / "ablations").glob("*.py")])


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_every_shipped_sweep_can_be_planned(file: Path) -> None:
    config, module = load_file(str(file))
    found = plan(config, module.sweep)
    assert module.REPORT in KINDS
    assert f"--config={file.relative_to(ROOT)} " in (module.__doc__ or "")
    assert found.notes == ()  # no run twice
    for run in found.runs:
        steps = run.config.train.total_steps
        assert run.config.optimizer.warmup_steps == max(1, steps // 10)
        assert run.config.model.inner in (4 * run.config.model.embed, 171)
        assert run.flops < 1e13  # it is to run on a laptop
        if "budget" in run.labels:
            assert run.flops == pytest.approx(float(run.labels["budget"]), rel=0.01)


def test_the_isoflop_sweep_is_large_enough_to_hold_a_budget_out() -> None:
    config, module = load_file(str(ROOT / "configs" / "sweeps" / "isoflop_tiny.py"))
    sizes: dict[float, set[int]] = {}
    for run in plan(config, module.sweep).runs:
        sizes.setdefault(float(run.labels["budget"]), set()).add(run.parameters["total"])
    budgets = sorted(sizes)
    assert len(budgets) >= 4 and budgets[-1] >= 10 * budgets[0] and budgets[-1] >= 2 * budgets[-2]
    assert min(map(len, sizes.values())) >= 4
