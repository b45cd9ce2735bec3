"""Rows of several sources in given proportions, exact from the first row to any other.

Each row is of one source. Whose turn row `n` is, is the order of `quota.py`, a function of the weights and `n`; a
source gives its own rows in its own order, epoch after epoch, whatever the others do. So another source, or another
weight from some row on, leaves the order of every source's rows as it was.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction

import numpy as np

from lm_jax.data.cache import digest
from lm_jax.data.packing import Pieces, Rows, by_group, key
from lm_jax.data.quota import MOST, Quota, Stage, whole_shares
from lm_jax.errors import ConfigError

LARGEST = 1e9  # beyond it a weight is a mistake
Weight = float | tuple[tuple[int, float], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixtureSource:
    """A source of a mixture.

    Attributes:
      source: as `data.source`.
      weight: its weight beside the others', a number; or, to change it, pairs of (tokens trained on so far, weight from
        there on), the first at 0.
      max_epochs: the most passes over it; None for `data.max_epochs`.
      field, prompt_field: as of `data`; None for its own.
    """

    source: str | tuple[str, ...]
    weight: Weight = 1.0
    max_epochs: int | None = None
    field: str | None = None
    prompt_field: str | None = None

    @property
    def pairs(self) -> tuple[tuple[int, float], ...]:
        """The weight as (tokens, weight from there on)."""
        return ((0, float(self.weight)),) if isinstance(self.weight, int | float) else self.weight


def check(mixture: Mapping[str, MixtureSource]) -> None:
    """Raises ConfigError where a mixture of the config cannot be met."""
    if len(mixture) > MOST:
        raise ConfigError("data.mixture", f"{len(mixture)} sources are too many", f"give at most {MOST}")
    for name, one in mixture.items():
        where = f"data.mixture.{name}"
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            raise ConfigError(where, "is no name of letters, digits, '-' and '_'")
        if not one.source or not all(one.source):
            raise ConfigError(f"{where}.source", "is empty", "give a file, a directory or a glob")
        starts = [tokens for tokens, _ in one.pairs]
        if not starts or starts[0] != 0 or starts != sorted(set(starts)):
            remedy = "give pairs (tokens, weight) whose first tokens are 0, each later than the one before"
            raise ConfigError(f"{where}.weight", f"{one.weight!r} is no schedule", remedy)
        for _, weight in one.pairs:
            if not 0 <= weight <= LARGEST:
                raise ConfigError(f"{where}.weight", f"{weight} is no weight", f"give 0 to {LARGEST:g}")
        if not any(weight for _, weight in one.pairs):
            raise ConfigError(f"{where}.weight", "is always 0", "leave the source out, or give it a weight")
        if one.max_epochs is not None and one.max_epochs < 1:
            raise ConfigError(f"{where}.max_epochs", f"{one.max_epochs} is too small", "give 1 or more")
    for tokens in _changes(mixture):
        if mixture and not any(_at(one, tokens) for one in mixture.values()):
            raise ConfigError("data.mixture", f"all weights are 0 from {tokens:,} tokens on", "give one a weight there")


def _changes(mixture: Mapping[str, MixtureSource]) -> list[int]:
    return sorted({tokens for one in mixture.values() for tokens, _ in one.pairs})


def _at(one: MixtureSource, tokens: int) -> float:
    """The weight of a source when so many tokens were trained on."""
    return one.pairs[bisect.bisect_right([t for t, _ in one.pairs], tokens) - 1][1]


class Mixture:
    """Rows of several sources, each row of one of them.

    Attributes:
      names, parts: the sources, and the rows of each.
      quota: whose turn each row is.
      length, pairs, left_out, rows_per_epoch: as of `Rows`; an epoch is as many rows as the sources have together.
    """

    def __init__(
        self,
        names: Sequence[str],
        parts: Sequence[Rows],
        sizes: Sequence[int],
        stages: Sequence[Stage],
        seed: int | None,
    ) -> None:
        """Rows of sources in turn.

        Args:
          names, parts: the sources and the rows of each, all of one length.
          sizes: how many documents each has, those of the other sides included: how the pieces' documents are counted.
          stages: the shares of rows.
          seed: decides who goes first where two are due alike.
        """
        self.names, self.parts = tuple(names), tuple(parts)
        self.firsts = [0, *itertools.accumulate(sizes)]
        self.length = parts[0].length
        self.pairs = sum(part.pairs for part in parts)
        self.left_out = sum(part.left_out for part in parts)
        self.rows_per_epoch = sum(part.rows_per_epoch for part in parts)
        self.quota = Quota(stages, None if seed is None else [key(seed, i, "mixture") for i in range(len(parts))])

    @property
    def fingerprint(self) -> str:
        return digest(f"mixture 1{self._shares}", *self.names, *(part.fingerprint for part in self.parts))

    @property
    def way(self) -> str:
        ways = dict.fromkeys(part.way for part in self.parts)
        return f", mixed {self._shares}" + "".join(ways)

    @property
    def _shares(self) -> str:
        stages = [
            ", ".join(f"{n} {s}" for n, s in zip(self.names, stage.shares, strict=True)) for stage in self.quota.stages
        ]
        starts = ["", *(f"from row {stage.start} " for stage in self.quota.stages[1:])]
        return "; ".join(start + shares for start, shares in zip(starts, stages, strict=True))

    def name_of(self, document: int) -> str:
        which = bisect.bisect_right(self.firsts, document) - 1
        return f"{self.names[which]}, {self.parts[which].name_of(document - self.firsts[which])}"

    def pieces(self, rows: np.ndarray) -> Pieces:
        turns = np.array([self.quota.turn(n) for n in np.asarray(rows).tolist()], np.int64).reshape(-1, 2)

        def of_part(which: int, here: np.ndarray) -> Pieces:
            found = self.parts[which].pieces(turns[here, 1])
            return found._replace(documents=found.documents + self.firsts[which])

        return by_group(turns[:, 0], of_part)

    def consumed(self, rows: int) -> dict[str, int]:
        """How many of the first rows are of each source."""
        return dict(zip(self.names, self.quota.counts(rows).tolist(), strict=True))


def stages_of(
    mixture: Mapping[str, MixtureSource], parts: Mapping[str, Rows], documents: Mapping[str, int] | None
) -> list[Stage]:
    """The shares of rows that weights come to.

    Args:
      mixture: the config's.
      parts: the rows of each source.
      documents: how many each source trains on, where weights are of documents. None where they are of tokens: a row
        counts as full, which all but a few are under every packing.
    """
    scale = {
        name: Fraction(part.rows_per_epoch, documents[name] if documents else part.rows_per_epoch)
        for name, part in parts.items()
    }
    length = next(iter(parts.values())).length
    stages: dict[int, Stage] = {}
    for tokens in _changes(mixture):
        weights = [Fraction(repr(_at(one, tokens))) * scale[name] for name, one in mixture.items()]
        start = math.ceil(tokens / length)
        stages[start] = Stage(start, whole_shares(weights))  # the later of two changes in one row
    for i, name in enumerate(mixture):
        if not any(stage.shares[i] for stage in stages.values()):
            problem = f"is above 0 for less than a row of {length} tokens: the source would never be read"
            raise ConfigError(f"data.mixture.{name}.weight", problem, "leave the source out, or let it hold for longer")
    return list(stages.values())


def side_by_side(names: Sequence[str], parts: Sequence[Rows], sizes: Sequence[int]) -> Mixture:
    """All rows of all sources once, evenly among one another: so that the first few of them stand for all."""
    shares = np.array([part.rows_per_epoch for part in parts])
    divisor = int(np.gcd.reduce(shares))
    return Mixture(names, parts, sizes, [Stage(0, tuple((shares // divisor).tolist()))], None)


def check_epochs(mixture: Mapping[str, MixtureSource], rows: Mixture, total: int, default: int) -> None:
    """Refuses a run that would read a source of a mixture too often.

    Args:
      mixture: the config's.
      rows: what it came to.
      total: all rows that the run will have consumed.
      default: passes allowed where the source says nothing.

    Raises:
      ConfigError: names the source, how many passes it would be, and the tokens that would be allowed.
    """
    counts = rows.consumed(total)
    for part, (name, one) in zip(rows.parts, mixture.items(), strict=True):
        most = one.max_epochs or default
        allowed = most * part.rows_per_epoch
        if counts[name] > allowed:
            where = f"data.mixture.{name}.max_epochs" if one.max_epochs else "data.max_epochs"
            reached = bisect.bisect_left(range(total), allowed + 1, key=lambda n: rows.consumed(n)[name]) - 1
            raise ConfigError(
                where,
                f"the run asks for {counts[name] / part.rows_per_epoch:.1f} passes over {name}; {most} are allowed, "
                f"which {reached * rows.length:,} of the run's {total * rows.length:,} tokens reach",
                f"lower its weight (data.mixture.{name}.weight), add text to it, train on fewer tokens, or allow more",
            )
