"""A run's records: `metrics.jsonl` and whatever mirrors it (TensorBoard, Weights & Biases).

`metrics.jsonl` has one JSON object a line, of two kinds:

- `{"kind": "step", "step": 12, "tokens": 24576, "loss": 3.2, "grad_norm": .., "learning_rate": .., "batch_hash": "..",
  "step_seconds": .., "tokens_per_second": .., "data_wait_seconds": ..}`: exactly one for each step, also after resumes.
  `step` counts from 1 (how many are done once it is done), `tokens` are those seen so far; `data_wait_seconds` is for
  how long the device had nothing to do because the batch was not there; `peak_memory_bytes` and `mfu` stand where they
  are known.
- `{"kind": "evaluation", "step": 99, "tokens": .., "eval_loss": .., "perplexity": .., "bits_per_byte": ..}`: at most
  one for each step, with named sets beside it as `wiki/eval_loss` and so on. Step 0 is the model before its first step.

The JSON is strict: a number that is not finite is `null`, and `nonfinite` says what it was (`{"loss": "nan"}`). A step
whose loss or gradient was not finite has `"bad_step": true`.
"""

from __future__ import annotations

import array
import json
import math
import os
import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, Protocol

import jax
import numpy as np
from etils import epath

from lm_jax import paths
from lm_jax.errors import UserError
from lm_jax.training.events import EventsWriter, tagged

FILE = "metrics.jsonl"

Kind = Literal["step", "evaluation"]
Record = dict[str, Any]

_OBJECT_STORE_SECONDS = (
    30.0  # an object store takes whole files only, so records go there this often, and with each `flush`
)


def speed(
    tokens: int, seconds: float, *, flops_per_token: float | None = None, peak_flops: float | None = None
) -> dict[str, float]:
    """`tokens_per_second` and `step_seconds` of a step, and its `mfu` where that is known.

    Args:
      tokens: of the whole global batch.
      seconds: that the step took, waiting included.
      flops_per_token: what the model needs for a token, forward and backward, without recomputation (PaLM, appendix B).
      peak_flops: FLOPs a second of all devices of the run together.
    """
    rate = tokens / seconds if seconds > 0 else 0.0
    values = {"tokens_per_second": rate, "step_seconds": seconds}
    if flops_per_token and peak_flops:
        values["mfu"] = rate * flops_per_token / peak_flops
    return values


def evaluation_values(nats: float, tokens: int, text_bytes: int | None = None, *, name: str = "") -> dict[str, float]:
    """`eval_loss`, `perplexity`, `bits_per_byte` of a held-out set; `name/eval_loss` and so on where it has a name.

    Args:
      nats: the summed loss of its targets.
      tokens: how many targets that were.
      text_bytes: how many UTF-8 bytes of text these targets stand for; without them there are no bits per byte.

    Raises:
      UserError: where there is no target.
    """
    if tokens <= 0:
        raise UserError(
            f"an evaluation{f' of {name}' if name else ''} counted no target: it read prompts alone, or nothing\n"
            "read more of it (evaluation.batches), or give rows that prompts do not fill (train.length)"
        )
    loss = nats / tokens
    values = {"eval_loss": loss, "perplexity": math.exp(loss) if loss < 700 else math.inf}
    if text_bytes:
        values["bits_per_byte"] = nats / math.log(2) / text_bytes
    return {f"{name}/{key}" if name else key: value for key, value in values.items()}


