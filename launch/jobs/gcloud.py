"""The `gcloud` commands for a job on a slice of the Cloud TPU API, and what it answers."""

from __future__ import annotations

import dataclasses
import json
import shlex
import zlib
from pathlib import Path

from launch.jobs import again, tools
from launch.jobs.job import Job
from lm_jax.errors import Failure, UserError
from lm_jax.slices import slice_of

FOLDER = "lm_jax"  # of the code, in the home directory of each worker
ARCHIVE = "lm_jax.tar.gz"  # there
ABSENT, RUNNING, GONE = "absent", "running", "gone"  # what a worker says, where it does not say an exit status
_AT_WORK = "a job is at work on these files"  # what a worker says that is to have others
_MARK = "lm_jax_status"  # in front of it: ssh writes lines of its own

# uv brings the Python: images of TPU VMs have 3.10. What is locked comes first, with its hashes; extras leave room.
_INSTALL = f"""\
set -e
rm -rf {FOLDER} && mkdir {FOLDER} && tar -xzf {ARCHIVE} -C {FOLDER} && cd {FOLDER}
python3 -m pip install --quiet --user --require-hashes --no-deps --only-binary :all: -r requirements/bootstrap.lock
python3 -m uv venv --quiet --python 3.12 .venv
export UV_PYTHON=.venv/bin/python
python3 -m uv pip install --quiet --require-hashes --only-binary :all: -r requirements/run.lock
python3 -m uv pip install --quiet --editable '.[tpu,gcs,s3]'"""


@dataclasses.dataclass(frozen=True)
class State:
    """How a queued resource stands.

    Attributes:
      name: ACTIVE, SUSPENDED and so on; empty where there is no such resource.
      reason: why it FAILED.
    """

    name: str
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class Pod:
    """A queued resource of one slice, and the node of the same name that comes of it.

    Attributes:
      name: of both.
      zone: of Google's.
      project: of Google's; empty: as `gcloud` is set.
      spot: whether it may be preempted; cheaper.
      reserved: whether it is taken from a reservation of the project's.
    """

    name: str
    zone: str
    project: str = ""
    spot: bool = False
    reserved: bool = False

    # ------------------------------------------------------------------------------------------------ command lines

    def create_command(self, job: Job) -> list[str]:
        """Asks for the slice.

        Raises:
          UserError: the Cloud TPU API does not serve it.
        """
        assert job.slice is not None
        if not job.slice.runtime:
            raise UserError(
                f"--slice={job.slice.name}: the Cloud TPU API, and so this program, has no {job.slice.generation}\n"
                "GKE does: python -m launch.gke with the same flags"
            )
        words = ["gcloud", "compute", "tpus", "queued-resources", "create", self.name, f"--node-id={self.name}"]
        if slice_of(job.slice.accelerator_type) == job.slice:
            words.append(f"--accelerator-type={job.slice.accelerator_type}")
        else:  # not the shape that the number of chips stands for
            words += [f"--type={job.slice.generation}", f"--topology={job.slice.topology}"]
        words.append(f"--runtime-version={job.slice.runtime}")
        words += ["--spot"] if self.spot else []
        words += ["--reserved"] if self.reserved else []
        return [*words, *self._place()]

    def describe_command(self) -> list[str]:
        words = ["gcloud", "compute", "tpus", "queued-resources", "describe", self.name]
        return [*words, "--format=json", *self._place()]

    def delete_command(self) -> list[str]:
        """Deletes resource and node, whatever their state."""
        words = ["gcloud", "compute", "tpus", "queued-resources", "delete", self.name]
        return [*words, "--force", "--quiet", *self._place()]

    def copy_commands(self, checkout: Path, archives: Path) -> list[list[str]]:
        """The tracked files of the checkout, as they are now: packed, copied to all workers, installed there; but not
        under a job that runs from them.

        Args:
          checkout: of this project, with git.
          archives: a folder for the packed files.
        """
        where, archive = shlex.quote(str(checkout)), archives / f"{self.name}.tar.gz"
        pack = f"git -C {where} ls-files -z | tar -C {where} --null --files-from=- -czf {shlex.quote(str(archive))}"
        copy = ["gcloud", "compute", "tpus", "tpu-vm", "scp", str(archive), f"{self.name}:{ARCHIVE}", "--worker=all"]
        copy += ["--batch-size=all", *self._place()]
        alive = f"[ -f {self.name}.pid ] && kill -0 -- -$(cat {self.name}.pid) 2> /dev/null"
        free = f"if {alive}; then echo 'ERROR: {_AT_WORK}' >&2; exit 1; fi\n"
        return [["bash", "-o", "pipefail", "-c", pack], copy, self.ssh_command(free + _INSTALL)]

    def stop_command(self) -> list[str]:
        """Stops the job on all workers, which are then as if none had been started. What runs saves first."""
        return self.ssh_command(f"{self._stop()}; rm -f {self.name}.pid {self.name}.status {self.name}.job")

    def start_command(self, job: Job, identity: str) -> list[str]:
        """Stops what is left of an earlier start on all workers, and starts the job in the background."""
        exports = "".join(f"export {name}={shlex.quote(value)}; " for name, value in job.environment)
        watched = shlex.join(job.watched(identity, python=".venv/bin/python"))
        if job.setup:  # nobody counts its failures, so that one ends the job
            watched = f"if ({job.setup}); then {watched}; else echo 'the setup failed'; (exit {again.FINAL}); fi"
        run = f"{{ {watched}; }} >> ~/{self.name}.log 2>&1; echo $? > ~/{self.name}.status"
        # Status and stop go by the process group, which is there only once setsid has run.
        apart = "while kill -0 $! 2> /dev/null && ! kill -0 -- -$! 2> /dev/null; do sleep 0.1; done"
        return self.ssh_command(
            f"{self._stop()}; rm -f {self.name}.status; echo {_mark(job)} > {self.name}.job; "
            f"cd {FOLDER} || exit 1; {exports}"
            f"nohup setsid sh -c {shlex.quote(run)} > /dev/null 2>&1 < /dev/null & echo $! > ~/{self.name}.pid; {apart}"
        )

    def status_command(self, job: Job) -> list[str]:
        """Has every worker say the job's exit status, or how it stands; another job's is none."""
        n = self.name
        other = f'[ "$(cat {n}.job 2> /dev/null)" != {_mark(job)} ]'
        alive = f"kill -0 -- -$(cat {n}.pid) 2> /dev/null"
        ask = f"if {other}; then echo {ABSENT}; elif [ -s {n}.status ]; then cat {n}.status; "
        return self.ssh_command(f"echo {_MARK} $({ask}elif {alive}; then echo {RUNNING}; else echo {GONE}; fi)")

    def log_command(self, *, follow: bool) -> list[str]:
        """The first worker's log."""
        return self.ssh_command(f"tail -n 100 {'-F ' if follow else ''}{self.name}.log", worker="0")

    def ssh_command(self, command: str, worker: str = "all") -> list[str]:
        words = ["gcloud", "compute", "tpus", "tpu-vm", "ssh", self.name, f"--worker={worker}"]
        words += ["--batch-size=all"] if worker == "all" else []
        return [*words, f"--command={command}", *self._place()]

    def _place(self) -> list[str]:
        return [f"--zone={self.zone}", *([f"--project={self.project}"] if self.project else [])]

    def _stop(self) -> str:
        """The watcher hands SIGTERM on; its command saves. What is left after two minutes is killed."""
        group = f"-- -$(cat {self.name}.pid)"
        wait = f"for i in $(seq 120); do kill -0 {group} 2> /dev/null || break; sleep 1; done"
        # The command has a session of its own, and may not heed the signal that follows its watcher's end.
        children = f"for p in $(pgrep -g $(cat {self.name}.pid)); do pkill -KILL -P $p; done"
        kill = f"{children}; kill -KILL {group} 2> /dev/null"
        return f"if [ -f {self.name}.pid ]; then kill -TERM {group} 2> /dev/null && {wait}; {kill}; fi"

    # ----------------------------------------------------------------------------------------------------- answers

    def state(self) -> State:
        """How the resource stands.

        Raises:
          ToolFailed, UserError: `gcloud` does not say.
        """
        try:
            answer = json.loads(tools.call(self.describe_command(), seconds=tools.ASK) or "{}")
        except tools.ToolFailed as e:
            if "NOT_FOUND" in e.said or "was not found" in e.said:
                return State("")
            raise explained(e) from e
        state = answer.get("state", {})
        error = state.get("failedData", {}).get("error", {})
        return State(state.get("state", "UNKNOWN"), error.get("message", ""))

    def statuses(self, job: Job) -> list[str]:
        """What the workers say of the job, of those that could be reached; in no order.

        Raises:
          ToolFailed: `gcloud` reached none of them.
        """
        answer = tools.call(self.status_command(job), seconds=tools.ASK)
        lines = [line.split() for line in answer.splitlines() if line.startswith(_MARK)]
        return [words[1] for words in lines if len(words) == 2]


