"""What a sweep leaves for people: a page that opens from disk, its pictures, a summary, a table of runs.

An analysis (a file each beside this one) says what was found; here it becomes files.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import os
import platform
from collections.abc import Mapping, Sequence

from etils import epath

from lm_jax import paths
from lm_jax.html_page import escape, figure, page, table
from lm_jax.scaling.outcome import Outcome
from lm_jax.scaling.sweep import Run
from lm_jax.training.report import git_commit, versions
from lm_jax.training.run import RunConfig
from lm_jax.training.terminal import count, duration


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture: the name of its file, what it shows, and the PNG."""

    name: str
    caption: str
    png: bytes


@dataclasses.dataclass(frozen=True)
class Table:
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of the page: paragraphs, then pictures, then tables."""

    title: str
    text: Sequence[str] = ()
    pictures: Sequence[Picture] = ()
    tables: Sequence[Table] = ()


@dataclasses.dataclass(frozen=True)
class Analysis:
    """What an analysis found.

    Attributes:
      title: of the page.
      summary: three sentences: what was found, and how sure that is.
      sections: the rest of the page.
      files: further files beside the page, by name (the next config).
    """

    title: str
    summary: Sequence[str]
    sections: Sequence[Section]
    files: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Ended:
    """A run that has ended well."""

    run: Run
    outcome: Outcome

    @property
    def loss(self) -> float:
        """Of held-out text; of training where none is held out. Nats a token."""
        loss = self.outcome.loss if self.outcome.loss is not None else self.outcome.train_loss
        assert loss is not None  # see `usable`
        return loss

    @property
    def config(self) -> RunConfig:
        """The run's, with its vocabulary."""
        if self.outcome.vocab is None:
            return self.run.config.with_likely_vocab()
        return self.run.config.with_vocab(self.outcome.vocab)

    def label(self, word: str) -> str:
        return self.run.labels.get(word, "")


def usable(runs: Sequence[Run], outcomes: Mapping[str, Outcome]) -> tuple[list[Ended], list[str]]:
    """The runs to go by, and why the others are left out, a line each."""
    ended, notes = [], []
    for run in runs:
        outcome = outcomes.get(run.name)
        if outcome is None:
            notes.append(f"{run.name} has not run")
        elif not outcome.finished:
            notes.append(f"{run.name} is left out: it failed ({outcome.reason})")
        elif outcome.loss is None and outcome.train_loss is None:
            notes.append(f"{run.name} is left out: its loss is not finite")
        else:
            ended.append(Ended(run, outcome))
            if outcome.bad_steps:
                notes.append(f"{run.name}: {outcome.bad_steps} steps were not finite and not applied")
    return ended, notes


# --------------------------------------------------------------------------------------------------------------- files


def write(
    directory: epath.Path,
    analysis: Analysis,
    runs: Sequence[Run],
    outcomes: Mapping[str, Outcome],
    *,
    command: str,
    commands: Mapping[str, str],
    notes: Sequence[str] = (),
) -> epath.Path:
    """Writes `report.html`, `summary.md`, `runs.csv`, the pictures and the analysis' own files.

    Args:
      directory: the sweep's.
      analysis: what was found.
      runs, outcomes: of the sweep.
      command: what makes all this again.
      commands: what trains each run by itself, by name.
      notes: what was left out and why.

    Returns:
      The page's path.
    """
    for picture in _pictures(analysis):
        paths.write_bytes_atomic(directory / picture.name, picture.png)
    for name, text in analysis.files.items():
        paths.write_text_atomic(directory / name, text)
    paths.write_text_atomic(directory / "runs.csv", _csv(runs, outcomes))
    paths.write_text_atomic(directory / "summary.md", _summary(analysis, command, notes))
    report = directory / "report.html"
    paths.write_text_atomic(report, _page(analysis, runs, outcomes, command, commands, notes))
    return report


def _pictures(analysis: Analysis) -> list[Picture]:
    return [picture for section in analysis.sections for picture in section.pictures]


