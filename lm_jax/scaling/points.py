"""The points that a law is fitted to: which can be used, which are left out, and whether they are enough."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lm_jax.errors import UserError
from lm_jax.scaling.minimise import Array

_SAME = 0.05  # of a logarithm: sizes and budgets within 5% of each other are one, as those of a sweep never are exact
_NAMED = 8  # in a message


@dataclass(frozen=True)
class Points:
    """Finite, positive points (M,), what they are called, and what was left out."""

    parameters: Array
    tokens: Array
    losses: Array
    names: tuple[str, ...]
    notes: tuple[str, ...]


def listed(names: Iterable[str]) -> str:
    """`a, b, c and 5 more`."""
    found = list(names)
    rest = len(found) - _NAMED
    return ", ".join(found[:_NAMED]) + (f" and {rest} more" if rest > 0 else "")


def usable(
    columns: dict[str, ArrayLike], names: Sequence[str] | None = None
) -> tuple[dict[str, Array], tuple[str, ...], list[str]]:
    """The rows of a table in which every entry is a finite number above zero.

    Args:
      columns: arrays of one length, by what they are called.
      names: of the rows; `point 0`, ... if not given.

    Returns:
      The columns as float64 with these rows alone, the rows' names, and a note for each column with others.

    Raises:
      UserError: columns that are no numbers, or of different lengths; no row is left.
    """
    arrays: dict[str, Array] = {}
    for key, column in columns.items():
        try:
            arrays[key] = np.asarray(column, np.float64)
        except (TypeError, ValueError):
            raise UserError(f"{key} are no numbers") from None
        if arrays[key].ndim != 1:
            raise UserError(f"{key} have the shape {arrays[key].shape}: give one number a point")
    lengths = {key: len(array) for key, array in arrays.items()} | ({"names": len(names)} if names is not None else {})
    if len(set(lengths.values())) > 1:
        told = ", ".join(f"{count} {key}" for key, count in lengths.items())
        raise UserError(f"there are {told}: give as many of each")
    rows = len(next(iter(arrays.values())))
    called = tuple(str(name) for name in names) if names is not None else tuple(f"point {i}" for i in range(rows))
    keep = np.ones(rows, bool)
    notes = []
    for key, array in arrays.items():
        bad = ~(np.isfinite(array) & (array > 0))
        if bad.any():
            notes.append(f"left out, as their {key} are no finite numbers above 0: {listed(_pick(called, bad))}")
        keep &= ~bad
    if not keep.any():
        raise UserError(
            f"no point can be used: of {rows}, none has finite {' and '.join(arrays)} above 0" if rows else "no points"
        )
    return {key: array[keep] for key, array in arrays.items()}, _pick(called, keep), notes


def read_points(
    parameters: ArrayLike, tokens: ArrayLike, losses: ArrayLike, *, names: Sequence[str] | None, constants: int
) -> Points:
    """The points that a law of so many constants in N and D can be fitted to.

    Runs of one size and one number of tokens with different losses are seeds, and all count. A row that is there twice,
    loss and all, counts once.

    Raises:
      UserError: too few points, or points that do not tell the law's terms apart; says which.
    """
    table, called, notes = usable({"parameters": parameters, "tokens": tokens, "losses": losses}, names)
    rows = np.stack(list(table.values()), axis=1)
    first = np.zeros(len(rows), bool)
    first[np.unique(rows, axis=0, return_index=True)[1]] = True
    if not first.all():
        notes.append(
            f"left out, as the same parameters, tokens and loss are there before: {listed(_pick(called, ~first))}"
        )
    N, D, L = rows[first].T
    points = Points(N, D, L, _pick(called, first), tuple(notes))
    _check_enough(points, constants)
    return points


def _check_enough(points: Points, constants: int) -> None:
    count = len(points.losses)
    left_out = f"\n{points.notes[0]}" if points.notes else ""
    if count <= constants:
        raise UserError(f"{count} points are too few for {constants} constants: give {constants + 1} or more{left_out}")
    n, d = np.log(points.parameters), np.log(points.tokens)
    one = {
        "one size of model": (n, "tokens alone vary: the law's term of parameters cannot be told from its floor"),
        "one number of tokens": (d, "sizes alone vary: the law's term of tokens cannot be told from its floor"),
        "one budget (parameters x tokens)": (n + d, "where one term falls the other rises: give two budgets or more"),
        "one ratio of tokens to parameters": (d - n, "the two terms fall together: give other ratios as well"),
    }
    for what, (values, why) in one.items():
        if np.ptp(values) < _SAME:
            raise UserError(f"all {count} points are of {what}\n{why}{left_out}")
    for what, values in {"sizes of model": n, "numbers of tokens": d}.items():
        distinct = 1 + int(np.sum(np.diff(np.sort(values)) > _SAME))
        if distinct < 3:
            raise UserError(
                f"the points have {distinct} {what}: give 3 or more, as a power law has two constants{left_out}"
            )


def _pick(names: Sequence[str], keep: NDArray[np.bool_]) -> tuple[str, ...]:
    return tuple(name for name, kept in zip(names, keep, strict=True) if kept)
