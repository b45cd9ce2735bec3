"""What a fit alone does not answer: does the law hold beyond its runs, and what did the way of counting do?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.interpolate import PchipInterpolator

from lm_jax.errors import UserError
from lm_jax.scaling.forms import FORMS, Form
from lm_jax.scaling.frontier import isoflop_parabola
from lm_jax.scaling.laws import Estimate, Law, estimate, fit_law
from lm_jax.scaling.minimise import Array
from lm_jax.scaling.points import usable

_OF_LARGEST = 0.75  # of the largest FLOPs: those of one budget scatter, and budgets are further apart
_HALF_STEP = 0.5 * np.log(10.0)  # of the budget, on either side of the middle: the exponent is a slope over a decade
_GRID = 400  # sizes at which a frontier is searched; what lies between is a parabola's


@dataclass(frozen=True)
class HoldOut:
    """What a law fitted to smaller budgets says of the largest."""

    budget: float  # FLOPs, of the largest
    where: str  # at which model the two are compared
    parameters: float
    tokens: float
    predicted: Estimate
    measured: float
    error: float  # predicted / measured - 1
    inside: bool  # whether the measured loss is within the interval
    unchanged: float  # the best loss of the largest budget that was fitted
    unchanged_error: float  # of saying that nothing changes
    point_errors: Array  # predicted / measured - 1 of each run of the largest budget
    law: Law
    notes: tuple[str, ...]


def hold_out_largest(
    parameters: ArrayLike,
    tokens: ArrayLike,
    losses: ArrayLike,
    flops: ArrayLike | None = None,
    *,
    names: Sequence[str] | None = None,
    **fit: Any,
) -> HoldOut:
    """Fits a law to all budgets but the largest, and compares it there with what was measured.

    The comparison is at the minimum of the largest budget's parabola, or, where its runs have no minimum inside, at
    their best.

    Args:
      parameters: N of each run.
      tokens: D.
      losses: in nats.
      flops: C; 6 N D if not given. Runs within a quarter of the largest are of the largest budget.
      names: of the runs.
      **fit: further arguments of `fit_law`.

    Raises:
      UserError: one budget alone; too little is left for the fit.
    """
    given = {} if flops is None else {"flops": flops}
    table, called, notes = usable({"parameters": parameters, "tokens": tokens, "losses": losses, **given}, names)
    N, D, L = table["parameters"], table["tokens"], table["losses"]
    C = table.get("flops", 6 * N * D)
    largest = _largest(C)
    held, rest = np.flatnonzero(largest), np.flatnonzero(~largest)
    if not len(rest):
        raise UserError("all runs are of one budget: none is left to fit to when the largest is held out")
    law = fit_law(N[rest], D[rest], L[rest], names=[called[i] for i in rest], **fit)
    parabola = isoflop_parabola(N[held], C[held], D[held], L[held], tuple(called[i] for i in held))
    if parabola.inside:
        where, at, measured = "the parabola's minimum", (parabola.parameters, parabola.tokens), parabola.loss
    else:
        best = held[np.argmin(L[held])]
        where, at, measured = f"the best run, {called[best]}", (float(N[best]), float(D[best])), float(L[best])
    predicted = law.predict(*at)
    unchanged = float(L[rest][_largest(C[rest])].min())
    return HoldOut(
        budget=parabola.budget,
        where=where,
        parameters=at[0],
        tokens=at[1],
        predicted=predicted,
        measured=measured,
        error=predicted.value / measured - 1,
        inside=predicted.low <= measured <= predicted.high,
        unchanged=unchanged,
        unchanged_error=unchanged / measured - 1,
        point_errors=law.loss(N[held], D[held]) / L[held] - 1,
        law=law,
        notes=(*notes, *law.notes),
    )


def _largest(flops: Array) -> NDArray[np.bool_]:
    """Which runs are of the largest budget."""
    limit = _OF_LARGEST * flops.max()
    return flops > limit


# ------------------------------------------------------------------------------------------------------------- counting


class Counting(NamedTuple):
    """One way to count runs: an entry a run."""

    parameters: ArrayLike
    flops_per_token: ArrayLike
    tokens: ArrayLike


@dataclass(frozen=True)
class Counted:
    """What a counting makes of the runs."""

    name: str
    law: Law
    budget: float  # FLOPs: the geometric mean of the runs
    parameters: Estimate  # the optimum there
    tokens: Estimate
    a: Estimate  # N ~ C^a around it
    b: Estimate  # D ~ C^b; a + b is 1 only where FLOPs are a multiple of N D
    notes: tuple[str, ...]


def compare_countings(
    losses: ArrayLike, countings: Mapping[str, Counting], *, names: Sequence[str] | None = None, **fit: Any
) -> tuple[Counted, ...]:
    """The exponents of the compute-optimal frontier under several countings of the same runs.

    Whether embeddings, the output layer and attention's scores count moves the exponents as much as papers differ
    (Porian et al., 2024, arXiv:2406.19146). For each counting the law is fitted to its N and D, and L(N, D) minimised
    where flops_per_token(N) * D is a budget; between the runs' sizes, FLOPs per token are interpolated in
    logarithms, and beyond them they go on as they end. An exponent is the slope over a decade of budgets
    around the middle.

    Args:
      losses: in nats, of each run.
      countings: by name.
      names: of the runs.
      **fit: further arguments of `fit_law`.

    Raises:
      UserError: no counting is given; or one that cannot be fitted, by its name.
    """
    if not countings:
        raise UserError("no counting is given: give a mapping of names to (parameters, flops_per_token, tokens)")
    found = []
    for name, counting in countings.items():
        try:
            found.append(_counted(name, losses, Counting(*counting), names, fit))
        except UserError as problem:
            raise UserError(f"the counting {name}: {problem}") from None
    return tuple(found)


def _counted(
    name: str, losses: ArrayLike, counting: Counting, names: Sequence[str] | None, fit: dict[str, Any]
) -> Counted:
    columns = {"losses": losses, "parameters": counting.parameters, "tokens": counting.tokens}
    table, called, left_out = usable({**columns, "flops_per_token": counting.flops_per_token}, names)
    N, D = table["parameters"], table["tokens"]
    law = fit_law(N, D, table["losses"], names=called, **fit)
    sizes, rows = np.unique(N, return_inverse=True)
    per_token = np.bincount(rows, np.log(table["flops_per_token"])) / np.bincount(rows)
    middle = float(np.mean(np.log(table["flops_per_token"]) + np.log(D)))
    form, values = FORMS[law.form], np.array([list(law.constants.values())])
    best, best_draws = (_frontier(form, c, np.log(sizes), per_token, middle) for c in (values, law.draws))
    notes = [*left_out, *law.notes]
    if np.isnan(best).any():
        notes.append("the optimum around the middle budget is far outside the sizes tried: no exponents")
    N_best, D_best, a, b = (estimate(best[0, i], best_draws[:, i]) for i in range(4))
    N_best, D_best = (Estimate(*(float(np.exp(v)) for v in log)) for log in (N_best, D_best))
    return Counted(name, law, float(np.exp(middle)), N_best, D_best, a, b, tuple(notes))


def _frontier(form: Form, constants: Array, sizes: Array, per_token: Array, middle: float) -> Array:
    """log N and log D of the optimum at the middle budget, and the exponents a and b: (P, 4) of constants (P, K).

    sizes and per_token are logarithms, and so is the middle budget.
    """
    margin = np.log(10.0)
    grid = np.linspace(sizes[0] - margin, sizes[-1] + margin, _GRID)
    inner = PchipInterpolator(sizes, per_token)
    ends = inner.derivative()(sizes[[0, -1]])
    cost = inner(np.clip(grid, sizes[0], sizes[-1]))
    cost += ends[0] * np.minimum(grid - sizes[0], 0) + ends[1] * np.maximum(grid - sizes[-1], 0)
    found = []
    for log_budget in (middle - _HALF_STEP, middle, middle + _HALF_STEP):
        with np.errstate(all="ignore"):
            loss = form.log_loss(form.theta(constants), grid, log_budget - cost)[0]
        n = _lowest(grid, loss)
        found.append((n, log_budget - np.interp(n, grid, cost)))
    (n_low, d_low), (n, d), (n_high, d_high) = found
    return np.stack([n, d, (n_high - n_low) / (2 * _HALF_STEP), (d_high - d_low) / (2 * _HALF_STEP)], axis=1)


def _lowest(x: Array, y_PM: Array) -> Array:
    """Where each row of y is lowest, by a parabola through the three points around it; nan at the ends of x."""
    i = np.argmin(y_PM, axis=1)
    inner = np.clip(i, 1, len(x) - 2)
    left, here, right = (y_PM[np.arange(len(i)), inner + k] for k in (-1, 0, 1))
    with np.errstate(all="ignore"):
        shift = 0.5 * (left - right) / (left - 2 * here + right)
    return np.where(i == inner, x[inner] + shift * (x[1] - x[0]), np.nan)
