"""Parametric scaling laws: fitted to runs, with intervals, and what they say of a budget (Hoffmann et al., approach 3).

    law = fit_law(parameters, tokens, losses)
    law["alpha"], law.intervals["alpha"]
    law.optimal(1e21).parameters          # Estimate(value, low, high)

The fit is that of Hoffmann et al. (2022), arXiv:2203.15556, section 3.3 and appendix D.3: the Huber loss (delta 1e-3)
of log losses, from a grid of starts. Besiroglu et al. (2024), arXiv:2404.10102, found that the published constants had
come of a minimiser that stopped too early. Here all starts descend together (`minimise.py`), and the best are then
taken by L-BFGS as far as rounding allows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import ndtri, stdtrit

from lm_jax.config import did_you_mean
from lm_jax.errors import UserError
from lm_jax.scaling.forms import FORMS, Form
from lm_jax.scaling.minimise import DELTA, Array, Model, minimise, polish
from lm_jax.scaling.points import Points, listed, read_points

LEVEL = (2.5, 97.5)  # percentiles: the ends of a 95% interval
# Steps that starts take, and how many go on: the first turns take all of them out of the far corners of the grid.
_TURNS = ((4, 1000), (12, 200), (400, 4))
_REFIT = 400  # steps of a draw, at most: it starts from the fit, and ends after some twenty
_MARGIN = 1.03  # of the intervals: without it they held 93 to 97% of constants (benchmarks/law_intervals.py)
_MOST = 3.0  # of the stretch: with one degree of freedom Student's t says 6.5
_STEEP = 3.0  # an exponent that no language model has shown
_NO_FLOOR = 0.02  # of the smallest loss: an E below is as good as none


class Estimate(NamedTuple):
    """A value and its 95% interval (nan where the law has no draws)."""

    value: float
    low: float
    high: float


class Optimum(NamedTuple):
    """The best model of a budget: parameters, tokens, and the loss that the law expects of it."""

    parameters: Estimate
    tokens: Estimate
    loss: Estimate


class Exponents(NamedTuple):
    """Of the optimum's growth with the budget: N ~ C^a, D ~ C^b."""

    a: Estimate
    b: Estimate


