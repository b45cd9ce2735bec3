"""The command line that all launchers share.

A launcher declares its flags in a `FlagValues` of its own, and hands its `main` to `run`:

    FLAGS = flags.FlagValues()
    WORKDIR = flags.DEFINE_string("workdir", None, "the run's folder", required=True, flag_values=FLAGS)

    def main(config: ConfigDict) -> int: ...

    if __name__ == "__main__":
        cli.run(main, FLAGS, config=True)

With `config`, the command line takes a config file (`--config=configs/tiny.py`), a variant that it declares
(`--config=configs/tiny.py:muon`), and any of its keys (`--config.train.steps=100`), after ml_collections' manner. They
are parsed here, because theirs answers a typo with a long traceback, cannot set a key back to None, and takes no new
name in a mapping.

A mistake of the user's ends with at most three lines on stderr and exit status 2. To be told of one at once, a launcher
imports what is slow to load (jax, lm_jax.training) inside of `main`.
"""

from __future__ import annotations

import ast
import difflib
import importlib.util
import inspect
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, NoReturn

from absl import flags, logging
from ml_collections import ConfigDict

import lm_jax
from lm_jax.config import assign, did_you_mean, locate
from lm_jax.errors import ConfigError, Failure, UserError

USER_MISTAKE, FAILED = 2, 1
MAX_LINES = 3

Main = Callable[..., int | None]  # main(), main(config), main(config, file), or main(words, command)


class ConfigFile(NamedTuple):
    """What `--config` names.

    Attributes:
      spec: as it was written: `configs/tiny.py:muon`.
      module: the file, executed.
      overrides: the keys that the command line gives, and how it writes their values.
    """

    spec: str
    module: ModuleType
    overrides: list[tuple[str, str | None]]


def run(
    main: Main, flag_values: flags.FlagValues, *, config: bool = False, file: bool = False, command: bool = False
) -> NoReturn:
    """Runs a launcher's `main` on this process's command line, and exits with what it returns (None is 0).

    Args:
      main: the launcher's.
      flag_values: what it declares.
      config: whether it takes a config; `main` is handed its ConfigDict,
      file: and the `ConfigFile` as well, where it declares more than a config.
      command: whether it takes words before its flags, and behind `--` a command for somebody else to run; `main` is
        handed both.
    """
    try:
        code = status(main, flag_values, sys.argv, config=config, file=file, command=command)
    except Exception:
        if not _one_of_many():
            raise
        traceback.print_exc()
        code = FAILED
    if code in (USER_MISTAKE, FAILED) and _one_of_many():
        # Leaving in good order would wait for the job's other processes, which wait for this one.
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _one_of_many() -> bool:
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized()


def status(
    main: Main,
    flag_values: flags.FlagValues,
    argv: Sequence[str],
    *,
    config: bool = False,
    file: bool = False,
    command: bool = False,
) -> int:
    """The exit status of `main` on a command line (`argv[0]` is the program's name). See `run`."""
    logging.set_verbosity(logging.ERROR)  # what orbax and grain tell of their progress
    words: list[str] = []
    theirs: list[str] = []
    if command:
        argv, words, theirs = _apart(argv)
    if any(re.fullmatch(r"--?(h|help|helpfull|helpshort)", arg) for arg in argv[1:]):
        print(usage(main, flag_values, config=config))
        return 0
    try:
        if config:
            spec, overrides, rest = split(argv)
            parse(flag_values, rest, more=("config",))
            if not spec:
                raise UserError("--config is missing\ngive a config file: --config=configs/tiny.py")
            loaded, module = load_file(spec)
            values = overridden(loaded, overrides)
            return (main(values, ConfigFile(spec, module, overrides)) if file else main(values)) or 0
        parse(flag_values, argv)
        return (main(words, theirs) if command else main()) or 0
    except UserError as mistake:
        lines = [line for line in str(mistake).splitlines() if line.strip()]
        print("\n".join(lines[:MAX_LINES]), file=sys.stderr, flush=True)
        return USER_MISTAKE
    except Failure as failure:
        print("\n".join(str(failure).splitlines()[:MAX_LINES]), file=sys.stderr, flush=True)
        return FAILED


