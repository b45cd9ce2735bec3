"""The progress line: drawn in place on a terminal, plain lines elsewhere."""

from __future__ import annotations

import io
import os
import pty
import struct
import termios
from fcntl import ioctl

import pytest

from lm_jax.training.terminal import Progress, count, duration, visible


class Clock:
    """A time that a test sets."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def drive(progress: Progress, clock: Clock, steps: range, seconds: float) -> None:
    progress.start()
    for step in steps:
        clock.now += seconds
        progress.update({"step": step, "loss": 3.21, "step_seconds": seconds, "data_wait_seconds": seconds / 1000})
    progress.close()


def test_numbers_and_times_are_short() -> None:
    assert [count(n) for n in (0, 950, 999.9, 12345, 1.2e6, 999_960, 3.5e9)] == [
        "0",
        "950",
        "1.00k",
        "12.3k",
        "1.20M",
        "1.00M",
        "3.50B",
    ]
    assert [duration(s) for s in (0, 59.4, 59.6, 80, 7500, 273_600)] == [
        "0s",
        "59s",
        "1m00s",
        "1m20s",
        "2h05m",
        "3d04h",
    ]


def test_line_has_loss_speed_wait_and_time_left() -> None:
    clock, out = Clock(), io.StringIO()
    progress = Progress(400, 1000, stream=out, clock=clock)
    drive(progress, clock, range(1, 121), 0.5)
    line = progress.line({"step": 120, "loss": 3.21})
    assert line == "step 120/400 30%  loss 3.210  2.00k tok/s  data 0.1%  2m20s left"
    assert "loss not finite" in progress.line({"step": 120, "loss": None})
    assert "loss not finite" in progress.line({"step": 120, "loss": float("nan")})


def test_time_left_counts_evaluations_and_not_the_compilation() -> None:
    clock = Clock()
    progress = Progress(100, 1, start_step=10, stream=io.StringIO(), clock=clock)
    clock.now += 60  # compiling
    for step in range(11, 31):
        clock.now += 1 + (3 if step == 20 else 0)  # an evaluation of 3 seconds
        progress.update({"step": step, "loss": 1.0, "step_seconds": 1.0})
    assert progress.seconds_left(30) == pytest.approx(70 * 21 / 18)


def test_the_compilation_is_no_guide_to_the_speed() -> None:
    progress = Progress(10, 100, stream=io.StringIO())
    progress.update({"step": 1, "loss": 1.0, "step_seconds": 50.0, "data_wait_seconds": 25.0})
    assert "tok/s" not in progress.line({"step": 1, "loss": 1.0})
    progress.update({"step": 2, "loss": 1.0, "step_seconds": 1.0, "data_wait_seconds": 0.01})
    assert "100 tok/s  data 1.0%" in progress.line({"step": 2, "loss": 1.0})


def test_elsewhere_plain_lines_at_intervals() -> None:
    clock, out = Clock(), io.StringIO()
    drive(Progress(1000, 100, stream=out, clock=clock), clock, range(1, 1001), 0.05)  # 50 seconds
    text = out.getvalue()
    lines = text.splitlines()
    assert lines[0] == "compiling the first step ..."
    assert lines[1].startswith("step 1/1000") and lines[-1].startswith("step 1000/1000 100%")
    assert 10 <= len(lines) <= 18 and text.endswith("\n")
    assert "\r" not in text and "\x1b" not in text


def test_elsewhere_a_long_run_says_less() -> None:
    clock, out = Clock(), io.StringIO()
    drive(Progress(100_000, 100, stream=out, clock=clock), clock, range(1, 40_001), 1.0)  # eleven hours
    assert 600 < len(out.getvalue().splitlines()) < 900


def terminal(columns: int) -> tuple[int, io.TextIOWrapper]:
    reader, writer = pty.openpty()
    ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    return reader, os.fdopen(writer, "w")


def drain(reader: int) -> str:
    """What a closed terminal was sent."""
    text = b""
    while True:
        try:
            part = os.read(reader, 1 << 16)
        except OSError:  # the other end is closed and nothing is left
            part = b""
        if not part:
            os.close(reader)
            return text.decode()
        text += part


def test_on_a_terminal_one_line_is_drawn_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    reader, stream = terminal(40)
    clock = Clock()
    with stream:
        progress = Progress(40, 100, stream=stream, clock=clock)
        progress.start()
        for step in range(1, 41):
            clock.now += 0.05
            progress.update({"step": step, "loss": 3.0, "step_seconds": 0.05})
            if step == 20:
                progress.say("held-out loss 3.1")
        progress.close()
    text = drain(reader)
    assert text.count("\n") == 2  # after what was said, and at the end
    draws = text.split("\r\x1b[K")
    assert draws[1] == "compiling the first step ..." and 15 < len(draws) < 30  # at most ten a second
    assert all(len(d.split("\r\n")[-1]) < 40 for d in draws)  # a line that wraps could not be erased
    said = next(i for i, d in enumerate(draws) if d.startswith("held-out"))
    assert draws[said].split("\r\n")[1].startswith("step ")  # the progress line stands again under it
    assert draws[-1].startswith("step 40/40 100%")


def test_a_dumb_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    reader, stream = terminal(60)
    with stream:
        drive(Progress(3, 100, stream=stream, clock=Clock()), Clock(), range(1, 4), 1.0)
    text = drain(reader)
    assert "\x1b" not in text and "step 3/3" in text


def test_a_run_outlives_its_terminal() -> None:
    out = io.StringIO()
    progress = Progress(3, 1, stream=out)
    out.close()
    progress.update({"step": 1, "loss": 1.0})


def test_what_a_model_says_cannot_steer_a_terminal() -> None:
    assert visible("a\tb\n\x1b[2J\r\x07語é\x85") == "a\tb\n\\x1b[2J\\r\\x07語é\\x85"
