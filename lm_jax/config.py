"""From a ConfigDict to frozen dataclasses, and back to plain values.

A config file builds a `ConfigDict`; that is what a user edits and overrides. Each section's dataclass is declared, with
its own checks, beside the code that it configures. Here is only the machinery between the two: types, unknown keys, and
what to say about them. `defaults` makes the ConfigDict from the dataclasses, so a default is written down once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import math
import numbers
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, TypeVar

from ml_collections import ConfigDict, FieldReference

from lm_jax.errors import ConfigError

T = TypeVar("T")

# ----------------------------------------------------------------------------------------------- mapping -> dataclasses


def build(cls: type[T], values: Mapping[str, Any] | ConfigDict, section: str = "") -> T:
    """An instance of the dataclass `cls`, its fields' types checked and converted.

    What converts is what loses nothing: a whole number to a float, `3.0` to an int, a list to a tuple. A field that is
    itself a dataclass is a section of its own; one that is left out is built from its defaults.

    Args:
      cls: a dataclass.
      values: a value a field; a field with a default may be left out.
      section: what stands before the fields' names in messages (`optimizer`); empty for the whole config.

    Raises:
      ConfigError: names the key, its value, and what would be right.
    """
    plain = values.to_dict() if isinstance(values, ConfigDict) else values
    hints = _hints(cls)
    for key in plain:
        if key not in hints:
            known = [_join(section, name) for name in hints]
            raise ConfigError(
                _join(section, str(key)), "there is no such key", did_you_mean(_join(section, str(key)), known)
            )
    built: dict[str, Any] = {}
    for field in _fields(cls):
        key = _join(section, field.name)
        hint = hints[field.name]
        if field.name in plain:
            built[field.name] = _convert(plain[field.name], hint, key)
        elif not _has_default(field):
            if not dataclasses.is_dataclass(hint):
                raise ConfigError(key, "is not given, and has no default", f"give {_wanted(hint)}")
            built[field.name] = _convert({}, hint, key)
    return cls(**built)


def _convert(value: Any, hint: Any, key: str) -> Any:
    """`value` as the type `hint`."""
    if hint is Any:
        return value
    options = _without_none(hint)
    if value is None:
        if len(options) < len(_options(hint)):
            return None
        raise ConfigError(key, "is not given, and has no default", f"give {_wanted(hint)}")
    if len(options) > 1:
        return _convert_to_one_of(value, hint, options, key)
    (kind,) = options
    origin = typing.get_origin(kind)
    if origin is Literal:
        return _convert_choice(value, typing.get_args(kind), key)
    if origin is tuple:
        return _convert_tuple(value, kind, key)
    if origin in (dict, Mapping) or dataclasses.is_dataclass(kind):
        if not isinstance(value, Mapping):
            raise ConfigError(key, f"{_show(value)} is no mapping of keys to values", f"give {_wanted(hint)}")
        if dataclasses.is_dataclass(kind):
            return build(typing.cast(type, kind), value, key)
        item = typing.get_args(kind)[1]
        return {_convert(k, str, key): _convert(v, item, _join(key, str(k))) for k, v in value.items()}
    return _convert_scalar(value, kind, key)


def _convert_to_one_of(value: Any, hint: Any, options: list[Any], key: str) -> Any:
    for option in options:
        try:
            return _convert(value, option, key)
        except ConfigError:
            continue
    raise ConfigError(key, f"{_show(value)} is not {_wanted(hint)}")


def _convert_choice(value: Any, choices: tuple[Any, ...], key: str) -> Any:
    for choice in choices:
        if value == choice and isinstance(value, bool) == isinstance(choice, bool):
            return choice
    near = difflib.get_close_matches(str(value), [str(c) for c in choices], n=1)
    listed = ", ".join(str(c) for c in choices)
    raise ConfigError(key, f"{_show(value)} is none of {listed}", f"did you mean {near[0]}?" if near else "")


def _convert_tuple(value: Any, kind: Any, key: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise ConfigError(key, f"{_show(value)} is no list", f"give {_wanted(kind)}")
    items = typing.get_args(kind)
    if items[-1] is Ellipsis:
        items = (items[0],) * len(value)
    if len(items) != len(value):
        raise ConfigError(key, f"{_show(value)} has {len(value)} entries", f"give {len(items)}")
    return tuple(_convert(v, item, f"{key}[{i}]") for i, (v, item) in enumerate(zip(value, items, strict=True)))


def _convert_scalar(value: Any, kind: Any, key: str) -> Any:
    if kind not in _NAMES:
        raise TypeError(f"{key}: a config field cannot be of type {kind}")
    problem = f"{_show(value)} is not {_NAMES[kind]}"
    if kind is bool or kind is str:
        if not isinstance(value, kind):
            raise ConfigError(key, problem)
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ConfigError(key, problem)
    number: Any = value
    try:
        finite = math.isfinite(number)
    except OverflowError:  # a whole number beyond any float
        finite = kind is int
    if not finite:
        raise ConfigError(key, f"{_show(value)} is not finite", f"give {_NAMES[kind]}")
    if kind is int and number != int(number):
        raise ConfigError(key, problem)
    return kind(number)


# ------------------------------------------------------------------------------------------------ dataclasses -> values


def defaults(cls: type) -> ConfigDict:
    """A ConfigDict with every key of the dataclass `cls` at its default: what a config file starts from.

    It is locked, so that a typo in a config file is an error there; only mappings with names of the user's own
    (`evaluation.sets`) stay open. A field without a default is None until it is set. Optional fields keep their type.
    """
    open_mappings: list[ConfigDict] = []
    config = _defaults(cls, open_mappings).lock()
    for mapping in open_mappings:
        mapping.unlock()
    return config


def _defaults(cls: type, open_mappings: list[ConfigDict]) -> ConfigDict:
    config = ConfigDict()
    hints = _hints(cls)
    for field in _fields(cls):
        options = _without_none(hints[field.name])
        kind = options[0]
        if dataclasses.is_dataclass(kind):
            # Not of an instance: what a section works out from its other fields stays open here.
            config[field.name] = _defaults(typing.cast(type, kind), open_mappings)
            continue
        value = _default(field)
        if typing.get_origin(kind) in (dict, Mapping):
            config[field.name] = ConfigDict(dict(value or {}))
            open_mappings.append(config[field.name])
        else:
            held = _held_type(kind) if len(options) == 1 else object
            # A reference keeps its type when its value is None; a plain value would take any type after that.
            config[field.name] = FieldReference(
                _convert(value, hints[field.name], field.name) if value is not None else None, held
            )
    return config


def _held_type(kind: Any) -> type:
    """What a ConfigDict holds for a field of this type."""
    if typing.get_origin(kind) is Literal:
        found = {type(choice) for choice in typing.get_args(kind)}
        return found.pop() if len(found) == 1 else object
    if typing.get_origin(kind) is tuple:
        return tuple
    return kind if kind in _NAMES else object


def to_dict(instance: Any) -> dict[str, Any]:
    """A dataclass as nested dicts and lists of plain values, fit for JSON. `build` makes an equal one of them."""
    return {field.name: _plain(getattr(instance, field.name)) for field in _fields(type(instance))}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_dict(value)
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value


def completed(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """What `to_dict` wrote when the dataclass `cls` had fewer fields, with each later one at its default."""
    full = {**defaults(cls).to_dict(), **values}
    for name, hint in _hints(cls).items():
        kind = _without_none(hint)[0]
        if dataclasses.is_dataclass(kind) and isinstance(values.get(name), Mapping):
            full[name] = completed(typing.cast(type, kind), values[name])
    return full


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, by dotted key. An empty mapping has no keys and is left out."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, _join(prefix, str(key)))
        else:
            flat[_join(prefix, str(key))] = value
    return flat


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What changed from one config (as of `to_dict`) to another, a line a key: `train.steps: 100 -> 200`."""
    absent = object()
    before, after = flatten(_plain(old)), flatten(_plain(new))
    lines = []
    for key in [*after, *(k for k in before if k not in after)]:
        a, b = before.get(key, absent), after.get(key, absent)
        if a != b:
            lines.append(f"{key}: {'absent' if a is absent else a} -> {'absent' if b is absent else b}")
    return lines


