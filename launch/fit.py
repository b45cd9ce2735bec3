"""A scaling law from a table of runs: `python -m launch.fit --csv=runs.csv --budget=1e21,1e24`.

The table has a header. Its columns, in any order and in any case: the model's parameters (parameters, params, N, model
size), tokens (tokens, D) or FLOPs (flops, compute, C; tokens are then C / (6 N)), and the final loss in nats (loss,
final loss, L); if there is one, a run's name (name, run). Other columns are ignored.

Printed: the law's constants with 95% intervals, how the best model grows with the budget, and the best parameters and
tokens of each --budget. With --png the law and its residuals are drawn; with --json all of it is written to a file.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from typing import TYPE_CHECKING, Any

from absl import flags

from launch import cli
from lm_jax.errors import UserError

if TYPE_CHECKING:
    from lm_jax.scaling.laws import Estimate, Law, Optimum

FLAGS = flags.FlagValues()
CSV = flags.DEFINE_string("csv", None, "the table of runs", required=True, flag_values=FLAGS)
FORM = flags.DEFINE_string("form", "chinchilla", "the law's form: chinchilla or kaplan", flag_values=FLAGS)
BUDGET = flags.DEFINE_multi_string(
    "budget", [], "FLOPs to spend well: 1e21, or 1e21,1e24; may be repeated", flag_values=FLAGS
)
BOOTSTRAP = flags.DEFINE_integer(
    "bootstrap", 500, "draws that the intervals are from; 0 for none", lower_bound=0, flag_values=FLAGS
)
SEED = flags.DEFINE_integer("seed", 0, "of the draws", lower_bound=0, flag_values=FLAGS)
JSON = flags.DEFINE_string("json", None, "write the law to this file", flag_values=FLAGS)
PNG = flags.DEFINE_string("png", None, "draw the law and its residuals into this file", flag_values=FLAGS)

# What columns are called, in small letters and with _ for all but letters and digits.
COLUMNS = {
    "parameters": ("parameters", "params", "n", "n_params", "num_params", "num_parameters", "model_size", "size"),
    "tokens": ("tokens", "d", "n_tokens", "num_tokens", "training_tokens", "train_tokens"),
    "flops": ("flops", "c", "flop", "compute", "training_flops", "training_flop", "train_flops"),
    "loss": ("loss", "l", "final_loss", "eval_loss", "val_loss", "validation_loss", "test_loss"),
    "name": ("name", "run", "run_name", "id"),
}


def main() -> int:
    from lm_jax import paths
    from lm_jax.scaling.laws import fit_law

    table = read_table(paths.run_path(CSV.value))
    asked = budgets(BUDGET.value)
    law = fit_law(
        table["parameters"],
        table["tokens"],
        table["loss"],
        form=FORM.value,
        names=table["name"],
        bootstrap=BOOTSTRAP.value,
        seed=SEED.value,
    )
    print(told(law))
    optima = [(flops, law.optimal(flops)) for flops in asked]
    if optima:
        print("\n" + told_optima(optima))
    if JSON.value:
        paths.write_text_atomic(paths.run_path(JSON.value), json.dumps(as_json(law, optima), indent=2) + "\n")
    if PNG.value:
        from lm_jax.scaling.reports.pictures import surface  # matplotlib is slow to import

        paths.write_bytes_atomic(paths.run_path(PNG.value), surface(law))
    return 0


# ----------------------------------------------------------------------------------------------------------- the table


def read_table(path: Any) -> dict[str, list[Any]]:
    """parameters, tokens and loss as floats, and names; what is no number is nan, which the fit leaves out by name.

    Raises:
      UserError: there is no such file, it is no table, or columns are missing.
    """
    from lm_jax import paths

    try:
        text = paths.read_text(path).removeprefix("\ufeff")
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"--csv: there is no file {path}") from None
    except UnicodeDecodeError:
        raise UserError(f"--csv: {path} is no text in UTF-8") from None
    header = text.split("\n", 1)[0]
    delimiter = max(",;\t", key=header.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    titles = next(reader, [])
    where = _columns([title.strip() for title in titles])
    read: dict[str, list[Any]] = {"parameters": [], "tokens": [], "loss": [], "name": []}
    for row in reader:
        if not any(cell.strip() for cell in row):
            continue
        cell = {key: row[i].strip() if i < len(row) else "" for key, i in where.items()}
        if delimiter == ";":  # where numbers are written as 3,14
            cell |= {key: re.sub(r"^([^.,]*),([^.,]*)$", r"\1.\2", cell[key]) for key in cell if key != "name"}
        size = _number(cell["parameters"])
        read["parameters"].append(size)
        read["tokens"].append(
            _number(cell["tokens"]) if "tokens" in cell else _number(cell["flops"]) / (6 * size) if size else math.nan
        )
        read["loss"].append(_number(cell["loss"]))
        read["name"].append(cell.get("name") or f"line {reader.line_num}")
    return read


def _columns(titles: list[str]) -> dict[str, int]:
    """Where each column is."""
    plain = [re.sub(r"[^a-z0-9]+", "_", title.lower()).strip("_") for title in titles]
    where: dict[str, int] = {}
    for key, names in COLUMNS.items():
        found = [i for name in names for i, title in enumerate(plain) if title == name]
        if len(found) > 1:
            both = " and ".join(titles[i] for i in found)
            raise UserError(f"--csv: the columns {both} could all be the {key}\nrename or remove all but one")
        if found:
            where[key] = found[0]
    missing = [key for key in ("parameters", "loss") if key not in where]
    missing += [] if "tokens" in where or "flops" in where else ["tokens (or flops)"]
    if missing:
        raise UserError(
            f"--csv: there is no column for {', '.join(missing)}\nfound: {', '.join(titles) or 'nothing'}\n"
            "wanted: parameters, tokens or flops, loss, and, if there is one, name"
        )
    return where


def _number(text: str) -> float:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return math.nan


def budgets(given: list[str]) -> list[float]:
    """The budgets in FLOPs, of flags that may each have several.

    Raises:
      UserError: one is no number above zero.
    """
    found = []
    for text in (part.strip() for flag in given for part in flag.split(",")):
        value = _number(text)
        if not (math.isfinite(value) and value > 0):
            raise UserError(f"--budget: {text!r} is no number of FLOPs above 0: write 1e21, or 1e21,1e24")
        found.append(value)
    return found


# ------------------------------------------------------------------------------------------------------------- to read


def told(law: Law) -> str:
    """The law as a table."""
    from lm_jax.scaling.forms import FORMS

    lines = [
        f"{law.form}: {FORMS[law.form].equation}",
        f"{law.points} points, objective {law.objective:.6g}, {len(law.draws)} draws",
        "",
        f"{'':10}{'value':>12}   95% interval",
    ]
    for name, value in law.constants.items():
        low, high = law.intervals.get(name, (math.nan, math.nan))
        lines.append(f"{name:10}{value:12.5g}   {_interval(low, high, '.5g')}")
    a, b = law.exponents
    lines.append(f"{'a':10}{a.value:12.4f}   {_interval(a.low, a.high, '.4f'):24} N ~ C^a")
    lines.append(f"{'b':10}{b.value:12.4f}   {_interval(b.low, b.high, '.4f'):24} D ~ C^b")
    return "\n".join([*lines, *(f"note: {note}" for note in law.notes)])


def told_optima(optima: list[tuple[float, Optimum]]) -> str:
    """The best model of each budget as a table."""
    from lm_jax.training.terminal import count

    def cell(e: Estimate) -> str:
        return f"{count(e.value)} ({count(e.low)} to {count(e.high)})" if math.isfinite(e.low) else count(e.value)

    rows = [("FLOPs", "parameters", "tokens", "tokens/parameter", "loss")]
    for flops, best in optima:
        ratio = f"{best.tokens.value / best.parameters.value:.3g}"
        low, high = best.loss.low, best.loss.high
        loss = (
            f"{best.loss.value:.4f} {_interval(low, high, '.4f')}" if math.isfinite(low) else f"{best.loss.value:.4f}"
        )
        rows.append((f"{flops:.4g}", cell(best.parameters), cell(best.tokens), ratio, loss))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _interval(low: float, high: float, form: str) -> str:
    return f"({low:{form}} to {high:{form}})" if math.isfinite(low) and math.isfinite(high) else "-"


def as_json(law: Law, optima: list[tuple[float, Optimum]]) -> dict[str, Any]:
    """All that is printed, and the points with their residuals; what is not known is null."""
    record = {
        "form": law.form,
        "constants": law.constants,
        "intervals": law.intervals,
        "exponents": {name: e._asdict() for name, e in law.exponents._asdict().items()},
        "objective": law.objective,
        "bootstrap": len(law.draws),
        "notes": law.notes,
        "optima": [
            {"flops": flops} | {name: e._asdict() for name, e in best._asdict().items()} for flops, best in optima
        ],
        "points": [
            {"name": name, "parameters": n, "tokens": d, "loss": loss, "residual": r}
            for name, n, d, loss, r in zip(
                law.names,
                law.parameters.tolist(),
                law.tokens.tolist(),
                law.losses.tolist(),
                law.residuals.tolist(),
                strict=True,
            )
        ],
    }
    return _finite(record)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    cli.run(main, FLAGS)
