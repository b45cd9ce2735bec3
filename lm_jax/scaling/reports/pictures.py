"""The pictures of scaling laws. Budgets run from dark to light."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from lm_jax.scaling.frontier import Envelope, IsoFlop, Parabola
from lm_jax.scaling.laws import Estimate, Law
from lm_jax.scaling.studies import Counted, HoldOut

_DRAWN = 160  # points a side at which a law is drawn
_PARAMETERS = "parameters"
_LOSS = "loss, nats a token"


def png(figure: Figure) -> bytes:
    """A figure as a PNG."""
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110)
    return out.getvalue()


def _colors(n: int) -> Any:
    return colormaps["viridis"](np.linspace(0, 0.88, n))


def profiles(found: IsoFlop) -> bytes:
    """IsoFLOP curves: the mean of each size's runs (which stand behind it, small), the parabola, its minimum."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axis: Any = figure.subplots()
    for parabola, color in zip(found.parabolas, _colors(len(found.parabolas)), strict=True):
        N = np.geomspace(0.85 * parabola.run_parameters.min(), 1.18 * parabola.run_parameters.max(), 200)
        axis.plot(N, parabola.curve(N), "-" if parabola.inside else ":", color=color, lw=1.5)
        label = f"{parabola.budget:.2g} FLOPs"
        if len(parabola.sizes) < len(parabola.run_losses):
            axis.plot(parabola.run_parameters, parabola.run_losses, "o", color=color, ms=3, alpha=0.5)
        axis.plot(parabola.sizes, parabola.size_losses, "o", color=color, label=label)
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
    """The law's lines of equal loss with the runs and the best models on them, and what each run is off by."""
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    lines_of, scatter = figure.subplots(1, 2, width_ratios=(3, 2))
    (n_low, n_high), (d_low, d_high) = ((0.6 * x.min(), 1.7 * x.max()) for x in (law.parameters, law.tokens))
    N, D = np.meshgrid(np.geomspace(n_low, n_high, _DRAWN), np.geomspace(d_low, d_high, _DRAWN))
    # Before the contours: their labels are placed, and cut into the lines, as the axes are then.
    lines_of.set(xscale="log", yscale="log", xlim=(n_low, n_high), ylim=(d_low, d_high))
    lines = lines_of.contour(N, D, law.loss(N, D), levels=14, cmap="viridis", linewidths=0.9)
    lines_of.clabel(lines, fontsize=7)
    shades = {"c": law.losses, "cmap": "viridis", "vmin": lines.norm.vmin, "vmax": lines.norm.vmax}
    lines_of.scatter(law.parameters, law.tokens, s=22, edgecolor="k", linewidth=0.4, zorder=3, **shades)
    if math.isfinite(law.exponents.a.value):
        best = [law.optimal(flops) for flops in np.geomspace(6 * n_low * d_low, 6 * n_high * d_high, 20)]
        at = [(o.parameters.value, o.tokens.value) for o in best]
        lines_of.plot(*zip(*at, strict=True), color="#e45756", linewidth=1.6, label="best at C = 6 N D")
        lines_of.legend(loc="upper left", fontsize=8)
    lines_of.set(xlabel=_PARAMETERS, ylabel="tokens", title=f"{law.form}: lines of equal loss (nats a token)")
    scatter.axhline(0, color="#333a45", linewidth=0.8)
    scatter.scatter(law.loss(law.parameters, law.tokens), 100 * law.residuals, s=16, color="#4c78a8")
    scatter.set(xlabel="fitted loss", ylabel="measured over fitted, %", title="residuals")
    scatter.grid(alpha=0.3)
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