# ------------------------------------------------------------------------------------------------ changing a ConfigDict

# Of these two a run has one: who gives it need not unset the config's other.
_EITHER = {"train.steps": "train.tokens", "train.tokens": "train.steps"}


def locate(config: ConfigDict, key: str, prefix: str = "") -> tuple[ConfigDict, str]:
    """The section that a dotted key is in, and its name there.

    Args:
      config: all sections.
      key: `optimizer.learning_rate`.
      prefix: what stands before keys in messages (`--config.`).

    Raises:
      ConfigError: there is no such key; names the nearest.
    """
    *path, name = key.split(".")
    section: Any = config
    for part in path:
        section = section.get(part) if isinstance(section, ConfigDict) else None
    if isinstance(section, ConfigDict) and (name in section or not section.is_locked):
        return section, name
    near = nearest(key, flatten(config.to_dict()))
    remedy = f"did you mean {prefix}{near}?" if near else f"the sections are {', '.join(config.keys())}"
    raise ConfigError(prefix + key, "there is no such key", remedy)


def assign(config: ConfigDict, values: Mapping[str, Any], prefix: str = "") -> ConfigDict:
    """`config` with other values, by dotted key. Where a run has one of two keys, giving one unsets the other.

    Raises:
      ConfigError: there is no such key, or its value is of another type.
    """
    for key, value in values.items():
        section, name = locate(config, key, prefix)
        try:
            section[name] = value
        except TypeError:
            wanted = _NAMES.get(section.get_type(name), section.get_type(name).__name__)
            raise ConfigError(prefix + key, f"{_show(value)} is not {wanted}") from None
        other = _EITHER.get(key)
        if other is not None and value is not None and other not in values:
            with contextlib.suppress(ConfigError):  # a config that has only one of them
                there, last = locate(config, other)
                there[last] = None
    return config


