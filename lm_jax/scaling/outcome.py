"""What came of a sweep's run: read from its records once it has ended, kept in its folder as `result.json`. Beside it,
from before its first step, `fingerprint.txt` says which run it is."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from typing import Any, Literal

from etils import epath

from lm_jax import costs, paths
from lm_jax.config import build
from lm_jax.errors import UserError
from lm_jax.training.metrics import FILE, History, read_metrics
from lm_jax.training.run import RunConfig

RESULT = "result.json"
FINGERPRINT = "fingerprint.txt"
SMOOTHED = 0.05  # of a run's steps: what its last training loss is the mean of


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
      fingerprint: of the run; another config under the same name is another run.
      status: finished, or failed.
      reason: why it failed; empty where it did not.
      loss: of held-out text after the last step, nats a token; None where none is held out.
      train_loss: mean over the last steps, those left out that were not finite; None where all were not.
      tokens: trained on.
      flops: of training.
      parameters: by part; see `costs.parameters`.
      steps: done.
      step_seconds: median of a step.
      training_seconds: of all steps together, evaluations and saving left out.
      seconds: of the whole run in the process that ended it, compiling included.
      memory_bytes: that a step needs on each device, by estimate.
      bad_steps: whose loss or gradient was not finite.
      vocab: ids of its model, which may be the tokenizer's.
    """

    fingerprint: str
    status: Literal["finished", "failed"]
    reason: str = ""
    loss: float | None = None
    train_loss: float | None = None
    tokens: int = 0
    flops: float = 0.0
    parameters: dict[str, int] = dataclasses.field(default_factory=dict)
    steps: int = 0
    step_seconds: float | None = None
    training_seconds: float = 0.0
    seconds: float = 0.0
    memory_bytes: int | None = None
    bad_steps: int = 0
    vocab: int | None = None

    @property
    def finished(self) -> bool:
        return self.status == "finished"


def finished(fingerprint: str, directory: epath.Path, *, seconds: float, memory_bytes: int | None) -> Outcome:
    """The outcome of a run that has come to its end, from its records; failed where its held-out loss is not finite.

    Args:
      fingerprint: of the run; see `Run`.
      directory: the run's.
      seconds: that it took.
      memory_bytes: that a step needs on each device.
    """
    config = build(RunConfig, json.loads(paths.read_text(directory / "config.json")))  # its vocabulary is known now
    train = config.train
    tokens = train.total_steps * train.tokens_per_step
    history = History(read_metrics(directory / FILE))
    loss = None
    if config.data.held_out > 0:
        # Of the last step and no other: an earlier evaluation is of another model.
        loss = next((r.get("eval_loss") for r in history.evaluations if r["step"] == train.total_steps), None)
        if loss is None:
            return Outcome(fingerprint, "failed", "it has no finite held-out loss after its last step")
    last = max(1, round(SMOOTHED * len(history.losses)))
    # A step whose loss was not finite was not applied either.
    trained = [value for value in history.losses[-last:] if math.isfinite(value)]
    return Outcome(
        fingerprint,
        "finished",
        loss=loss,
        train_loss=statistics.fmean(trained) if trained else None,
        tokens=tokens,
        flops=costs.training_flops(config.model, train.length, tokens),
        parameters=costs.parameters(config.model),
        steps=train.total_steps,
        step_seconds=statistics.median(history.seconds) if history.seconds else None,
        training_seconds=math.fsum(history.seconds),
        seconds=seconds,
        memory_bytes=memory_bytes,
        bad_steps=len(history.bad_tokens),
        vocab=config.model.vocab,
    )


def begin(directory: epath.Path, fingerprint: str) -> None:
    """Writes down which run a folder is, before it trains: a run that has not ended must go on as the same one."""
    if begun(directory) is None:
        paths.write_text_atomic(directory / FINGERPRINT, fingerprint + "\n")


def begun(directory: epath.Path) -> str | None:
    """The fingerprint of the run that a folder was begun with; None where none has begun there."""
    file = directory / FINGERPRINT
    return paths.read_text(file).strip() if file.exists() else None


def write(directory: epath.Path, outcome: Outcome) -> None:
    """Writes `result.json`."""
    paths.make_directory(directory)
    paths.write_text_atomic(directory / RESULT, json.dumps(dataclasses.asdict(outcome), indent=1) + "\n")


def read(directory: epath.Path) -> Outcome | None:
    """The outcome that a run's folder holds; None where it has none that can be read."""
    file = directory / RESULT
    if not file.exists():
        return None
    try:
        values: dict[str, Any] = json.loads(paths.read_text(file))
        return build(Outcome, values)
    except (ValueError, TypeError, UserError):
        return None  # damaged: the run ends once more, from its last checkpoint
