"""Every mesh layout equals one device. Eight devices are simulated, each check in a process of its own."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.jobs import free_port
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
        ("optimizers", ["muon"]),
        pytest.param("optimizers", ["adamw", "adafactor"], marks=pytest.mark.slow),
    ],
)
def test_eight_devices_equal_one(check: str, arguments: list[str]) -> None:
    slow = arguments in (["all"], ["OTHERS"])
    run_python(HERE / f"check_{check}.py", *arguments, devices=8, timeout=1800 if slow else 300)


@pytest.mark.slow
def test_twenty_steps_on_eight_devices(tmp_path: Path) -> None:
    run_python(HERE / "check_training.py", "all", str(tmp_path), devices=8, timeout=3600)


@pytest.mark.parametrize("which", ["sample", pytest.param("all", marks=pytest.mark.slow)])
def test_twenty_steps_on_two_processes_of_four_devices(tmp_path: Path, which: str) -> None:
    address = f"127.0.0.1:{free_port()}"

    def process(number: int) -> str:
        arguments = which, str(tmp_path), address, str(number)
        return run_python(HERE / "check_training.py", *arguments, devices=4, timeout=3600).stdout

    with ThreadPoolExecutor(2) as both:
        for out in both.map(process, range(2)):
            assert "restored on each other" in out
