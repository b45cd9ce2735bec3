"""The loop: a run that was stopped is the run that was not; what may change and what may not; what a run leaves."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from lm_jax import paths
from lm_jax.config import build
from lm_jax.data.loader import batch_hash
from lm_jax.errors import ConfigError, UserError
from lm_jax.objectives.next_token import next_token
from lm_jax.objectives.objective import Objective
from lm_jax.training import loop
from lm_jax.training.log import RunFailed
from lm_jax.training.run import RunConfig
from tests.support import jobs
from tests.support.small_run import get_config, write_text

STEPS = 20
TIMES = {"tokens_per_second", "step_seconds", "data_wait_seconds", "peak_memory_bytes", "mfu"}


@pytest.fixture(scope="module", autouse=True)
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Runs of one program compile it once."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    old = [getattr(jax.config, name) for name in names]
    jax.config.update(names[0], str(tmp_path_factory.mktemp("compiled")))
    jax.config.update(names[1], 0.0)
    compilation_cache.reset_cache()
    yield
    for name, value in zip(names, old, strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(autouse=True)
def undrawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures take half a second each; the whole run has one."""
    request.getfixturevalue("whole")
    monkeypatch.setattr("lm_jax.training.report.draw_loss", lambda history, title: b"")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


def small(text: Path, **changes: Any) -> RunConfig:
    """A run of 20 steps of one layer; `section__key=value` changes a key."""
    config = get_config()
    config.model.layers, config.model.embed = 1, 16
    config.data.source = str(text)
    config.train.steps, config.train.length = STEPS, 16
    config.checkpoint.every, config.checkpoint.keep, config.checkpoint.keep_every = 5, 10, None
    config.evaluation.every, config.evaluation.batches = 8, 4
    config.optimizer.schedule = "constant"  # another number of steps is the same program
    with config.unlocked():
        for name, value in changes.items():
            section, key = name.split("__")
            config[section][key] = value
    return build(RunConfig, config)


def objective(c: RunConfig) -> Objective:
    return next_token(c.model, z_loss=c.train.z_loss, remat=c.train.remat)


def train(config: RunConfig, directory: Path, make_objective: Any = objective) -> int:
    return loop.train(config, paths.run_path(str(directory)), make_objective, "python -m launch.train ...")


