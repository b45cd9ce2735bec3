"""A step compiled for chips that are not here: its bytes are the compiler's, and what does not fit is told."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from launch import cli
from launch import preflight as launcher
from lm_jax import costs
from lm_jax.config import assign, build
from lm_jax.models.transformer import TransformerConfig
from lm_jax.preflight import compiling
from lm_jax.preflight import verdict as verdicts
from lm_jax.preflight.buffers import CLASSES
from lm_jax.preflight.chips import target_of
from lm_jax.preflight.verdict import Verdict, predicted, preflight
from lm_jax.sharding import MeshConfig
from lm_jax.training.run import RunConfig, TrainConfig

SLICE = target_of("v5e:2x2")
MODEL = TransformerConfig(layers=16, embed=1024, heads=8, feed_forward_dim=2752, vocab=8192)
RUN = RunConfig(
    model=MODEL,
    mesh=MeshConfig(data=1, fsdp=4),
    train=TrainConfig(batch_size=32, length=1024, remat="full", tokens=10**9, steps=None),
)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Verdict:
    with pytest.MonkeyPatch.context() as m:
        m.setenv("LM_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        first = preflight(RUN, SLICE)
        m.setattr(verdicts, "compile_step", lambda *a, **k: pytest.fail("asked again, it compiles"))
        assert preflight(RUN, SLICE) == {**first, "from_cache": True}
    return first


def test_classes_are_the_compiler_s_total(found: Verdict) -> None:
    size = found["bytes_per_device"]
    assert found["fits"] and size["capacity"] == int(15.75 * 2**30)
    assert sum(size[kind] for kind in CLASSES) == pytest.approx(size["compiler_total"], rel=0.05)
    weights = 4 * costs.parameters(MODEL)["total"] / 4
    gain = 33 * 1024 * 4  # gains are whole on every device
    assert size["parameters"] == pytest.approx(weights + gain, rel=1e-2)
    assert size["optimizer"] == pytest.approx(2 * size["parameters"], rel=1e-2)
    inputs = 2 * 16 * 8 * 1024 * 1024  # of each block, in bfloat16; beside them angles, the last output, the batch
    assert inputs < size["activations"] < 1.5 * inputs
    blocks = sum(costs.parameters(MODEL)[part] for part in ("attention", "feed_forward"))
    assert 4 * blocks / 4 < size["gradients"] < 1.5 * weights  # all layers' parts, in float32, and what is at hand


def test_costs_predict_the_compiler(found: Verdict) -> None:
    assert found["predicted_total"] == predicted(RUN, SLICE)["total"]
    assert found["predicted_total"] == pytest.approx(found["bytes_per_device"]["compiler_total"], rel=0.15)


def test_time_is_the_arithmetic_s(found: Verdict) -> None:
    step, tokens = found["step"], 32 * 1024
    assert 0.3 < step["mfu"] < 0.75  # a quarter is computed again
    assert step["tokens_per_second"] == pytest.approx(tokens / step["seconds"])
    assert found["run"]["steps"] == -(-(10**9) // tokens)
    assert found["run"]["chip_hours"] == pytest.approx(4 * found["run"]["steps"] * step["seconds"] / 3600)
    gathered = [s for s in found["collectives"] if s["kind"] == "all-gather"]
    blocks = sum(costs.parameters(MODEL)[part] for part in ("attention", "feed_forward"))
    table = 8192 * 1024
    assert gathered[0]["axes"] == ["fsdp"] and gathered[0]["link"] == "ici"
    assert gathered[0]["bytes"] == pytest.approx(2 * (2 * blocks + 2 * table), rel=0.05)


def test_what_does_not_fit_is_refused_with_what_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """As the command: its status, and its two files."""
    monkeypatch.setenv("LM_JAX_CACHE", str(tmp_path / "cache"))
    flags = [
        "--config=configs/125m.py",
        "--config.train.batch_size=512",
        "--config.train.remat=none",
        "--topology=v5e:2x2",
        f"--json={tmp_path}/v.json",
        f"--picture={tmp_path}/v.png",
    ]
    status = cli.status(launcher.main, launcher.FLAGS, ["preflight", *flags], config=True, file=True)
    out = capsys.readouterr().out
    assert status == 1 and "DOES NOT FIT" in out and "this fits: --config." in out
    record = json.loads((tmp_path / "v.json").read_text())
    size = record["bytes_per_device"]
    assert not record["fits"] and "HBM" in record["compiler_says"] and size["compiler_total"] > size["capacity"]
    assert sum(size[kind] for kind in CLASSES) == pytest.approx(size["compiler_total"], rel=0.05)
    assert size["activations"] > 0.5 * size["compiler_total"]
    assert (tmp_path / "v.png").read_bytes().startswith(b"\x89PNG")


def test_no_verdict_is_not_does_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The compiler is killed, fails, and this program does."""
    monkeypatch.setenv("LM_JAX_CACHE", str(tmp_path))
    argv = ["preflight", "--config=configs/125m.py", "--topology=v5e:2x2"]

    def status(python: str) -> int:
        (tmp_path / "python").write_text(f"#!/bin/sh\n{python}\n")
        (tmp_path / "python").chmod(0o755)
        monkeypatch.setattr(compiling.sys, "executable", str(tmp_path / "python"))
        return cli.status(launcher.main, launcher.FLAGS, argv, config=True, file=True)

    assert status("kill -KILL $$") == 3
    assert "the compiler was ended by SIGKILL; this machine's memory may not" in capsys.readouterr().err
    assert status("echo 'Traceback'; echo 'NotImplementedError: no such ring'; exit 1") == 3
    assert capsys.readouterr().err.endswith("the compiler failed (status 1)\nNotImplementedError: no such ring\n")
    monkeypatch.setattr(verdicts, "compile_step", lambda *a, **k: 1 / 0)
    assert status("") == 3
    assert "ZeroDivisionError" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--topology=v5e:3x3"], "the nearest that can: v5e:2x4"),
        (["--topology=v4:2x2x1"], "v4:2x2x1 cannot be compiled for"),
        (["--topology=h200:12"], "the nearest is h200:16"),
        (["--topology=h300:8"], "there is no compiler here for h300"),
        (["--topology=h200:8", "--slices=2"], "write all GPUs, h200:16"),
        (["--topology=v5e:2x2", "--config.mesh.tensor=3"], "mesh"),
    ],
)
def test_mistakes_are_told_before_anything_is_compiled(
    flags: list[str], words: str, capsys: pytest.CaptureFixture
) -> None:
    argv = ["preflight", "--config=configs/125m.py", *flags]
    assert cli.status(launcher.main, launcher.FLAGS, argv, config=True, file=True) == 2
    assert words in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "dots", "attention", "full"])
