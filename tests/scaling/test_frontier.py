"""Approaches 1 and 2 on losses whose frontier is known in closed form."""

from __future__ import annotations

import numpy as np
import pytest

from lm_jax.errors import UserError
from lm_jax.scaling.frontier import Curve, envelope, group, isoflop
from lm_jax.scaling.laws import known_law
from lm_jax.scaling.minimise import Array

LAW = known_law(E=1.69, A=406.4, B=410.7, alpha=0.34, beta=0.28)
BUDGETS = np.geomspace(1e18, 1e21, 4)
FACTORS = np.exp(np.linspace(-1.2, 1.2, 9))


def runs(scatter: float = 0.0, shift: float = 1.0, seed: int = 0) -> tuple[Array, Array, Array]:
    """N, C and losses around each budget's optimum, or `shift` times it."""
    N = np.concatenate([shift * LAW.optimal(C).parameters.value * FACTORS for C in BUDGETS])
    C = np.repeat(BUDGETS, len(FACTORS))
    noise = np.exp(scatter * np.random.default_rng(seed).standard_normal(len(N)))
    return N, C, LAW.loss(N, C / (6 * N)) * noise


def test_parabolas_find_the_optimum_of_each_budget() -> None:
    N, C, L = runs()
    found = isoflop(N, C, L)
    assert len(found.parabolas) == 4 and found.notes == ()
    for parabola, budget in zip(found.parabolas, BUDGETS, strict=True):
        best = LAW.optimal(budget)
        assert parabola.budget == pytest.approx(budget) and parabola.inside
        assert parabola.parameters == pytest.approx(best.parameters.value, rel=0.05)
        assert parabola.loss == pytest.approx(best.loss.value, rel=1e-3)
        assert parabola.parameters * parabola.tokens * 6 == pytest.approx(budget, rel=1e-6)
        textbook = np.polyfit(np.log(parabola.run_parameters), parabola.run_losses, 2)
        assert np.log(parabola.parameters) == pytest.approx(-textbook[1] / (2 * textbook[0]), abs=1e-6)
        np.testing.assert_allclose(
            parabola.residuals, parabola.run_losses / parabola.curve(parabola.run_parameters) - 1, atol=1e-12
        )
    assert found.parameters.exponent.value == pytest.approx(0.28 / 0.62, abs=1e-3)
    assert found.tokens.exponent.value == pytest.approx(0.34 / 0.62, abs=1e-3)
    slope, intercept = np.polyfit(np.log(BUDGETS), np.log([p.loss for p in found.parabolas]), 1)
    assert found.loss.exponent.value == pytest.approx(slope) and slope < 0
    assert found.loss.at(1e22).value == pytest.approx(np.exp(intercept + slope * np.log(1e22)))


def test_seeds_of_a_size_count_as_their_mean() -> None:
    N, C, L = runs(0.0)
    assert isoflop(N, C, L).scatter is None
    factors = np.array([0.99, 1.0, 1.013])
    shuffled = np.random.default_rng(0).permutation(3 * len(N))
    many = isoflop(*(np.concatenate(x)[shuffled] for x in ([N] * 3, [C] * 3, [L * f for f in factors])))
    means = isoflop(N, C, L * factors.mean())
    assert many.scatter == pytest.approx(np.std(factors, ddof=1) / factors.mean())
    for p, q in zip(many.parabolas, means.parabolas, strict=True):
        assert p.coefficients == pytest.approx(q.coefficients, rel=1e-9)
        np.testing.assert_allclose(p.sizes, np.sort(q.run_parameters))
        np.testing.assert_allclose(p.size_losses, q.run_losses[np.argsort(q.run_parameters)], rtol=1e-12)
        np.testing.assert_allclose(p.size_residuals, q.size_residuals, atol=1e-9)
        assert np.abs(p.residuals).max() > 0.009 > 10 * np.abs(p.size_residuals).max()


def test_exponents_are_within_their_intervals() -> None:
    inside, widths, values = 0, [], []
    for seed in range(100):
        exponent = isoflop(*runs(0.002, seed=seed), bootstrap=200, seed=seed).parameters.exponent
        inside += exponent.low <= 0.28 / 0.62 <= exponent.high
        widths.append(exponent.high - exponent.low)
        values.append(exponent.value)
    assert inside >= 90
    assert 0.8 <= np.median(widths) / (3.92 * np.std(values)) <= 1.3


