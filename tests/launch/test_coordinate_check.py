"""The launcher of coordinate checks: what it prints, draws and refuses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from launch import cli, coordinate_check
from lm_jax.scaling import coordinates
from lm_jax.scaling.coordinates import KINDS, Scales

CONFIG = ["--config=configs/tiny.py", "--config.model.parametrization=mup", "--config.model.base_embed=64"]


def status(*arguments: str) -> int:
    coordinate_check.FLAGS.unparse_flags()
    for name in ("widths", "depths", "png"):
        coordinate_check.FLAGS[name].value = None
    return cli.status(coordinate_check.main, coordinate_check.FLAGS, ["x", *CONFIG, *arguments], config=True)


@pytest.mark.parametrize(("power", "code"), [(0.0, 0), (0.5, 1)])
def test_the_verdict_is_the_exit_status(
    power: float, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = {}

    def measured(run: object, models: dict, make: object, *, steps: int, seeds: int) -> Scales:
        seen.update(models)
        flat = np.ones((len(models), steps + 1))
        values = {
            kind: flat * np.array(list(models))[:, None] ** (power if kind == "residual" else 0) for kind in KINDS
        }
        return Scales(dict.fromkeys(KINDS, flat), values)

    monkeypatch.setattr(coordinates, "measure", measured)
    png = tmp_path / "widths.png"
    assert status("--widths=128,64", "--steps=2", f"--png={png}") == code
    out, err = capsys.readouterr()
    assert list(seen) == [64, 128] and seen[128].scale.width == 2
    assert png.read_bytes().startswith(b"\x89PNG")
    assert ("PASS" in out) == (code == 0) and ("FAIL: 1 kinds" in err) == (code == 1)
    assert code == 0 or ("FAILED  residual" in out and "width^+0.50" in out and len(err.splitlines()) <= 3)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "one of --widths and --depths"),
        (["--widths=64,128", "--depths=2,4"], "one of --widths and --depths"),
        (["--widths=64"], "nothing to be compared with"),
        (["--widths=64,x"], "not whole numbers"),
        (["--widths=64,96"], "cannot be cut into heads"),
    ],
)
def test_mistakes(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert status(*arguments) == 2
    err = capsys.readouterr().err
    assert says in err and len(err.splitlines()) <= 3