def peak_memory_bytes() -> int | None:
    """The most memory that a device of this process has had in use, in bytes; None where devices do not tell (CPU)."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s]
    return max(peaks) if peaks else None


def strict(record: Mapping[str, Any], kind: Kind) -> Record:
    """A record as it is written: its kind and step first, nothing that is None, no number that JSON does not know."""
    out: Record = {"kind": kind, "step": int(record["step"])}
    odd: dict[str, str] = {}
    for key, value in record.items():
        if isinstance(value, np.generic):
            value = value.item()
        if isinstance(value, float) and not math.isfinite(value):
            odd[key], value = str(value), None
        elif value is None:
            continue
        out.setdefault(key, value)
    if odd:
        out["nonfinite"] = odd
    if kind == "step" and odd.keys() & {"loss", "grad_norm"}:
        out["bad_step"] = True
    return out


def _parse(line: str) -> Record | None:
    """A line's record, or None where it is none (cut short by a crash, or damaged)."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    fits = isinstance(record, dict) and type(record.get("step")) is int and record.get("kind") in ("step", "evaluation")
    return record if fits else None


def read_metrics(path: epath.PathLike) -> list[Record]:
    """All records of a `metrics.jsonl`, in order. A last line that was cut short by a crash is left out.

    Raises:
      UserError: where there is no such file, or another line than the last is no record.
    """
    file = epath.Path(path)
    if not file.exists():
        raise UserError(f"{file} is not there\ngive a run's directory or its {FILE}")
    with paths.storage_errors("read", file):
        lines = file.read_bytes().decode("utf-8", errors="replace").split("\n")
    records = []
    for number, line in enumerate(lines, 1):
        record = _parse(line)
        if record is not None:
            records.append(record)
        elif line and number < len(lines):
            raise UserError(
                f"{file}: line {number} is no record of a run: {line[:60]!r}\nremove that line to read the others"
            )
    return records


class History:
    """What a report needs of a run's records: a few numbers a step (32 bytes), and the evaluations.

    Attributes:
      steps, tokens, losses, seconds, waits: a value for each step record; NaN where it has none.
      evaluations: the evaluation records.
      last: the last step record, or None.
      bad_tokens: the tokens of each step whose loss or gradient was not finite.
    """

    def __init__(self, records: Iterable[Record] = ()) -> None:
        self.steps = array.array("q")
        self.tokens, self.losses, self.seconds, self.waits = (array.array("d") for _ in range(4))
        self.evaluations: list[Record] = []
        self.last: Record | None = None
        self.bad_tokens: list[float] = []
        for record in records:
            self.add(record)

    def add(self, record: Record) -> None:
        if record["kind"] == "evaluation":
            self.evaluations.append(record)
            return
        self.last = record
        if record.get("bad_step"):
            self.bad_tokens.append(record.get("tokens", math.nan))
        self.steps.append(record["step"])
        columns = (self.tokens, self.losses, self.seconds, self.waits)
        for column, key in zip(columns, ("tokens", "loss", "step_seconds", "data_wait_seconds"), strict=True):
            value = record.get(key)
            column.append(math.nan if value is None else value)


class Mirror(Protocol):
    """Something else that gets every record."""

    def write(self, record: Mapping[str, Any]) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


