"""`metrics.jsonl`: what is in it, each step once, and what becomes of crashes, full disks and NaN."""

from __future__ import annotations

import json
import math
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from etils import epath

from lm_jax.errors import UserError
from lm_jax.paths import StorageError
from lm_jax.training.metrics import (
    History,
    MetricsWriter,
    WandbWriter,
    evaluation_values,
    read_metrics,
    speed,
)


def refuse(constant: str) -> float:
    raise AssertionError(f"{constant} is no JSON")


def records(directory: Path) -> list[dict[str, Any]]:
    text = (directory / "metrics.jsonl").read_text()
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def step(n: int, **values: Any) -> dict[str, Any]:
    return {"step": n, "tokens": 100 * n, "loss": 5.0 - n / 10, **values}


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Path]:
    """A run of 6 steps with evaluations at 0, 3 and 6."""
    writer = MetricsWriter(epath.Path(tmp_path))
    for n in range(7):
        if n:
            writer.write(step(n))
        if n % 3 == 0:
            writer.write({"step": n, "tokens": 100 * n, "eval_loss": 5.0 - n / 10}, "evaluation")
    writer.close()
    yield tmp_path


def test_a_record_has_its_kind_and_step_and_only_what_is_known(tmp_path: Path) -> None:
    writer = MetricsWriter(epath.Path(tmp_path))
    writer.write({"loss": np.float32(2.5), "step": 1, "tokens": 64, "mfu": None, "batch_hash": "ab12"})
    writer.write({"step": 1, "eval_loss": 2.0, "wiki/eval_loss": 3.0}, "evaluation")
    writer.close()
    assert records(tmp_path) == [
        {"kind": "step", "step": 1, "loss": 2.5, "tokens": 64, "batch_hash": "ab12"},
        {"kind": "evaluation", "step": 1, "eval_loss": 2.0, "wiki/eval_loss": 3.0},
    ]
    assert list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))


def test_a_record_can_be_read_before_the_next(tmp_path: Path) -> None:
    writer = MetricsWriter(epath.Path(tmp_path))
    for n in (1, 2, 3):
        writer.write(step(n))
        assert [r["step"] for r in records(tmp_path)] == list(range(1, n + 1))
    writer.close()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, np.float32("nan")])
def test_numbers_that_json_does_not_know(tmp_path: Path, value: float) -> None:
    writer = MetricsWriter(epath.Path(tmp_path))
    writer.write(step(1, loss=value, grad_norm=1.0))
    writer.write({"step": 1, "eval_loss": value}, "evaluation")
    writer.close()
    first, second = records(tmp_path)
    assert first["loss"] is None and first["bad_step"] is True
    assert float(first["nonfinite"]["loss"]) == value or math.isnan(value)
    assert second["eval_loss"] is None and "bad_step" not in second
    assert writer.history.bad_tokens == [100]


def test_a_gradient_that_is_not_finite_makes_a_bad_step(tmp_path: Path) -> None:
    writer = MetricsWriter(epath.Path(tmp_path))
    writer.write(step(1, grad_norm=math.inf))
    writer.write(step(2, grad_norm=1.0, mfu=math.nan))
    writer.close()
    assert [r.get("bad_step") for r in records(tmp_path)] == [True, None]


def test_a_step_is_written_once_and_in_order(tmp_path: Path) -> None:
    writer = MetricsWriter(epath.Path(tmp_path))
    writer.write(step(1))
    writer.write(step(2))
    for n in (1, 2):
        with pytest.raises(ValueError, match=f"step {n} after"):
            writer.write(step(n))
    writer.write({"step": 2, "eval_loss": 1.0}, "evaluation")
    with pytest.raises(ValueError, match="evaluation 2 after"):
        writer.write({"step": 2, "eval_loss": 1.0}, "evaluation")
    assert [r["step"] for r in records(tmp_path)] == [1, 2, 2]


def test_a_resume_drops_what_comes_again(run: Path) -> None:
    writer = MetricsWriter(epath.Path(run), start_step=4)
    assert [(r["kind"][0], r["step"]) for r in records(run)] == [
        ("e", 0),
        ("s", 1),
        ("s", 2),
        ("s", 3),
        ("e", 3),
        ("s", 4),
    ]
    assert writer.notes == ["metrics.jsonl: dropped 3 records of steps after 4, which come again"]
    assert writer.evaluated(3) and not writer.evaluated(6) and not writer.evaluated(4)
    with pytest.raises(ValueError):
        writer.write(step(4))
    writer.write(step(5))
    writer.write(step(6))
    writer.write({"step": 6, "eval_loss": 1.0}, "evaluation")
    writer.close()
    assert [r["step"] for r in records(run) if r["kind"] == "step"] == [1, 2, 3, 4, 5, 6]
    assert list(writer.history.steps) == [1, 2, 3, 4, 5, 6]
    assert [r["step"] for r in writer.history.evaluations] == [0, 3, 6]


def test_a_start_without_a_checkpoint_starts_anew(run: Path) -> None:
    writer = MetricsWriter(epath.Path(run))
    assert records(run) == [] and not writer.evaluated(0)
    assert writer.notes == ["metrics.jsonl: dropped 9 records of an earlier start without a checkpoint"]
    writer.close()


def test_missing_records_are_told(tmp_path: Path) -> None:
    writer = MetricsWriter(epath.Path(tmp_path), start_step=4)
    assert writer.notes == ["metrics.jsonl: the records of 4 of the first 4 steps are not there"]


