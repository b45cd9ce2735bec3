"""A trace holds the steps that were asked for, and no others."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from etils import epath
from jax.profiler import ProfileData

from lm_jax.errors import Failure, UserError
from lm_jax.training.profile import StepTrace, parse_steps


def test_steps_are_first_and_last() -> None:
    assert list(parse_steps("10:12", 12)) == [10, 11, 12] and list(parse_steps("3:3", 5)) == [3]


@pytest.mark.parametrize("text", ["15:10", "x", "10", "0:3", "-1:3", "1:2:3", "1.5:2", "", "9:21"])
def test_other_values_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="--profile_steps=") as refused:
        parse_steps(text, 20)
    assert len(str(refused.value).splitlines()) <= 3


def traced(folder: Path, steps: range | None, run: range) -> tuple[list[Path], list[str]]:
    """The trace's files after some steps, and what was told."""
    lines: list[str] = []
    add = jax.jit(lambda x: x @ x + 1)
    x = jnp.ones((64, 64))
    with StepTrace(epath.Path(folder), steps, lines.append) as trace:
        for number in run:
            x = trace.run(number, add, x)
    return sorted(folder.rglob("*.pb")), lines


def steps_in(file: Path) -> set[int]:
    """The numbers of the steps that a trace holds, by their annotations."""
    found = set()
    for plane in ProfileData.from_file(str(file)).planes:
        for line in plane.lines:
            for event in line.events:
                if event.name == "train":
                    found |= {int(value) for name, value in event.stats if name == "step_num"}
    return found


@pytest.mark.parametrize(
    ("steps", "run", "held"),
    [
        (range(3, 6), range(1, 9), (3, 4, 5)),
        (range(3, 6), range(5, 9), (5,)),  # the run went on from a checkpoint
        (range(3, 6), range(1, 5), (3, 4)),  # the run was stopped
    ],
)
def test_a_trace_holds_its_steps(tmp_path: Path, steps: range, run: range, held: tuple[int, ...]) -> None:
    (file,), (*before, line) = traced(tmp_path, steps, run)
    went_on = run[0] > steps[0]
    assert before == ["--profile_steps=3:5: the run goes on at step 5, so steps 5 to 5 are traced"] * went_on
    assert file == tmp_path / f"profile/plugins/profile/steps_{held[0]}_{held[-1]}/process_0.xplane.pb"
    assert steps_in(file) == set(held)
    assert str(file.parent) in line and "xprof --logdir" in line


def test_no_trace_where_none_is_asked_for(tmp_path: Path) -> None:
    assert traced(tmp_path, None, range(1, 9)) == ([], [])
    told = "--profile_steps=3:5: the run goes on at step 6, so nothing is traced"
    assert traced(tmp_path, range(3, 6), range(6, 9)) == ([], [told])
    assert list(tmp_path.iterdir()) == []


def test_a_step_that_fails_keeps_its_own_error(tmp_path: Path) -> None:
    def step() -> None:
        raise Failure("the disk is full")

    with pytest.raises(Failure, match="the disk is full"), StepTrace(epath.Path(tmp_path), range(1, 3), print) as trace:
        trace.run(1, step)
    assert not (tmp_path / "profile").exists()
