"""What each change moved: one change at a time against a base, over the same seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from lm_jax.errors import UserError
from lm_jax.scaling.reports.page import Analysis, Ended, Picture, Section, Table
from lm_jax.scaling.reports.pictures import png
from lm_jax.training.terminal import count

BASE = "base"


@dataclass(frozen=True)
class Effect:
    """What one change did.

    Attributes:
      name: of the change.
      seeds: how many pairs of runs.
      loss: mean of its runs' loss.
      moved: mean difference of the loss from the base, seed by seed; below zero is better.
      low, high: its 95% interval, by Student's t over the seeds; nan with one seed.
      time: its steps' seconds over the base's.
      memory: its bytes a device over the base's, by estimate.
      parameters: of its model.
    """

    name: str
    seeds: int
    loss: float
    moved: float
    low: float
    high: float
    time: float
    memory: float
    parameters: int

    @property
    def verdict(self) -> str:
        if math.isnan(self.low):
            return "one seed: no interval"
        if self.high < 0:
            return "lowers the loss"
        return "raises the loss" if self.low > 0 else "no difference seen"


def effects(ended: Sequence[Ended]) -> tuple[Effect, list[Effect], list[str]]:
    """The base, each change's effect (the best first), and what is to be said of them.

    A seed decides initial values and the order of the data, so runs of one seed differ by the change alone: their
    differences scatter less than the runs themselves.

    Raises:
      UserError: there is no run of the base; or runs differ in more than change and seed.
    """
    by_change: dict[str, dict[int, Ended]] = {}
    for run in ended:
        of_change, seed = by_change.setdefault(run.label("change"), {}), run.run.config.train.seed
        if seed in of_change:
            raise UserError(
                f"{of_change[seed].run.name} and {run.run.name} are of one change and one seed\n"
                "an ablation's runs differ in their change and their seed alone"
            )
        of_change[seed] = run
    base = by_change.pop(BASE, {})
    if not base:
        raise UserError(
            f'no run of the change {BASE!r} has ended: there is nothing to compare with\ns.change("{BASE}")'
        )
    found, notes = [], []
    for name, runs in by_change.items():
        seeds = sorted(runs.keys() & base.keys())
        if not seeds:
            notes.append(f"{name} is left out: none of its seeds has a run of the base")
            continue
        if len(seeds) < len(runs):
            notes.append(f"{name}: {len(runs) - len(seeds)} of its runs have no run of the base with their seed")
        found.append(_effect(name, [(runs[s], base[s]) for s in seeds]))
    itself = _effect(BASE, [(run, run) for run in base.values()])
    return itself, sorted(found, key=lambda effect: effect.moved), notes


def _effect(name: str, pairs: Sequence[tuple[Ended, Ended]]) -> Effect:
    moved = np.array([changed.loss - base.loss for changed, base in pairs])
    low = high = math.nan
    if len(pairs) > 1:
        half = stats.t.ppf(0.975, len(pairs) - 1) * moved.std(ddof=1) / math.sqrt(len(pairs))
        low, high = moved.mean() - half, moved.mean() + half
    return Effect(
        name,
        len(pairs),
        float(np.mean([changed.loss for changed, _ in pairs])),
        float(moved.mean()),
        float(low),
        float(high),
        _ratio([(c.outcome.step_seconds, b.outcome.step_seconds) for c, b in pairs]),
        _ratio([(c.outcome.memory_bytes, b.outcome.memory_bytes) for c, b in pairs]),
        pairs[0][0].outcome.parameters["total"],
    )


def _ratio(pairs: Sequence[tuple[float | None, float | None]]) -> float:
    """The geometric mean of ratios; nan where one is unknown."""
    if any(not a or not b for a, b in pairs):
        return math.nan
    return math.exp(np.mean([math.log(a) - math.log(b) for a, b in pairs if a and b]))


def analyse(ended: Sequence[Ended]) -> Analysis:
    """The page of an ablation. Runs are told apart by their label `change`; `base` is what they are compared with."""
    base, found, notes = effects(ended)
    clear = [e for e in found if e.verdict in ("lowers the loss", "raises the loss")]
    lowers = [e.name for e in clear if e.high < 0]
    raises = [e.name for e in clear if e.low > 0]
    unclear = [e.name for e in found if e not in clear]
    seeds = min((e.seeds for e in found), default=0)
    tokens = count(ended[0].outcome.tokens)
    summary = [
        f"Of {len(found)} changes to a base that reaches {base.loss:.4f} nats on {tokens} tokens, "
        + (f"{_listed(lowers)} lowered the loss" if lowers else "none lowered the loss")
        + (f" and {_listed(raises)} raised it." if raises else "."),
        f"Of {_listed(unclear)} no difference was seen beyond what seeds make."
        if unclear
        else "Every change was seen.",
        f"The intervals are 95% each, from {seeds} pairs of runs with the same seed"
        + (
            f": with {len(found)} changes about {0.05 * len(found):.1f} would leave theirs by chance." if found else "."
        ),
    ]
    rows = [
        (
            e.name,
            f"{e.loss:.4f}",
            "" if e is base else f"{e.moved:+.4f}",
            "" if math.isnan(e.low) or e is base else f"{e.low:+.4f} to {e.high:+.4f}",
            "" if e is base else e.verdict,
            f"{e.time:.2f}",
            f"{e.memory:.2f}",
            count(e.parameters),
            str(e.seeds),
        )
        for e in (base, *found)
    ]
    columns = ("change", "loss", "moved", "95% interval", "", "time", "memory", "parameters", "seeds")
    text = [
        "Moved is the mean difference of held-out loss from the base in nats a token, seed by seed; time is a step's "
        "median seconds and memory a step's estimated bytes, both over the base's.",
        *notes,
    ]
    pictures = [Picture("ablation.png", "How much each change moved the loss, with its 95% interval", _draw(found))]
    return Analysis(
        "Ablation: what each change moved",
        summary,
        [Section("Changes", text, pictures if found else (), [Table(columns, rows)])],
    )


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}" if names else "none"


_COLORS = {"lowers the loss": "#1b7837", "raises the loss": "#b2182b"}


def _draw(found: Sequence[Effect]) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.4 + 0.42 * len(found)), layout="constrained")
    axes: Any = figure.subplots(1, 2, sharey=True, width_ratios=(4, 1))
    for y, e in enumerate(reversed(found)):
        color = _COLORS.get(e.verdict, "#666666")
        if not math.isnan(e.low):
            axes[0].plot([e.low, e.high], [y, y], color=color, lw=2.5, solid_capstyle="round")
        axes[0].plot([e.moved], [y], "o", color=color)
        axes[1].plot([e.time], [y], "s", color="#444444")
    axes[0].axvline(0, color="black", lw=1)
    axes[0].set_yticks(range(len(found)), [e.name for e in reversed(found)])
    axes[0].set_xlabel("held-out loss, change minus base (nats a token; left is better)")
    axes[1].axvline(1, color="black", lw=1)
    axes[1].set_xlabel("time of a step / base's")
    for axis in axes:
        axis.grid(axis="x", alpha=0.3)
        axis.set_ylim(-0.6, len(found) - 0.4)
    return png(figure)
