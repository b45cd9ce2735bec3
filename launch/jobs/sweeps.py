"""A sweep's runs as jobs of their own."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import zlib

from launch.jobs.job import Job
from lm_jax.errors import UserError


def each_run(job: Job) -> list[Job]:
    """A job for each run of a sweep that has not ended, with a name that stays with the run.

    Raises:
      UserError: the job is no sweep, or its sweep cannot be listed; with the reason that launch.sweep gives.
    """
    if job.command[2] != "launch.sweep":
        raise UserError(f"--each_run is for sweeps, and {job.command[2]} is none\nleave --each_run out")
    return [
        dataclasses.replace(
            job,
            name=f"{job.name[:31].rstrip('-')}-{zlib.crc32(name.encode()):08x}",
            workdir=f"{job.workdir.rstrip('/')}/runs/{name}",
            command=(*job.command, f"--only={name}"),
        )
        for name in missing(job)
    ]


def missing(job: Job) -> list[str]:
    """The names of the runs of a sweep that have not ended.

    Raises:
      UserError: launch.sweep does not say; with its reason.
    """
    listing = subprocess.run([sys.executable, *job.command[1:], "--missing"], capture_output=True, text=True)
    if listing.returncode:
        raise UserError(listing.stderr.strip() or "launch.sweep does not list its runs")
    return listing.stdout.splitlines()
