"""Every mesh layout equals one device. Eight devices are simulated, each check in a process of its own."""

from pathlib import Path

import pytest

from tests.support.processes import run_python

HERE = Path(__file__).parent


@pytest.mark.parametrize(
    ("check", "arguments"),
    [
        ("step", ["SOME"]),
        pytest.param("step", ["OTHERS"], marks=pytest.mark.slow),
        ("attention", []),
        ("context", ["some"]),
        pytest.param("context", ["all"], marks=pytest.mark.slow),
        ("context", ["wires"]),
        ("cross_entropy", []),
        ("generation", []),
    ],
)
def test_eight_devices_equal_one(check: str, arguments: list[str]) -> None:
    run_python(HERE / f"check_{check}.py", *arguments, devices=8, timeout=900 if arguments == ["all"] else 300)
