"""Stand-ins for the command lines of others (`gcloud`, `kubectl`, `sbatch`): executables that write down what they were
asked, and answer as they are told, with the real tools' words and statuses."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

# Quoted from public issues and manuals: what the tools say when something is wrong.
NO_SUCH_RESOURCE = (
    "ERROR: (gcloud.compute.tpus.queued-resources.describe) NOT_FOUND: Resource "
    "'projects/p/locations/z/queuedResources/lm' was not found. This command is authenticated as a@b.c\n"
    "- '@type': type.googleapis.com/google.rpc.ResourceInfo\n"
)
QUOTA = (
    "ERROR: (gcloud.compute.tpus.queued-resources.create) RESOURCE_EXHAUSTED: Quota limit "
    "'TPUV5PPerProjectPerZoneForTPUAPI' has been exceeded. Limit: 0 in zone us-east5-a.\n"
)
SSH_FAILED = (
    "SSH: Attempting to connect to worker 1...\nERROR: (gcloud.compute.tpus.tpu-vm.ssh) [/usr/bin/ssh] exited with "
    "return code [255].\n"
)
NO_ACCOUNT = (
    "ERROR: (gcloud.compute.tpus.queued-resources.describe) You do not currently have an active account selected.\n"
    "Please run:\n\n  $ gcloud auth login\n\nto obtain new credentials.\n"
)
JOBSET_EXISTS = (
    'Error from server (AlreadyExists): error when creating "STDIN": jobsets.jobset.x-k8s.io "lm" already exists\n'
)
NO_JOBSETS = (
    'error: resource mapping not found for name: "lm" namespace: "default" from "STDIN": no matches for kind "JobSet" '
    'in version "jobset.x-k8s.io/v1alpha2"\nensure CRDs are installed first\n'
)
NO_PARTITION = (
    "sbatch: error: invalid partition specified: gpus\nsbatch: error: Batch job submission failed: Invalid partition "
    "name specified\n"
)
NO_REQUEUE = "slurm_requeue error: Requested operation is presently disabled for job 7\n"


@dataclasses.dataclass
class Answer:
    """What a stand-in does where a pattern matches its command line; the first that does is taken.

    Attributes:
      pattern: a regular expression.
      out: for stdout.
      err: for stderr.
      status: to exit with.
      times: that it is good for; None: always.
      hangs: whether it then does not end, nor does a process that it has started and that holds its stderr.
    """

    pattern: str
    out: str = ""
    err: str = ""
    status: int = 0
    times: int | None = 1
    hangs: bool = False


_SOURCE = """\
#!{python}
import fcntl, json, re, subprocess, sys
given = "" if sys.stdin.isatty() else sys.stdin.read()
with open({lock!r}, "w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    with open({calls!r}, "a") as calls:
        calls.write(json.dumps({{"tool": {tool!r}, "words": sys.argv[1:], "given": given}}) + "\\n")
    answers = json.load(open({answers!r}))
    found = next((a for a in answers if a["times"] != 0 and re.search(a["pattern"], " ".join(sys.argv[1:]))), None)
    if found is None:
        sys.exit(f"{tool}: no answer was given to this stand-in for {{sys.argv[1:]}}")
    if found["times"] is not None:
        found["times"] -= 1
    json.dump(answers, open({answers!r}, "w"))
sys.stdout.write(found["out"])
sys.stderr.write(found["err"])
if found["hangs"]:
    child = subprocess.Popen(["sleep", "600"])
    open({calls!r} + ".children", "a").write(f"{{child.pid}}\\n")
    child.wait()
sys.exit(found["status"])
"""


class StandIns:
    """Tools in a folder that comes first in PATH.

    Attributes:
      bin: that folder.
    """

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.bin = folder / "bin"
        self.bin.mkdir(parents=True)
        self._calls = folder / "calls.jsonl"
        monkeypatch.setenv("PATH", f"{self.bin}{os.pathsep}{os.environ['PATH']}")

    def add(self, tool: str, *answers: Answer) -> None:
        """Puts a tool there, with what it will answer."""
        play = self.bin.parent / f"{tool}.json"
        play.write_text(json.dumps([dataclasses.asdict(answer) for answer in answers]))
        names = {"lock": f"{play}.lock", "calls": str(self._calls), "answers": str(play), "tool": tool}
        (self.bin / tool).write_text(_SOURCE.format(python=sys.executable, **names))
        (self.bin / tool).chmod(0o755)

    def calls(self, tool: str | None = None) -> list[dict[str, Any]]:
        """What was asked: tool, words, given (the standard input)."""
        lines = self._calls.read_text().splitlines() if self._calls.exists() else []
        return [call for line in lines if tool in (None, (call := json.loads(line))["tool"])]

    def children(self) -> list[int]:
        """Of the tools that hung: the processes that they had started."""
        return [int(line) for line in Path(f"{self._calls}.children").read_text().split()]

    def verbs(self, known: Sequence[str]) -> list[str]:
        """The calls as words of `known`: of each the first that it matches."""
        lines = [" ".join(call["words"]) for call in self.calls()]
        return [next((k for k in known if re.search(k, line)), line) for line in lines]
