"""Scaling laws of a sweep: the three approaches of Hoffmann et al. (2022), how far they hold, what to train next.

N is counted without the embedding, which is looked up and not multiplied with; FLOPs are all that the model spends,
attention's scores and the output included. The page also shows what other countings would have made of the same runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from etils import epath

from lm_jax import costs
from lm_jax.errors import UserError
from lm_jax.scaling.frontier import Curve, IsoFlop, envelope, isoflop
from lm_jax.scaling.laws import Law, fit_law
from lm_jax.scaling.reports import pictures
from lm_jax.scaling.reports.next_config import Next, as_file, choose
from lm_jax.scaling.reports.page import Analysis, Ended, Picture, Section, Table
from lm_jax.scaling.reports.pictures import interval
from lm_jax.scaling.studies import Counting, HoldOut, compare_countings, hold_out_largest
from lm_jax.training.metrics import FILE, History, read_metrics
from lm_jax.training.run import RunConfig
from lm_jax.training.terminal import count

COUNTED = "without_embedding"
NEXT = 10.0  # times the largest budget: what the next config is for
_SMOOTH = 0.05  # of a run's steps: what a training curve is the running mean over
_CURVE_POINTS = 200


class Runs:
    """The runs of a sweep as arrays, an entry a run."""

    def __init__(self, ended: Sequence[Ended]) -> None:
        self.ended = list(ended)
        self.names = [e.run.name for e in ended]
        self.N = np.array([e.outcome.parameters[COUNTED] for e in ended], float)
        self.D = np.array([e.outcome.tokens for e in ended], float)
        self.C = np.array([e.outcome.flops for e in ended], float)
        self.loss = np.array([e.loss for e in ended])

    @property
    def configs(self) -> list[RunConfig]:
        return [e.config for e in self.ended]


def analyse(ended: Sequence[Ended], folder: Callable[[str], epath.Path], flops: float | None, source: str) -> Analysis:
    """The page of a scaling law.

    Args:
      ended: the runs.
      folder: of a run, by name.
      flops: what the next config may spend; None: `NEXT` times the largest budget.
      source: what made it, for the next config's docstring.

    Raises:
      UserError: the runs identify no law.
    """
    runs = Runs(ended)
    law = fit_law(runs.N, runs.D, runs.loss, names=runs.names)
    budgets = _attempt(isoflop, runs.N, runs.C, runs.loss, tokens=runs.D, names=runs.names)
    held = _attempt(hold_out_largest, runs.N, runs.D, runs.loss, runs.C, names=runs.names)
    budget = flops or NEXT * float(runs.C.max())
    chosen = choose(law, runs.configs, budget, COUNTED)
    sections = [
        *(_profiles(budgets) if isinstance(budgets, IsoFlop) else [Section("IsoFLOP profiles", [budgets])]),
        _surface(law),
        _extrapolation(held, budgets),
        *_curves(runs, folder),
        _countings(runs),
        _next(chosen, budget),
    ]
    files = {} if chosen is None else {"next.py": as_file(chosen, source=source)}
    return Analysis("Scaling laws", _summary(runs, law, budgets, held, chosen), sections, files)


def _attempt(f: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What a function gives, or, where these runs are not enough for it, why, in words."""
    try:
        return f(*args, **kwargs)
    except UserError as e:
        return str(e).replace("\n", "; ")


def _summary(runs: Runs, law: Law, budgets: IsoFlop | str, held: HoldOut | str, chosen: Next | None) -> list[str]:
    a = budgets.parameters.exponent if isinstance(budgets, IsoFlop) else law.exponents.a
    how = "isoFLOP profiles" if isinstance(budgets, IsoFlop) else "the fitted surface"
    found = (
        f"Over {len(runs.names)} runs of {runs.C.min():.2g} to {runs.C.max():.2g} training FLOPs the best size grows "
        f"as C^{interval(a, '.2f')} by {how} and as C^{interval(law.exponents.a, '.2f')} by the parametric fit, "
        f"L = {law.E:.3f} + {law.A:.3g} / N^{law.alpha:.3f} + {law.B:.3g} / D^{law.beta:.3f}."
    )
    if isinstance(held, HoldOut):
        sure = (
            f"Fitted without the largest budget, the law predicts its best loss as {held.predicted.value:.4f} where "
            f"{held.measured:.4f} was measured ({100 * held.error:+.2f}%), {'inside' if held.inside else 'OUTSIDE'} "
            f"the 95% interval; to say that nothing changes would be off by {100 * held.unchanged_error:+.1f}%."
        )
    else:
        sure = f"How far the law carries could not be tested: {held}."
    if chosen is None:
        return [found, sure, "No next config is proposed: the law's optimum lies at the edge of what it was asked for."]
    then = (
        f"For {chosen.flops:.2g} FLOPs the law would train {count(chosen.parameters)} parameters on "
        f"{count(chosen.tokens)} tokens and expects {interval(chosen.loss, '.3f')} nats: next.py."
    )
    return [found, sure, then]


