"""`launch.fit` on tables with columns of many names, and on tables that cannot be fitted."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.law_intervals import design
from launch import cli, fit
from lm_jax.paths import run_path
from lm_jax.scaling.laws import fit_law, known_law

ROOT = Path(__file__).parents[2]
LAW = known_law(E=1.69, A=406.4, B=410.7, alpha=0.34, beta=0.28)


@pytest.fixture(autouse=True)
def fresh_flags() -> None:
    """Several command lines in one process: a flag that may be repeated would keep what it had."""
    for name in fit.FLAGS:
        fit.FLAGS[name].unparse()


def rows(scatter: float = 0.002) -> list[tuple[str, float, float, float]]:
    N, D = design("grid", 30, np.random.default_rng(0))
    L = LAW.loss(N, D) * np.exp(scatter * np.random.default_rng(1).standard_normal(len(N)))
    return [(f"r{i}", *row) for i, row in enumerate(zip(N.tolist(), D.tolist(), L.tolist(), strict=True))]


def write(path: Path, header: str, lines: list[str]) -> str:
    path.write_text("\n".join([header, *lines]) + "\n")
    return f"--csv={path}"


def launch(*flags: str) -> int:
    return cli.status(fit.main, fit.FLAGS, ["fit", *flags])


def test_the_table_that_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = write(tmp_path / "a.csv", "name,parameters,tokens,loss", [",".join(map(str, r)) for r in rows()])
    outputs = (f"--json={tmp_path / 'law.json'}", f"--png={tmp_path / 'law.png'}")
    assert launch(table, "--budget=1e21,5.76e23", "--budget=1e25", "--bootstrap=100", *outputs) == 0
    out = capsys.readouterr().out
    _, N, D, L = (np.array(column) for column in zip(*rows(), strict=True))
    law = fit_law(N, D, L, bootstrap=100)
    for name, value in law.constants.items():
        printed = re.search(rf"^{name} +(\S+) +\((\S+) to (\S+)\)", out, re.MULTILINE)
        assert printed and [float(p) for p in printed.groups()] == pytest.approx(
            [value, *law.intervals[name]], rel=1e-4
        )
    assert re.search(rf"^a +{law.exponents.a.value:.4f} .* N ~ C\^a$", out, re.MULTILINE)
    assert [line.split()[0] for line in out.splitlines()[-3:]] == ["1e+21", "5.76e+23", "1e+25"]
    assert "30 points" in out and "note" not in out

    record = json.loads((tmp_path / "law.json").read_text())
    assert record["constants"] == pytest.approx(law.constants)
    assert record["optima"][1]["tokens"]["low"] == pytest.approx(law.optimal(5.76e23).tokens.low)
    assert [p["name"] for p in record["points"]][:2] == ["r0", "r1"] and len(record["points"]) == 30
    from matplotlib import image

    picture = image.imread(tmp_path / "law.png")
    assert picture.shape[0] > 300 and picture.std() > 0.02


@pytest.mark.parametrize(
    ("header", "line"),
    [
        ("N,D,L", "{1},{2},{3}"),
        (" Params ; Training Tokens ; Final Loss ", "{1}; {2}; {3}"),
        ("Model Size,Training FLOP,loss,seed", "{1},{4},{3},7"),
        ("loss\tother\tC\tn", "{3}\tx\t{4}\t{1}"),
        ("\ufeffrun,parameters,tokens,flops,loss", '{0},"{1:,.6f}",{2},1,{3}'),
    ],
)
def test_columns_by_other_names(tmp_path: Path, header: str, line: str) -> None:
    lines = [line.format(*r, 6 * r[1] * r[2]) for r in rows()]
    assert launch(write(tmp_path / "a.csv", header, lines), "--bootstrap=0", f"--json={tmp_path / 'a.json'}") == 0
    _, N, D, L = (np.array(column) for column in zip(*rows(), strict=True))
    record = json.loads((tmp_path / "a.json").read_text())
    assert record["constants"] == pytest.approx(fit_law(N, D, L, bootstrap=0).constants, rel=1e-4)
    assert record["exponents"]["a"]["low"] is None and record["intervals"] == {}


def test_rows_that_are_left_out_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [f"{n},{d},{loss}" for _, n, d, loss in rows()]
    lines[3] = "1e9,,3.0"
    lines[5] = "1e9,1e9,nan"
    lines.insert(7, "")
    assert launch(write(tmp_path / "a.csv", "N,D,loss", lines), "--bootstrap=0", "--form=kaplan") == 0
    out = capsys.readouterr().out
    assert "28 points" in out and "tokens are no finite numbers above 0: line 5" in out and "line 7" in out
    assert "alpha_D" in out and not re.search("^E ", out, re.MULTILINE)


@pytest.mark.parametrize(
    ("header", "flags", "said"),
    [
        (
            "N,loss,epochs",
            [],
            "no column for tokens (or flops)\nfound: N, loss, epochs\nwanted: parameters, tokens or flops",
        ),
        ("N,D,params,loss", [], "the columns params and N could all be the parameters"),
        ("N,D,loss", ["--budget=1e21,much"], "--budget: 'much' is no number of FLOPs"),
        ("N,D,loss", ["--budget=-1"], "--budget: '-1' is no number"),
        ("N,D,loss", ["--form=chinchila"], "did you mean chinchilla?"),
        ("N,D,loss", [], "4 points are too few for 5 constants: give 6 or more"),
        ("N,D,loss", ["--bootstrap=-1"], "bootstrap"),
        ("", [], "found: nothing"),
    ],
)
def test_mistakes_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], header: str, flags: list[str], said: str
) -> None:
    table = write(tmp_path / "a.csv", header, [f"{n},{d},{loss}" for _, n, d, loss in rows()][:4])
    assert launch(table, *flags) == 2
    err = capsys.readouterr().err
    assert said in err and len(err.splitlines()) <= 3


def test_files_that_are_no_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch(f"--csv={tmp_path / 'none.csv'}") == 2
    assert "there is no file" in capsys.readouterr().err
    (tmp_path / "b.csv").write_bytes(b"\xff\xfe\x00\x80")
    assert launch(f"--csv={tmp_path / 'b.csv'}") == 2
    assert "no text in UTF-8" in capsys.readouterr().err


def test_it_starts_without_jax(tmp_path: Path) -> None:
    table = write(tmp_path / "a.csv", "name,parameters,tokens,loss", [",".join(map(str, r)) for r in rows()])
    code = (
        "import sys; from launch import cli, fit;"
        f"code = cli.status(fit.main, fit.FLAGS, ['fit', {table!r}, '--bootstrap=10', '--budget=1e21']);"
        "sys.exit(code or 'jax' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_numbers_with_a_decimal_comma_are_read_where_semicolons_are_between(tmp_path: Path) -> None:
    write(tmp_path / "a.csv", "N;D;loss", ["1,5e6;20,000,000;3,141", "7.5;1,234.5;2.5"])
    table = fit.read_table(run_path(tmp_path / "a.csv"))
    assert table["parameters"] == [1.5e6, 7.5] and table["tokens"] == [2e7, 1234.5] and table["loss"] == [3.141, 2.5]
