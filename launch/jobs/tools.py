"""The command lines of others: `gcloud`, `kubectl`, `sbatch`."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence

from lm_jax.errors import Failure, UserError

INSTALL = {
    "gcloud": "install the Google Cloud CLI, and log in: gcloud auth login",
    "kubectl": "install it, and fetch the cluster's credentials: gcloud container clusters get-credentials",
    "sbatch": "run this where jobs are sent from: a log-in node of the cluster",
}

# Seconds that a tool may take: to answer a question, to change something (a job that is stopped saves first), to carry
# the code to all workers and install it there. Some ten times what they take where nothing is wrong: a tool that hangs
# must not hang who waits for it.
ASK, CHANGE, CARRY = 120.0, 900.0, 1800.0


class ToolFailed(Failure):
    """A tool ended with another status than 0. The message has its own words.

    Attributes:
      words: its command line.
      said: all that it wrote on stderr.
    """

    def __init__(self, words: Sequence[str], said: str) -> None:
        self.words, self.said = tuple(words), said
        lines = [line.strip() for line in said.splitlines() if line.strip()]
        errors = [line for line in lines if line.lower().startswith("error")] or lines[-1:] or ["it says nothing"]
        super().__init__(f"{' '.join(words[:5])} failed\n{errors[0][:400]}")


class TimedOut(ToolFailed):
    """A tool gave no answer in its time, and was ended. What it had asked for may happen all the same."""

    def __init__(self, words: Sequence[str], seconds: float) -> None:
        super().__init__(words, f"no answer within {seconds:g} s; it was ended")


def call(words: Sequence[str], *, seconds: float | None, given: str | None = None, through: bool = False) -> str:
    """Runs a tool.

    Args:
      words: its command line.
      seconds: it may take; None: until somebody ends it.
      given: its standard input.
      through: whether what it writes goes straight to this program's own output, and is not returned.

    Returns:
      What it wrote on stdout.

    Raises:
      UserError: it is not installed.
      TimedOut: it took longer.
      ToolFailed: it failed.
    """
    # With a limit it has a session of its own: what it has started (ssh) ends with it, and asks nobody for a password.
    try:
        process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL if given is None else subprocess.PIPE,
            stdout=None if through else subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=seconds is not None,
        )
    except FileNotFoundError:
        raise UserError(f"{words[0]} is not installed here\n{INSTALL.get(words[0], '')}".strip()) from None
    with process:
        try:
            out, said = process.communicate(given, timeout=seconds)
        except subprocess.TimeoutExpired:
            assert seconds is not None
            raise TimedOut(words, seconds) from None
        finally:
            if process.poll() is None:
                process.kill() if seconds is None else os.killpg(process.pid, signal.SIGKILL)
    if process.returncode:
        raise ToolFailed(words, said)
    return out or ""


def show(words: Sequence[str]) -> None:
    """Prints a command as it can be pasted into a shell."""
    print(shlex.join(words), flush=True)


def say(line: str) -> None:
    """Tells how a job stands."""
    print(line, file=sys.stderr, flush=True)