@dataclass(frozen=True)
class Law:
    """A fitted law.

    constants are those of its form, by name: E, A, B, alpha and beta, or Kaplan's Nc, Dc, alpha_N and alpha_D, whose
    form has no E (its loss goes to zero); `law["E"]` of it is an error that says so.
    """

    form: str
    constants: dict[str, float]
    intervals: dict[str, tuple[float, float]]  # 95%, each constant's by itself; empty without draws
    objective: float  # the sum of Huber losses at the minimum
    draws: Array  # of the constants, in their order: (bootstrap, K)
    parameters: Array  # the points that were fitted, (M,)
    tokens: Array
    losses: Array
    names: tuple[str, ...]
    residuals: Array  # log loss, measured minus fitted
    notes: tuple[str, ...]  # what was left out, and what to be careful with

    def __getitem__(self, name: str) -> float:
        """A constant by its name.

        Raises:
          UserError: the form has no such constant.
        """
        if name not in self.constants:
            raise UserError(f"the form {self.form} has no {name}: its constants are {', '.join(self.constants)}")
        return self.constants[name]

    @property
    def E(self) -> float:
        """The loss of endless parameters and tokens, in nats."""
        return self["E"]

    @property
    def A(self) -> float:
        """Of A / N^alpha, in nats."""
        return self["A"]

    @property
    def B(self) -> float:
        """Of B / D^beta, in nats."""
        return self["B"]

    @property
    def alpha(self) -> float:
        """How fast parameters lower the loss."""
        return self["alpha"]

    @property
    def beta(self) -> float:
        """How fast tokens lower the loss."""
        return self["beta"]

    @property
    def points(self) -> int:
        """How many points were fitted."""
        return len(self.losses)

    def loss(self, parameters: ArrayLike, tokens: ArrayLike) -> Array:
        """The loss in nats, of the arrays' common shape."""
        N, D = np.broadcast_arrays(np.asarray(parameters, np.float64), np.asarray(tokens, np.float64))
        return _losses(FORMS[self.form], self._values(), N.ravel(), D.ravel())[0].reshape(N.shape)

    def predict(self, parameters: float, tokens: float) -> Estimate:
        """The loss of a run not yet made. Its interval is for that one run: it has the law's own doubt (the draws) and
        a run's scatter around it (the residuals)."""
        value = float(self.loss(parameters, tokens))
        if not len(self.draws):
            return Estimate(value, np.nan, np.nan)
        point = (np.array([float(parameters)]), np.array([float(tokens)]))
        of_draws = _losses(FORMS[self.form], self.draws, *point)[:, 0]
        scatter = np.exp(_spread(self.residuals, len(self.constants)))
        return estimate(value, (of_draws[:, None] * scatter).ravel())

    @property
    def exponents(self) -> Exponents:
        """a = beta / (alpha + beta) and b = alpha / (alpha + beta)."""
        a, b = (_exponents(FORMS[self.form].terms(c)) for c in (self._values(), self.draws))
        return Exponents(estimate(a[0, 0], b[:, 0]), estimate(a[0, 1], b[:, 1]))

    def optimal(self, flops: float, flops_per_token_per_parameter: float = 6.0) -> Optimum:
        """The parameters and tokens of the lowest loss at a budget of C = 6 N D floating-point operations.

        Hoffmann et al. (2022), equation 4: N = G (C / 6)^a, D = (C / 6)^b / G, G = (alpha A / (beta B))^(1 / (alpha +
        beta)). The loss's interval is the law's own doubt, without a run's scatter; `predict` has both.

        Raises:
          UserError: the budget is not above zero; or the fitted law has no optimum, as one of its terms does not fall.
        """
        if not (np.isfinite(flops) and flops > 0 and flops_per_token_per_parameter > 0):
            raise UserError(f"a budget of {flops:g} FLOPs has no optimum: give one above 0")
        form = FORMS[self.form]
        for name in form.positive:
            if not self[name] > 0:
                raise UserError(f"{name} is {self[name]:.3g}: a law whose loss does not fall has no optimum")
        product = flops / flops_per_token_per_parameter
        N, D = _optimum(form.terms(self._values()), product)
        N_draws, D_draws = _optimum(form.terms(self.draws), product)
        loss = _losses(form, self._values(), N, D)[0, 0]
        loss_draws = _losses_each(form, self.draws, N_draws, D_draws)
        return Optimum(estimate(N[0], N_draws), estimate(D[0], D_draws), estimate(loss, loss_draws))

    def _values(self) -> Array:
        return np.array([list(self.constants.values())])


def _losses(form: Form, constants: Array, N: Array, D: Array) -> Array:
    """(P, M) of constants (P, K) and points (M,)."""
    with np.errstate(all="ignore"):
        return np.exp(form.log_loss(form.theta(constants), np.log(N), np.log(D))[0])


def _losses_each(form: Form, constants: Array, N: Array, D: Array) -> Array:
    """(P,) of constants (P, K), each at a point of its own."""
    with np.errstate(all="ignore"):
        log_loss = form.log_loss(form.theta(constants), np.log(N)[:, None], np.log(D)[:, None])[0]
        return np.exp(log_loss[:, 0])


def _exponents(terms: Array) -> Array:
    """a and b, (P, 2); nan where a term does not fall."""
    alpha, beta = terms[:, 1], terms[:, 3]
    with np.errstate(all="ignore"):
        falls = np.where((alpha > 0) & (beta > 0), alpha + beta, np.nan)
        return np.stack([beta / falls, alpha / falls], axis=1)


