"""A few blows of `tests.chaos`, each at a moment that was chosen: losing nothing, whatever ends a process."""

from __future__ import annotations

import copy
import math
import os
import random
from pathlib import Path
from signal import SIGINT, SIGKILL, SIGTERM

import pytest

from tests import chaos
from tests.chaos import Blow, Reference, Run, World


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    # Programs compiled for other tests that start processes serve here too: see tests/conftest.py.
    return World(tmp_path_factory.mktemp("chaos"), Path(os.environ["LM_JAX_CACHE"]) / "xla")


def struck(world: World, name: str, processes: int, *blows: Blow) -> Run:
    run = Run(world, name, processes)
    for blow in blows:
        assert run.strike(blow), f"finished before {blow}"
    run.finish()
    assert run.resumes == len(blows)
    return run


def test_one_process(world: World) -> None:
    struck(world, "one", 1, Blow(SIGKILL, "saving", 15), Blow(SIGTERM, "stepping", 40))


def test_two_processes(world: World) -> None:
    run = struck(
        world, "two", 2, Blow(SIGTERM, "stepping", 10, victims=(1,)), Blow(SIGKILL, "saving", 30, victims=(0,))
    )
    assert 0 < run.alone < chaos.PATIENCE  # the other one noticed, and ended by itself


@pytest.mark.slow
def test_two_processes_the_other_way(world: World) -> None:
    blows = (Blow(SIGINT, "stepping", 10, victims=(0,)), Blow(SIGKILL, "stepping", 25, victims=(1,)))
    run = struck(world, "other_way", 2, *blows, Blow(SIGTERM, "retiring", 40, victims=(0, 1)))
    assert run.alone > 0


@pytest.mark.slow
@pytest.mark.parametrize("number", range(30))
def test_random_blows(world: World, number: int) -> None:
    chaos.chaos_run(world, f"run_{number}", 1 + number % 2, random.Random(number))


def test_what_differs_is_told(world: World) -> None:
    """The comparison itself can fail."""
    run = Run(world, "reference_1", 1)  # the reference, taken for a run that was struck
    run._compare()
    for spoil, told in ((_spoil_a_record, "a record differs"), (_spoil_a_leaf, "last checkpoint differ")):
        run.reference = copy.deepcopy(world.reference(1))
        spoil(run.reference)
        with pytest.raises(chaos.Different, match=told):
            run._compare()


def _spoil_a_record(reference: Reference) -> None:
    record = next(r for r in reference.records if r["step"] == 5)
    record["loss"] = math.nextafter(record["loss"], 0)


def _spoil_a_leaf(reference: Reference) -> None:
    next(iter(reference.leaves.values()))["fingerprint"] ^= 1
