"""Many runs, declared beside their config.

A config file that declares a sweep has, beside `get_config`, a function of one argument that says which runs there are:

    def sweep(s: Sweep) -> Points:
        widths = s.zip(s.each("model.embed", (64, 128)), s.each("model.heads", (2, 4)))
        return s.product(widths, s.each("optimizer.learning_rate", (1e-3, 2e-3)), s.seeds(3))

A point is what one run changes in the config, and the words that its name is made of. All combinators take and give
lists of points, so they nest. A run's name comes from its own point alone: adding runs to a sweep renames none.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict

from lm_jax import costs
from lm_jax.config import assign, build, flatten, to_dict
from lm_jax.errors import ConfigError, UserError
from lm_jax.training.run import RunConfig

_LONGEST = 150  # of a name: file systems take 255 bytes


@dataclasses.dataclass(frozen=True)
class Point:
    """One run of a sweep, as far as it differs from the config.

    Attributes:
      values: other values, by dotted key.
      labels: what its name says, by word: `{"embed": "64"}`.
    """

    values: Mapping[str, Any]
    labels: Mapping[str, str]

    def and_then(self, other: Point) -> Point:
        """Both; where they disagree, the other's values and words."""
        return Point({**self.values, **other.values}, {**self.labels, **other.labels})


Points = list[Point]
Declare = Callable[["Sweep"], Points]


class Sweep:
    """The combinators, and the config that points change. What a config file's `sweep` is handed.

    Attributes:
      config: the config, with what the command line has changed.
    """

    def __init__(self, config: ConfigDict) -> None:
        self.config = config
        keys = list(flatten(config.to_dict()))
        self._last = [key.rpartition(".")[2] for key in keys]

    def at(self, point: Point) -> ConfigDict:
        """The config of a point."""
        config = ConfigDict(self.config, convert_dict=False).copy_and_resolve_references()
        return assign(config, point.values)

    def _word(self, key: str) -> str:
        """What a key is called in names: its last part where no other key ends so, and says what it is."""
        section, _, last = key.rpartition(".")
        if last == "name":
            return section.rpartition(".")[2]
        return last if self._last.count(last) <= 1 else key

    def each(self, key: str, values: Iterable[Any]) -> Points:
        """A point for each value of a key."""
        return [Point({key: value}, {self._word(key): written(value)}) for value in values]

    def product(self, *axes: Points) -> Points:
        """Each point of the first with each of the second, and so on."""
        return [_joined(combination) for combination in itertools.product(*axes)]

    def zip(self, *axes: Points) -> Points:
        """The first point of each together, the second of each, and so on.

        Raises:
          UserError: where they are not of one length.
        """
        if len({len(points) for points in axes}) > 1:
            lengths = " and ".join(str(len(points)) for points in axes)
            raise UserError(f"sweep: zip is given {lengths} points\nall must be of one length; product takes any")
        return [_joined(together) for together in zip(*axes, strict=True)]

    def chain(self, *sweeps: Points) -> Points:
        """All points of the first, then all of the second, and so on."""
        return [point for points in sweeps for point in points]

    def conditional(self, points: Points, then: Callable[[ConfigDict], Points | Mapping[str, Any] | None]) -> Points:
        """What further holds of a point depends on its config.

        Args:
          points: to go on from.
          then: from a point's config, the points that it becomes (none at all: it is left out); or further values by
            key, which its name does not speak of; or None: it stays as it is.
        """
        result: Points = []
        for point in points:
            more = then(self.at(point))
            if more is None:
                result.append(point)
            elif isinstance(more, Mapping):
                result.append(point.and_then(Point(dict(more), {})))
            else:
                result += [point.and_then(other) for other in more]
        return result

    def seeds(self, n: int) -> Points:
        """`n` points that differ in `train.seed` alone: initial values, and the order of the data."""
        first = self.config.train.seed
        return self.each("train.seed", range(first, first + n))

    def change(self, name: str, values: Mapping[str, Any] | None = None) -> Points:
        """One point under a name of its own, for several keys that belong together (or none: the config as it is)."""
        return [Point(dict(values or {}), {"change": name})]

    def budget(self, flops: Iterable[float], points: Points) -> Points:
        """Each point trained for each of these training FLOPs: sets `train.tokens`.

        The model's vocabulary must be known before there is a tokenizer: `model.vocab`, or `data.vocab_size`.
        """
        spent: Points = []
        for c, point in itertools.product(flops, points):
            config = build(RunConfig, self.at(point)).with_likely_vocab()
            tokens = c / costs.flops_per_token(config.model, config.train.length)
            steps = round(tokens / config.train.tokens_per_step)
            if not steps:
                raise UserError(f"sweep: a budget of {c:g} FLOPs is less than one step of {_name(point)}")
            more = Point({"train.tokens": steps * config.train.tokens_per_step}, {"budget": written(float(c))})
            spent.append(point.and_then(more))
        return spent


