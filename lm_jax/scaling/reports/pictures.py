"""The pictures of scaling laws. Budgets run from dark to light."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from lm_jax.scaling.frontier import Envelope, IsoFlop, Parabola
from lm_jax.scaling.laws import Estimate, Law
from lm_jax.scaling.reports.page import png
from lm_jax.scaling.studies import Counted, HoldOut

_PARAMETERS = "parameters"
_LOSS = "loss, nats a token"


def _colors(n: int) -> Any:
    return colormaps["viridis"](np.linspace(0, 0.88, n))


def profiles(found: IsoFlop) -> bytes:
    """IsoFLOP curves: the runs of each budget, the parabola through them, its minimum."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axis: Any = figure.subplots()
    for parabola, color in zip(found.parabolas, _colors(len(found.parabolas)), strict=True):
        N = np.geomspace(0.85 * parabola.run_parameters.min(), 1.18 * parabola.run_parameters.max(), 200)
        axis.plot(N, parabola.curve(N), "-" if parabola.inside else ":", color=color, lw=1.5)
        label = f"{parabola.budget:.2g} FLOPs"
        axis.plot(parabola.run_parameters, parabola.run_losses, "o", color=color, label=label)
        if parabola.inside:
            axis.plot(parabola.parameters, parabola.loss, "*", ms=16, color=color, mec="black")
    axis.set(xscale="log", xlabel=_PARAMETERS, ylabel=_LOSS)
    axis.grid(alpha=0.3, which="both")
    axis.legend()
    return png(figure)


def frontier(C: np.ndarray, measured: Sequence[tuple[str, np.ndarray, Any]]) -> bytes:
    """Optimal parameters and tokens against the budget: points and power laws with their bands.

    Args:
      C: budgets of the points.
      measured: for each panel, what it shows, the points, the `PowerLaw`.
    """
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    grid: Any = figure.subplots(1, len(measured))
    span = np.geomspace(0.7 * C.min(), 12 * C.max(), 60)
    for axis, (what, points, law) in zip(grid, measured, strict=True):
        at = [law.at(c) for c in span]
        axis.fill_between(span, [e.low for e in at], [e.high for e in at], color="#2b6cb0", alpha=0.2, lw=0)
        exponent = law.exponent
        text = f"C^{exponent.value:.2f} ({exponent.low:.2f} to {exponent.high:.2f})"
        axis.plot(span, [e.value for e in at], color="#2b6cb0", label=text)
        axis.plot(C, points, "o", color="black", ms=4)
        axis.set(xscale="log", yscale="log", xlabel="training FLOPs", ylabel=f"optimal {what}")
        axis.grid(alpha=0.3, which="both")
        axis.legend()
    return png(figure)


