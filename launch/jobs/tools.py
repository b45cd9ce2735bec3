"""The command lines of others: `gcloud`, `kubectl`, `sbatch`."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Sequence

from lm_jax.errors import Failure, UserError

INSTALL = {
    "gcloud": "install the Google Cloud CLI, and log in: gcloud auth login",
    "kubectl": "install it, and fetch the cluster's credentials: gcloud container clusters get-credentials",
    "sbatch": "run this where jobs are sent from: a log-in node of the cluster",
}


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


def call(words: Sequence[str], *, given: str | None = None, through: bool = False) -> str:
    """Runs a tool.

    Args:
      words: its command line.
      given: its standard input.
      through: whether what it writes goes straight to this program's own output, and is not returned.

    Returns:
      What it wrote on stdout.

    Raises:
      UserError: it is not installed.
      ToolFailed: it failed.
    """
    try:
        done = subprocess.run(
            words,
            input=given,
            stdin=subprocess.DEVNULL if given is None else None,
            stdout=None if through else subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
    except FileNotFoundError:
        raise UserError(f"{words[0]} is not installed here\n{INSTALL.get(words[0], '')}".strip()) from None
    if done.returncode:
        raise ToolFailed(words, done.stderr)
    return done.stdout or ""


def show(words: Sequence[str]) -> None:
    """Prints a command as it can be pasted into a shell."""
    print(shlex.join(words), flush=True)


def say(line: str) -> None:
    """Tells how a job stands."""
    print(line, file=sys.stderr, flush=True)