def _joined(points: Iterable[Point]) -> Point:
    result = Point({}, {})
    for point in points:
        result = result.and_then(point)
    return result


def written(value: Any) -> str:
    """A value as it stands in a name: `0.003`, `1.5e12`, `squared_relu`, `none`."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        text = f"{value:.6g}"
        return re.sub(r"e([+-])0*(\d)", lambda m: "e" + m[1].replace("+", "") + m[2], text)
    if isinstance(value, list | tuple):
        return "-".join(written(v) for v in value)
    return _plain(str(value))


def _plain(text: str) -> str:
    """Without what folders and shells take amiss."""
    return re.sub(r"[^\w.+-]+", "_", text)


# ---------------------------------------------------------------------------------------------------------------- runs


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of a sweep.

    Attributes:
      name: of its folder.
      labels: what the name says, by word.
      values: what it changes in the sweep's config.
      config: its own, whole.
    """

    name: str
    labels: Mapping[str, str]
    values: Mapping[str, Any]
    config: RunConfig

    @property
    def fingerprint(self) -> str:
        """Of all that decides the run."""
        text = json.dumps(to_dict(self.config), sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    @property
    def tokens(self) -> int:
        train = self.config.train
        return train.total_steps * train.tokens_per_step

    @property
    def flops(self) -> float:
        """Of the whole training."""
        config = self.config.with_likely_vocab()
        return costs.training_flops(config.model, config.train.length, self.tokens)

    @property
    def parameters(self) -> dict[str, int]:
        """By part; see `costs.parameters`."""
        return costs.parameters(self.config.with_likely_vocab().model)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The runs of a sweep, and what is to be said of them."""

    runs: tuple[Run, ...]
    notes: tuple[str, ...]


def plan(config: ConfigDict, declare: Declare) -> Plan:
    """The runs that a config file declares.

    Raises:
      UserError: there are none; a run's config cannot be used (names the run); two different runs have one name.
    """
    s = Sweep(config)
    points = declare(s)
    if not isinstance(points, list) or not all(isinstance(point, Point) for point in points):
        raise UserError("sweep: returned no list of points\nreturn what s.each, s.product and the others give")
    if not points:
        raise UserError("sweep: declares no runs")
    runs: dict[str, Run] = {}
    same: dict[str, str] = {}
    notes: list[str] = []
    for point in points:
        name = _name(point)
        try:
            run = Run(name, dict(point.labels), dict(point.values), build(RunConfig, s.at(point)))
        except ConfigError as e:
            raise UserError(f"run {name}: {e}") from e
        if name in runs and runs[name].config != run.config:
            raise UserError(f"sweep: two different runs have the name {name}\ngive them a word of their own: s.change")
        first = same.setdefault(run.fingerprint, name)
        if name in runs or first != name:
            notes.append(f"{name} is declared twice" if first == name else f"{name} is left out: it is {first}")
        else:
            runs[name] = run
    return Plan(tuple(runs.values()), tuple(notes))


def _name(point: Point) -> str:
    name = ",".join(f"{word}={_plain(text)}" for word, text in point.labels.items()) or "base"
    if len(name) <= _LONGEST:
        return name
    return f"{name[: _LONGEST - 9]},{hashlib.blake2b(name.encode(), digest_size=4).hexdigest()}"
