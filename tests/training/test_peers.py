"""A process that loses a peer ends, says whom it lost, and leaves its stacks; a slow host is named."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import pytest
from etils import epath

from lm_jax.errors import Failure
from lm_jax.training import peers as module
from lm_jax.training.peers import Peers, Roll, slow_hosts
from tests.support import jobs
from tests.support.small_run import write_text

# ---------------------------------------------------------------------------------------------------------- who is lost


def test_the_roll_names_who_is_silent() -> None:
    roll = Roll(range(1, 4), 0.0, silent=20)
    for index in (1, 2, 3):
        roll.hear(index, {"number": 1, "host": f"h{index}"}, 1.0)
    roll.hear(1, {"number": 2, "host": "h1"}, 15.0)
    roll.hear(2, {"number": 1, "host": "h2"}, 15.0)  # the same beat again: no sign of life
    roll.hear(3, {"number": 2, "host": "h3", "ended": ""}, 2.0)  # finished: may be silent
    assert roll.lost(20.9) is None
    assert roll.lost(21.1) == (2, "process 2 on h2 has been silent for 20 s: it died, hangs, or is cut off")
    roll.forgive(21.1)
    assert roll.lost(41.0) is None


def test_the_roll_names_who_failed_before_it_is_silent() -> None:
    roll = Roll(range(1), 0.0, silent=20)
    roll.hear(0, {"number": 9, "host": "h", "ended": "disk full"}, 10.0)
    assert roll.lost(14.0) is None  # this process may be about to fail of the same
    assert roll.lost(15.5) == (0, "process 0 on h failed (disk full)")


def test_who_was_never_heard_is_lost_too() -> None:
    lost = Roll(range(1, 2), 0.0, silent=20).lost(30.0)
    assert lost is not None and lost[0] == 1


@pytest.mark.parametrize(
    ("seconds", "slow"),
    [
        ({0: 0.01, 1: 0.5, 2: 0.02}, [1]),
        ({0: 0.01, 1: 0.09}, []),  # not worth a line
        ({0: 1.0, 1: 1.5, 2: 1.1}, []),
        ({0: 3.0, 1: 1.0}, [0]),
        ({0: 3.0}, []),
    ],
)
def test_slow_hosts_are_named(seconds: dict[int, float], slow: list[int]) -> None:
    lines = slow_hosts({i: (s, f"h{i}") for i, s in seconds.items()})
    assert [line.split(" is slow")[0] for line in lines] == [f"process {i} on h{i}" for i in slow]


# ------------------------------------------------------------------------------------------ with a store of the test's


class Shared:
    """A key-value store that several `Peers` of one process share."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}

    def key_value_set(self, key: str, value: str, allow_overwrite: bool = False) -> None:
        assert allow_overwrite
        self.values[key] = value

    def key_value_dir_get(self, key: str) -> list[tuple[str, str]]:
        return [(k, v) for k, v in self.values.items() if k.startswith(key)]


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("_BEAT", 0.05), ("_FAREWELL", 0.2), ("_LINGER", 0.2), ("_BROKEN", 0.6), ("_SLOW_TELL", 0.1)):
        monkeypatch.setattr(module, f"{name}_SECONDS", value)


Make = Callable[[int], Peers]


@pytest.fixture
def make(tmp_path: Path, fast: None) -> Iterator[Make]:
    """Peers of a job of three, by index; `left` holds the exit statuses."""
    store, made = Shared(), []

    def one(index: int) -> Peers:
        left: list[int] = []
        peers = Peers(epath.Path(tmp_path), store=store, index=index, count=3, silent=1.0, leave=left.append)
        peers.left = left  # type: ignore[attr-defined]
        made.append(peers)
        return peers

    yield one
    for peers in made:
        peers._stop.set()


def _step(peers: Peers) -> None:
    """Enters `stepping`, for good."""
    _entered.append(peers.stepping())
    _entered[-1].__enter__()


_entered: list[Any] = []


