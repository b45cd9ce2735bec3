"""Held-out budgets and countings on losses whose law is known."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.optimize

from lm_jax.errors import UserError
from lm_jax.scaling.laws import known_law
from lm_jax.scaling.minimise import Array
from lm_jax.scaling.studies import Counting, compare_countings, hold_out_largest

LAW = known_law(E=1.69, A=406.4, B=410.7, alpha=0.34, beta=0.28)


def runs(scatter: float = 0.0, budgets: int = 6) -> tuple[Array, Array, Array]:
    C = np.repeat(np.geomspace(1e18, 3e21, budgets), 9)
    N = np.concatenate([LAW.optimal(c).parameters.value * np.exp(np.linspace(-1.2, 1.2, 9)) for c in C[::9]])
    D = C / (6 * N)
    return N, D, LAW.loss(N, D) * np.exp(scatter * np.random.default_rng(0).standard_normal(len(N)))


def test_the_largest_budget_is_foretold() -> None:
    N, D, L = runs(0.002)
    found = hold_out_largest(N, D, L, bootstrap=200)
    assert found.law.points == 45 and found.law.parameters.max() < N.max()
    assert found.budget == pytest.approx(3e21) and found.where == "the parabola's minimum"
    assert abs(found.error) < 0.004 and found.inside
    assert found.error == pytest.approx(found.predicted.value / found.measured - 1)
    assert found.unchanged == L[36:45].min() and found.unchanged_error > 0.03
    np.testing.assert_allclose(found.point_errors, found.law.loss(N[45:], D[45:]) / L[45:] - 1)


def test_a_world_that_turns_is_not_foretold() -> None:
    """The largest budget was trained worse than the law of the others says."""
    N, D, L = runs(0.002)
    L[45:] *= 1.05
    found = hold_out_largest(N, D, L, bootstrap=200)
    assert found.error == pytest.approx(-0.05, abs=0.01) and not found.inside


def test_without_a_minimum_the_best_run_is_compared() -> None:
    N, D, L = runs()
    keep = np.r_[0:45, 46, 47]
    names = [f"r{i}" for i in range(47)]
    found = hold_out_largest(N[keep], D[keep], L[keep], names=names, bootstrap=0)
    assert found.where == "the best run, r46" and found.parameters == N[47]
    assert found.error == pytest.approx(0, abs=1e-6)
    rng = np.random.default_rng(0)
    sizes, data = 10 ** rng.uniform(7, 10, 60), 10 ** rng.uniform(8, 12, 60)  # no two runs of one budget
    assert hold_out_largest(sizes, data, LAW.loss(sizes, data), bootstrap=0).error == pytest.approx(0, abs=1e-6)
    with pytest.raises(UserError, match="one budget"):
        hold_out_largest(N[:9], D[:9], L[:9])


def test_a_counting_by_six_n_is_the_closed_form() -> None:
    N, D, L = runs(0.002)
    (counted,) = compare_countings(L, {"all": Counting(N, 6 * N, D)}, bootstrap=100)
    closed = counted.law.exponents.a
    assert counted.a == pytest.approx(closed, abs=1e-3)
    assert counted.b.value == pytest.approx(1 - closed.value, abs=1e-3)
    best = counted.law.optimal(counted.budget)
    assert counted.parameters == pytest.approx(best.parameters, rel=2e-3)
    assert counted.tokens.value == pytest.approx(best.tokens.value, rel=2e-3)


def test_countings_move_the_exponents() -> None:
    """Parameters without embeddings, and FLOPs with attention's: against scipy's minimiser on the true law."""
    N, D, L = runs()
    extra = 3e4 * np.sqrt(N)
    body = N - 0.3 * extra
    both = {"all": Counting(N, 6 * N, D), "attention": Counting(N, 6 * N + extra, D), "body": Counting(body, 6 * N, D)}
    plain, attention, without = compare_countings(L, both, bootstrap=0)
    assert [c.name for c in (plain, attention, without)] == list(both)

    def log_best(log_C: float) -> float:
        def loss(n: float) -> float:
            return float(LAW.loss(np.exp(n), np.exp(log_C) / (6 * np.exp(n) + 3e4 * np.exp(n / 2))))

        return scipy.optimize.minimize_scalar(loss, bounds=(10, 30), method="bounded", options={"xatol": 1e-8}).x

    middle = np.log(attention.budget)
    step = 0.5 * np.log(10)
    expected = (log_best(middle + step) - log_best(middle - step)) / (2 * step)
    assert attention.a.value == pytest.approx(expected, abs=2e-3)
    assert abs(attention.a.value - plain.a.value) > 5e-3
    assert np.log(attention.parameters.value) == pytest.approx(log_best(middle), abs=5e-3)
    assert without.a.value > plain.a.value + 0.01  # the small models lose most
    with pytest.raises(UserError, match="the counting short: there are"):
        compare_countings(L, {"short": Counting(N[1:], 6 * N, D)})
    with pytest.raises(UserError, match="no counting"):
        compare_countings(L, {})
