import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from absl import flags
from ml_collections import ConfigDict, FieldReference

from launch import cli
from lm_jax.errors import ConfigError, UserError

ROOT = Path(__file__).parents[2]

CONFIG = """
from ml_collections import ConfigDict, FieldReference

def get_config(variant=""):
    config = ConfigDict()
    config.train = ConfigDict({"steps": 100, "remat": False, "name": "a"})
    config.optimizer = ConfigDict({"learning_rate": 0.1, "clip_norm": FieldReference(None, field_type=float)})
    config.model = ConfigDict({"pattern": ("attention",), "embed": FieldReference(64)})
    config.model.feed_forward_dim = config.model.get_ref("embed") * 4
    config.evaluation = ConfigDict({"sets": {}})
    config.lock()
    config.evaluation.sets.unlock()
    if variant == "wide":
        config.model.embed = 128
    elif variant:
        from lm_jax.errors import UserError
        raise UserError(f"no variant {variant}")
    return config
"""

LAUNCHER = '''
"""A launcher for tests."""
from absl import flags
from launch import cli

FLAGS = flags.FlagValues()
WORKDIR = flags.DEFINE_string("workdir", None, "the run's folder", required=True, flag_values=FLAGS)

def main(config):
    if WORKDIR.value == "broken":
        raise ValueError("a fault")
    print(config.train.steps, WORKDIR.value)
    return 75

if __name__ == "__main__":
    cli.run(main, FLAGS, config=True)
'''


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    file = tmp_path / "1b.py"
    file.write_text(CONFIG)
    return file


@pytest.fixture
def launched(config_file: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, Any, list[str]]]:
    """Runs a command line: its exit status, what its main was given (a config, a workdir), its lines on stderr."""

    def run(*args: str, result: int | Exception | None = None, workdir: bool = True) -> tuple[int, Any, list[str]]:
        flag_values = flags.FlagValues()
        holder = flags.DEFINE_string("workdir", None, "the run's folder", required=True, flag_values=flag_values)
        flags.DEFINE_integer("processes", 1, "how many", flag_values=flag_values)
        given: list[Any] = [None, None]

        def main(config: ConfigDict) -> int | None:
            given[:] = config, holder.value
            if isinstance(result, Exception):
                raise result
            return result

        argv = ["prog", f"--config={config_file}", *(["--workdir=w"] if workdir else []), *args]
        status = cli.status(main, flag_values, argv, config=True)
        error = capsys.readouterr().err.splitlines()
        assert len(error) <= 3
        assert bool(error) == (status == 2)
        return status, given, error

    return run


@pytest.mark.parametrize(("result", "status"), [(None, 0), (0, 0), (75, 75)])
def test_the_status_is_what_main_returns(launched: Any, result: int | None, status: int) -> None:
    assert launched(result=result)[0] == status


def test_a_users_mistake_is_told_in_three_lines_and_a_fault_keeps_its_traceback(launched: Any) -> None:
    assert launched(result=ConfigError("a.b", "is bad", "be good"))[::2] == (2, ["a.b: is bad", "be good"])
    assert launched(result=UserError("1\n2\n\n3\n4"))[::2] == (2, ["1", "2", "3"])
    with pytest.raises(ZeroDivisionError):
        launched(result=ZeroDivisionError())


