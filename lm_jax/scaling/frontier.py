"""The compute-optimal frontier without a form for L(N, D): approaches 1 and 2 of Hoffmann et al. (2022), section 3.

Approach 2 (`isoflop`) is a parabola a budget; approach 1 (`envelope`) the lower edge of training curves. Both end in
power laws of the budget C in FLOPs, N ~ C^a and D ~ C^b, by least squares in logarithms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lm_jax.errors import UserError
from lm_jax.scaling.laws import Estimate, estimate
from lm_jax.scaling.minimise import Array
from lm_jax.scaling.points import listed, usable

_CLOSE = 0.2  # of a logarithm: budgets that are further apart are two
_PER_TOKEN = 6.0  # FLOPs per token and parameter, where tokens are not given


@dataclass(frozen=True)
class PowerLaw:
    """y = coefficient * C^exponent."""

    coefficient: Estimate
    exponent: Estimate
    draws: Array  # (bootstrap, 2): log coefficient, exponent

    def at(self, flops: float) -> Estimate:
        """y at a budget, with its interval."""
        x = np.log(flops)
        value = np.exp(np.log(self.coefficient.value) + self.exponent.value * x)
        return estimate(value, np.exp(self.draws[:, 0] + self.draws[:, 1] * x))


def _power_law(x: Array, y: Array, x_draws: Array, y_draws: Array) -> PowerLaw:
    """By least squares in logs: x and y (M,), draws (R, M); entries that are nan do not count."""
    value = _lines(np.log(x)[None], np.log(y)[None])[0]
    draws = _lines(np.log(x_draws), np.log(y_draws))
    return PowerLaw(estimate(np.exp(value[0]), np.exp(draws[:, 0])), estimate(value[1], draws[:, 1]), draws)


def _lines(x_RM: NDArray[Any], y_RM: NDArray[Any]) -> Array:
    """Intercept and slope (R, 2) of the least-squares line in each row; nan where fewer than two x are left."""
    there = np.isfinite(x_RM) & np.isfinite(y_RM)
    count = there.sum(axis=1)
    with np.errstate(all="ignore"):
        x_mean = np.where(there, x_RM, 0).sum(axis=1) / count
        y_mean = np.where(there, y_RM, 0).sum(axis=1) / count
        dx = np.where(there, x_RM - x_mean[:, None], 0)
        dy = np.where(there, y_RM - y_mean[:, None], 0)
        spread = np.sum(dx**2, axis=1)
        slope = np.where(spread > 1e-12, np.sum(dx * dy, axis=1) / spread, np.nan)
    return np.asarray(np.stack([y_mean - slope * x_mean, slope], axis=1), np.float64)


# ------------------------------------------------------------------------------------------- approach 2: isoFLOP curves


@dataclass(frozen=True)
class Parabola:
    """One budget: loss = c0 + c1 x + c2 x^2 of x = log N - centre, and where it is lowest."""

    budget: float  # FLOPs: the geometric mean of its runs
    coefficients: tuple[float, float, float]
    centre: float
    parameters: float  # at the minimum; nan where there is none
    tokens: float
    loss: float
    run_parameters: Array  # of its runs
    run_losses: Array
    run_names: tuple[str, ...]
    residuals: Array  # measured / fitted - 1, of each run
    sizes: Array  # different ones, from the smallest
    size_losses: Array  # of each size: the mean over its runs, which differ in their seeds
    inside: bool  # whether the minimum lies between the smallest and the largest size
    verdict: str  # in words

    def curve(self, parameters: ArrayLike) -> Array:
        """The parabola at other sizes."""
        x = np.log(np.asarray(parameters, np.float64)) - self.centre
        c0, c1, c2 = self.coefficients
        return c0 + x * (c1 + x * c2)

    @property
    def size_residuals(self) -> Array:
        """Measured / fitted - 1 of each size's mean. Single runs' `residuals` have their seeds' scatter in them."""
        return self.size_losses / self.curve(self.sizes) - 1


@dataclass(frozen=True)
class IsoFlop:
    """Approach 2: parabolas, from the smallest budget, and the frontier through those whose minimum is inside."""

    parabolas: tuple[Parabola, ...]
    parameters: PowerLaw
    tokens: PowerLaw
    loss: PowerLaw
    notes: tuple[str, ...]

    @property
    def scatter(self) -> float | None:
        """The standard deviation of the losses of one size and budget over their mean, from all that have several
        runs; None where none has."""
        squares, freedom = 0.0, 0
        for p in self.parabolas:
            sizes = np.argmin(np.abs(np.log(p.run_parameters)[:, None] - np.log(p.sizes)), axis=1)
            squares += float(np.sum((p.run_losses / p.size_losses[sizes] - 1) ** 2))
            freedom += len(sizes) - len(p.sizes)
        return float(np.sqrt(squares / freedom)) if freedom else None


