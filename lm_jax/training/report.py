"""What a run leaves for people: `config.json`, `loss.png`, `samples.md` and `report.md`.

None of it is read back by the run: the truth is in `metrics.jsonl` and the checkpoints.
"""

from __future__ import annotations

import importlib.metadata
import io
import json
import math
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath

import lm_jax
from lm_jax import paths
from lm_jax.config import redact
from lm_jax.training.metrics import History, Record
from lm_jax.training.terminal import count, duration, visible

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
_DRAW_SECONDS = 60.0  # drawing takes half a second, so evaluations that follow each other closely share a picture
_ROWS = 15  # evaluations in the report's table
_POINTS = 1500  # about the picture's width in pixels


def write_config(directory: epath.Path, config: Mapping[str, Any]) -> None:
    """Writes `config.json`: the resolved config, from which secrets have been taken out already."""
    paths.write_text_atomic(directory / "config.json", json.dumps(config, indent=2, allow_nan=False) + "\n")


def command_line() -> str:
    """The command that started this process, as one would type it again; secrets among its options are hidden."""
    words = ["python"]
    for word in sys.orig_argv[1:]:
        key, equals, value = word.partition("=")
        words.append(f"{key}={redact({key.split('.')[-1]: value}).popitem()[1]}" if equals else word)
    return shlex.join(words)