# -------------------------------------------------------------------------------------------------------------- secrets

REDACTED = "<redacted>"
_SECRET_WORDS = {"secret", "secrets", "password", "passwd", "passphrase", "credential", "credentials", "apikey"}
_SECRET_KEYS = {"api", "access", "private", "secret", "encryption", "signing"}  # ..._key
_TEXT_TOKENS = {
    "bos",
    "eos",
    "pad",
    "unk",
    "mask",
    "sep",
    "cls",
    "start",
    "end",
    "special",
}  # ..._token: a piece of text
_URL_PASSWORD = re.compile(r"(?<=://)[^/@\s]*:[^/@\s]*(?=@)")


def redact(values: Mapping[str, Any]) -> dict[str, Any]:
    """A copy without secrets: values of keys that name one (`api_key`, `hf_token`), and passwords inside of URLs."""
    return {key: _redact(value, _names_secret(str(key))) for key, value in values.items()}


def _redact(value: Any, secret: bool) -> Any:
    if isinstance(value, Mapping):
        return {k: _redact(v, secret or _names_secret(str(k))) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_redact(v, secret) for v in value]
    if secret and value is not None:
        return REDACTED
    return _URL_PASSWORD.sub(REDACTED, value) if isinstance(value, str) else value


def _names_secret(key: str) -> bool:
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", key).lower().replace("-", "_").split("_")
    before = words[-2] if len(words) > 1 else ""
    return (
        not _SECRET_WORDS.isdisjoint(words)
        or (words[-1] == "token" and before not in _TEXT_TOKENS)
        or (words[-1] == "key" and before in _SECRET_KEYS)
    )


# ------------------------------------------------------------------------------------------------------------- messages


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that was probably meant, if one comes near: by the last part of dotted names, then by the rest."""

    def alike(a: str, b: str) -> float:
        return difflib.SequenceMatcher(None, a, b).ratio()

    section, _, last = name.rpartition(".")
    best: tuple[float, float, str | None] = (0.6, 0.0, None)
    for k in known:
        known_section, _, known_last = k.rpartition(".")
        best = max(best, (alike(last, known_last), alike(section, known_section), k), key=lambda b: b[:2])
    return best[2]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`did you mean NAME?`, or the known names where none comes near."""
    names = list(known)
    near = nearest(name, names)
    return f"did you mean {near}?" if near else f"known are: {', '.join(names)}"


_NAMES: dict[Any, str] = {int: "a whole number", float: "a number", str: "text", bool: "True or False"}


def _wanted(hint: Any) -> str:
    """A type in words."""
    words = []
    for kind in _options(hint):
        origin, args = typing.get_origin(kind), typing.get_args(kind)
        if kind is type(None):
            words.append("None")
        elif origin is Literal:
            words.append("one of " + ", ".join(str(a) for a in args))
        elif origin is tuple:
            words.append(f"a list, each entry {_wanted(args[0])}" if args[-1] is Ellipsis else f"a list of {len(args)}")
        elif origin in (dict, Mapping):
            words.append(f"a mapping from names to {_wanted(args[1])}")
        else:
            words.append(_NAMES.get(kind, "a mapping of keys to values"))
    return " or ".join(words)


def _show(value: Any) -> str:
    """A value for a message: on one line, not too long."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


# ---------------------------------------------------------------------------------------------------------- dataclasses


def _join(section: str, name: str) -> str:
    return f"{section}.{name}" if section else name


def _fields(cls: Any) -> Iterator[dataclasses.Field[Any]]:
    return (field for field in dataclasses.fields(cls) if field.init)


def _hints(cls: Any) -> dict[str, Any]:
    """The resolved type of each field."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in _fields(cls)}


def _options(hint: Any) -> list[Any]:
    """The members of a union; any other type is its own only member."""
    return list(typing.get_args(hint)) if typing.get_origin(hint) in (typing.Union, types.UnionType) else [hint]


def _without_none(hint: Any) -> list[Any]:
    return [option for option in _options(hint) if option is not type(None)]


def _has_default(field: dataclasses.Field[Any]) -> bool:
    return field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING


def _default(field: dataclasses.Field[Any]) -> Any:
    """A field's default, None where it has none."""
    if field.default_factory is not dataclasses.MISSING:
        factory: Callable[[], Any] = field.default_factory
        return factory()
    return None if field.default is dataclasses.MISSING else field.default
