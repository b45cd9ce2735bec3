"""Reports, from runs whose losses follow a law that is known."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from configs.ablations import architecture_tiny
from configs.sweeps import isoflop_tiny, mup_tiny, tokens_tiny
from launch.cli import load
from launch.fit import read_table
from lm_jax import costs
from lm_jax.config import build, to_dict
from lm_jax.errors import UserError
from lm_jax.models.transformer import TransformerConfig
from lm_jax.paths import run_path
from lm_jax.scaling.outcome import Outcome, finished, read, write
from lm_jax.scaling.reports import ablations, make, page, rates
from lm_jax.scaling.reports.next_config import family
from lm_jax.scaling.sweep import Run, plan
from lm_jax.training.run import RunConfig

E, A, B, ALPHA, BETA = 1.0, 40.0, 200.0, 0.40, 0.42


def law(parameters: float, tokens: float) -> float:
    return E + A / parameters**ALPHA + B / tokens**BETA


def ended(run: Run, loss: float, **more: object) -> Outcome:
    values = {"step_seconds": 0.1, "seconds": 10.0, "training_seconds": 9.0, "memory_bytes": 10**8}
    return Outcome(
        run.fingerprint,
        "finished",
        loss=loss,
        train_loss=loss,
        tokens=run.tokens,
        flops=run.flops,
        parameters=run.parameters,
        steps=run.config.train.total_steps,
        **{**values, **more},  # type: ignore[arg-type]
    )


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tuple[Run, ...], dict[str, Outcome]]:
    """The shipped isoFLOP sweep, as if its runs had followed the law to 0.05%; one of them failed."""
    folder = tmp_path_factory.mktemp("isoflop")
    runs = plan(isoflop_tiny.get_config(), isoflop_tiny.sweep).runs
    noise = np.random.default_rng(0).normal(size=len(runs))
    outcomes = {}
    for run, z in zip(runs, noise, strict=True):
        N = run.parameters["without_embedding"]
        outcomes[run.name] = ended(run, law(N, run.tokens) * math.exp(5e-4 * z))
        steps, per_step = run.config.train.total_steps, run.config.train.tokens_per_step
        records = [
            {"kind": "step", "step": s, "tokens": s * per_step, "loss": law(N, s * per_step), "step_seconds": 0.1}
            for s in range(1, steps + 1, max(1, steps // 200))
        ]
        (folder / "runs" / run.name).mkdir(parents=True)
        (folder / "runs" / run.name / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    failed = runs[0].name
    outcomes[failed] = Outcome(runs[0].fingerprint, "failed", "10 steps in a row were not finite")
    return folder, runs, outcomes


@pytest.fixture(scope="module")
def written(sweep: tuple[Path, tuple[Run, ...], dict[str, Outcome]]) -> tuple[Path, list[str]]:
    folder, runs, outcomes = sweep
    commands = {run.name: f"python -m launch.train --of={run.name}" for run in runs}
    file, summary = make.write(run_path(folder), "law", runs, outcomes, command="a command", commands=commands)
    assert Path(file).read_text()
    return folder, summary


def test_a_law_report_finds_the_law(written: tuple[Path, list[str]]) -> None:
    folder, summary = written
    text = " ".join(summary)
    a = BETA / (ALPHA + BETA)
    found = re.search(r"C\^([\d.]+) \(([\d.]+) to ([\d.]+)\) by the parametric fit", text)
    assert found and abs(float(found[1]) - a) < 0.05
    error = re.search(r"was measured \(([+-][\d.]+)%\), inside", text)
    assert error and abs(float(error[1])) < 0.3
    assert "10 steps in a row were not finite" in text
    for name in ("isoflop", "frontier", "surface", "extrapolation", "curves", "countings"):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_stands_alone_and_names_every_run(
    written: tuple[Path, list[str]], sweep: tuple[Path, tuple[Run, ...], dict[str, Outcome]]
) -> None:
    text = (written[0] / "report.html").read_text()
    assert not re.search(r"(src|href)=\"(?!data:|runs/)", text)  # nothing from elsewhere
    assert "<script" not in text
    for run in sweep[1]:
        assert f'href="runs/{run.name}/report.md"' in text and f"--of={run.name}" in text
    assert "a command" in text and "jax 0" in text


def test_the_next_config_is_the_law_s_optimum_and_loads(written: tuple[Path, list[str]]) -> None:
    config = build(RunConfig, load(str(written[0] / "next.py")))
    model, train = config.model, config.train
    budget = 2.4e13  # ten times the sweep's largest
    tokens = train.total_steps * train.tokens_per_step
    assert abs(costs.training_flops(model, train.length, tokens) / budget - 1) < 0.01

    def loss(pairs: int) -> float:
        other = dataclasses.replace(model, embed=8 * pairs, head_dim=2 * pairs, feed_forward_dim=32 * pairs)
        D = budget / costs.flops_per_token(other, train.length)
        return law(costs.parameters(other)["without_embedding"], D)

    best = min(range(1, 200), key=loss)
    assert abs(model.embed / 8 - best) <= 2  # of the true law; the fitted one is a little off
    assert model.parametrization == "mup" and model.heads == 4 and model.layers == 2
    assert config.optimizer.warmup_steps == pytest.approx(train.total_steps / 10, rel=0.01)
    assert config.optimizer.learning_rate == pytest.approx(2e-2 * (8e11 / budget) ** 0.5, rel=0.01)


def test_the_table_of_a_sweep_over_tokens_can_be_fitted(tmp_path: Path) -> None:
    runs = plan(tokens_tiny.get_config(), tokens_tiny.sweep).runs
    outcomes = {run.name: ended(run, 2.0 + i) for i, run in enumerate(runs)}
    (tmp_path / "runs.csv").write_text(page._csv(runs, outcomes))
    table = read_table(run_path(tmp_path / "runs.csv"))
    assert table["tokens"] == [run.tokens for run in runs] and table["name"] == [run.name for run in runs]


def test_runs_that_identify_no_law_are_shown_without_one(
    sweep: tuple[Path, tuple[Run, ...], dict[str, Outcome]], tmp_path: Path
) -> None:
    _, runs, outcomes = sweep
    few = runs[:4]
    file, summary = make.write(
        run_path(tmp_path), "law", few, outcomes, command="", commands=dict.fromkeys([r.name for r in few], "")
    )
    assert any(line.startswith("no analysis: ") for line in summary)
    assert few[1].name in Path(file).read_text()


def test_families_go_on_as_they_grew() -> None:
    def model(embed: int, layers: int, heads: int, **more: int) -> RunConfig:
        c = TransformerConfig(embed=embed, layers=layers, heads=heads, vocab=257, **more)
        return RunConfig(model=c)

    more_heads = family([model(64, 4, 4, kv_heads=2), model(128, 8, 8, kv_heads=4)])
    assert [(m.embed, m.layers, m.heads, m.key_heads, m.head_size) for m in more_heads[:5]] == [
        (64, 4, 4, 2, 16),
        (96, 6, 6, 3, 16),
        (128, 8, 8, 4, 16),
        (160, 10, 10, 5, 16),
        (192, 12, 12, 6, 16),
    ]
    assert {m.inner for m in more_heads if m.embed == 192} == {512}  # the kind's usual width
    wider = family([model(32, 2, 4, feed_forward_dim=128), model(64, 2, 4, feed_forward_dim=256)])
    assert [(m.embed, m.heads, m.head_size, m.inner) for m in wider[:3]] == [
        (32, 4, 8, 128),
        (40, 4, 10, 160),
        (48, 4, 12, 192),
    ]


# ----------------------------------------------------------------------------------------------------------- ablations


def of_changes(loss: Callable[[str, int], float], **more: object) -> list[page.Ended]:
    runs = plan(architecture_tiny.get_config(), architecture_tiny.sweep).runs
    return [page.Ended(r, ended(r, loss(r.labels["change"], r.config.train.seed), **more)) for r in runs]


def test_effects_are_the_paired_t_test_s() -> None:
    rng = np.random.default_rng(1)
    table = {(c, s): 2 + 0.01 * rng.normal() for c in ("base", *architecture_tiny.CHANGES) for s in range(4)}
    _, found, _ = ablations.effects(of_changes(lambda change, seed: table[change, seed]))
    assert {e.name for e in found} == set(architecture_tiny.CHANGES)
    for effect in found:
        pair = [[table[c, s] for s in range(4)] for c in (effect.name, "base")]
        expected = stats.ttest_rel(*pair).confidence_interval(0.95)
        assert (effect.low, effect.high) == pytest.approx((expected.low, expected.high), rel=1e-9)
        assert effect.moved == pytest.approx(np.mean(pair[0]) - np.mean(pair[1]), abs=1e-12)


def test_what_moved_is_named_and_what_did_not_is_too() -> None:
    def loss(change: str, seed: int) -> float:
        moved = {"ALiBi": 0.2, "no QK-norm": -0.1}.get(change, 0.0)
        wobble = 0.0 if change == "base" else 1e-3 * (-1) ** seed  # seeds scatter, and their mean does not move
        return 2 + 0.05 * seed + moved + wobble

    analysis = ablations.analyse(of_changes(loss))
    assert "no QK-norm lowered the loss and ALiBi raised it" in analysis.summary[0]
    assert "SwiGLU of 8/3" in analysis.summary[1]


def test_an_ablation_without_a_base_is_refused() -> None:
    with pytest.raises(UserError, match="nothing to compare with"):
        ablations.effects([e for e in of_changes(lambda c, s: 2.0) if e.label("change") != "base"])


def test_an_ablation_over_a_third_thing_is_refused() -> None:
    runs = [e for e in of_changes(lambda c, s: 2.0) if e.label("change") == "base"]
    with pytest.raises(UserError, match="one change and one seed"):
        ablations.effects([*runs, runs[0]])


# --------------------------------------------------------------------------------------------------------------- rates


def test_the_best_rates_and_how_far_they_are_apart() -> None:
    runs = plan(mup_tiny.get_config(), mup_tiny.sweep).runs
    grid = sorted({r.config.optimizer.learning_rate for r in runs})

    def loss(run: Run) -> float:
        model = run.config.model
        best = 3 if model.parametrization == "mup" or model.embed == 64 else 1
        away = math.log(run.config.optimizer.learning_rate / grid[best])
        return 2 + 0.1 * away**2 - 1e-3 * model.embed

    found = {(p.panel, p.curve): p for p in rates.profiles([page.Ended(r, ended(r, loss(r))) for r in runs])}
    mup, standard = "parametrization mup", "parametrization standard"
    assert rates.steps_apart(found[mup, "embed 64"], found[mup, "embed 256"]) == pytest.approx(0, abs=1e-9)
    assert rates.steps_apart(found[standard, "embed 64"], found[standard, "embed 256"]) == pytest.approx(2)
    summary = rates.analyse([page.Ended(r, ended(r, loss(r))) for r in runs]).summary
    assert any("parametrization standard" in line and "2 steps of the grid apart" in line for line in summary)


def test_a_rate_at_which_a_seed_failed_is_not_the_best_and_one_rate_alone_is_shown() -> None:
    config = mup_tiny.get_config()
    runs = plan(config, lambda s: s.product(s.each(f"optimizer.{rates.RATE}", (1e-3, 2e-3)), s.seeds(2))).runs
    losses = [2.0, 2.1, 1.9, None]
    known = [page.Ended(r, ended(r, x)) for r, x in zip(runs, losses, strict=True) if x is not None]
    (profile,) = rates.profiles(known)
    assert list(profile.seeds) == [2, 1] and profile.rates[profile.best] == 1e-3
    assert "Of fewer where runs are missing: all runs" in rates.analyse(known).summary[-1]
    one = plan(
        config, lambda s: s.product(s.each("model.embed", (64, 128)), s.each(f"optimizer.{rates.RATE}", (1e-3,)))
    )
    alone = rates.analyse([page.Ended(r, ended(r, 2.0 + i)) for i, r in enumerate(one.runs)])
    assert "The grid has one rate" in alone.summary[0]


# ------------------------------------------------------------------------------------------------------------ outcomes


def test_an_outcome_is_of_the_last_step_and_of_finite_losses(tmp_path: Path) -> None:
    config = isoflop_tiny.get_config()
    config.train.steps = 40
    (tmp_path / "config.json").write_text(json.dumps(to_dict(build(RunConfig, config).with_likely_vocab())))
    losses: list[float | None] = [3.0, 2.0, None]  # the last step was not applied
    steps = [
        {"kind": "step", "step": 38 + i, "loss": x, "step_seconds": 0.1, "bad_step": x is None}
        for i, x in enumerate(losses)
    ]

    def outcome(last: float | None) -> Outcome:
        evaluations = [{"kind": "evaluation", "step": s, "eval_loss": x} for s, x in ((0, 5.5), (40, last))]
        text = "".join(json.dumps(record) + "\n" for record in [*steps, *evaluations])
        (tmp_path / "metrics.jsonl").write_text(text)
        found = finished("abc", run_path(tmp_path), seconds=1.0, memory_bytes=None)
        write(run_path(tmp_path), found)
        assert read(run_path(tmp_path)) == found
        return found

    good = outcome(2.5)
    assert (good.loss, good.bad_steps) == (2.5, 1) and good.train_loss is None  # 5% of three steps is the last
    bad = outcome(None)
    assert not bad.finished and "no finite held-out loss" in bad.reason  # not the 5.5 of before the first step


def test_outcomes_come_back_and_damaged_ones_count_as_none(
    sweep: tuple[Path, tuple[Run, ...], dict[str, Outcome]], tmp_path: Path
) -> None:
    outcome = sweep[2][sweep[1][1].name]
    write(run_path(tmp_path), outcome)
    assert read(run_path(tmp_path)) == outcome
    (tmp_path / "result.json").write_text('{"fingerprint": "abc", "sta')
    assert read(run_path(tmp_path)) is None
    (tmp_path / "result.json").write_text('{"fingerprint": "abc", "status": "asleep"}')
    assert read(run_path(tmp_path)) is None