def until(holds: Callable[[], object], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_all_name_the_one_that_fell_silent(make: Make, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    three = [make(i) for i in range(3)]
    for peers in three:
        peers.__enter__()
        _step(peers)
    time.sleep(0.5)
    assert [peers.left for peers in three] == [[], [], []]  # type: ignore[attr-defined]
    three[2]._stop.set()  # dead
    until(lambda: all(peers.left == [1] for peers in three[:2]))  # type: ignore[attr-defined]
    for index in (0, 1):
        text = (tmp_path / f"stacks-{index}.txt").read_text("utf-8")
        assert text.startswith("process 2 on ") and "most recent call first" in text
    said = capfd.readouterr().err
    assert said.count("this process ends") == 2 and "most recent call first" in said


def test_before_the_first_step_silence_does_not_end(make: Make) -> None:
    peers = make(0)
    peers.__enter__()
    time.sleep(1.5)
    assert peers.left == []  # type: ignore[attr-defined]
    _step(peers)
    until(lambda: peers.left == [1])  # type: ignore[attr-defined]


def test_a_collective_that_breaks_is_explained(make: Make, tmp_path: Path) -> None:
    """The process that the error reached waits until it knows whose fault it is, and keeps the error's traceback."""
    peers = make(1)
    peers.__enter__()
    error = jax.errors.JaxRuntimeError("Gloo all-reduce failed")
    leaving = threading.Thread(target=lambda: peers.__exit__(type(error), error, None))
    leaving.start()
    until(lambda: peers.left == [1])  # type: ignore[attr-defined]
    leaving.join()
    text = (tmp_path / "stacks-1.txt").read_text("utf-8")
    assert text.startswith("process 0 on ") and "Gloo all-reduce failed" in text


def test_a_failure_of_its_own_is_told_to_the_others(make: Make, tmp_path: Path) -> None:
    three = [make(i) for i in range(3)]
    for peers in three:
        peers.__enter__()
        _step(peers)
    began = time.monotonic()
    three[2].__exit__(Failure, Failure("disk full"), None)
    assert time.monotonic() - began < 0.5  # nothing to wait for
    until(lambda: all(peers.left == [1] for peers in three[:2]))  # type: ignore[attr-defined]
    assert "failed (disk full)" in (tmp_path / "stacks-1.txt").read_text("utf-8")


def test_who_finishes_is_not_missed(make: Make) -> None:
    three = [make(i) for i in range(3)]
    for peers in three:
        peers.__enter__()
        _step(peers)
    three[2].__exit__(None, None, None)
    three[1].__exit__(None, None, None)
    time.sleep(1.6)
    assert three[0].left == []  # type: ignore[attr-defined]


def test_a_slow_host_is_told_by_the_first_process(make: Make) -> None:
    three, lines = [make(i) for i in range(3)], []
    for index, peers in enumerate(three):
        peers.__enter__()
        _step(peers)
        for _ in range(5):
            peers.step(0.4 if index == 1 else 0.01, lines.append)

    def told() -> bool:
        three[0].step(0.01, lines.append)
        return bool(lines)

    until(told)
    assert lines[0].startswith("process 1 on ") and "0.40 s a step, the others 0.01 s" in lines[0]


def test_an_abort_says_whose_it_is(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """jax's client aborts where process 0 is gone; a fault of this process itself is not laid to another's door."""
    for index, answers, words in ((1, False, "process 0 on "), (2, True, "this one, aborted")):
        monkeypatch.setattr(module, "_coordinator_answers", lambda answers=answers: answers)
        peers = make(index)
        peers._on_abort(signal.SIGABRT)
        assert peers.left == [1]  # type: ignore[attr-defined]
        assert words in (tmp_path / f"stacks-{index}.txt").read_text("utf-8").splitlines()[0]


def test_one_process_watches_nobody(tmp_path: Path) -> None:
    before = threading.active_count()
    with Peers(epath.Path(tmp_path)) as peers, peers.stepping():
        peers.step(1.0, print)
        assert threading.active_count() == before


# ------------------------------------------------------------------------------------------------------- two processes


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("peers")
    write_text(folder / "text")
    return folder


def endless(world: Path, name: str) -> jobs.Job:
    """Two processes that train for longer than any test."""
    steps = ("--config.train.steps=100000", "--config.data.max_epochs=100000", "--config.evaluation.every=None")
    env = {"LM_JAX_CACHE": str(world / "cache"), "JAX_COMPILATION_CACHE_DIR": str(world / "compiled")}
    logs = world / f"logs-{name}"
    return jobs.Job(world / name, world / "text", logs, processes=2, devices=1, options=steps, env=env)


@pytest.mark.parametrize(
    ("number", "victim"),
    [
        pytest.param(signal.SIGKILL, 1, id="dead-1"),
        pytest.param(signal.SIGSTOP, 0, id="silent-0"),
        pytest.param(signal.SIGKILL, 0, id="dead-0", marks=pytest.mark.slow),
        pytest.param(signal.SIGSTOP, 1, id="silent-1", marks=pytest.mark.slow),
    ],
)
def test_the_other_process_ends_and_names_it(world: Path, number: signal.Signals, victim: int) -> None:
    """(That a run goes on after it, bit for bit, is in test_chaos.py.)"""
    name, other = f"{number.name}-{victim}", 1 - victim
    job = endless(world, name)
    try:
        assert job.wait_for(lambda: jobs.last_step(job.workdir) >= 10, 240), job.said(0) + job.said(1)
        job.strike(number, (victim,))
        began = time.monotonic()
        status = job.processes[other].wait(60)
        seconds = time.monotonic() - began
        said = job.said(other)
        print(f"{name}: {seconds:.1f} s")
        assert status == 1, said
        assert f"\nprocess {victim} on " in said.split("this process ends")[0], said
        assert "most recent call first" in said
        assert f"process {victim} on " in (job.workdir / f"stacks-{other}.txt").read_text("utf-8")
        if number == signal.SIGSTOP:
            job.strike(signal.SIGCONT, (victim,))
            assert job.processes[victim].wait(60) == 1, job.said(victim)
    finally:
        job.kill()