def _apart(argv: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """A command line without them, the words in front of its flags, and the command behind `--`."""
    end = argv.index("--") if "--" in argv else len(argv)
    own = list(argv[1:end])
    flags_from = next((i for i, word in enumerate(own) if word.startswith("-")), len(own))
    return [argv[0], *own[flags_from:]], own[:flags_from], list(argv[end + 1 :])


def usage(main: Main, flag_values: flags.FlagValues, *, config: bool) -> str:
    """The launcher's own docstring, and its flags."""
    module = sys.modules.get(main.__module__)
    lines = [(module.__doc__ if module else None) or main.__doc__ or "", "Flags:"]
    if config:
        lines.append("  --config=FILE[:VARIANT]  a config file, and one of the variants that it declares")
        lines.append("  --config.SECTION.KEY=VALUE  another value for one of its keys")
    for name in sorted(flag_values):
        flag = flag_values[name]
        lines.append(f"  --{name}  {flag.help}" + ("" if flag.default is None else f" (default {flag.default})"))
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------------- launchers' flags


def parse(flag_values: flags.FlagValues, argv: Sequence[str], more: Sequence[str] = ()) -> None:
    """Parses a launcher's own flags.

    Args:
      flag_values: what the launcher declared; their values are set.
      argv: the command line; `argv[0]` is the program's name.
      more: names that are known besides, for suggestions.

    Raises:
      UserError: an unknown flag, a value of the wrong type, a required flag left out, an argument that is no flag.
    """
    try:
        rest = flag_values(list(argv))
    except flags.UnrecognizedFlagError as e:
        known = [f"--{name}" for name in (*more, *flag_values)]
        raise UserError(f"unknown flag --{e.flagname}\n{did_you_mean(f'--{e.flagname}', known)}") from None
    except flags.Error as e:
        missing = re.search(r"Flag --(\w+) must have a value other than None", str(e))
        raise UserError(f"--{missing[1]} is missing: {flag_values[missing[1]].help}" if missing else str(e)) from None
    if rest[1:]:
        raise UserError(f"unexpected argument {rest[1]!r}: flags are written --name=value")


# ------------------------------------------------------------------------------------------------------------ --config


def split(argv: Sequence[str]) -> tuple[str, list[tuple[str, str | None]], list[str]]:
    """Takes `--config` and `--config.KEY` out of a command line.

    Returns:
      The config file, with its variant (empty if none is given); the overrides in their order, as (key, value as
      written); the other arguments. `--config.KEY` alone has None as its value, which sets a bool to True;
      `--noconfig.KEY` sets it to False.
    """
    spec = ""
    overrides: list[tuple[str, str | None]] = []
    rest: list[str] = []
    waiting = list(argv)
    while waiting:
        token = waiting.pop(0)
        match = re.fullmatch(r"--?(no)?config(?:\.([^=]+))?(?:=(.*))?", token, re.DOTALL)
        if match is None or (match[1] and not match[2]):
            rest.append(token)
            continue
        negated, key, text = match.groups()
        if negated:
            text = "False"
        elif text is None and waiting and re.match(r"(?!-)|-[\d.]", waiting[0]):
            text = waiting.pop(0)
        if key is None:
            spec = text or ""
        else:
            overrides.append((key, text))
    return spec, overrides, rest


def load(spec: str) -> ConfigDict:
    """The ConfigDict of `configs/tiny.py`, or of one of its variants: `configs/tiny.py:muon`. See `load_file`."""
    return load_file(spec)[0]


def load_file(spec: str) -> tuple[ConfigDict, ModuleType]:
    """The ConfigDict of `configs/tiny.py`, or of one of its variants: `configs/tiny.py:muon`; and the file itself.

    Raises:
      UserError: there is no such file or variant, or the file fails; names the file and its line.
    """
    path, _, variant = spec.partition(":")
    file = Path(path)
    if not file.is_file():
        siblings = [str(p) for p in file.parent.glob("*.py")] if file.parent.is_dir() else []
        near = difflib.get_close_matches(str(file), siblings, n=1)
        raise UserError(f"--config: there is no file {path}" + (f"\ndid you mean {near[0]}?" if near else ""))
    try:
        module = _execute(file)
        make = getattr(module, "get_config", None)
        if make is None:
            raise UserError(f"{path} is no config file: it has no function get_config")
        if variant and not inspect.signature(make).parameters:
            raise UserError(f"--config={spec}: {path} declares no variants")
        config = make(variant) if variant else make()
    except UserError:
        raise
    except Exception as e:
        if _within_lm_jax(e):
            raise
        raise UserError(failure(file, e)) from e
    if not isinstance(config, ConfigDict):
        raise UserError(f"{path}: get_config returned a {type(config).__name__}, not an ml_collections.ConfigDict")
    return config, module


def _execute(file: Path) -> ModuleType:
    """Runs a config file as a module. Its name need not be one that Python could import (`1b.py`)."""
    name = f"config_file_{re.sub(r'[^0-9a-zA-Z]', '_', file.stem)}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise UserError(f"--config: {file} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses that a config file declares look their module up
    spec.loader.exec_module(module)
    return module


def _within_lm_jax(error: Exception) -> bool:
    """Whether it was raised in this project's own code: then it is no mistake of the config file's."""
    ours = Path(lm_jax.__file__).parent.resolve()
    return any(ours in Path(frame.filename).resolve().parents for frame in traceback.extract_tb(error.__traceback__))


def failure(file: Path, error: Exception) -> str:
    """What went wrong in a config file: where, the line itself, what."""
    if isinstance(error, SyntaxError):
        where, line, text, what = error.filename, error.lineno, error.text, error.msg
    else:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).resolve() == file.resolve()]
        last = frames[-1] if frames else None
        where, line, text = str(file), last and last.lineno, last and last.line
        what = " ".join(str(error.args[0] if error.args else error).split())
    typo = re.match(r"'?Key \"(.+?)\" does not exist", what)
    if typo and isinstance(error, AttributeError | KeyError):
        # A locked ConfigDict's message goes on with all that the section holds.
        near = re.search(r"Did you mean \"(.+?)\"", what)
        what = f"there is no such key: {typo[1]}" + (f" (did you mean {near[1]}?)" if near else "")
    else:
        what = f"{type(error).__name__}: {what}"
    return "\n".join(
        [f"{where}, line {line}" if line else str(where), *([f"    {text.strip()}"] if text else []), what]
    )