@pytest.mark.parametrize(
    ("args", "key", "expected"),
    [
        (["--config.train.steps=7"], "train.steps", 7),
        (["--config.train.steps", "7"], "train.steps", 7),
        (["--config.train.steps=1e9"], "train.steps", 10**9),
        (["--config.train.steps", "-1"], "train.steps", -1),
        (["--config.train.steps=7", "--config.train.steps=8"], "train.steps", 8),
        (["--config.train.remat"], "train.remat", True),
        (["--config.train.remat", "--noconfig.train.remat"], "train.remat", False),
        (["--config.train.remat=true"], "train.remat", True),
        (["--config.train.name=7"], "train.name", "7"),
        (["--config.train.name=a=b c"], "train.name", "a=b c"),
        (["--config.train.name="], "train.name", ""),
        (["--config.optimizer.learning_rate=1"], "optimizer.learning_rate", 1.0),
        (["--config.optimizer.clip_norm=1"], "optimizer.clip_norm", 1.0),
        (["--config.optimizer.clip_norm=1", "--config.optimizer.clip_norm=None"], "optimizer.clip_norm", None),
        (["--config.model.pattern=('a', 'b')"], "model.pattern", ("a", "b")),
        (["--config.model.pattern=['a']"], "model.pattern", ("a",)),
        (["--config.model.pattern=a,b"], "model.pattern", ("a", "b")),
        (["--config.model.pattern=a"], "model.pattern", ("a",)),
        (["--config.model.pattern=1,2"], "model.pattern", (1, 2)),
        (["--config.model.embed=32"], "model.feed_forward_dim", 128),
        (["--config.evaluation.sets.wiki=../data/wiki.txt"], "evaluation.sets.wiki", "../data/wiki.txt"),
        (["--config.evaluation.sets.wiki=a", "--config.evaluation.sets.wiki=b"], "evaluation.sets.wiki", "b"),
    ],
)
def test_overrides(launched: Any, args: list[str], key: str, expected: Any) -> None:
    status, (config, workdir), _ = launched(*args)
    assert status == 0 and workdir == "w"
    section, name = key.rsplit(".", 1)
    for part in section.split("."):
        config = config[part]
    assert config[name] == expected
    assert type(config[name]) is type(expected)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--config.train.stps=3"], ["--config.train.stps", "did you mean --config.train.steps?"]),
        (["--config.steps=3"], ["--config.steps", "did you mean --config.train.steps?"]),
        (["--config.optim.learning_rate=3"], ["did you mean --config.optimizer.learning_rate?"]),
        (["--config.zzz.qqq=3"], ["the sections are evaluation, model, optimizer, train"]),
        (["--config.train.steps.x=3"], ["--config.train.steps.x: there is no such key"]),
        (["--config.train=3"], ["--config.train: is a section"]),
        (["--config.train.steps"], ["--config.train.steps: has no value"]),
        (["--config.train.steps=abc"], ["--config.train.steps: 'abc' is not a whole number"]),
        (["--config.train.steps=1.5"], ["'1.5' is not a whole number"]),
        (["--config.train.steps=nan"], ["'nan' is not a whole number"]),
        (["--config.train.remat=maybe"], ["'maybe' is not true or false"]),
        (["--config.optimizer.learning_rate=fast"], ["'fast' is not a number"]),
        (["--config.evaluation.sets.wiki"], ["--config.evaluation.sets.wiki: has no value"]),
        (["--wrkdir=3"], ["unknown flag --wrkdir", "did you mean --workdir?"]),
        (["--confg=a.py"], ["unknown flag --confg", "did you mean --config?"]),
        (["--processes=two"], ["--processes=two"]),
        (["somewhere"], ["unexpected argument 'somewhere'"]),
        (["--config="], ["--config is missing"]),
        (["--config=no/such.py"], ["there is no file no/such.py"]),
    ],
)
def test_mistakes_on_the_command_line(launched: Any, args: list[str], words: list[str]) -> None:
    status, given, error = launched(*args)
    assert status == 2 and given == [None, None]
    for word in words:
        assert word in "\n".join(error)


def test_a_missing_workdir_says_what_it_is(launched: Any) -> None:
    assert launched(workdir=False)[::2] == (2, ["--workdir is missing: the run's folder"])
    assert "--wrkdir" in launched("--wrkdir=w", workdir=False)[2][0]


def test_a_missing_config_file_names_the_nearest(launched: Any, config_file: Path) -> None:
    error = launched(f"--config={config_file.parent}/lb.py")[2]
    assert error[1] == f"did you mean {config_file}?"