@pytest.fixture(scope="module")
def whole(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was never stopped: with samples, and a second set to evaluate on. To be read, and copied to go on."""
    directory = tmp_path_factory.mktemp("whole") / "run"
    other = write_text(tmp_path_factory.mktemp("other"), documents=4, seed=1)
    sets = {"second": str(other)}
    config = small(text, evaluation__sets=sets, evaluation__prompt="the ", evaluation__sample_tokens=4)
    assert train(config, directory) == loop.FINISHED
    return directory


@pytest.fixture
def again(whole: Path, tmp_path: Path) -> Path:
    """A copy of the whole run, to go on with."""
    return shutil.copytree(whole, tmp_path / "run")


class Stop:
    """In the place of `StopSignal`: asks for a stop after a step."""

    after = 0

    def __enter__(self) -> Stop:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def should_stop(self, step: int) -> bool:
        return step >= self.after


def records(directory: Path, kind: str) -> list[dict[str, Any]]:
    return [{k: v for k, v in r.items() if k not in TIMES} for r in jobs.records(directory) if r["kind"] == kind]


def state(directory: Path, step: int, *roots: str) -> dict[str, int]:
    """The fingerprints of a checkpoint's leaves under these names (all of them, if none is given)."""
    leaves = jobs.fingerprints(directory, step)
    return {n: leaf["fingerprint"] for n, leaf in leaves.items() if not roots or n.split("/")[0] in roots}


def test_a_run_leaves_its_files(whole: Path) -> None:
    found = set(jobs.names(whole))
    assert found >= {
        "config.json",
        "metrics.jsonl",
        "tensorboard",
        "loss.png",
        "samples.md",
        "checkpoints",
        "report.md",
    }
    assert json.loads((whole / "config.json").read_text())["model"]["vocab"] == 257  # resolved: bytes and a boundary
    assert (whole / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "python -m launch.train ..." in (whole / "report.md").read_text()
    assert jobs.checkpoints(whole) == [5, 10, 15, 20]


def test_every_step_is_on_record(whole: Path, text: Path) -> None:
    steps = [r for r in jobs.records(whole) if r["kind"] == "step"]
    assert [r["step"] for r in steps] == list(range(1, STEPS + 1))
    assert [r["tokens"] for r in steps] == [n * 4 * 16 for n in range(1, STEPS + 1)]
    for record in steps:
        numbers = ("loss", "grad_norm", "learning_rate", "tokens_per_second", "step_seconds", "data_wait_seconds")
        assert all(math.isfinite(record[name]) for name in numbers) and len(record["batch_hash"]) == 8
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert len({r["batch_hash"] for r in steps}) == STEPS


@pytest.mark.parametrize("idle", [True, False])
def test_waiting_counts_where_the_device_has_nothing_to_do(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, idle: bool
) -> None:
    take = loop.Batches.__next__

    def late(batches: Any) -> Any:
        time.sleep(0.1)
        return take(batches)

    monkeypatch.setattr(loop.Batches, "__next__", late)
    if not idle:
        monkeypatch.setattr(loop.RunLog, "device_is_idle", False)
    assert train(small(text, train__steps=3, evaluation__every=None), tmp_path / "run") == loop.FINISHED
    waits = [r["data_wait_seconds"] for r in jobs.records(tmp_path / "run") if r["kind"] == "step"]
    assert len(waits) == 3 and all(w >= 0.1 if idle else w == 0 for w in waits)


def test_evaluations_stand_at_the_start_between_and_at_the_end(whole: Path) -> None:
    evaluations = records(whole, "evaluation")
    assert [r["step"] for r in evaluations] == [0, 8, 16, 20]
    for record in evaluations:
        for name in ("", "second/"):
            loss = record[f"{name}eval_loss"]
            assert record[f"{name}perplexity"] == pytest.approx(math.exp(loss))
            assert 0 < record[f"{name}bits_per_byte"] < 12
        assert record["eval_loss"] != record["second/eval_loss"]
    order = [(r["kind"], r["step"]) for r in jobs.records(whole)]
    assert order[0] == ("evaluation", 0) and order[order.index(("evaluation", 8)) - 1] == ("step", 8)
    assert abs(evaluations[0]["eval_loss"] - math.log(257)) < 0.2
    assert evaluations[-1]["eval_loss"] < evaluations[0]["eval_loss"]


def test_samples_go_on_from_the_prompt(whole: Path) -> None:
    text = (whole / "samples.md").read_text()
    assert [line for line in text.splitlines() if line.startswith("## step")][-1].split()[2] == "20"
    assert text.count("    the ") >= 2


def test_a_finished_run_has_nothing_left_to_do(whole: Path, again: Path, text: Path) -> None:
    before = (again / "metrics.jsonl").read_bytes()
    assert train(small(text), again) == loop.FINISHED
    assert (again / "metrics.jsonl").read_bytes() == before
    assert jobs.checkpoints(again) == jobs.checkpoints(whole)
    assert state(again, STEPS) == state(whole, STEPS)


@pytest.mark.parametrize("stops", [(10,), (0, 3, 16)])  # at a save and between saves, before the first step, after one
def test_a_stopped_run_is_the_whole_run(
    whole: Path, text: Path, tmp_path: Path, stops: Sequence[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "run"
    save = loop.Checkpointer.save

    def recorded_first(self: loop.Checkpointer, step: int, *arguments: Any, **named: Any) -> bool:
        assert jobs.last_step(directory) == step, "a step's record is on disk before its checkpoint commits"
        return save(self, step, *arguments, **named)

    monkeypatch.setattr(loop.Checkpointer, "save", recorded_first)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "StopSignal", Stop)
        for step in stops:
            patch.setattr(Stop, "after", step)
            assert train(small(text), directory) == loop.SAVED
            assert jobs.checkpoints(directory)[-1] == jobs.last_step(directory) == step
    assert train(small(text), directory) == loop.FINISHED
    assert records(directory, "step") == records(whole, "step")
    ours, theirs = records(directory, "evaluation"), records(whole, "evaluation")
    assert ours == [{k: v for k, v in r.items() if not k.startswith("second")} for r in theirs]
    assert state(directory, STEPS) == state(whole, STEPS)


def test_more_steps_another_rate_and_batch_are_accepted_and_told(
    again: Path, text: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = jobs.records(again)
    config = small(text, train__steps=22, train__batch_size=2, optimizer__learning_rate=2e-3)
    assert train(config, again) == loop.FINISHED
    said = capfd.readouterr().err
    for line in ("train.steps: 20 -> 22", "train.batch_size: 4 -> 2", "optimizer.learning_rate: 0.01 -> 0.002"):
        assert f"changed: {line}\n" in said
    assert "going on from checkpoint 20\n" in said
    now = jobs.records(again)
    assert now[: len(before)] == before
    assert [(r["kind"], r["step"]) for r in now[len(before) :]] == [("step", 21), ("step", 22), ("evaluation", 22)]
    assert now[-1]["tokens"] == (20 * 4 + 2 * 2) * 16
    assert {"loss", "batch_hash"} <= now[-2].keys() and now[-2]["learning_rate"] == pytest.approx(2e-3)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"train__seed": 1}, "seed"),
        ({"data__tokenizer": "characters"}, "tokenizer"),
        ({"data__boundary": False}, "data"),
        ({"data__held_out": 0.2}, "data"),
        ({"train__length": 8}, "data"),
        ({"data__packing": "best_fit"}, "data"),
        ({"model__layers": 2}, "model.layers: 1 -> 2"),
        ({"model__qk_norm": True}, "model.qk_norm"),
    ],
)
def test_another_run_is_refused(
    again: Path, text: Path, changes: dict[str, Any], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compiles(*arguments: Any, **named: Any) -> None:
        raise AssertionError("got as far as restoring")

    monkeypatch.setattr(loop.Checkpointer, "restore", compiles)
    before = (again / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match=named) as error:
        train(small(text, **({"model__vocab": 257} | changes)), again)
    assert "checkpoint.accept" in str(error.value) and len(str(error.value).splitlines()) <= 3
    assert (again / "metrics.jsonl").read_bytes() == before


def test_other_text_and_another_seed_go_on_where_they_are_accepted(
    again: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    other = write_text(tmp_path / "other", seed=2)
    with pytest.raises(UserError, match="another data"):
        train(small(other, train__steps=21), again)
    config = small(other, train__steps=21, train__seed=1, checkpoint__accept=("data", "seed"))
    assert train(config, again) == loop.FINISHED
    assert "changed: seed: 0 -> 1 (by checkpoint.accept)" in capfd.readouterr().err
    assert jobs.last_step(again) == 21


def test_a_checkpoint_from_before_a_key_is_no_other_model(
    again: Path, text: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    later = ("parametrization", "base_embed", "base_layers", "base_head_dim")
    read = loop.Checkpointer.read_metadata

    def earlier(checkpoints: loop.Checkpointer) -> dict[str, Any]:
        metadata = read(checkpoints)
        model = {key: value for key, value in metadata["config"]["model"].items() if key not in later}
        return metadata | {"config": metadata["config"] | {"model": model}}

    monkeypatch.setattr(loop.Checkpointer, "read_metadata", earlier)
    assert train(small(text, train__steps=21), again) == loop.FINISHED
    told = capfd.readouterr().err
    assert "train.steps" in told and "parametrization" not in told
    sized = {"model__parametrization": "mup", "model__base_embed": 8}
    with pytest.raises(UserError, match=r"another model: model.parametrization: standard -> mup"):
        train(small(text, train__steps=22, **sized), again)


def test_another_model_is_accepted_only_where_its_weights_fit(again: Path, text: Path) -> None:
    config = small(text, train__steps=21, model__logit_soft_cap=30.0, checkpoint__accept=("model",))
    assert train(config, again) == loop.FINISHED
    with pytest.raises(UserError, match=r"does not fit:\n.*params/"):
        train(small(text, train__steps=22, model__embed=32, checkpoint__accept=("model",)), again)


def test_another_run_s_weights_are_a_start(whole: Path, text: Path, tmp_path: Path) -> None:
    directory = tmp_path / "new"
    config = small(text, train__steps=1, train__init_from=str(whole), train__seed=7, evaluation__every=None)
    assert train(config, directory) == loop.FINISHED
    # What the other run was evaluated with, its averaged weights, is what this one begins with.
    assert records(directory, "evaluation")[0]["eval_loss"] == records(whole, "evaluation")[-1]["eval_loss"]
    assert records(directory, "step")[0]["learning_rate"] == records(whole, "step")[0]["learning_rate"]
    other = write_text(tmp_path / "other", seed=2)
    config = small(other, train__steps=1, train__init_from=str(whole), train__length=8, checkpoint__every=1)
    assert train(config, tmp_path / "other_text") == loop.FINISHED


def test_weights_that_do_not_fit_are_named(whole: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"does not fit:\n(params|ema)/") as error:
        train(small(text, train__init_from=str(whole), model__embed=32), tmp_path / "new")
    assert "[1, 16, " in str(error.value) and "[1, 32, " in str(error.value)
    with pytest.raises(UserError, match="no checkpoint in"):
        train(small(text, train__init_from=str(tmp_path / "nowhere")), tmp_path / "new")


def test_a_directory_in_use_is_refused(again: Path, text: Path) -> None:
    before = (again / "metrics.jsonl").read_bytes()
    with paths.lock(paths.run_path(str(again))), pytest.raises(UserError, match="is in use by"):
        train(small(text, train__steps=30), again)
    assert (again / "metrics.jsonl").read_bytes() == before


def spoilt(bad: Sequence[str], where: str) -> Any:
    """The objective, with a loss or a gradient that is NaN on the batches of these hashes."""

    def make(c: RunConfig) -> Objective:
        good = objective(c)
        hashes = jnp.array([int(h, 16) for h in bad], jnp.uint32)

        def terms(params: Any, frozen: Any, extra: Any, batch: Any, key: Any) -> Any:
            sums, extra = good.terms(params, frozen, extra, batch, key)
            hit = jnp.any(batch_hash(batch) == hashes)
            if where == "loss":
                more = jnp.where(hit, jnp.nan, 0.0)
            else:  # 0 with a gradient that is not finite
                more = jnp.sqrt(jnp.where(hit, 0.0, 1.0) * jnp.sum(params["final_norm"]["gain"] ** 2)) * 0.0
            return {name: value + more for name, value in sums.items()}, extra

        return Objective(good.weights, terms)

    return make


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_not_finite_is_never_applied(whole: Path, text: Path, tmp_path: Path, where: str) -> None:
    hashes = [r["batch_hash"] for r in records(whole, "step")]
    directory = tmp_path / "run"
    config = small(text, checkpoint__every=1, train__max_bad_steps=3, evaluation__every=None)
    bad = spoilt([hashes[2], *hashes[6:]], where)  # steps 3, 7, 8, 9, ...
    with pytest.raises(RunFailed, match="3 steps in a row") as error:
        train(config, directory, bad)
    assert "optimizer.learning_rate" in str(error.value)
    steps = records(directory, "step")
    assert [r["step"] for r in steps if r.get("bad_step")] == [3, 7, 8, 9]
    assert steps[2]["nonfinite"].keys() == {"loss" if where == "loss" else "grad_norm"}
    roots = ("params", "opt_state", "extra", "ema", "applied", "key")
    assert state(directory, 3, *roots) == state(directory, 2, *roots)
    assert state(directory, 8, *roots) == state(directory, 6, *roots)
    assert state(directory, 4, "params") != state(directory, 3, "params")
    assert all(math.isfinite(r["loss"]) for r in steps[3:6])
    assert jobs.checkpoints(directory)[-1] == 8  # step 9 ended the run
    assert (
        "\nFailed (3 steps in a row had a loss or gradient that is not finite" in (directory / "report.md").read_text()
    )
    if where == "loss":  # the reason gone, it goes on
        assert train(config, directory) == loop.FINISHED
        assert jobs.last_step(directory) == STEPS


def test_the_averaged_weights_are_evaluated(whole: Path, text: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    assert train(small(text, optimizer__ema=None), directory) == loop.FINISHED
    assert [r["loss"] for r in records(directory, "step")] == [r["loss"] for r in records(whole, "step")]
    averaged, last = (records(d, "evaluation")[-1]["eval_loss"] for d in (whole, directory))
    assert averaged > last + 0.01  # behind, while the loss falls


def test_a_single_document_ends_in_what_is_held_out(text: Path, tmp_path: Path) -> None:
    content = "".join(path.read_text("utf-8") for path in sorted(text.glob("*.txt")))
    content = content[: len(content) // 10 * 10]
    one, tail = tmp_path / "one.txt", tmp_path / "tail.txt"
    one.write_text(content, "utf-8")
    tail.write_text(content[len(content) // 10 * 9 :], "utf-8")
    config = small(one, train__steps=2, evaluation__batches=None, evaluation__sets={"tail": str(tail)})
    assert train(config, tmp_path / "run") == loop.FINISHED
    for record in records(tmp_path / "run", "evaluation"):
        assert record["eval_loss"] == pytest.approx(record["tail/eval_loss"], rel=1e-6)
        assert record["bits_per_byte"] == pytest.approx(record["tail/bits_per_byte"], rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model__vocab": 100}, "model.vocab"),
        ({"train__batch_size": 6, "train__microbatches": 4}, "train.microbatches"),
        ({"mesh__data": 1, "mesh__fsdp": 2}, "mesh"),
        ({"mesh__tensor": 64}, "mesh"),
        ({"train__steps": 100_000}, "data.max_epochs"),
        ({"evaluation__sets": {"x": "/nowhere/at/all"}}, "evaluation.sets.x"),
        ({"data__source": "/nowhere/at/all"}, "data.source"),
        ({"train__init_from": "/nowhere/at/all"}, "/nowhere/at/all"),
        ({"data__tokenizer": "characters", "evaluation__prompt": "Ω"}, "evaluation.prompt"),
    ],
)
def test_a_mistake_ends_before_anything_compiles(
    text: Path, tmp_path: Path, changes: dict[str, Any], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compiles(*arguments: Any, **named: Any) -> None:
        raise AssertionError("got as far as compiling")

    monkeypatch.setattr("lm_jax.training.program.init_state", compiles)
    with pytest.raises(UserError, match=named) as error:
        train(small(text, **changes), tmp_path / "run")
    assert len(str(error.value).splitlines()) <= 3
    assert isinstance(error.value, ConfigError) or "/nowhere/at/all" in named
    assert jobs.checkpoints(tmp_path / "run") == []


def test_a_text_without_documents_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.txt").write_text("")
    with pytest.raises(UserError, match="empty"):
        train(small(tmp_path / "empty"), tmp_path / "run")


def test_numbers_survive_the_way_to_the_file(whole: Path) -> None:
    losses = [np.float32(r["loss"]) for r in records(whole, "step")]
    assert [float(x) for x in losses] == [r["loss"] for r in records(whole, "step")]  # float32, no digit rounded away


def test_steps_are_traced(text: Path, tmp_path: Path) -> None:
    config, directory = small(text, evaluation__every=None, train__steps=4), tmp_path / "run"
    status = loop.train(config, paths.run_path(str(directory)), objective, "", profile=range(2, 4))
    assert status == loop.FINISHED and jobs.last_step(directory) == 4
    assert jobs.names(directory / "profile/plugins/profile/steps_2_3") == [
        "process_0.trace.json.gz",
        "process_0.xplane.pb",
    ]