def group(flops: Array, budgets: ArrayLike | None = None) -> list[NDArray[np.intp]]:
    """The rows of each budget, from the smallest: those nearest to each of `budgets`, or else rows with less than 20%
    from one to the next."""
    c = np.log(flops)
    if budgets is not None:
        targets = np.log(np.sort(np.asarray(budgets, np.float64)))
        nearest = np.argmin(np.abs(c[:, None] - targets), axis=1)
        return [rows for i in range(len(targets)) if len(rows := np.flatnonzero(nearest == i))]
    order = np.argsort(c, kind="stable")
    return list(np.split(order, 1 + np.flatnonzero(np.diff(c[order]) > _CLOSE)))


def isoflop(
    parameters: ArrayLike,
    flops: ArrayLike,
    losses: ArrayLike,
    *,
    tokens: ArrayLike | None = None,
    budgets: ArrayLike | None = None,
    names: Sequence[str] | None = None,
    bootstrap: int = 500,
    seed: int = 0,
) -> IsoFlop:
    """Fits a parabola of the loss in log N to each budget, and power laws to their minima.

    A budget whose minimum is not between its smallest and its largest size stays out of the frontier, and a note names
    it. Draws add to the parabolas residuals from all budgets.

    Args:
      parameters: N of each run.
      flops: C of each run.
      losses: in nats.
      tokens: D of each run; C / (6 N) if not given.
      budgets: in FLOPs: runs belong to the nearest. If not given, runs with nearly the same FLOPs belong together.
      names: of the runs.
      bootstrap: how many draws the intervals are from.
      seed: of the draws.

    Raises:
      UserError: arrays that do not fit each other; fewer than two budgets have a minimum inside.
    """
    given = {} if tokens is None else {"tokens": tokens}
    table, called, notes = usable({"parameters": parameters, "flops": flops, "losses": losses, **given}, names)
    N, C, L = table["parameters"], table["flops"], table["losses"]
    D = table.get("tokens", C / (_PER_TOKEN * N))
    groups = group(C, budgets)
    parabolas = tuple(isoflop_parabola(N[i], C[i], D[i], L[i], tuple(called[j] for j in i)) for i in groups)
    inside = [i for i, p in enumerate(parabolas) if p.inside]
    outside = [p for p in parabolas if not p.inside]
    notes += [f"left out of the frontier, the budget of {p.budget:.3g} FLOPs: {p.verdict}" for p in outside]
    if len(inside) < 2:
        raise UserError(
            f"{len(inside)} of {len(parabolas)} budgets have a minimum inside their range of sizes, and 2 are needed"
            f"\n{'; '.join(f'{p.budget:.3g}: {p.verdict}' for p in outside[:2])}"
        )
    if len(inside) == 2:
        notes.append("two budgets: the power laws run through both, and nothing tells how well they hold")
    kept = [parabolas[i] for i in inside]
    x = np.array([p.budget for p in kept])
    minima = _drawn_minima(kept, [D[groups[i]] for i in inside], bootstrap, seed)
    x_draws = np.broadcast_to(x, (bootstrap, len(x)))
    of_N, of_D, of_loss = (
        _power_law(x, np.array([getattr(p, what) for p in kept]), x_draws, minima[what])
        for what in ("parameters", "tokens", "loss")
    )
    return IsoFlop(parabolas, of_N, of_D, of_loss, tuple(notes))