def _csv(runs: Sequence[Run], outcomes: Mapping[str, Outcome]) -> str:
    """A line a run, fit for `launch.fit --csv`."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    columns = ["parameters", "parameters_without_embedding", "tokens", "flops", "loss", "train_loss", "steps"]
    columns += ["step_seconds", "seconds", "memory_bytes", "bad_steps", "status", "reason"]
    # A sweep over tokens or steps has them among its words, too.
    words = [w for w in dict.fromkeys(word for run in runs for word in run.labels) if w not in ("name", *columns)]
    writer.writerow(["name", *words, *columns])
    for run in runs:
        o = outcomes.get(run.name) or Outcome(run.fingerprint, "failed", "has not run")
        sizes = o.parameters or run.parameters
        tokens, flops = (o.tokens, o.flops) if o.finished else (run.tokens, run.flops)
        values = [sizes["total"], sizes["without_embedding"], tokens, repr(flops), o.loss, o.train_loss]
        values += [o.steps, o.step_seconds, round(o.seconds, 2), o.memory_bytes, o.bad_steps, o.status, o.reason]
        writer.writerow([run.name, *(run.labels.get(word, "") for word in words), *values])
    return out.getvalue()


def _made_by(command: str) -> list[tuple[str, str]]:
    found = versions()
    packages = ", ".join(f"{name} {version}" for name, version in found.items())
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}"
    return [("command", command), ("commit", git_commit() or "not from a checkout"), ("versions", packages),
            ("machine", machine)]  # fmt: skip


def _summary(analysis: Analysis, command: str, notes: Sequence[str]) -> str:
    lines = [f"# {analysis.title}", "", " ".join(analysis.summary), ""]
    lines += [f"![{p.caption}]({p.name})" for p in _pictures(analysis)[:1]] + [""]
    lines += ["Left out or to be known:", "", *(f"- {note}" for note in notes), ""] if notes else []
    lines += [f"- {name}: `{text}`" for name, text in _made_by(command)]
    return "\n".join([*lines, "", "All of it: [report.html](report.html)", ""])


def _page(
    analysis: Analysis,
    runs: Sequence[Run],
    outcomes: Mapping[str, Outcome],
    command: str,
    commands: Mapping[str, str],
    notes: Sequence[str],
) -> str:
    e = escape
    parts = [f'<p class="summary">{e(" ".join(analysis.summary))}</p>']
    if notes:
        parts.append('<ul class="notes">' + "".join(f"<li>{e(note)}</li>" for note in notes) + "</ul>")
    for section in analysis.sections:
        parts.append(f"<h2>{e(section.title)}</h2>")
        parts += [f"<p>{e(text)}</p>" for text in section.text]
        parts += [figure(picture.png, f"{picture.caption} ({picture.name})") for picture in section.pictures]
        parts += [table(t.columns, t.rows) for t in section.tables]
    for name, text in analysis.files.items():
        parts.append(f"<h2>{e(name)}</h2><pre>{e(text)}</pre>")
    parts += ["<h2>Runs</h2>", _runs(runs, outcomes)]
    parts.append("<h2>How this was made</h2><ul>")
    parts += [f"<li>{e(name)}: <code>{e(text)}</code></li>" for name, text in _made_by(command)]
    parts.append("</ul><details><summary>The command of each run</summary>")
    parts += [f"<pre>{e(commands[run.name])}</pre>" for run in runs]
    return page(analysis.title, [*parts, "</details>"])


def _runs(runs: Sequence[Run], outcomes: Mapping[str, Outcome]) -> str:
    """The table of runs, with links to their curves and reports."""
    e = escape
    rows = []
    for run in runs:
        o = outcomes.get(run.name)
        folder = f"runs/{run.name}"
        cells = [f'<a href="{e(folder)}/report.md">{e(run.name)}</a>']
        if o is None or not o.finished:
            what = "has not run" if o is None else f"failed: {o.reason}"
            rows.append(f'<tr class="failed"><td>{cells[0]}</td><td colspan="7">{e(what)}</td></tr>')
            continue
        loss = "" if o.loss is None else f"{o.loss:.4f}"
        values = [count(o.parameters["total"]), count(o.tokens), f"{o.flops:.3g}", loss]
        values += [duration(o.seconds), f"{max(0.0, o.seconds - o.training_seconds):.1f}s"]
        cells += [e(v) for v in values] + [f'<a href="{e(folder)}/loss.png">curve</a>']
        rows.append("<tr>" + "".join(f"<td>{c}</td>" for c in cells) + "</tr>")
    head = ("run", "parameters", "tokens", "FLOPs", "loss", "time", "of it not steps", "")
    return (
        '<div class="wide"><table><tr>' + "".join(f"<th>{h}</th>" for h in head) + f"</tr>{''.join(rows)}</table></div>"
    )
