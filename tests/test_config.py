import dataclasses
import json
import math
from typing import Any, Literal

import numpy as np
import pytest
from ml_collections import ConfigDict

from lm_jax import config as config_lib
from lm_jax.config import build, completed, defaults, differences, nearest, redact, to_dict
from lm_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    layers: int
    embed: int = 64
    vocab: int | None = None
    pattern: tuple[str, ...] = ("attention",)
    window: tuple[int, int] = (0, 0)
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    scan: bool = True

    def __post_init__(self) -> None:
        if self.layers < 1:
            raise ConfigError("model.layers", f"{self.layers} is no number of layers", "use 1 or more")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
    learning_rate: float = 1
    clip_norm: float | None = 1.0
    name: Literal["adamw", "lion"] = "adamw"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    every: int = 100
    source: str | tuple[str, ...] = "python"
    sets: dict[str, str] = dataclasses.field(default_factory=dict)
    weights: dict[str, float] = dataclasses.field(default_factory=lambda: {"a": 1})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    model: Model
    optimizer: Optimizer = dataclasses.field(default_factory=Optimizer)
    evaluation: Evaluation = dataclasses.field(default_factory=Evaluation)


def mistake(values: Any, cls: type = Run, section: str = "") -> str:
    with pytest.raises(ConfigError) as e:
        build(cls, values, section)
    assert len(str(e.value).splitlines()) <= 3
    return str(e.value)


def test_a_section_is_built_from_a_mapping() -> None:
    built = build(Model, {"layers": 2, "pattern": ["attention", "mlp"], "window": (1, 2)}, "model")
    assert built == Model(layers=2, pattern=("attention", "mlp"), window=(1, 2))


def test_nested_sections_are_built_and_left_out_ones_take_their_defaults() -> None:
    built = build(Run, {"model": {"layers": 2}, "optimizer": {"learning_rate": 0.5}})
    assert built == Run(model=Model(layers=2), optimizer=Optimizer(learning_rate=0.5))