def isoflop_parabola(N: Array, C: Array, D: Array, L: Array, names: tuple[str, ...]) -> Parabola:
    """The parabola through the runs of one budget."""
    centre = float(np.log(N).mean())
    x: Array = np.log(N) - centre
    starts = np.concatenate([[0], 1 + np.flatnonzero(np.diff(np.sort(x)) > 1e-6)])
    in_order, runs = np.argsort(x, kind="stable"), np.diff([*starts, len(x)])
    distinct = len(starts)
    c = np.array([L.mean(), 0.0, 0.0])
    lowest = loss = log_tokens = np.nan
    if distinct < 3:
        verdict = f"{distinct} sizes of model are too few for a parabola: 3 are needed"
    else:
        c = np.linalg.lstsq(_powers(x), L, rcond=None)[0]
        lowest, loss, log_tokens = (float(v[0]) for v in _minimum(c[None], x, np.log(D)))
        where = "inside the sizes tried"
        if lowest > x.max():
            where = f"above the largest size tried, {N.max():.3g}"
        elif lowest < x.min():
            where = f"below the smallest size tried, {N.min():.3g}"
        verdict = f"the minimum, at {np.exp(lowest + centre):.3g} parameters, is {where}"
        if np.isnan(lowest):
            verdict = "the parabola opens downwards: there is no minimum"
    return Parabola(
        budget=float(np.exp(np.log(C).mean())),
        coefficients=(float(c[0]), float(c[1]), float(c[2])),
        centre=centre,
        parameters=float(np.exp(lowest + centre)),
        tokens=float(np.exp(log_tokens)),
        loss=loss,
        run_parameters=N,
        run_losses=L,
        run_names=names,
        residuals=L / (_powers(x) @ c) - 1,
        sizes=N[in_order][starts],
        size_losses=np.add.reduceat(L[in_order], starts) / runs,
        inside=bool(x.min() <= lowest <= x.max()),
        verdict=verdict,
    )


def _powers(x: Array) -> Array:
    return np.stack([np.ones_like(x), x, x**2], axis=1)


def _minimum(c_R3: NDArray[Any], x: Array, log_D: Array) -> tuple[Array, Array, Array]:
    """x, loss and log D (R,) at the minima of parabolas; nan where they open downwards."""
    with np.errstate(all="ignore"):
        lowest = np.where(c_R3[:, 2] > 0, -c_R3[:, 1] / (2 * c_R3[:, 2]), np.nan)
        loss = c_R3[:, 0] + c_R3[:, 1] * lowest / 2
    # Along a budget log D falls as log N grows, by slope -1 where C = 6 N D.
    intercept, slope = _lines(x[None], log_D[None])[0]
    return lowest, loss, intercept + slope * lowest


def _drawn_minima(parabolas: Sequence[Parabola], tokens: Sequence[Array], draws: int, seed: int) -> dict[str, Array]:
    """The minima (draws, budgets) of parabolas through what they fit, with scatter drawn anew."""
    rng = np.random.default_rng(seed)
    # A parabola takes three of its runs' degrees of freedom: its residuals are that much smaller than the scatter.
    pooled = np.concatenate([p.residuals * np.sqrt(len(p.residuals) / max(len(p.residuals) - 3, 1)) for p in parabolas])
    found: dict[str, list[Array]] = {"parameters": [], "tokens": [], "loss": []}
    for parabola, D in zip(parabolas, tokens, strict=True):
        x = np.log(parabola.run_parameters) - parabola.centre
        X = _powers(x)
        drawn = (X @ np.array(parabola.coefficients)) * (1 + rng.choice(pooled, size=(draws, len(x))))
        lowest, loss, log_tokens = _minimum(drawn @ np.linalg.pinv(X).T, x, np.log(D))
        # A draw's parabola may be nearly flat: its minimum is then anywhere, as it would be with other seeds.
        found["parameters"].append(np.exp(np.clip(lowest + parabola.centre, -50, 100)))
        found["tokens"].append(np.exp(np.clip(log_tokens, -50, 100)))
        found["loss"].append(np.where(loss > 0, loss, np.nan))
    return {what: np.stack(columns, axis=1) for what, columns in found.items()}


# ---------------------------------------------------------------------------------- approach 1: edge of training curves


@dataclass(frozen=True)
class Curve:
    """One training run: its loss as its FLOPs add up."""

    name: str
    parameters: float
    flops: Array  # (T,), rising
    losses: Array  # (T,)
    tokens: Array | None = None  # (T,); C / (6 N) if not given


@dataclass(frozen=True)
class Envelope:
    """Approach 1: at each budget (M,) the run with the lowest loss, and power laws through those that count."""

    flops: Array
    run_parameters: Array
    run_tokens: Array
    run_losses: Array
    runs: tuple[str, ...]  # which is the lowest at each budget
    used: NDArray[np.bool_]
    parameters: PowerLaw
    tokens: PowerLaw
    loss: PowerLaw
    notes: tuple[str, ...]