def test_a_budget_without_a_minimum_inside_is_left_out_by_name() -> None:
    N, C, L = runs()
    small = np.concatenate([N[:9] / 8, N[9:]])
    found = isoflop(small, C, LAW.loss(small, C / (6 * small)))
    assert [p.inside for p in found.parabolas] == [False, True, True, True]
    assert "above the largest size tried" in found.parabolas[0].verdict
    assert "1e+18 FLOPs" in found.notes[0] and "above the largest" in found.notes[0]
    assert found.parameters.exponent.value == pytest.approx(0.28 / 0.62, abs=2e-3)
    large = isoflop(
        np.concatenate([N[:27], N[27:] * 8]), C, np.concatenate([L[:27], LAW.loss(N[27:] * 8, 1e21 / (48 * N[27:]))])
    )
    assert "below the smallest size tried" in large.parabolas[3].verdict
    arch = isoflop(N, C, np.concatenate([3 - 0.1 * np.log(FACTORS) ** 2, L[9:]]))
    assert "opens downwards" in arch.parabolas[0].verdict
    with pytest.raises(UserError, match=r"0 of 4 budgets.*2 are needed"):
        isoflop(N / 20, C, LAW.loss(N / 20, 20 * C / (6 * N)))
    few = isoflop(np.delete(N, range(2, 9)), np.delete(C, range(2, 9)), np.delete(L, range(2, 9)))
    assert "2 sizes of model are too few" in few.notes[0]


def test_budgets_are_told_apart_by_closeness_or_as_given() -> None:
    flops = np.array([1.02e18, 3e18, 1e18, 3.1e18, 0.98e18])
    assert [sorted(g.tolist()) for g in group(flops)] == [[0, 2, 4], [1, 3]]
    assert [sorted(g.tolist()) for g in group(flops, [2e18])] == [[0, 1, 2, 3, 4]]
    N, C, L = runs()
    uneven = C * np.exp(np.random.default_rng(0).uniform(-0.02, 0.02, len(C)))
    assert len(isoflop(N, uneven, L).parabolas) == 4


def test_tokens_are_the_runs_own_where_given() -> None:
    N, C, L = runs()
    own = isoflop(N, C, L, tokens=C / (8 * N))
    assert own.parabolas[0].tokens * own.parabolas[0].parameters * 8 == pytest.approx(1e18, rel=1e-6)
    with pytest.raises(UserError, match="36 parameters, 36 flops, 35 losses"):
        isoflop(N, C, L[:-1])


# ------------------------------------------------------------------------------------------------------------ envelope


def curves(sizes: Array, seeds: int = 1, scatter: float = 0.0) -> list[Curve]:
    rng = np.random.default_rng(0)
    found = []
    for N in sizes:
        for seed in range(seeds):
            C = np.geomspace(6 * N * 2e8, 6 * N * 1e11, 80)
            L = LAW.loss(N, C / (6 * N)) * np.exp(scatter * rng.standard_normal())
            found.append(Curve(f"{N:.3g}/{seed}", float(N), C, L))
    return found


def test_the_envelope_follows_the_optimum() -> None:
    sizes = np.geomspace(1e7, 3e9, 16)
    found = envelope(curves(sizes, seeds=2, scatter=2e-4), bootstrap=100)
    assert found.parameters.exponent.value == pytest.approx(0.28 / 0.62, abs=0.02)
    assert found.tokens.exponent.value == pytest.approx(0.34 / 0.62, abs=0.02)
    assert found.parameters.exponent.low < 0.28 / 0.62 < found.parameters.exponent.high
    middle = found.flops[found.used][found.used.sum() // 2]
    assert found.parameters.at(middle).value == pytest.approx(LAW.optimal(middle).parameters.value, rel=0.15)
    assert found.loss.at(middle).value == pytest.approx(LAW.optimal(middle).loss.value, rel=0.05)
    used = found.run_parameters[found.used]
    assert used.min() > sizes[0] and used.max() < sizes[-1] and "left out" in found.notes[0]
    np.testing.assert_allclose(found.run_tokens * found.run_parameters * 6, found.flops)


def test_curves_that_show_no_frontier() -> None:
    with pytest.raises(UserError, match="2 sizes of model are too few"):
        envelope(curves(np.array([1e8, 1e9])))
    C = np.geomspace(1e18, 1e20, 10)
    apart = [Curve(f"{n}", n, C, 3 / C**0.01 + i) for i, n in enumerate((1e8, 2e8, 4e8))]
    with pytest.raises(UserError, match="one size is the best"):
        envelope(apart)
    with pytest.raises(UserError, match="curve x: no point can be used"):
        envelope([*apart, Curve("x", 1e8, C, C * np.nan)])
    broken = curves(np.geomspace(1e7, 3e9, 8))
    broken[2].losses[5] = np.nan
    assert any(f"{broken[2].name}[5]" in note for note in envelope(broken, bootstrap=10).notes)
