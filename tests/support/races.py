"""Pallas's interpreter with its race detector, for every TPU kernel that runs."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
from jax.experimental.pallas import tpu as pltpu


@contextlib.contextmanager
def detected(cores: int = 2) -> Iterator[list[Any]]:
    """The TPU kernels that are traced and run inside are watched; gives the list of what was seen of each, in order.

    The detector keeps what it sees in a variable of a module, which the next kernel overwrites: so each kernel's is
    caught where it is made. Nothing is seen of a kernel that asks for the interpreter in another way than by
    `pltpu.InterpretParams(..)`, and `assert_no_races` says so.

    Args:
      cores: how many share out the dimensions of a grid that are called parallel. With one, only copies can race.
    """
    seen: list[Any] = []
    make = interpreter.RaceDetectionState

    def caught(*a: Any, **k: Any) -> Any:
        seen.append(make(*a, **k))
        return seen[-1]

    jax.clear_caches()  # a kernel that was traced before, for the same call, would run as it was then: unwatched
    watching = functools.partial(pltpu.InterpretParams, detect_races=True, num_cores_or_threads=cores)
    try:
        with (
            mock.patch.object(pltpu, "InterpretParams", watching),
            mock.patch.object(interpreter, "RaceDetectionState", caught),
        ):
            yield seen
    finally:
        pltpu.reset_tpu_interpret_mode_state()  # a kernel that raised leaves its memory to the next one


def assert_no_races(seen: list[Any], kernels: int) -> None:
    """That so many kernels ran, all watched, and that no two of their accesses to the same memory lacked an order."""
    assert len(seen) == kernels, f"{len(seen)} kernels ran in the interpreter, not {kernels}"
    for n, state in enumerate(seen):
        assert state.reads and state.writes, f"kernel {n} ran without the race detector"
        assert state.races_found is False, f"kernel {n} has a race: standard output tells where"