def envelope(curves: Sequence[Curve], *, budgets: int = 500, bootstrap: int = 500, seed: int = 0) -> Envelope:
    """The lower edge of training curves at log-spaced budgets, and power laws through it.

    A run's loss at a budget is read between its logged points, linear in log C. Where the smallest or the largest size
    is the best, a size that was not tried may be better still: such budgets are left out as long as two other sizes are
    best somewhere. Curves should be smoothed, or logged as means over many steps: the edge follows the luckiest
    step. Draws take runs with replacement.

    Args:
      curves: of several sizes, one run of each or more.
      budgets: at how many budgets the edge is read.
      bootstrap: how many draws the intervals are from.
      seed: of the draws.

    Raises:
      UserError: fewer than three sizes; a curve without points; one size is best everywhere.
    """
    read = [_readable(curve) for curve in curves]
    notes = [note for _, of_curve in read for note in of_curve]
    clean = [curve for curve, _ in read]
    sizes = np.array([c.parameters for c in clean])
    if len(np.unique(sizes)) < 3:
        raise UserError(f"{len(np.unique(sizes))} sizes of model are too few for an envelope: give curves of 3 or more")
    C = np.geomspace(min(c.flops[0] for c in clean), max(c.flops[-1] for c in clean), budgets)
    inside = [(c.flops[0] <= C) & (c.flops[-1] >= C) for c in clean]
    loss = np.stack(
        [
            np.where(i, np.interp(np.log(C), np.log(c.flops), c.losses), np.inf)
            for i, c in zip(inside, clean, strict=True)
        ]
    )
    tokens = np.stack([_tokens_at(c, C) for c in clean])
    best, used = _edge(loss, sizes)
    if len(np.unique(sizes[best[used]])) < 2:
        raise UserError("one size is the best at every budget: the curves do not cross, and show no frontier")
    left = C[~used & np.isfinite(loss.min(axis=0))]
    if len(left):
        notes.append(
            f"left out, as the smallest or largest size is best there: {len(left)} of {budgets} budgets; used are"
            f" {C[used].min():.3g} to {C[used].max():.3g} FLOPs"
        )
    columns = np.arange(budgets)
    of = {"parameters": sizes[best], "tokens": tokens[best, columns], "loss": loss[best, columns]}
    rng = np.random.default_rng(seed)
    drawn: dict[str, list[Array]] = {what: [np.zeros((0, budgets))] for what in of}
    for _ in range(bootstrap):
        taken = np.unique(rng.integers(0, len(clean), len(clean)))
        chosen, kept = _edge(loss[taken], sizes[taken])
        rows = taken[chosen]
        for what, values in (
            ("parameters", sizes[rows]),
            ("tokens", tokens[rows, columns]),
            ("loss", loss[rows, columns]),
        ):
            drawn[what].append(np.where(kept, values, np.nan)[None])
    x_draws = np.broadcast_to(C, (bootstrap, budgets))
    of_N, of_D, of_loss = (_power_law(C[used], of[what][used], x_draws, np.concatenate(drawn[what])) for what in of)
    names = tuple(clean[i].name for i in best)
    return Envelope(C, of["parameters"], of["tokens"], of["loss"], names, used, of_N, of_D, of_loss, notes=tuple(notes))


def _edge(loss_RM: Array, sizes_R: Array) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
    """Which run is the lowest at each budget, and at which budgets that tells where the optimum is."""
    best = np.argmin(loss_RM, axis=0)
    there = np.isfinite(loss_RM.min(axis=0))
    between = there & (sizes_R[best] > sizes_R.min()) & (sizes_R[best] < sizes_R.max())
    return best, between if len(np.unique(sizes_R[best[between]])) >= 2 else there


def _readable(curve: Curve) -> tuple[Curve, list[str]]:
    """The curve's usable points in the order of their FLOPs."""
    given = {} if curve.tokens is None else {"tokens": curve.tokens}
    names = [f"{curve.name}[{i}]" for i in range(len(np.atleast_1d(curve.flops)))]
    try:
        table, _, notes = usable({"flops": curve.flops, "losses": curve.losses, **given}, names)
    except UserError as problem:
        raise UserError(f"the curve {curve.name}: {problem}") from None
    if not (np.isfinite(curve.parameters) and curve.parameters > 0):
        raise UserError(f"the curve {curve.name} has {curve.parameters} parameters: give a number above 0")
    order = np.argsort(table["flops"], kind="stable")
    if not np.array_equal(order, np.arange(len(order))):
        notes.append(f"put in the order of FLOPs: {listed([curve.name])}")
    kept = {key: column[order] for key, column in table.items()}
    return Curve(curve.name, float(curve.parameters), kept["flops"], kept["losses"], kept.get("tokens")), notes


def _tokens_at(curve: Curve, C: Array) -> Array:
    if curve.tokens is None:
        return C / (_PER_TOKEN * curve.parameters)
    return np.exp(np.interp(np.log(C), np.log(curve.flops), np.log(curve.tokens)))