@pytest.mark.parametrize("torn", [b'{"kind": "step", "step": 7, "lo', b"\0" * 40, b'{"kind": "step"'])
def test_a_last_line_cut_short_by_a_crash(run: Path, torn: bytes) -> None:
    whole = read_metrics(run / "metrics.jsonl")
    with open(run / "metrics.jsonl", "ab") as file:
        file.write(torn)
    assert read_metrics(run / "metrics.jsonl") == whole
    writer = MetricsWriter(epath.Path(run), start_step=6)
    assert len(writer.notes) == 1 and "1 lines that were cut short" in writer.notes[0]
    writer.write(step(7))
    writer.close()
    assert [r["step"] for r in records(run) if r["kind"] == "step"] == [1, 2, 3, 4, 5, 6, 7]


def test_reading_a_damaged_or_missing_file_says_where(run: Path) -> None:
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines()
    for damaged in ('{"kind": "step"}', '{"kind": "step", "step": "3"}', "[1]", "nonsense"):
        file.write_text("\n".join([lines[0], damaged, *lines[2:]]) + "\n")
        with pytest.raises(UserError, match="line 2 is no record"):
            read_metrics(file)
    with pytest.raises(UserError, match="is not there"):
        read_metrics(run / "nowhere" / "metrics.jsonl")


def test_a_history_is_the_same_from_file_and_from_writing(run: Path) -> None:
    history = History(read_metrics(run / "metrics.jsonl"))
    assert list(history.steps) == [1, 2, 3, 4, 5, 6] and list(history.tokens) == [100.0 * n for n in range(1, 7)]
    assert history.losses[2] == pytest.approx(4.7) and math.isnan(history.seconds[0])
    assert history.last == step(6, kind="step")


def test_other_processes_write_nothing(tmp_path: Path) -> None:
    writer = MetricsWriter(epath.Path(tmp_path), active=False)
    writer.write(step(1))
    writer.flush(sync=True)
    writer.close()
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_shows_within_the_step(tmp_path: Path) -> None:
    writer = MetricsWriter(epath.Path(tmp_path))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, hard))  # no file may grow beyond that
    try:
        with pytest.raises(StorageError) as caught:
            for n in range(1, 200):
                writer.write(step(n))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert n < 30 and "File too large" in str(caught.value)
    steps = [r["step"] for r in records(tmp_path)]  # every line is whole
    assert steps == list(range(1, len(steps) + 1)) and len(steps) in (n - 1, n)


def test_mirrors_get_what_is_written(tmp_path: Path) -> None:
    class Mirror:
        def __init__(self) -> None:
            self.calls: list[Any] = []

        def write(self, record: Any) -> None:
            self.calls.append(record["step"])

        def flush(self) -> None:
            pass

        def close(self) -> None:
            self.calls.append("close")

    mirror = Mirror()
    writer = MetricsWriter(epath.Path(tmp_path), mirrors=[mirror])
    writer.write(step(1))
    writer.close()
    writer.close()
    assert mirror.calls == [1, "close"]


def test_wandb_without_its_package_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if not installed
    with pytest.raises(UserError, match=r"train\.wandb: 'project' needs the wandb package\ninstall it with"):
        WandbWriter("project", epath.Path(tmp_path), {})


def test_wandb_joins_resumes_to_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wandb:
        """What WandbWriter uses of the package."""

        def __init__(self) -> None:
            self.ids: list[str] = []
            self.logged: list[dict[str, float]] = []

        def init(self, **settings: Any) -> Wandb:
            assert settings["resume"] == "allow" and settings["config"] == {"seed": 1}
            self.ids.append(settings["id"])
            return self

        def define_metric(self, name: str, step_metric: str | None = None) -> None: ...

        def log(self, values: dict[str, float]) -> None:
            self.logged.append(values)

        def finish(self) -> None: ...

    wandb = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for n in (1, 2):
        writer = MetricsWriter(
            epath.Path(tmp_path), start_step=n - 1, mirrors=[WandbWriter("p", epath.Path(tmp_path), {"seed": 1})]
        )
        writer.write(step(n))
        writer.close()
    assert len(set(wandb.ids)) == 1 and len(wandb.ids) == 2
    assert [v["step"] for v in wandb.logged] == [1, 2] and "train/loss" in wandb.logged[0]


def test_speed_and_mfu() -> None:
    assert speed(1000, 0.5) == {"tokens_per_second": 2000.0, "step_seconds": 0.5}
    assert speed(1000, 0.5, flops_per_token=6e6, peak_flops=24e9)["mfu"] == pytest.approx(0.5)
    assert "mfu" not in speed(1000, 0.5, flops_per_token=6e6)


def test_values_of_an_evaluation() -> None:
    values = evaluation_values(800 * math.log(2), 200, 400)
    assert values == pytest.approx({"eval_loss": 4 * math.log(2), "perplexity": 16.0, "bits_per_byte": 2.0})
    assert evaluation_values(2.0, 2, name="wiki") == {"wiki/eval_loss": 1.0, "wiki/perplexity": pytest.approx(math.e)}
    assert evaluation_values(1e6, 1)["perplexity"] == math.inf
    with pytest.raises(UserError, match="an evaluation of wiki counted no target"):
        evaluation_values(0.0, 0, name="wiki")


def test_an_object_store_gets_records_when_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lm_jax.paths.is_local", lambda path: False)
    writer = MetricsWriter(epath.Path(tmp_path))
    writer.write(step(1))
    writer.write(step(2))
    assert not (tmp_path / "metrics.jsonl").exists()
    writer.flush(sync=True)
    assert [r["step"] for r in records(tmp_path)] == [1, 2]
    monkeypatch.setattr("lm_jax.training.metrics._OBJECT_STORE_SECONDS", 0.0)
    writer.write(step(3))
    assert [r["step"] for r in records(tmp_path)] == [1, 2, 3]
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1
