"""What a run tells while it runs: records, the progress line, samples and the report, from the first process alone.

The numbers of a step are read when the next one is already on its way, so that reading never keeps the device waiting.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, cast

import jax
from etils import epath

from lm_jax import costs
from lm_jax.config import redact, to_dict
from lm_jax.errors import Failure
from lm_jax.training.metrics import MetricsWriter, WandbWriter, evaluation_values, peak_memory_bytes, speed
from lm_jax.training.pace import Pace
from lm_jax.training.report import Report, Samples, write_config
from lm_jax.training.run import RunConfig
from lm_jax.training.terminal import Progress, visible


class RunFailed(Failure):
    """Too many steps in a row were not finite."""


class RunLog:
    """A run's records and reports.

    Args:
      config: resolved.
      directory: the run's.
      start_step: steps done by earlier processes.
      command: what starts the run again.
      facts: lines of the report's head, by name.
    """

    def __init__(
        self, config: RunConfig, directory: epath.Path, *, start_step: int, command: str, facts: Mapping[str, str]
    ) -> None:
        self.active = jax.process_index() == 0
        train = config.train
        self._length, self._tokens_per_step = train.length, train.tokens_per_step
        self._flops = costs.flops_per_token(config.model, train.length)
        peak = costs.peak_flops(jax.devices()[0].device_kind, config.model.compute_dtype)
        self._peak = peak and peak * jax.device_count()
        plain = redact(to_dict(config))
        mirrors = [WandbWriter(train.wandb, directory, plain)] if train.wandb and self.active else []
        self.writer = MetricsWriter(directory, start_step=start_step, active=self.active, mirrors=mirrors)
        self.progress = (
            Progress(train.total_steps, self._tokens_per_step, start_step=start_step) if self.active else None
        )
        self._samples = Samples(directory, start_step=start_step) if self.active else None
        self._report = Report(directory, config=plain, command=command, facts=facts) if self.active else None
        if self.active:
            write_config(directory, plain)
        self._max_bad_steps = train.max_bad_steps
        self._waiting: tuple[int, int, dict[str, jax.Array], float] | None = None
        self._since = time.perf_counter()
        self._pace = Pace()

    def say(self, line: str) -> None:
        """A line to whoever watches."""
        if self.progress is not None:
            self.progress.say(line)

    @property
    def device_is_idle(self) -> bool:
        """Whether every step that was started is done. While one runs, nothing waits for the next batch."""
        return self._waiting is None or cast(Any, self._waiting[2]["loss"]).is_ready()  # not in the type of jax.Array

    def start(self) -> None:
        """Says that the first step is being compiled, and starts the clock of the steps."""
        if self.progress is not None:
            self.progress.start()
        self.resume_clock()

    def step(self, step: int, rows: int, metrics: dict[str, jax.Array], waited: float) -> None:
        """Takes the numbers of a step that was just started, and writes those of the one before.

        Args:
          step: how many steps are done with this one.
          rows: rows consumed with this one.
          metrics: the step's, still on the device.
          waited: seconds that the device waited for the batch.

        Raises:
          RunFailed: see `flush`.
        """
        self.flush()
        self._waiting = (step, rows, metrics, waited)

    def flush(self) -> None:
        """Writes the record of the last step, once it is done.

        Raises:
          RunFailed: where it was the last of too many steps in a row whose loss or gradient was not finite.
        """
        if self._waiting is None:
            return
        (step, rows, on_device, waited), self._waiting = self._waiting, None
        values = jax.device_get(on_device)
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        record: dict[str, Any] = {"step": step, "tokens": rows * self._length}
        names = [name for name in values if name not in ("bad_steps", "batch_hash", "targets")]
        record |= {name: float(values[name]) for name in names}
        record |= speed(self._tokens_per_step, seconds, flops_per_token=self._flops, peak_flops=self._peak)
        record |= {"data_wait_seconds": waited, "peak_memory_bytes": peak_memory_bytes()}
        record["batch_hash"] = f"{int(values['batch_hash']):08x}"
        self.writer.write(record)
        if self.progress is not None:
            self.progress.update(record)
        if slow := self._pace.step(step, seconds):
            self.say(slow)
        if (bad := int(values["bad_steps"])) >= self._max_bad_steps:
            raise RunFailed(
                f"{bad} steps in a row had a loss or gradient that is not finite; none of them was applied\n"
                "try a lower optimizer.learning_rate, more optimizer.warmup_steps or a smaller optimizer.clip_norm\n"
                "the last checkpoint is whole; train.max_bad_steps says how many are borne"
            )

    def resume_clock(self) -> None:
        """Leaves what has happened since the last step (an evaluation, a save) out of the next step's seconds."""
        self._since = time.perf_counter()
        self._pace.rest()

    def evaluation(
        self,
        step: int,
        rows: int,
        results: Mapping[str, tuple[float, int, float]],
        consumed: Mapping[str, int] | None = None,
    ) -> None:
        """Writes an evaluation.

        Args:
          results: by the set's name (empty for the held-out text): the sum of its loss in nats, targets, bytes a
            target.
          consumed: rows trained on so far of each source of a mixture.
        """
        values: dict[str, float] = {}
        for name, (nats, targets, bytes_per_target) in results.items():
            values |= evaluation_values(nats, targets, round(targets * bytes_per_target), name=name)
        taken = {f"{name}_tokens": n * self._length for name, n in (consumed or {}).items()}
        self.writer.write({"step": step, "tokens": rows * self._length, **taken, **values}, kind="evaluation")
        losses = ", ".join(f"{k} {v:.4f}" for k, v in values.items() if k.endswith(("eval_loss", "bits_per_byte")))
        self.say(f"step {step}: {losses}")
        if rows and consumed:
            shares = ", ".join(f"{name} {n * self._length:,} ({n / rows:.1%})" for name, n in consumed.items())
            self.say(f"step {step}: tokens of {shares}")
        if self._report is not None:
            self._report.update(self.writer.history)

    def sample(self, step: int, prompt: str, text: str) -> None:
        """Adds what the model wrote after a prompt."""
        if self._samples is not None:
            self._samples.add(step, prompt, text)

    def left(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """What is done in any case when a run ends: records go to the disk, and an error into the report.

        (The form of an `__exit__`, for an ExitStack.)
        """
        del kind, trace
        if error is not None and self._report is not None:
            reason = visible(str(error)).strip().split("\n")[0] or type(error).__name__
            with contextlib.suppress(OSError):  # a full disk: the error itself is on its way to the user
                self._report.update(self.writer.history, f"failed ({reason})", final=True)
        self.writer.close()

    def close(self, state: str) -> None:
        """Everything on the disk, and the report with how the run ended."""
        self.flush()
        self.writer.close()
        if self._report is not None:
            self._report.update(self.writer.history, state, final=True)
        if self.progress is not None:
            self.progress.close()
