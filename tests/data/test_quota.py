"""Nobody is ever a whole turn away from what is due, and a place is found as if all before it had been gone through."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm_jax.data import quota
from lm_jax.data.quota import FINEST, Quota, Stage, whole_shares

weights = st.one_of(st.integers(0, 5).map(float), st.floats(0, 1, width=32), st.sampled_from((1e-3, 1e-6, 0.1)))


@st.composite
def stages(draw: st.DrawFn) -> list[Stage]:
    sources = draw(st.integers(1, 7))
    found, start = [], 0
    for _ in range(draw(st.integers(1, 4))):
        given_ = draw(st.lists(weights, min_size=sources, max_size=sources).filter(any))
        found.append(Stage(start, whole_shares(given_)))
        start += draw(st.integers(1, 900))
    return found


def slow_dues(stages: list[Stage], places: int) -> list[list[Fraction]]:
    """What each source is due after 0, 1, .. places, added up place by place."""
    dues = [[Fraction(0)] * len(stages[0].shares)]
    for n in range(places):
        shares = next(stage.shares for stage in reversed(stages) if stage.start <= n)
        dues.append([d + Fraction(s, sum(shares)) for d, s in zip(dues[-1], shares, strict=True)])
    return dues


@settings(deadline=None, max_examples=60)
@given(stages(), st.integers(0, 2**32))
def test_no_source_is_a_whole_turn_away_from_its_due(stages: list[Stage], seed: int) -> None:
    places = stages[-1].start + 300
    ties = np.random.default_rng(seed).permutation(len(stages[0].shares)).tolist()
    order = Quota(stages, ties)
    dues, counts = slow_dues(stages, places), [0] * len(ties)
    for n in range(places):
        assert order.counts(n).tolist() == counts
        source, before = order.turn(n)
        assert before == counts[source]
        counts[source] += 1
        assert order.due(n + 1) == dues[n + 1]
        assert all(abs(c - d) < 1 for c, d in zip(counts, dues[n + 1], strict=True))
    fresh = Quota(stages, ties)
    for n in np.random.default_rng(seed).integers(0, places, 20).tolist():  # in any order
        assert fresh.turn(n) == order.turn(n)


@pytest.mark.parametrize(
    "stages",
    [
        [Stage(0, (7, 2, 1))],
        [Stage(0, (7, 2, 1)), Stage(10_007, (1, 0, 4)), Stage(30_011, (1, 1, 1))],
        [Stage(0, (5, 7, 1)), Stage(92, (58, 5, 11)), Stage(684, (1, 51, 1))],  # its last periods differ
        [Stage(0, (3, 3, 3, 1)), Stage(5_000, (0, 0, 0, 1)), Stage(5_100, (97, 1, 1, 1))],
    ],
)
def test_what_repeats_is_what_would_have_been_worked_out(stages: list[Stage], monkeypatch: pytest.MonkeyPatch) -> None:
    """The places of periods that were only repeated are those that the rule takes one after the other."""
    order, places = Quota(stages), stages[-1].start + 2_000
    repeated = [order.turn(n) for n in range(places)]
    worked_out = order._runs
    assert any(run.times > 1 for run in worked_out)
    slow = Quota(stages)
    slow._period = None
    monkeypatch.setattr(Quota, "_extend", lambda self: self._append(np.array(self._picks(0, places), np.uint8), 1))
    assert [slow.turn(n) for n in range(places)] == repeated


def test_a_place_far_away_costs_one_period() -> None:
    order = Quota([Stage(0, (7, 2, 1))])
    counts = order.counts(10**15 + 3)
    assert abs(int(counts[0]) - 0.7 * (10**15 + 3)) < 1 and counts.sum() == 10**15 + 3
    assert sum(len(run.sources) for run in order._runs) <= 20


def test_weights_are_the_decimals_that_were_written() -> None:
    assert whole_shares([0.7, 0.2, 0.1]) == (7, 2, 1)
    assert whole_shares([2.0, 1.0]) == (2, 1)
    assert whole_shares([0.5, 0.0, 0.25]) == (2, 0, 1)
    rounded = whole_shares([1e-9, 1 / 3, 0.123456789])
    assert sum(rounded) == FINEST and rounded[0] == 1
    exact = [1e-9, 1 / 3, 0.123456789]
    assert all(abs(n / FINEST - w / sum(exact)) < 2 / FINEST for n, w in zip(rounded, exact, strict=True))
    many = whole_shares([1.0] + [1e-12] * 50)
    assert sum(many) == FINEST and min(many) == 1


def test_the_seed_decides_who_goes_first() -> None:
    even = [Stage(0, (1, 1))]
    assert Quota(even, [0, 1]).turn(0)[0] == 0 and Quota(even, [1, 0]).turn(0)[0] == 1


def test_more_sources_than_a_byte_are_not_numbered() -> None:
    assert quota.MOST == 256
    order = Quota([Stage(0, (1,) * 256)])
    assert sorted(order.turn(n)[0] for n in range(256)) == list(range(256))