def _profiles(found: IsoFlop) -> list[Section]:
    inside = [p for p in found.parabolas if p.inside]
    rows = [
        (
            f"{p.budget:.3g}",
            str(len(p.run_losses)),
            f"{p.parameters:,.0f}" if p.inside else "",
            f"{p.tokens:,.0f}" if p.inside else "",
            f"{p.loss:.4f}" if p.inside else "",
            f"{100 * np.abs(p.size_residuals).max():.2f}%",
            p.verdict,
        )
        for p in found.parabolas
    ]
    columns = ("FLOPs", "runs", "best parameters", "tokens", "loss", "largest residual", "")
    C = np.array([p.budget for p in inside])
    panels: list[tuple[str, np.ndarray, Any]] = [
        ("parameters", np.array([p.parameters for p in inside]), found.parameters),
        ("tokens", np.array([p.tokens for p in inside]), found.tokens),
    ]
    scatter = found.scatter
    text = [
        "Approach 2: at each budget the loss of several sizes, and a parabola in the logarithm of the size (dotted "
        "where its minimum is outside of what was tried). Stars are the minima."
        + ("" if scatter is None else f" Seeds of one size scatter by {100 * scatter:.2f}%; points are their means."),
        *found.notes,
    ]
    caption = "Loss against size at each budget"
    first = Section(
        "IsoFLOP profiles", text, [Picture("isoflop.png", caption, pictures.profiles(found))], [Table(columns, rows)]
    )
    caption = "The best size and its tokens by budget, with 95% bands"
    grown = f"N ~ C^{interval(found.parameters.exponent, '.3f')}, D ~ C^{interval(found.tokens.exponent, '.3f')}."
    return [first, Section("Frontier", [grown], [Picture("frontier.png", caption, pictures.frontier(C, panels))])]


def _surface(law: Law) -> Section:
    rows = [(name, *(f"{v:.5g}" for v in (law[name], *law.intervals[name]))) for name in law.constants]
    a, b = law.exponents
    rows += [("a", *(f"{v:.3f}" for v in a)), ("b", *(f"{v:.3f}" for v in b))]
    text = [
        "Approach 3: L = E + A / N^alpha + B / D^beta, fitted to all runs by the Huber loss (delta 0.001) of log loss. "
        f"Objective {law.objective:.4g}; residuals have a standard deviation of {100 * law.residuals.std():.2f}% and "
        f"are at most {100 * np.abs(law.residuals).max():.2f}%. N ~ C^a and D ~ C^b hold where C is a multiple of N D.",
        *law.notes,
    ]
    picture = Picture("surface.png", "The fitted loss, and what each run is off by", pictures.surface(law))
    return Section("Fitted law", text, [picture], [Table(("constant", "value", "95% from", "to"), rows)])


def _extrapolation(held: HoldOut | str, budgets: IsoFlop | str) -> Section:
    if not isinstance(held, HoldOut):
        return Section("Extrapolation", [held])
    text = [
        f"The law of all budgets but the largest, asked for {held.budget:.3g} FLOPs at {held.where}: predicted "
        f"{interval(held.predicted, '.4f')}, measured {held.measured:.4f} ({100 * held.error:+.2f}%). Its single runs "
        f"are predicted within {100 * np.abs(held.point_errors).max():.2f}%.",
        *held.notes,
    ]
    if not isinstance(budgets, IsoFlop):
        return Section("Extrapolation", text)
    inside = [p for p in budgets.parabolas if p.inside]
    if not inside:
        return Section("Extrapolation", text)
    caption = "What the law of the smaller budgets says of the largest"
    drawn = _attempt(pictures.extrapolation, inside, held)  # of a law without optima there is no line
    if isinstance(drawn, str):
        return Section("Extrapolation", [*text, f"There is no picture: {drawn}."])
    return Section("Extrapolation", text, [Picture("extrapolation.png", caption, drawn)])


