"""The shipped configs: what their docstrings state is what they are, and golden dumps hold what they resolve to."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from configs.base import base
from launch.cli import load, overridden, split
from lm_jax import costs
from lm_jax.config import build, to_dict
from lm_jax.errors import UserError
from lm_jax.training.run import RunConfig
from tests.golden.dump_configs import FOLDER, ROOT, VARIANTS, dump, names, resolved, with_vocabulary
from tests.support.twins import twin

BIG = ("125m", "350m", "760m", "1b", "3b", "7b", "13b", "70b")


def docstring(name: str) -> str:
    return ast.get_docstring(ast.parse((ROOT / "configs" / f"{name}.py").read_text("utf-8"))) or ""


def stated(text: str) -> dict[str, str]:
    """The numbers of a docstring, as written."""
    found = dict(re.findall(r"^ +(parameters|tokens|training FLOPs) +([\d.,e]+)(?:,|$)", text, re.MULTILINE))
    assert set(found) == {"parameters", "tokens", "training FLOPs"}, text
    return {key: value.rstrip(",") for key, value in found.items()}


def three_digits(number: float) -> str:
    return f"{number:.3g}".replace("e+0", "e").replace("e+", "e")


def derived(config: RunConfig) -> dict[str, str]:
    """The same numbers from the config."""
    tokens = config.train.tokens or config.train.total_steps * config.train.tokens_per_step
    return {
        "parameters": f"{costs.parameters(config.model)['total']:,}",
        "tokens": three_digits(tokens),
        "training FLOPs": three_digits(costs.training_flops(config.model, config.train.length, tokens)),
    }


def shape(config: RunConfig) -> list[str]:
    """What a docstring says about the shape."""
    m = config.model
    heads = f"{m.heads} heads" + (f" on {m.key_heads} key-value heads" if m.key_heads != m.heads else "")
    kind = {"swiglu": "SwiGLU", "squared_relu": "squared ReLU"}[m.feed_forward]
    return [f"{m.layers} layers of {m.embed:,}", heads, f"{kind} of {m.inner:,}", "untied" if not m.tied else ", tied"]


def test_these_are_shipped() -> None:
    assert set(names()) == {"tiny", "shakespeare_char", *BIG}


@pytest.mark.parametrize("name", names())
def test_a_docstring_states_what_the_config_is(name: str) -> None:
    config, text = with_vocabulary(name), docstring(name)
    assert stated(text) == derived(config)
    flat = " ".join(text.split())
    assert [words for words in shape(config) if words not in flat] == []


def test_a_drifting_number_is_seen() -> None:
    config = with_vocabulary("1b")
    for changes in ({"layers": 17}, {"feed_forward_dim": 8256}, {"vocab": 32_064}):
        drifted = dataclasses.replace(config, model=dataclasses.replace(config.model, **changes))
        assert derived(drifted)["parameters"] != stated(docstring("1b"))["parameters"]


@pytest.mark.parametrize("name", BIG)
def test_tokens_are_20_a_parameter(name: str) -> None:
    config = with_vocabulary(name)
    assert config.train.tokens == float(f"{20 * costs.parameters(config.model)['total']:.3g}")


@pytest.mark.parametrize("name", names())
def test_the_stated_command_is_this_config(name: str) -> None:
    (command,) = re.findall(r"^ +(python -m launch\.train .*)$", docstring(name), re.MULTILINE)
    spec, overrides, rest = split(shlex.split(command)[3:])
    assert spec == f"configs/{name}.py"
    assert len(rest) == 1 and rest[0].startswith("--workdir=runs/")
    build(RunConfig, overridden(load(str(ROOT / spec)), overrides))


@pytest.mark.parametrize("name", BIG)
def test_a_first_try_is_within_the_passes_over_the_embedded_text(name: str) -> None:
    (steps,) = re.findall(r"`--config\.train\.steps=(\d+)`", docstring(name))
    # The standard library has 5 million tokens at 32,000 pieces, or a little more.
    assert int(steps) * resolved(name).train.tokens_per_step <= 8 * 5e6


@pytest.mark.parametrize("name", names())
def test_a_config_repeats_nothing_of_base(name: str) -> None:
    assert repeated((ROOT / "configs" / f"{name}.py").read_text("utf-8")) == []


def repeated(source: str) -> list[str]:
    """The keys that `get_config` sets to what they are already. Derived defaults of the model count as well."""
    function = next(n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef) and n.name == "get_config")
    lines = [n for n in function.body if isinstance(n, ast.Assign) and isinstance(n.targets[0], ast.Attribute)]
    before, wrong = to_dict(build(RunConfig, base())), []
    for line in lines:
        _, section, key = ast.unparse(line.targets[0]).split(".")
        if before[section][key] == ast.literal_eval(line.value) and key not in ("head_dim", "feed_forward_dim"):
            wrong.append(f"{section}.{key}")
    return wrong


def test_a_repeated_value_is_seen() -> None:
    source = "def get_config():\n config = base()\n config.model.layers = 4\n config.model.tied = True\n"
    assert repeated(source) == ["model.layers"]


@pytest.mark.parametrize("name", BIG)
@pytest.mark.parametrize("devices", [1, 8, 64])
def test_a_config_divides_over_usual_numbers_of_devices(name: str, devices: int) -> None:
    resolved(name).check_layout(devices)


# ------------------------------------------------------------------------------------------------------ golden dumps


@pytest.mark.parametrize("name", names())
def test_a_config_is_as_its_golden_dump(name: str) -> None:
    golden = json.loads((FOLDER / f"{name}.json").read_text())
    assert json.loads(json.dumps(dump(name))) == golden, "if this is meant: python -m tests.golden.dump_configs"


def test_every_golden_dump_has_its_config() -> None:
    assert sorted(p.stem for p in FOLDER.glob("*.json")) == names()


def test_a_dump_holds_what_a_config_and_its_variants_are() -> None:
    tiny = dump("tiny")
    assert tiny["config"]["model"]["kv_heads"] == 2
    assert tiny["parameters"]["blocks/attention/query"]["axes"] == ["layers", "embed", "heads", "head_dim"]
    assert any(line.startswith("optimizer.name") for line in tiny["variants"]["adafactor"])


# ----------------------------------------------------------------------------------------------------------- variants


@pytest.mark.parametrize(("name", "variant"), [(n, v) for n, declared in VARIANTS.items() for v in declared])
def test_a_variant_is_another_config(name: str, variant: str) -> None:
    assert resolved(name, variant) != resolved(name)


def test_variants_that_are_declared_are_those_that_are_dumped() -> None:
    for name in names():
        with pytest.raises(UserError) as refused:
            load(f"{ROOT / 'configs' / name}.py:no_such_variant")
        declared = re.findall(r"declared are: (.*)", str(refused.value))
        assert tuple(", ".join(declared).split(", ")) == VARIANTS.get(name, ("",))


# -------------------------------------------------------------------------------------------------------------- twins

SHRUNK = {
    "model": {"layers", "embed", "heads", "kv_heads", "head_dim", "feed_forward_dim", "vocab"},
    "data": {"vocab_size"},
    "train": {"steps", "tokens", "batch_size", "length"},
    "optimizer": {"warmup_steps", "momentum_warmup_steps"},
}


@pytest.mark.parametrize("name", names())
def test_a_twin_is_small_and_keeps_every_choice(name: str) -> None:
    config = resolved(name)
    small = twin(config)
    small.check_layout(1)
    assert costs.parameters(small.with_vocab(320).model)["total"] < 50_000
    assert small.train.total_steps == 20
    for section, values in to_dict(config).items():
        kept = set(values) - SHRUNK.get(section, set())
        after: dict[str, Any] = to_dict(small)[section]
        assert {k: values[k] for k in kept} == {k: after[k] for k in kept}
    grouped = config.model.key_heads != config.model.heads
    assert (small.model.key_heads != small.model.heads) == grouped


def test_a_config_file_can_be_loaded_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load(str(ROOT / "configs" / "1b.py")).model.layers == 16