def _optimum(terms: Array, product: float) -> tuple[Array, Array]:
    """N and D (P,) with N D = product and the smallest sum of the two terms."""
    A, alpha, B, beta = terms.T
    a, b = _exponents(terms).T
    with np.errstate(all="ignore"):
        # In logs: A alone may be beyond a float's range where a draw's exponent is large.
        log_G = (np.log(alpha) + np.log(A) - np.log(beta) - np.log(B)) / (alpha + beta)
        return np.exp(log_G + a * np.log(product)), np.exp(b * np.log(product) - log_G)


def estimate(value: float, draws: Array) -> Estimate:
    """A value and the 95% interval of its draws; draws that have no such value are nan, and do not count."""
    draws = np.clip(draws[~np.isnan(draws)], -1e300, 1e300)
    low, high = np.percentile(draws, LEVEL) if len(draws) else (np.nan, np.nan)
    return Estimate(float(value), float(low), float(high))


def known_law(form: str = "chinchilla", **constants: float) -> Law:
    """A law from constants that are known, without points or draws: `known_law(E=1.69, A=406.4, ...)`.

    Raises:
      UserError: no such form; the constants are not its own.
    """
    names = _form(form).names
    if set(constants) != set(names):
        raise UserError(f"the constants of {form} are {', '.join(names)}, not {', '.join(constants) or 'none'}")
    ordered = {name: float(constants[name]) for name in names}
    none = np.zeros(0)
    return Law(form, ordered, {}, 0.0, np.zeros((0, len(names))), none, none, none, (), none, ())


def _form(name: str) -> Form:
    if name not in FORMS:
        raise UserError(f"there is no form {name}: it is one of {', '.join(FORMS)}\n{did_you_mean(name, FORMS)}")
    return FORMS[name]


# ------------------------------------------------------------------------------------------------------------- the fit


def fit_law(
    parameters: ArrayLike,
    tokens: ArrayLike,
    losses: ArrayLike,
    *,
    form: str = "chinchilla",
    names: Sequence[str] | None = None,
    bootstrap: int = 500,
    seed: int = 0,
    delta: float = DELTA,
) -> Law:
    """Fits a law to final losses.

    Args:
      parameters: N, of each run; in the counting that the law is to speak of.
      tokens: D, of each run.
      losses: in nats.
      form: of `FORMS`: chinchilla or kaplan.
      names: of the runs, for notes and messages.
      bootstrap: how many draws the intervals are from; 0 leaves them out.
      seed: of the draws.
      delta: of the Huber loss, of log loss.

    Raises:
      UserError: no such form; arrays of different lengths; too few points, or points that do not identify the law.
    """
    shape = _form(form)
    points = read_points(parameters, tokens, losses, names=names, constants=len(shape.names))
    n, d, y = np.log(points.parameters), np.log(points.tokens), np.log(points.losses)
    n0, d0 = float(n.mean()), float(d.mean())

    def model(theta: Array) -> tuple[Array, Array]:
        return shape.log_loss(theta, n - n0, d - d0)

    theta, objective = _search(model, shape.starts(n0, d0, float(y.mean())), y, delta)
    fitted = model(theta[None])[0][0]
    draws = np.zeros((0, len(shape.names)))
    if bootstrap:
        drawn = draw(model, theta, y, bootstrap, np.random.default_rng(seed), delta)
        draws = shape.constants(drawn, n0, d0)
    values = shape.constants(theta[None], n0, d0)[0]
    ends = np.percentile(draws, LEVEL, axis=0).T if bootstrap else ()
    law = Law(
        form=form,
        constants={name: float(v) for name, v in zip(shape.names, values, strict=True)},
        intervals={name: (float(low), float(high)) for name, (low, high) in zip(shape.names, ends, strict=False)},
        objective=objective,
        draws=draws,
        parameters=points.parameters,
        tokens=points.tokens,
        losses=points.losses,
        names=points.names,
        residuals=y - fitted,
        notes=points.notes,
    )
    return dataclasses.replace(law, notes=(*points.notes, *_doubts(law, points)))