# ------------------------------------------------------------------------------------------------------------ overrides


def overridden(config: ConfigDict, overrides: Sequence[tuple[str, str | None]]) -> ConfigDict:
    """`config` with the values that the command line gives. See `split` for the form of the overrides.

    Raises:
      ConfigError: an unknown key, with the nearest known one, or a value of another type.
    """
    values: dict[str, Any] = {}
    for key, text in overrides:
        section, name = locate(config, key, "--config.")
        # A mapping that is open to new names, as evaluation.sets is, cannot tell the type that they are to have.
        values[key] = read(key, text, section.get_type(name) if name in section else object)
    return assign(config, values, "--config.")


_KINDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    tuple: "a list, as \"('a', 'b')\" or a,b",
}


def read(key: str, text: str | None, kind: type) -> Any:
    """A value as written on the command line, as the type that the key has. `None` is None for every type.

    Whole numbers may be written as `1e9`. A list may be a Python tuple or list, or its entries with commas between.

    Raises:
      ConfigError: it does not read as that type.
    """
    flag = f"--config.{key}"
    if issubclass(kind, ConfigDict):
        raise ConfigError(flag, "is a section, not a value", f"set a key in it: {flag}.KEY=VALUE")
    if text is None:
        if kind is not bool:
            raise ConfigError(flag, "has no value", f"write {flag}=VALUE")
        return True
    if text == "None":
        return None
    try:
        return _as(kind, text)
    except ValueError:
        raise ConfigError(flag, f"{text!r} is not {_KINDS[kind]}") from None


def _as(kind: type, text: str) -> Any:
    if kind is str:
        return text
    if kind is bool:
        if text.lower() not in ("true", "false", "1", "0"):
            raise ValueError(text)
        return text.lower() in ("true", "1")
    if kind is int:
        try:
            return int(text)
        except ValueError:
            number = float(text)
            if not number.is_integer():  # false of nan and inf as well
                raise ValueError(text) from None
            return int(number)
    if kind is float:
        return float(text)
    if kind is tuple:
        value = _literal(text)
        if isinstance(value, str):
            value = [_literal(part.strip()) for part in value.split(",")]
        return tuple(value) if isinstance(value, list | tuple) else (value,)
    return _literal(text)


def _literal(text: str) -> Any:
    """A Python literal, or the text itself."""
    if text in ("true", "false"):
        return text == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