@pytest.mark.parametrize(
    ("cls", "key", "value", "expected"),
    [
        (Optimizer, "learning_rate", 1, 1.0),
        (Optimizer, "learning_rate", np.float32(0.5), 0.5),
        (Optimizer, "clip_norm", None, None),
        (Model, "embed", 3.0, 3),
        (Model, "embed", 1e9, 10**9),
        (Model, "embed", np.int64(3), 3),
        (Model, "vocab", None, None),
        (Model, "pattern", [], ()),
        (Evaluation, "source", "a", "a"),
        (Evaluation, "source", ["a", "b"], ("a", "b")),
        (Evaluation, "sets", {"wiki": "a.txt"}, {"wiki": "a.txt"}),
        (Evaluation, "weights", {"wiki": 2}, {"wiki": 2.0}),
    ],
)
def test_values_convert_where_nothing_is_lost(cls: type, key: str, value: Any, expected: Any) -> None:
    values = {"layers": 1, key: value} if cls is Model else {key: value}
    built = getattr(build(cls, values, "s"), key)
    assert built == expected
    assert type(built) is type(expected)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("model.embed", "3", "'3' is not a whole number"),
        ("model.embed", 2.5, "2.5 is not a whole number"),
        ("model.embed", True, "True is not a whole number"),
        ("model.embed", math.nan, "nan is not finite"),
        ("model.embed", None, "give a whole number"),
        ("model.vocab", "big", "'big' is not a whole number"),
        ("model.scan", 1, "1 is not True or False"),
        ("model.dtype", "float16", "is none of auto, float32, bfloat16"),
        ("model.dtype", 3, "is none of auto"),
        ("model.pattern", "attention", "'attention' is no list"),
        ("model.window", (1,), "give 2"),
        ("model.layers", 0, "0 is no number of layers"),
        ("optimizer.learning_rate", math.nan, "nan is not finite"),
        ("optimizer.learning_rate", math.inf, "inf is not finite"),
        ("optimizer.learning_rate", 10**400, "is not finite"),
        ("optimizer.learning_rate", "1e-3", "'1e-3' is not a number"),
        ("optimizer.name", "adamv", "did you mean adamw?"),
        ("optimizer", 3, "3 is no mapping"),
        ("evaluation.source", 3, "3 is not text or a list, each entry text"),
        ("evaluation.sets", ["a"], "is no mapping"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_by_its_key(key: str, value: Any, words: str) -> None:
    values: dict[str, Any] = {"model": {"layers": 1}}
    section, _, name = key.partition(".")
    if name:
        values.setdefault(section, {})[name] = value
    else:
        values[section] = value
    message = mistake(values)
    assert message.startswith(f"{key}: ")
    assert words in message


def test_entries_of_lists_and_mappings_are_named() -> None:
    assert mistake({"model": {"layers": 1, "pattern": ["a", 2]}}).startswith("model.pattern[1]: 2 is not text")
    assert mistake({"model": {"layers": 1}, "evaluation": {"sets": {"a": 2}}}).startswith(
        "evaluation.sets.a: 2 is not text"
    )


def test_an_unknown_key_names_the_nearest_known_one() -> None:
    assert mistake({"model": {"layers": 1, "embd": 3}}) == "model.embd: there is no such key\ndid you mean model.embed?"
    assert mistake({"modle": {}}) == "modle: there is no such key\ndid you mean model?"
    assert "known are: model.layers, model.embed" in mistake({"model": {"layers": 1, "xyzzyx": 3}})


def test_a_key_without_default_must_be_given() -> None:
    assert mistake({}) == "model.layers: is not given, and has no default\ngive a whole number"
    assert mistake({"model": {"layers": None}}).startswith("model.layers: is not given")


def test_a_field_of_no_known_type_is_a_fault_of_the_program() -> None:
    cls = dataclasses.make_dataclass("Odd", [("x", complex)])
    with pytest.raises(TypeError, match="complex"):
        build(cls, {"x": 1})


def test_defaults_hold_every_key_and_build_what_the_dataclasses_say() -> None:
    values = defaults(Run)
    assert list(config_lib.flatten(values.to_dict())) and values.model.embed == 64
    assert values.model.layers is None
    values.model.layers = 3
    assert build(Run, values) == Run(model=Model(layers=3))


def test_defaults_keep_types_also_of_values_that_are_none() -> None:
    values = defaults(Run)
    for value in (None, 0.5, 2, None):
        values.optimizer.clip_norm = value
    assert values.optimizer.get_type("clip_norm") is float
    assert values.model.get_type("vocab") is int
    assert values.model.get_type("layers") is int
    assert values.model.get_type("pattern") is tuple
    assert values.model.get_type("dtype") is str
    assert isinstance(values.optimizer.learning_rate, float)  # declared as 1
    for source in ("a.txt", ("a", "b")):
        values.evaluation.source = source
        assert values.evaluation.source == source
    with pytest.raises(TypeError):
        values.model.vocab = "many"


def test_defaults_take_no_new_keys_but_in_open_mappings() -> None:
    values = defaults(Run)
    with pytest.raises(AttributeError, match="embed"):
        values.model.embd = 3
    values.evaluation.sets.wiki = "wiki.txt"
    values.model.layers = 1
    assert build(Run, values).evaluation.sets == {"wiki": "wiki.txt"}
    assert defaults(Run).evaluation.sets.to_dict() == {}


def test_to_dict_is_the_inverse_of_build_through_json() -> None:
    run = build(Run, {"model": {"layers": 2, "window": [3, 4]}, "evaluation": {"sets": {"a": "b"}}})
    assert build(Run, json.loads(json.dumps(to_dict(run)))) == run
    assert to_dict(run)["model"]["window"] == [3, 4]


def test_keys_that_a_config_had_not_yet_are_at_their_defaults() -> None:
    now = to_dict(build(Run, {"model": {"layers": 2}, "evaluation": {"weights": {"b": 2.0}}}))
    before = {section: dict(values) for section, values in now.items()}
    del before["model"]["embed"], before["evaluation"]["every"], before["optimizer"]
    assert differences(completed(Run, before), now) == []  # names of the user's own are not keys that are missing
    assert completed(Run, {"model": {"layers": 2, "embed": 7}})["model"]["embed"] == 7


def test_differences_name_each_changed_key() -> None:
    old = build(Run, {"model": {"layers": 2}, "evaluation": {"sets": {"a": "b"}}})
    new = build(Run, {"model": {"layers": 2, "window": (0, 9)}, "optimizer": {"learning_rate": 0.5, "clip_norm": None}})
    assert differences(json.loads(json.dumps(to_dict(old))), to_dict(new)) == [
        "model.window: [0, 0] -> [0, 9]",
        "optimizer.learning_rate: 1 -> 0.5",
        "optimizer.clip_norm: 1.0 -> None",
        "evaluation.sets.a: b -> absent",
    ]
    assert differences(to_dict(old), to_dict(old)) == []


def test_a_config_dict_is_a_mapping_too() -> None:
    assert build(Run, ConfigDict({"model": {"layers": 2}})) == Run(model=Model(layers=2))


@pytest.mark.parametrize(
    "key",
    [
        "token",
        "hf_token",
        "wandb_api_key",
        "apiKey",
        "password",
        "aws_secret_access_key",
        "credentials",
        "session-token",
    ],
)
def test_secrets_are_redacted(key: str) -> None:
    assert redact({"data": {key: "abc", "source": "x"}}) == {"data": {key: config_lib.REDACTED, "source": "x"}}
    assert redact({key: {"inner": ["abc"]}}) == {key: {"inner": [config_lib.REDACTED]}}
    assert redact({key: None}) == {key: None}


@pytest.mark.parametrize(
    "key", ["tokens", "tokenizer", "tokens_per_step", "bos_token", "key", "text_key", "keys", "author"]
)
def test_what_only_sounds_like_a_secret_stays(key: str) -> None:
    assert redact({key: 3}) == {key: 3}


def test_passwords_in_urls_are_redacted() -> None:
    source = redact({"source": ["https://me:pw@host/a", "s3://bucket/a:b@c"]})["source"]
    assert source == [f"https://{config_lib.REDACTED}@host/a", "s3://bucket/a:b@c"]


def test_nearest() -> None:
    known = ["train.steps", "train.seed", "evaluation.every", "checkpoint.every", "optimizer.learning_rate"]
    assert nearest("train.stps", known) == "train.steps"
    assert nearest("steps", known) == "train.steps"
    assert nearest("evaluation.evry", known) == "evaluation.every"
    assert nearest("checkpoint.evry", known) == "checkpoint.every"
    assert nearest("optim.learning_rate", known) == "optimizer.learning_rate"
    assert nearest("learningrate", known) == "optimizer.learning_rate"
    assert nearest("qqqq.zzzz", known) is None