def surface(law: Law) -> bytes:
    """The fitted loss over parameters and tokens with the runs, and what each run is off by."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    N = np.geomspace(0.5 * law.parameters.min(), 2 * law.parameters.max(), 120)
    D = np.geomspace(0.5 * law.tokens.min(), 2 * law.tokens.max(), 120)
    values = law.loss(N[None, :], D[:, None])
    drawn = left.contourf(N, D, values, levels=20, cmap="viridis_r")
    left.contour(N, D, values, levels=20, colors="white", linewidths=0.4)
    left.plot(law.parameters, law.tokens, "o", color="white", mec="black", ms=5)
    left.set(xscale="log", yscale="log", xlabel=_PARAMETERS, ylabel="tokens", title="fitted loss, and the runs")
    figure.colorbar(drawn, ax=left, label=_LOSS)
    right.axhline(0, color="black", lw=1)
    points = right.scatter(law.parameters, 100 * law.residuals, c=np.log10(law.tokens), cmap="viridis")
    right.set(xscale="log", xlabel=_PARAMETERS, ylabel="measured over fitted, %", title="residuals")
    right.grid(alpha=0.3)
    figure.colorbar(points, ax=right, label="log10 of tokens")
    return png(figure)


def extrapolation(inside: Sequence[Parabola], held: HoldOut) -> bytes:
    """The best loss of each budget, what the law of the smaller ones says, and the largest, which it has not seen.

    Args:
      inside: the parabolas that have their minimum inside, by rising budget.
      held: the fit without the largest budget.
    """
    C, N, D, best = (np.array([getattr(p, w) for p in inside]) for w in ("budget", "parameters", "tokens", "loss"))
    fitted = 0.99 * held.budget > C
    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axis: Any = figure.subplots()
    span = np.geomspace(0.8 * C.min(), 3 * held.budget, 50)
    # FLOPs for each token and parameter in this counting: attention's and the output's share shrinks as models grow.
    factors = np.exp(np.interp(np.log(span), np.log(C), np.log(C / (N * D))))
    at: list[Estimate] = [held.law.optimal(c, f).loss for c, f in zip(span, factors, strict=True)]
    axis.fill_between(span, [e.low for e in at], [e.high for e in at], color="#2b6cb0", alpha=0.2, lw=0)
    axis.plot(span, [e.value for e in at], color="#2b6cb0", label="law of the smaller budgets, 95% band")
    axis.plot(C[fitted], best[fitted], "o", color="black", label="fitted budgets")
    axis.errorbar(
        [held.budget],
        [held.predicted.value],
        yerr=[[held.predicted.value - held.predicted.low], [held.predicted.high - held.predicted.value]],
        fmt="s",
        color="#2b6cb0",
        capsize=4,
        label=f"predicted ({100 * held.error:+.2f}%)",
    )
    axis.plot([held.budget], [held.measured], "*", ms=17, color="#d95f02", mec="black", label="measured, held out")
    text = f"no change from the largest fitted ({100 * held.unchanged_error:+.1f}%)"
    axis.axhline(held.unchanged, color="#888888", ls="--", lw=1, label=text)
    axis.set(xscale="log", xlabel="training FLOPs", ylabel=_LOSS)
    axis.grid(alpha=0.3, which="both")
    axis.legend()
    return png(figure)


def countings(found: Sequence[Counted]) -> bytes:
    """The exponent of the optimal size under each way of counting."""
    figure = Figure(figsize=(8, 1.2 + 0.5 * len(found)), layout="constrained")
    axis: Any = figure.subplots()
    for y, counted in enumerate(reversed(found)):
        a = counted.a
        axis.plot([a.low, a.high], [y, y], color="#2b6cb0", lw=2.5)
        axis.plot([a.value], [y], "o", color="#2b6cb0")
    axis.axvline(0.5, color="black", lw=1, ls=":")
    axis.set_yticks(range(len(found)), [counted.name for counted in reversed(found)])
    axis.set_xlabel("exponent a of N ~ C^a (dotted: parameters and tokens grow alike)")
    axis.set_ylim(-0.6, len(found) - 0.4)
    axis.grid(axis="x", alpha=0.3)
    return png(figure)


def curves(found: Envelope, of_runs: Sequence[tuple[np.ndarray, np.ndarray, float]]) -> bytes:
    """Training curves against FLOPs, and their lower edge.

    Args:
      found: the edge.
      of_runs: FLOPs, losses and parameters of each run.
    """
    figure = Figure(figsize=(8, 5), layout="constrained")
    axis: Any = figure.subplots()
    sizes = sorted({parameters for _, _, parameters in of_runs})
    colors = dict(zip(sizes, _colors(len(sizes)), strict=True))
    for flops, losses, parameters in of_runs:
        axis.plot(flops, losses, color=colors[parameters], lw=0.8, alpha=0.8)
    axis.plot(found.flops[found.used], found.run_losses[found.used], color="black", lw=2, label="lower edge")
    for size in sizes:
        axis.plot([], [], color=colors[size], label=f"{size:,.0f} parameters")
    top = float(np.max(found.run_losses[found.used]))
    low = float(np.min(found.run_losses[found.used]))
    axis.set(xscale="log", xlabel="training FLOPs", ylabel=_LOSS, ylim=(low - 0.1 * (top - low), top + (top - low)))
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize=8)
    return png(figure)


def interval(value: Estimate, form: str = ".3g") -> str:
    """`0.34 (0.31 to 0.37)`."""
    if math.isnan(value.low):
        return f"{value.value:{form}}"
    return f"{value.value:{form}} ({value.low:{form}} to {value.high:{form}})"