def test_costs_predict_every_policy(remat: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LM_JAX_CACHE", str(tmp_path))
    run = dataclasses.replace(RUN, train=dataclasses.replace(RUN.train, remat=remat))
    size = preflight(run, SLICE)
    assert size["predicted_total"] == pytest.approx(size["bytes_per_device"]["compiler_total"], rel=0.15)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "topology", "keys"),
    [
        ("tiny", "v5e:1x1", {}),
        ("tiny", "v5e:2x2", {}),
        ("shakespeare_char", "v5e:1x1", {}),
        ("125m", "v5e:4x4", {}),
        ("350m", "v5e:4x4", {}),
        ("760m", "v5e:4x4", {}),
        ("1b", "v5e:4x4", {}),
        ("3b", "v5p:4x4x4", {}),
        ("7b", "v5p:4x4x4", {}),
        ("13b", "v5p:4x4x8", {}),
        ("70b", "v5p:4x4x8", {}),
        ("125m", "v5e:2x2", {"mesh.sequence": 2, "mesh.context": "ring"}),
        ("125m", "v5e:2x2", {"mesh.sequence": 2, "mesh.context": "all_to_all"}),
    ],
)
def test_costs_predict_every_shipped_config(
    name: str, topology: str, keys: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """benchmarks/what_fits.py compares the larger ones on more slices."""
    monkeypatch.setenv("LM_JAX_CACHE", str(tmp_path))
    values = cli.load(f"configs/{name}.py")
    assign(values, keys)
    size = preflight(build(RunConfig, values).with_likely_vocab(), target_of(topology))
    assert size["predicted_total"] == pytest.approx(size["bytes_per_device"]["compiler_total"], rel=0.15)


@pytest.mark.skipif(
    not any(map(importlib.util.find_spec, ("jax_cuda12_plugin", "jax_cuda13_plugin"))),
    reason="compiling for GPUs needs jax's CUDA plugin",
)
def test_gpus_are_compiled_for_where_the_plugin_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of several documents are attended to in blocks there, whose products stand in the program."""
    monkeypatch.setenv("LM_JAX_CACHE", str(tmp_path))
    found = preflight(RUN, target_of("h200:4"))
    size, step = found["bytes_per_device"], found["step"]
    assert found["fits"] and found["chip"] == "NVIDIA H200"
    assert sum(size[kind] for kind in CLASSES) == pytest.approx(size["compiler_total"], rel=0.05)
    assert found["predicted_total"] == pytest.approx(size["compiler_total"], rel=0.25)
    # What is computed again is a third more; blocks compute whole tiles of the mask's diagonal.
    peak = costs.peak_flops("NVIDIA H200")
    assert peak is not None
    least = found["flops_per_device"] / peak
    assert 0.9 * least < step["compute_seconds"] + step["memory_seconds"] and step["compute_seconds"] < 2 * least
    assert 0.02 < step["mfu"] < 0.75
    assert {s["link"] for s in found["collectives"]} == {"nvlink"}


@pytest.mark.slow
def test_machine_code_comes_out_and_its_memory_is_the_plan_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LM_JAX_CACHE", str(tmp_path))
    whole = preflight(RUN, SLICE, machine_code=True)
    assert whole["machine_code_bytes"] > 2**20
    # memory_analysis: arguments, heap and results that take no argument's place.
    assert whole["bytes_per_device"]["compiler_total"] == pytest.approx(whole["analysed_bytes"], rel=1e-3)
