"""Learning rates by size: where the best one lies, and whether it stays there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lm_jax.errors import UserError
from lm_jax.scaling.reports.page import Analysis, Ended, Picture, Section, Table
from lm_jax.scaling.reports.pictures import png
from lm_jax.scaling.sweep import written

RATE = "learning_rate"


@dataclass(frozen=True)
class Profile:
    """Loss against learning rate, all else the same.

    Attributes:
      panel: what is the same in all of a picture's panel, as a name says it.
      curve: what tells its curves apart.
      rates: rising.
      losses: mean over the seeds whose runs ended; a rate of which none did is not there.
      errors: standard error of those means; nan with one seed.
      seeds: how many those are, a number a rate.
    """

    panel: str
    curve: str
    rates: np.ndarray
    losses: np.ndarray
    errors: np.ndarray
    seeds: np.ndarray

    @property
    def best(self) -> int:
        """The index of the rate with the lowest mean loss, of those at which no seed's run failed."""
        return int(np.argmin(np.where(self.seeds == self.seeds.max(), self.losses, np.inf)))

    @property
    def at_edge(self) -> bool:
        """Whether the best rate is the smallest or the largest that was tried."""
        return self.best in (0, len(self.rates) - 1)


def profiles(ended: Sequence[Ended]) -> list[Profile]:
    """All profiles of a sweep: panels by every label but width or batch size, rate and seed.

    Raises:
      UserError: the runs do not differ in their learning rate.
    """
    if not any(RATE in e.run.labels for e in ended):
        raise UserError("the runs do not differ in optimizer.learning_rate: there are no profiles to draw")
    within = next((w for w in ("embed", "layers", "batch_size") if len({e.label(w) for e in ended}) > 1), None)
    groups: dict[tuple[str, str], dict[float, list[float]]] = {}
    for e in ended:
        rest = {w: v for w, v in e.run.labels.items() if w not in (RATE, "seed", within)}
        panel = ", ".join(f"{w} {v}" for w, v in rest.items())
        curve = f"{within} {e.label(within)}" if within else "all runs"
        groups.setdefault((panel, curve), {}).setdefault(e.run.config.optimizer.learning_rate, []).append(e.loss)
    found = []
    for (panel, curve), losses in groups.items():
        rates = sorted(losses)
        means = [float(np.mean(losses[r])) for r in rates]
        errors = [
            float(np.std(losses[r], ddof=1)) / math.sqrt(len(losses[r])) if len(losses[r]) > 1 else math.nan
            for r in rates
        ]
        seeds = np.array([len(losses[r]) for r in rates])
        found.append(Profile(panel, curve, np.array(rates), np.array(means), np.array(errors), seeds))
    return found


def steps_apart(a: Profile, b: Profile) -> float:
    """How many steps of the grid lie between the best rates of two profiles; nan for a grid of one rate."""
    grid = np.diff(np.log(np.union1d(a.rates, b.rates)))
    if not len(grid):
        return math.nan
    return float(abs(math.log(a.rates[a.best] / b.rates[b.best])) / np.median(grid))


def analyse(ended: Sequence[Ended]) -> Analysis:
    """The page of a sweep over learning rates."""
    found = profiles(ended)
    panels = list(dict.fromkeys(p.panel for p in found))
    shifts = []
    for panel in panels:
        first, last = _ends([p for p in found if p.panel == panel])
        steps = steps_apart(first, last)
        if first is not last and not math.isnan(steps):
            where = f"With {panel}, the" if panel else "The"
            shifts.append(
                f"{where} best learning rate is {written(first.rates[first.best])} at {first.curve} and "
                f"{written(last.rates[last.best])} at {last.curve}, {steps:.0f} "
                f"{'step' if round(steps) == 1 else 'steps'} of the grid apart."
            )
    edges = [f"{p.panel} {p.curve}".strip() for p in found if p.at_edge]
    seeds = max(int(p.seeds.max()) for p in found)
    fewer = [f"{p.panel} {p.curve}".strip() for p in found if p.seeds.min() < seeds]
    grid = np.diff(np.log(found[0].rates))
    factor = f"a factor of {math.exp(np.median(grid)):.2f}" if len(grid) else "one rate"
    sure = f"The grid has {factor} between rates, and each loss is the mean of {seeds} seed{'s' * (seeds > 1)}."
    if fewer:
        sure += f" Of fewer where runs are missing: {'; '.join(fewer)}."
    if edges:
        sure += f" At the edge of the grid, so not bracketed: {'; '.join(edges)}."
    rows = [
        (
            p.panel or "all",
            p.curve,
            written(p.rates[p.best]),
            f"{p.losses[p.best]:.4f}",
            "" if math.isnan(p.errors[p.best]) else f"{p.errors[p.best]:.4f}",
            "at the edge" if p.at_edge else "",
        )
        for p in found
    ]
    columns = ("panel", "curve", "best rate", "loss", "standard error", "")
    picture = Picture("rates.png", "Held-out loss by learning rate; the best of each curve is marked", _draw(found))
    return Analysis(
        "Learning rates by size",
        [*shifts, sure],
        [Section("Profiles", (), [picture], [Table(columns, rows)])],
    )


def _ends(panel: Sequence[Profile]) -> tuple[Profile, Profile]:
    """The profiles of the smallest and of the largest size."""
    order = sorted(panel, key=lambda p: float(p.curve.rpartition(" ")[2]) if p.curve[-1].isdigit() else 0.0)
    return order[0], order[-1]


def _draw(found: Sequence[Profile]) -> bytes:
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    panels = list(dict.fromkeys(p.panel for p in found))
    curves = list(dict.fromkeys(p.curve for p in found))
    colors = dict(zip(curves, colormaps["viridis"](np.linspace(0, 0.85, len(curves))), strict=True))
    figure = Figure(figsize=(5.2 * min(2, len(panels)), 4.2 * math.ceil(len(panels) / 2)), layout="constrained")
    grid: Any = figure.subplots(
        math.ceil(len(panels) / 2), min(2, len(panels)), sharex=True, sharey=True, squeeze=False
    )
    for axis in grid.flat[len(panels) :]:
        axis.axis("off")
    for axis, panel in zip(grid.flat, panels, strict=False):
        for p in (p for p in found if p.panel == panel):
            errors = np.nan_to_num(p.errors)
            axis.errorbar(p.rates, p.losses, yerr=errors, fmt="-o", ms=3, color=colors[p.curve], label=p.curve)
            axis.plot(p.rates[p.best], p.losses[p.best], "*", ms=15, color=colors[p.curve], mec="black")
        axis.set(xscale="log", xlabel="learning rate", title=panel)
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.grid(alpha=0.3)
        axis.legend()
    lowest = min(np.nanmin(p.losses) for p in found)
    middle = np.nanmedian(np.concatenate([p.losses for p in found]))
    grid.flat[0].set_ylim(lowest - 0.1 * (middle - lowest), lowest + 3.0 * (middle - lowest))
    for row in grid:
        row[0].set_ylabel("held-out loss, nats a token")
    return png(figure)
