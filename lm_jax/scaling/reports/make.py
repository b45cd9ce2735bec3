"""The report of a sweep, by the name that its config file gives: REPORT = "isoflop"."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from etils import epath

from lm_jax.config import did_you_mean
from lm_jax.errors import UserError
from lm_jax.scaling.outcome import Outcome
from lm_jax.scaling.reports import ablations, laws, page, rates
from lm_jax.scaling.reports.page import Analysis, Ended, Section
from lm_jax.scaling.sweep import Run

PLAIN = "runs"
KINDS = (PLAIN, "law", "rates", "ablation")


def write(
    directory: epath.Path,
    kind: str,
    runs: Sequence[Run],
    outcomes: Mapping[str, Outcome],
    *,
    command: str,
    commands: Mapping[str, str],
    flops: float | None = None,
) -> tuple[epath.Path, list[str]]:
    """Writes the report of a sweep into its folder.

    Args:
      directory: the sweep's.
      kind: one of `KINDS`.
      runs, outcomes: of the sweep.
      command: what makes all this again.
      commands: what trains each run by itself, by name.
      flops: what the next config may spend; None: ten times the largest budget.

    Returns:
      The page's path, and its summary. Where the runs do not carry the analysis, the page has the runs alone and says
      why.
    """
    ended, notes = page.usable(runs, outcomes)
    try:
        analysis = _analyse(kind, ended, directory, command, flops)
    except UserError as e:
        notes = [*notes, f"no analysis: {str(e).replace(chr(10), '; ')}"]
        analysis = _plain(ended)
    file = page.write(directory, analysis, runs, outcomes, command=command, commands=commands, notes=notes)
    return file, [*analysis.summary, *notes]


def check(kind: str) -> None:
    """Raises UserError where there is no such kind of report."""
    if kind not in KINDS:
        raise UserError(f"REPORT = {kind!r}: there is no such report\n{did_you_mean(str(kind), KINDS)}")


def _analyse(kind: str, ended: Sequence[Ended], directory: epath.Path, command: str, flops: float | None) -> Analysis:
    if not ended:
        raise UserError("no run has ended with a loss")
    if kind == "law":
        return laws.analyse(ended, lambda name: directory / "runs" / name, flops, command)
    return {"runs": _plain, "rates": rates.analyse, "ablation": ablations.analyse}[kind](ended)


def _plain(ended: Sequence[Ended]) -> Analysis:
    """The runs and nothing more."""
    if not ended:
        return Analysis("Sweep", ["No run has ended with a loss."], [])
    best = min(ended, key=lambda e: e.loss)
    return Analysis(
        "Sweep",
        [f"Of {len(ended)} runs {best.run.name} has the lowest loss, {best.loss:.4f} nats."],
        [Section("All runs", ["See the table below."])],
    )