def _curves(runs: Runs, folder: Callable[[str], epath.Path]) -> list[Section]:
    """Approach 1, from the runs' training losses."""
    read = _attempt(_read_curves, runs, folder)
    found = read if isinstance(read, str) else _attempt(envelope, read)
    if isinstance(found, str):
        return [Section("Training curves", [f"Approach 1: {found}"])]
    text = [
        "Approach 1: the training loss of each run, smoothed, against the FLOPs spent, and the lower edge of all: "
        f"N ~ C^{interval(found.parameters.exponent, '.3f')}, D ~ C^{interval(found.tokens.exponent, '.3f')}. A "
        "curve's inner points are of a learning rate that has not come down yet, so the edge lies above what a run of "
        "that length would reach.",
        *found.notes,
    ]
    drawn = pictures.curves(found, [(np.asarray(c.flops), np.asarray(c.losses), c.parameters) for c in read])
    return [Section("Training curves", text, [Picture("curves.png", "Training curves and their lower edge", drawn)])]


def _read_curves(runs: Runs, folder: Callable[[str], epath.Path]) -> list[Curve]:
    read = []
    for e, config in zip(runs.ended, runs.configs, strict=True):
        history = History(read_metrics(folder(e.run.name) / FILE))
        smooth = max(1, round(_SMOOTH * len(history.losses)))
        losses = np.convolve(np.array(history.losses), np.ones(smooth) / smooth, "valid")
        tokens = np.array(history.tokens)[smooth - 1 :]
        keep = np.unique(np.linspace(len(tokens) // 10, len(tokens) - 1, _CURVE_POINTS).astype(int))
        flops = tokens[keep] * costs.flops_per_token(config.model, config.train.length)
        size = float(e.outcome.parameters[COUNTED])
        read.append(Curve(e.run.name, size, flops, losses[keep], tokens[keep]))
    return read


def _countings(runs: Runs) -> Section:
    """The exponents under other ways to count the same runs."""
    sizes = [e.outcome.parameters for e in runs.ended]
    total, inner, matrices = (np.array([s[what] for s in sizes], float) for what in ("total", COUNTED, "attention"))
    matrices = matrices + np.array([s["feed_forward"] for s in sizes], float)
    warm = np.array([c.train.tokens_per_step * c.optimizer.warmup_steps for c in runs.configs], float)
    countings = {
        "without embedding, all FLOPs": Counting(inner, runs.C / runs.D, runs.D),
        "without embedding, C = 6 N D": Counting(inner, 6 * inner, runs.D),
        "with embedding, C = 6 N D": Counting(total, 6 * total, runs.D),
        "with embedding, all FLOPs": Counting(total, runs.C / runs.D, runs.D),
        "blocks alone, C = 6 N D (no last layer)": Counting(matrices, 6 * matrices, runs.D),
        "without embedding, all FLOPs, warm-up not counted": Counting(inner, runs.C / runs.D, runs.D - warm),
    }
    found = _attempt(compare_countings, runs.loss, countings, names=runs.names)
    if isinstance(found, str):
        return Section("What is counted", [found])
    rows = [
        (c.name, interval(c.a, ".3f"), interval(c.b, ".3f"), f"{c.parameters.value:,.0f}", f"{c.law.objective:.4g}")
        for c in found
    ]
    columns = ("counting", "a of N ~ C^a", "b of D ~ C^b", "best N at the middle budget", "objective")
    text = [
        "The same runs under other countings, as papers differ in them (Porian et al. 2024): whether the embedding "
        "belongs to N, whether attention and the last layer belong to the FLOPs, whether the tokens of the warm-up "
        "count. Each is fitted anew."
    ]
    caption = "The exponent of the best size under each counting, 95% intervals"
    return Section(
        "What is counted", text, [Picture("countings.png", caption, pictures.countings(found))], [Table(columns, rows)]
    )


def _next(chosen: Next | None, budget: float) -> Section:
    if chosen is None:
        text = "the law's optimum is the smallest or the largest model of the family, so the law does not say"
        return Section("What to train next", [f"For {budget:.3g} FLOPs {text}."])
    model = chosen.config.model
    text = (
        f"For {chosen.flops:.3g} FLOPs: {model.layers} layers of {model.embed}, {chosen.parameters:,.0f} parameters "
        f"({chosen.best.low:,.0f} to {chosen.best.high:,.0f} by the law's draws), {chosen.tokens:,.0f} tokens, "
        f"expected loss {interval(chosen.loss, '.4f')}. Batch size, schedule and learning rate are the sweep's."
    )
    return Section("What to train next", [text, "python -m launch.train --config=next.py --workdir=DIR"])
