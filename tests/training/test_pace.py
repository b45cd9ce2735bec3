"""Slow steps are told, and only they."""

from __future__ import annotations

from lm_jax.training.pace import Pace


def test_a_slow_step_is_told_and_a_minute_passes_before_the_next() -> None:
    now = [0.0]
    pace = Pace(lambda: now[0])
    assert pace.step(1, 60) is None and pace.step(2, 9) is None  # compile
    assert [pace.step(n, 0.5) for n in range(3, 13)] == [None] * 10
    assert pace.step(13, 1.4) is None  # not by the factor
    assert pace.step(14, 4.0) == "step 14 was slow: 4.0 s, where the median is 0.50 s"
    assert pace.step(15, 4.0) is None and pace.step(16, 0.5) is None
    now[0] = 61
    line = pace.step(17, 4.0)
    assert line == "step 17 was slow: 4.0 s, where the median is 0.50 s; 1 others were slow since the last such line"


def test_short_steps_and_those_after_something_else_are_not() -> None:
    pace = Pace(lambda: 0.0)
    assert [pace.step(n, 0.01) for n in range(1, 20)] == [None] * 19
    assert pace.step(20, 0.9) is None  # ninety times the median, and nobody waited
    pace.rest()
    assert pace.step(21, 30) is None
    assert pace.step(22, 30) is not None


def test_a_run_that_became_slower_is_not_told_for_ever() -> None:
    now = [0.0]
    pace = Pace(lambda: now[0])
    lines = 0
    for n in range(200):
        now[0] += 100
        lines += pace.step(n, 0.5 if n < 30 else 5.0) is not None
    assert 1 <= lines <= 13