def git_commit() -> str | None:
    """The commit of the checkout that this package runs from, with `-dirty` where files differ; None outside of one."""
    package = Path(lm_jax.__file__).resolve().parent

    def git(*words: str) -> str:
        command = ["git", "--no-optional-locks", "-C", os.fspath(package.parent), *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        # An installed package may lie inside somebody else's repository.
        if Path(git("rev-parse", "--show-toplevel")).resolve() != package.parent:
            return None
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def versions() -> dict[str, str]:
    """What this process runs on: versions, device, git commit (where there is one)."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    found["platform"] = platform.platform()
    found["devices"] = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    found["hosts"] = f"{jax.process_count()}, the first with {os.cpu_count()} cores ({platform.machine()})"
    commit = git_commit()
    return found if commit is None else {**found, "git commit": commit}


def smoothed(values: np.ndarray) -> np.ndarray:
    """A running mean over some 4% of the steps so far: narrow where a loss falls fast, wide where it is noise.

    NaN is left out.
    """
    n = len(values)
    index = np.arange(n)
    reach = (0.02 * index).astype(np.int64) + 1 if n > 20 else np.zeros(n, np.int64)
    low, high = np.maximum(index - reach, 0), np.minimum(index + reach + 1, n)
    known = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    with np.errstate(invalid="ignore", divide="ignore"):
        return (sums[high] - sums[low]) / (counts[high] - counts[low])


def _extremes(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most about `_POINTS` points of a noisy curve, the lowest and the highest of each stretch."""
    stretch = -(-2 * len(y) // _POINTS)
    if stretch < 3:
        return x, y
    picks = []
    for start in range(0, len(y), stretch):
        part = y[start : start + stretch]
        if np.isfinite(part).any():
            picks += sorted({start + int(np.nanargmin(part)), start + int(np.nanargmax(part))})
    return x[picks], y[picks]


def _held_out(history: History) -> dict[str, tuple[list[float], list[float]]]:
    """Tokens and losses of each held-out set by its label."""
    sets: dict[str, tuple[list[float], list[float]]] = {}
    for record in history.evaluations:
        for key, value in record.items():
            if key.endswith("eval_loss") and value is not None:
                name = key.removesuffix("eval_loss").rstrip("/") or "held out"
                xs, ys = sets.setdefault(name, ([], []))
                xs.append(record.get("tokens", 0))
                ys.append(value)
    return sets


def draw_loss(history: History, title: str) -> bytes:
    """The loss against tokens as a PNG: each step, a running mean, held-out points."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import: only where it is needed
    from matplotlib.figure import Figure

    ink, train, colors = "#333a45", "#4c78a8", ("#e45756", "#54a24b", "#b279a2", "#f58518", "#72b7b2", "#9d755d")
    figure = Figure(figsize=(8, 4.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    tokens, losses = np.array(history.tokens), np.array(history.losses)
    mean = smoothed(smoothed(losses))  # twice: a box alone leaves corners
    if len(losses):
        every = slice(None, None, max(1, len(losses) // _POINTS))
        axes.plot(*_extremes(tokens, losses), color=train, alpha=0.28, linewidth=0.8)
        axes.plot(
            tokens[every], mean[every], color=train, linewidth=1.8, label=f"training, running mean  {mean[-1]:.3f}"
        )
    sets = _held_out(history)
    for i, (name, (xs, ys)) in enumerate(sets.items()):
        color = colors[i % len(colors)]
        style: dict[str, Any] = {"marker": "o", "markeredgecolor": "white", "markeredgewidth": 0.6}
        style["markersize"] = 5 if len(xs) < 40 else 2.5
        axes.plot(xs, ys, color=color, linewidth=1, label=f"{name}  {ys[-1]:.3f}", zorder=3, **style)
    _limit(axes, tokens, mean, losses, list(sets.values()))
    bad = history.bad_tokens
    if bad:
        floor = [axes.get_ylim()[0]] * len(bad)
        axes.plot(bad, floor, "|", color="#d62728", markersize=14, label=f"{len(bad)} steps not finite")
    _dress(axes, ink)
    axes.set_title(title, loc="left", color=ink, fontsize=11, fontweight="bold")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _dress(axes: Any, ink: str) -> None:
    """Labels, grid and legend."""
    from matplotlib.ticker import FuncFormatter

    axes.set_xlabel("tokens", color=ink)
    axes.set_ylabel("loss (nats a token)", color=ink)
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda x, _: re.sub(r"\.0*(?=[kMBT])|(?<=\.\d)0(?=[kMBT])", "", count(x)))
    )
    axes.grid(axis="y", color="#e3e6ea", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=ink, labelsize=9)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color("#b8bec7")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=9, labelcolor=ink, loc="upper right")


def _limit(
    axes: Any, tokens: np.ndarray, mean: np.ndarray, losses: np.ndarray, sets: Sequence[tuple[list[float], list[float]]]
) -> None:
    """Limits that show the course of a run: its first hundredth and lone spikes may leave the picture at the top."""
    x = np.concatenate([tokens, *(np.array(xs) for xs, _ in sets)])
    y = np.concatenate([mean, *(np.array(ys) for _, ys in sets)])
    finite = np.isfinite(y)
    if not finite.any():
        return
    shown = y[finite & (x >= 0.01 * x.max())]
    shown = shown if len(shown) else y[finite]
    low, high = shown.min(), shown.max()
    if np.isfinite(losses).any():
        low = min(low, float(np.nanpercentile(losses, 0.5)))
    margin = 0.05 * (high - low) or 0.1
    axes.set_ylim(low - margin, high + margin)
    axes.set_xlim(0, x.max() * 1.02 or 1)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)])


def _number(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _evaluations(records: Sequence[Record]) -> str:
    picks = np.unique(np.linspace(0, len(records) - 1, min(_ROWS, len(records))).round().astype(int))
    keys = list(dict.fromkeys(k for r in records for k in r if k not in ("kind", "step", "tokens", "nonfinite")))
    rows = [
        [str(records[i]["step"]), count(records[i].get("tokens", 0)), *(_number(records[i].get(k)) for k in keys)]
        for i in picks
    ]
    return _table(["step", "tokens", *(k.replace("_", " ") for k in keys)], rows)


def speed_facts(history: History) -> dict[str, str]:
    """The speed of a run in words; medians, so that compiling and saving do not count."""
    seconds = np.array(history.seconds)
    known = seconds[np.isfinite(seconds) & (seconds > 0)]
    if not len(known):
        return {}
    median = float(np.median(known))
    facts = {"step": f"{median:.3g} s (median; 95% of steps under {float(np.percentile(known, 95)):.3g} s)"}
    per_step = np.diff(np.array(history.tokens))
    if len(per_step):
        facts["tokens a second"] = count(float(np.median(per_step)) / median)
    facts["waiting for data"] = (
        f"{100 * float(np.nansum(np.array(history.waits))) / float(known.sum()):.2f}% of the time"
    )
    last = history.last or {}
    if last.get("mfu") is not None:
        facts["MFU of the last step"] = f"{100 * last['mfu']:.1f}%"
    if last.get("peak_memory_bytes") is not None:
        facts["peak memory"] = f"{last['peak_memory_bytes'] / 2**30:.2f} GiB a device"
    facts["time in steps"] = duration(float(known.sum()))
    return facts


def _result(history: History, state: str) -> str:
    last, text = history.last, state
    if last is not None:
        text += f" at step {last['step']}, {count(last.get('tokens', 0))} tokens"
        if last.get("loss") is not None:
            text += f", training loss {last['loss']:.3f}"
    if history.evaluations and history.evaluations[-1].get("eval_loss") is not None:
        text += f", held-out loss **{history.evaluations[-1]['eval_loss']:.3f}**"
    if history.bad_tokens:
        text += f"; {len(history.bad_tokens)} steps were not finite and not applied"
    return text[0].upper() + text[1:] + "."


def _config_lines(config: Mapping[str, Any]) -> str:
    lines = []
    for section, values in config.items():
        if isinstance(values, Mapping):
            inner = ", ".join(f"{k} = {json.dumps(v)}" for k, v in values.items() if v is not None)
            lines.append(f"- **{section}**: `{inner}`" if inner else f"- **{section}**: defaults")
        else:
            lines.append(f"- **{section}**: `{json.dumps(values)}`")
    return "\n".join(lines)


class Report:
    """Keeps `report.md` and `loss.png` of a run up to date.

    Args:
      directory: the run's.
      config: resolved and without secrets.
      command: what starts the run again.
      facts: more to tell in the head of the report (parameters, layout), by name.
    """

    def __init__(
        self, directory: epath.Path, *, config: Mapping[str, Any], command: str, facts: Mapping[str, str] | None = None
    ) -> None:
        self._directory, self._config, self._command, self._facts = directory, config, command, dict(facts or {})
        self._versions = versions()
        self._drawn = -math.inf
        self._known = (0, 0)  # records in the last picture
        self._pictured = False

    def update(self, history: History, state: str = "running", *, final: bool = False) -> None:
        """Writes the report, and draws the picture where the last one is a minute old, or older than the records and
        this is the `final` one."""
        known = (len(history.steps), len(history.evaluations))
        if known[0] > 1 and known != self._known and (final or time.monotonic() - self._drawn >= _DRAW_SECONDS):
            self._known = known
            paths.write_bytes_atomic(self._directory / "loss.png", draw_loss(history, self._directory.name))
            self._drawn, self._pictured = time.monotonic(), True
        paths.write_text_atomic(self._directory / "report.md", self.text(history, state))

    def text(self, history: History, state: str) -> str:
        parts = [f"# {self._directory.name}", _result(history, state)]
        if self._facts:
            parts.append(_table(["", ""], self._facts.items()))
        if self._pictured:
            parts.append("![The loss against tokens](loss.png)")
        if history.evaluations:
            parts += ["## Held-out text", _evaluations(history.evaluations)]
        speed = speed_facts(history)
        if speed:
            parts += ["## Speed", _table(["", ""], speed.items())]
        parts += ["## To repeat it", f"```sh\n{self._command}\n```"]
        parts += ["## Config", _config_lines(self._config), "All of it: [config.json](config.json)."]
        parts += ["## Versions", _table(["", ""], self._versions.items())]
        parts.append(
            "Records: [metrics.jsonl](metrics.jsonl); samples: [samples.md](samples.md); `tensorboard --logdir .`"
        )
        return "\n\n".join(parts) + "\n"


class Samples:
    """Keeps `samples.md`: what the model writes as it learns, the newest last.

    Sections of steps after `start_step` are dropped (they come again); a run that starts at 0 starts with none.
    """

    _HEAD = "# Samples\n"

    def __init__(self, directory: epath.Path, *, start_step: int = 0) -> None:
        self._file = directory / "samples.md"
        self._sections: list[str] = []
        if start_step and self._file.exists():
            # The text of a sample is indented, so only a heading begins a line with ##.
            for section in re.split(r"^(?=## step \d+)", paths.read_text(self._file), flags=re.MULTILINE)[1:]:
                if int(section.split()[2]) <= start_step:
                    self._sections.append(section)

    def add(self, step: int, prompt: str, text: str) -> None:
        """Appends what the model wrote after the prompt at this step."""
        body = "\n".join("    " + line for line in visible(prompt + text).split("\n"))
        self._sections.append(f"## step {step}\n\nPrompt: `{json.dumps(prompt, ensure_ascii=False)}`\n\n{body}\n\n")
        paths.write_text_atomic(self._file, self._HEAD + "\n" + "".join(self._sections))
