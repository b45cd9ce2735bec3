"""What a job is, however it is sent: a command of this project's, the folder of its run, and the machines."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
from collections.abc import Sequence
from typing import Any

from absl import flags

from launch import cli
from launch.jobs import again
from lm_jax.errors import UserError
from lm_jax.slices import Slice, slice_of

EXAMPLE = "-- python -m launch.train --config=configs/7b.py --workdir=gs://bucket/7b"
COORDINATOR_PORT = 8476  # where the first process waits for the others; jax's own choice on TPUs and SLURM differs


@dataclasses.dataclass(frozen=True)
class Job:
    """A job.

    Attributes:
      name: what the cluster calls it.
      command: `python -m launch.X ..`.
      workdir: its `--workdir`.
      slice: the TPU slice; None for GPUs.
      nodes: with GPUs.
      gpus: of each node; 0 for a job on processors.
      gpu_type: what the cluster calls them; empty: any.
      environment: variables for the command, (name, value).
      setup: a line of shell that each host runs first, as to fetch text; empty: none. Where it fails the job ends.
    """

    name: str
    command: tuple[str, ...]
    workdir: str
    slice: Slice | None = None
    nodes: int = 1
    gpus: int = 0
    gpu_type: str = ""
    environment: tuple[tuple[str, str], ...] = ()
    setup: str = ""

    @property
    def hosts(self) -> int:
        """How many machines work at it."""
        return self.slice.hosts if self.slice else self.nodes

    def watched(self, identity: str, *, host: str = "", python: str = "python") -> list[str]:
        """The command under `launch.jobs.again`.

        Args:
          identity: which job it is, for the count of its starts.
          host: which host; empty: as the cluster says.
          python: the interpreter, in place of the command's own.
        """
        words = [python, "-m", "launch.jobs.again", f"--workdir={self.workdir}", f"--job={identity}"]
        return [*words, *([f"--host={host}"] if host else []), "--", python, *self.command[1:]]


def define_flags(values: flags.FlagValues, *, tpus: bool, gpus: bool) -> None:
    """The flags that describe a job.

    Args:
      values: where to.
      tpus: whether the cluster has TPU slices, on hosts with disks of their own,
      gpus: or nodes with GPUs.
    """
    flags.DEFINE_string("name", None, "what the cluster calls the job", required=True, flag_values=values)
    flags.DEFINE_multi_string("env", [], "NAME=VALUE for the command; as often as needed", flag_values=values)
    if tpus:
        flags.DEFINE_string("slice", None, "the TPU slice: v5p:4x4x4, v6e-64", flag_values=values)
        flags.DEFINE_string(
            "setup", "", "a line of shell for each host, run before the command: to fetch text", flag_values=values
        )
    if gpus:
        flags.DEFINE_integer("nodes", 1, "how many machines with GPUs", lower_bound=1, flag_values=values)
        flags.DEFINE_integer("gpus", 0, "how many GPUs a node has", lower_bound=0, flag_values=values)
        flags.DEFINE_string("gpu_type", "", "what the cluster calls the GPUs; empty: any", flag_values=values)


def job_of(values: flags.FlagValues, command: Sequence[str], *, shared_disk: bool) -> Job:
    """The job that a command line describes.

    Args:
      values: of `define_flags`.
      command: what came behind `--`.
      shared_disk: whether the hosts see the same disks; else the run's folder must be in an object store.

    Raises:
      UserError: something that no machine could run; it is told here, before any is asked for.
    """
    given: dict[str, Any] = {
        name: values[name].value for name in ("slice", "nodes", "gpus", "gpu_type", "setup") if name in values
    }
    if given.get("slice") and given.get("gpus"):
        raise UserError(f"--slice={given['slice']} and --gpus={given['gpus']}: a job runs on one or the other")
    described = {key: value for key, value in given.items() if key != "slice" and value}
    job = Job(
        name=_name(values["name"].value or ""),
        command=tuple(_checked(command)),
        workdir=_workdir(command, shared_disk=shared_disk),
        slice=slice_of(given["slice"]) if given.get("slice") else None,
        environment=tuple(_variable(text) for text in values["env"].value or []),
        **described,
    )
    if job.hosts > 1 and job.command[2] == "launch.sweep":
        raise UserError(
            f"a sweep trains each of its runs on one host, and this job has {job.hosts}\n"
            "send it to one host, or each of its runs as a job of its own: --each_run"
        )
    return job


def _name(text: str) -> str:
    # Of a label of Kubernetes (63), less what JobSet adds for a pod.
    if re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", text) is None:
        raise UserError(
            f"--name={text}: small letters, digits and - between them, a letter first, at most 40\n"
            f"as --name={re.sub(r'[^a-z0-9]+', '-', text.lower()).strip('-0123456789')[:40] or 'run'}"
        )
    return text


def _variable(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII) is None:
        raise UserError(f"--env={text} is no variable\nwrite --env=NAME=VALUE")
    return name, value


def _checked(command: Sequence[str]) -> Sequence[str]:
    """The command, as far as it can be checked here: its program, and the config that it names."""
    program = command[2] if len(command) > 2 else ""
    if list(command[:2]) != ["python", "-m"] or not program.startswith("launch."):
        said = " ".join(command) or "nothing"
        raise UserError(f"a job runs a program of this project, not {said[:80]}\nwrite it behind --, as {EXAMPLE}")
    if program.count(".") > 1 or importlib.util.find_spec(program) is None:
        raise UserError(f"there is no program {program}\nwrite it behind --, as {EXAMPLE}")
    spec, overrides, _ = cli.split(command[3:])
    if spec:
        config = cli.overridden(cli.load(spec), overrides)
        if program == "launch.train":
            from lm_jax.config import build
            from lm_jax.training.run import RunConfig

            build(RunConfig, config)
    return command


def _workdir(command: Sequence[str], *, shared_disk: bool) -> str:
    given = [word.partition("=") for word in command if re.match(r"--?workdir=", word)]
    if not given:
        raise UserError(f"the command has no --workdir=DIR, and starts are counted there\nwrite it as {EXAMPLE}")
    workdir = given[-1][2]
    if "://" not in workdir and not shared_disk:
        raise UserError(
            f"--workdir={workdir} would be on one host's own disk, and is lost with it\n"
            "give a folder in an object store: --workdir=gs://bucket/name"
        )
    if "://" not in workdir and not os.path.isabs(os.path.expanduser(workdir)):
        raise UserError(f"--workdir={workdir} is relative, and hosts start elsewhere\ngive its whole path")
    return workdir


def final_statuses() -> str:
    """`again.HOPELESS`, as a shell's `case` has them."""
    return "|".join(map(str, again.HOPELESS))