def test_variants(launched: Any, config_file: Path) -> None:
    assert launched(f"--config={config_file}:wide")[1][0].model.feed_forward_dim == 512
    assert launched(f"--config={config_file}:thin")[::2] == (2, ["no variant thin"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x = 1\ndef get_config(:\n", ["bad.py, line 2", "def get_config(:", "SyntaxError"]),
        ("import no_such_module_anywhere\n", ["bad.py, line 1", "ModuleNotFoundError", "no_such_module_anywhere"]),
        ("def get_config():\n    return 1 / 0\n", ["bad.py, line 2", "return 1 / 0", "ZeroDivisionError"]),
        ("x = 1\n", ["has no function get_config"]),
        ("def get_config():\n    return {}\n", ["returned a dict, not an ml_collections.ConfigDict"]),
        (CONFIG.replace("config.model.embed = 128", "config.model.embd = 128").replace('=""', '="wide"'),
         ["config.model.embd = 128", "there is no such key: embd", "did you mean embed?"]),
        (CONFIG.replace("config.model.embed = 128", "config.model.embed = 'b'").replace('=""', '="wide"'),
         ["config.model.embed = 'b'", "TypeError"]),
    ],
)  # fmt: skip
def test_a_config_file_that_fails(launched: Any, tmp_path: Path, text: str, words: list[str]) -> None:
    (tmp_path / "bad.py").write_text(text)
    status, _, error = launched(f"--config={tmp_path}/bad.py")
    assert status == 2
    for word in words:
        assert word in "\n".join(error)


def test_a_fault_of_the_project_below_a_config_file_keeps_its_traceback(launched: Any, tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("from lm_jax import config\ndef get_config():\n    config.build(int, {})\n")
    with pytest.raises(TypeError):
        launched(f"--config={tmp_path}/bad.py")


def test_a_config_without_variants_refuses_one(launched: Any, tmp_path: Path) -> None:
    (tmp_path / "plain.py").write_text(
        "from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict()\n"
    )
    assert launched(f"--config={tmp_path}/plain.py")[0] == 0
    assert "declares no variants" in launched(f"--config={tmp_path}/plain.py:a")[2][0]


def test_a_reference_keeps_its_type_after_none() -> None:
    config = ConfigDict({"clip": FieldReference(1.0, field_type=float)})
    assert cli.overridden(config, [("clip", "None")]).clip is None
    with pytest.raises(ConfigError, match="not a number"):
        cli.overridden(config, [("clip", "abc")])


def test_help_lists_the_flags(capsys: pytest.CaptureFixture[str]) -> None:
    flag_values = flags.FlagValues()
    flags.DEFINE_integer("processes", 1, "how many", flag_values=flag_values)
    assert cli.status(test_help_lists_the_flags, flag_values, ["prog", "--help"], config=True) == 0
    out = capsys.readouterr().out
    assert "--processes  how many (default 1)" in out and "--config=FILE" in out


def process(file: Path, *args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", file.read_text(), *args]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=60, env=os.environ | {"PYTHONPATH": "."}
    )


def test_as_a_process(config_file: Path, tmp_path: Path) -> None:
    launcher = tmp_path / "launcher.py"
    launcher.write_text(LAUNCHER)

    done = process(launcher, f"--config={config_file}", "--workdir=w", "--config.train.steps=3")
    assert (done.returncode, done.stdout, done.stderr) == (75, "3 w\n", "")

    typo = process(launcher, f"--config={config_file}", "--workdir=w", "--config.train.stps=3")
    assert typo.returncode == 2 and typo.stdout == ""
    assert "did you mean --config.train.steps?" in typo.stderr
    assert len(typo.stderr.splitlines()) <= 3 and "Traceback" not in typo.stderr

    fault = process(launcher, f"--config={config_file}", "--workdir=broken")
    assert fault.returncode == 1 and "Traceback" in fault.stderr and "ValueError: a fault" in fault.stderr


def test_nothing_slow_is_loaded_before_main() -> None:
    code = "import sys, launch.cli; print([m for m in ('jax', 'numpy', 'optax', 'grain') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "[]\n"


def test_an_unknown_error_ends_one_of_many_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Leaving in good order would wait for processes that wait for this one."""

    def leave(status: int) -> None:
        raise SystemExit(f"at once: {status}")

    def fault(*_: object, **__: object) -> int:
        raise RuntimeError("a fault")

    monkeypatch.setattr(cli, "status", fault)
    monkeypatch.setattr("os._exit", leave)
    with pytest.raises(RuntimeError, match="a fault"):  # alone: Python's own way
        cli.run(lambda: 0, flags.FlagValues())
    monkeypatch.setattr(cli, "_one_of_many", lambda: True)
    with pytest.raises(SystemExit, match="at once: 1"):
        cli.run(lambda: 0, flags.FlagValues())
    assert "RuntimeError: a fault" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "words", "command"),
    [
        (["x"], [], []),
        (
            ["x", "up", "--n=3", "--", "python", "-m", "y", "--n=4", "--", "z"],
            ["up"],
            ["python", "-m", "y", "--n=4", "--", "z"],
        ),
        (["x", "--n=3", "--"], [], []),
    ],
)
def test_words_in_front_and_a_command_behind_are_kept_apart(
    argv: list[str], words: list[str], command: list[str]
) -> None:
    values = flags.FlagValues()
    flags.DEFINE_integer("n", 3, "a number", flag_values=values)
    seen = []

    def main(*given: list[str]) -> None:
        seen.extend(given)

    assert cli.status(main, values, argv, command=True) == 0
    assert seen == [words, command] and values["n"].value == 3
    assert cli.status(main, values, ["x", "--n=3", "late"], command=True) == cli.USER_MISTAKE


@pytest.mark.parametrize(("raised", "said"), [("KeyboardInterrupt", "stopped\n"), ("OSError('x')", "Traceback")])
def test_ctrl_c_while_a_program_is_loaded_is_no_error(raised: str, said: str) -> None:
    ended = subprocess.run([sys.executable, "-c", f"import launch; raise {raised}"], cwd=ROOT, capture_output=True)
    told = ended.stderr.decode()
    assert ended.returncode and (told == said if raised == "KeyboardInterrupt" else told.startswith(said))