def _mark(job: Job) -> str:
    """By which a worker knows a job from another under the same name."""
    return f"{zlib.crc32(repr((job.command, job.environment, job.setup)).encode()):08x}"


def verdict(statuses: list[str], hosts: int) -> str:
    """What is to be done about a job.

    Args:
      statuses: of its workers; see `Pod.statuses`.
      hosts: how many there are.

    Returns:
      unreachable; start (it was never started here); final (no start can help); done; again; or wait.
    """
    if len(statuses) != hosts:
        return "unreachable"
    if ABSENT in statuses:
        return "start"
    if any(status in map(str, again.HOPELESS) for status in statuses):
        return "final"
    if set(statuses) == {"0"}:
        return "done"
    return "wait" if set(statuses) <= {"0", RUNNING} else "again"


def explained(error: tools.ToolFailed) -> Failure | UserError:
    """A failure of `gcloud`, with what helps where that is known."""
    said = str(error).splitlines()[-1]
    quota = "Quota" in error.said or "RESOURCE_EXHAUSTED" in error.said
    if quota and "create" in error.words:  # of other commands it is a limit of requests a minute, which passes
        return Failure(f"{said}\nask for quota (console: IAM, Quotas), or try another --zone, or --spot")
    if "active account" in error.said or "UNAUTHENTICATED" in error.said or "auth login" in error.said:
        return UserError(f"{said}\nlog in: gcloud auth login")
    if "required property [project]" in error.said:
        return UserError("gcloud knows no project\ngive --project, or: gcloud config set project PROJECT")
    if _AT_WORK in error.said:
        return UserError(f"{said}\nstop it first, it saves: python -m launch.tpu_pod stop with the same flags")
    if "PERMISSION_DENIED" in error.said:
        return UserError(f"{said}\nthe account needs the role TPU Admin, and the project the Cloud TPU API")
    return error