def _search(model: Model, starts: Array, y: Array, delta: float) -> tuple[Array, float]:
    """The lowest minimum that any start leads to: all take some steps, the best go on, the very best are polished."""
    ones = np.ones(len(y))
    theta = starts
    for steps, kept in _TURNS:
        theta, value = minimise(model, theta, y, ones, steps=steps, delta=delta, tolerance=1e-13)
        best = np.argsort(value)[:kept]
        theta, value = theta[best], value[best]
    found = [polish(model, start, y, delta=delta) for start in theta]
    found += [(start, float(v)) for start, v in zip(theta, value, strict=True)]
    return min(found, key=lambda pair: pair[1])


def _doubts(law: Law, points: Points) -> list[str]:
    """What a reader of the constants must know."""
    notes = []
    for name in FORMS[law.form].positive:
        low, high = law.intervals.get(name, (np.inf, np.inf))
        if not law[name] > 0:
            notes.append(f"{name} is {law[name]:.3g}: these points show no fall of the loss in that direction")
        elif law[name] > _STEEP:
            notes.append(f"{name} ran to {law[name]:.3g}: its term acts on the few points at that end alone")
        elif low <= 0:
            notes.append(f"{name}'s interval ({low:.3g} to {high:.3g}) includes 0: these points do not determine it")
    if "E" in law.constants:
        floor = _NO_FLOOR * points.losses.min()
        low, high = law.intervals.get("E", (np.inf, np.inf))
        if floor > law.E:
            notes.append(f"E ran to {law.E:.3g}, as good as 0: these points show no floor of the loss")
        elif low < floor:
            notes.append(f"E's interval ({low:.3g} to {high:.3g}) reaches 0: these points do not determine the floor")
        below = [name for name, loss in zip(points.names, points.losses, strict=True) if loss <= law.E]
        if below:
            notes.append(f"their loss is at or below the fitted floor E = {law.E:.4g}: {listed(below)}")
    return notes


# ----------------------------------------------------------------------------------------------------------- the draws


def draw(model: Model, theta: Array, y: Array, draws: int, rng: np.random.Generator, delta: float = DELTA) -> Array:
    """The fit again, with weights drawn for the points (the Bayesian bootstrap of Rubin, 1981): (draws, K).

    Weights, where resampled tables would leave points out, keep small tables fittable; and unlike residuals that are
    dealt out anew, they stay true where the scatter differs between points. Where the scatter is within delta the fit
    is one of least squares, whose residuals are smaller than the scatter: the draws are stretched around the fit by
    sqrt(n / (n - K)) and by Student's t over the normal quantile, as far as points beyond the K that any fit runs
    through are within delta. `benchmarks/law_intervals.py` measures what comes of it, and of other schemes.
    """
    points, constants = len(y), len(theta)
    weights = rng.exponential(size=(draws, points))
    found, _ = minimise(model, np.repeat(theta[None], draws, axis=0), y, weights, steps=_REFIT, delta=delta)
    within = int(np.sum(np.abs(y - model(theta[None])[0][0]) < delta))
    share = max(within - constants, 0) / (points - constants)
    student = stdtrit(points - constants, LEVEL[1] / 100) / ndtri(LEVEL[1] / 100)
    stretch = _MARGIN + share * (student * np.sqrt(points / (points - constants)) - 1)
    return theta + min(stretch, _MOST) * (found - theta)


def _spread(residuals: Array, constants: int) -> Array:
    """The residuals that speak of the scatter, around their mean: the fit runs through nearly as many points as it has
    constants, and their zeros say nothing of it."""
    kept = residuals[np.argsort(np.abs(residuals))[min(constants, len(residuals) - 1) :]]
    return kept - kept.mean() if len(kept) > 1 else kept