class MetricsWriter:
    """Writes a run's records: `metrics.jsonl`, TensorBoard events under `tensorboard/`, and other mirrors.

    Records of steps after `start_step` were written by a process that got further than its last checkpoint: they are
    dropped, since those steps come again. A run that starts at 0 starts with no records.

    Args:
      directory: the run's.
      start_step: the step of the checkpoint that the run resumes from; 0 for none.
      active: False in all processes but the first: nothing is read or written.
      mirrors: what else gets each record.

    Attributes:
      history: the run's records so far, those of earlier processes included.
      notes: what the reader of the terminal must be told: records dropped, unreadable or missing.

    Raises:
      StorageError: from any method, where the disk is full or cannot be written.
    """

    def __init__(
        self, directory: epath.Path, *, start_step: int = 0, active: bool = True, mirrors: Sequence[Mirror] = ()
    ) -> None:
        self.history = History()
        self.notes: list[str] = []
        self._last: dict[str, int] = {"step": start_step, "evaluation": -1}
        self._file: paths.Appender | None = None
        self._mirrors: list[Mirror] = []
        if active:
            self._file = paths.Appender(directory / FILE)
            self._keep(start_step)
            self._mirrors = [EventsWriter(directory / "tensorboard", start_step=start_step), *mirrors]
        self._local = paths.is_local(directory)
        self._flushed = time.monotonic()

    def _keep(self, start_step: int) -> None:
        """Drops the records that will be written again, and takes the others into the history."""
        assert self._file is not None
        later = unreadable = 0

        def keep(line: str) -> bool:
            nonlocal later, unreadable
            record = _parse(line)
            if record is None:
                unreadable += 1
                return False
            if record["step"] > start_step or start_step == 0:
                later += 1
                return False
            self.history.add(record)
            return True

        self._file.filter(keep)
        unreadable += bool(self._file.torn)
        if later:
            after = (
                f"of steps after {start_step}, which come again"
                if start_step
                else "of an earlier start without a checkpoint"
            )
            self.notes.append(f"{FILE}: dropped {later} records {after}")
        if unreadable:
            self.notes.append(f"{FILE}: dropped {unreadable} lines that were cut short or damaged")
        missing = start_step - len(set(self.history.steps))
        if missing:
            self.notes.append(f"{FILE}: the records of {missing} of the first {start_step} steps are not there")
        if self.history.evaluations:
            self._last["evaluation"] = self.history.evaluations[-1]["step"]

    def evaluated(self, step: int) -> bool:
        """Whether the last evaluation on record (maybe by an earlier process) is of this step. False if inactive."""
        return self._last["evaluation"] == step

    def write(self, record: Mapping[str, Any], kind: Kind = "step") -> None:
        """Writes a record: of a step, or of an evaluation. Values are plain numbers and strings; None is left out.

        Raises:
          ValueError: where a record of this kind and step, or a later one, is already written.
        """
        if self._file is None:
            return
        whole = strict(record, kind)
        if whole["step"] <= self._last[kind]:
            raise ValueError(f"a record of {kind} {whole['step']} after that of {kind} {self._last[kind]}")
        self._file.append(json.dumps(whole, allow_nan=False))
        self._last[kind] = whole["step"]
        self.history.add(whole)
        for mirror in self._mirrors:
            mirror.write(whole)
        if not self._local and time.monotonic() - self._flushed >= _OBJECT_STORE_SECONDS:
            self.flush()

    def flush(self, sync: bool = False) -> None:
        """Hands everything to the system (`sync`: to the disk itself, as must be before a checkpoint commits)."""
        if self._file is None:
            return
        self._file.flush(durable=sync)
        for mirror in self._mirrors:
            mirror.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        """Flushes to the disk and closes everything."""
        if self._file is None:
            return
        self.flush(sync=True)
        self._file.close()
        for mirror in self._mirrors:
            mirror.close()
        self._file = None


class WandbWriter:
    """Mirrors records to Weights & Biases; steps that are done again after a resume show twice there.

    Args:
      project: the project to log to.
      directory: the run's; its name is the run's name, and `wandb_id` in it joins resumes to one run.
      config: resolved and without secrets.

    Raises:
      UserError: where the `wandb` package is not installed.
    """

    def __init__(self, project: str, directory: epath.Path, config: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError as e:
            raise UserError(
                f"train.wandb: {project!r} needs the wandb package\n"
                "install it with `pip install wandb`, or leave train.wandb unset"
            ) from e
        file = directory / "wandb_id"
        if not file.exists():
            paths.write_text_atomic(file, secrets.token_hex(4) + "\n")
        self._run = wandb.init(
            project=project,
            name=directory.name,
            id=paths.read_text(file).strip(),
            resume="allow",
            config=dict(config),
            dir=os.fspath(directory) if paths.is_local(directory) else None,
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, record: Mapping[str, Any]) -> None:
        self._run.log({"step": record["step"], **tagged(record)})

    def flush(self) -> None:
        """Nothing to do: wandb sends from a process of its own."""

    def close(self) -> None:
        self._run.finish()
