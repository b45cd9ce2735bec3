"""Runs a job on a slice of Cloud TPUs, over the `gcloud` command line.

    python -m launch.tpu_pod up --name=lm-7b --zone=us-east5-a --slice=v5p:4x4x4 -- \\
        python -m launch.train --config=configs/7b.py --workdir=gs://bucket/7b

    up       all of the below: asks for the slice and waits for it, copies the code, runs, watches. Where the slice is
             preempted it asks for another, and where a host or process is lost it starts all again. To be left running,
             in tmux on any machine; stopped, the same command goes on. At the end the slice is deleted; not with --keep
    create   asks for the slice
    copy     copies the tracked files of this checkout to all workers, and installs them
    run      runs the command on all workers, in the background; stops what runs there
    stop     stops the job, which saves, and leaves the slice
    follow   shows the first worker's log
    delete   deletes the slice, and with it what it costs

--dry_run prints the commands and runs none. A job ends by itself after three starts without a new step
(launch/jobs/again.py). Exit status: 0 finished, 1 ended unfinished, 2 the user's mistake, 75 no longer watched. See
docs/pods.md.
"""

from __future__ import annotations

import signal
import time
from pathlib import Path

from absl import flags

from launch import cli, runtime
from launch.jobs import tools
from launch.jobs.gcloud import Pod, State, explained, verdict
from launch.jobs.job import Job, define_flags, job_of
from lm_jax.errors import Failure, UserError

VERBS = ("up", "create", "copy", "run", "stop", "follow", "delete")
FLAGS = flags.FlagValues()
define_flags(FLAGS, tpus=True, gpus=False)
ZONE = flags.DEFINE_string("zone", None, "Google's zone: us-east5-a", required=True, flag_values=FLAGS)
PROJECT = flags.DEFINE_string("project", "", "Google's project; empty: as gcloud is set", flag_values=FLAGS)
SPOT = flags.DEFINE_bool("spot", False, "a slice that may be preempted; cheaper", flag_values=FLAGS)
RESERVED = flags.DEFINE_bool("reserved", False, "a slice of the project's reservation", flag_values=FLAGS)
KEEP = flags.DEFINE_bool("keep", False, "up: leave the slice at the end", flag_values=FLAGS)
DRY_RUN = flags.DEFINE_bool("dry_run", False, "print the commands, and run none", flag_values=FLAGS)
POLL_SECONDS = flags.DEFINE_float("poll_seconds", 30.0, "up: how often it looks", lower_bound=0.0, flag_values=FLAGS)

_CHECKOUT = Path(__file__).resolve().parents[1]
_TRIES = 10  # of what may pass by itself: a worker that ssh does not reach, an answer of Google's
_AGAIN = 3  # times that what does no harm twice is asked for, where no answer comes
_FAILED_TRIES = 3  # of a request that Google refuses late
_WAITING = {
    "CREATING": "asked for",
    "ACCEPTED": "in the queue",
    "WAITING_FOR_RESOURCES": "in the queue, until there is room",
    "PROVISIONING": "being set up",
    "SUSPENDING": "being taken away",
    "DELETING": "being deleted",
    "UNKNOWN": "in a state that gcloud does not name",
}


def main(words: list[str], command: list[str]) -> int:
    if len(words) != 1 or words[0] not in VERBS:
        raise UserError(f"what is to be done? {', '.join(VERBS)}\nas python -m launch.tpu_pod up --name=..")
    pod = Pod(FLAGS["name"].value or "", ZONE.value, PROJECT.value, SPOT.value, RESERVED.value)
    if SPOT.value and RESERVED.value:
        raise UserError("--spot and --reserved: a slice is one or the other")
    verb = words[0]
    if verb == "copy":
        return _do(pod.copy_commands(_CHECKOUT, _archives()), tools.CARRY, _AGAIN)
    if verb == "stop":
        return _do([pod.stop_command()], tools.CHANGE, _AGAIN)
    if verb == "delete":
        return _do([pod.delete_command()], tools.CHANGE, _AGAIN)
    if verb == "follow":
        return _do([pod.log_command(follow=True)], None)
    job = _job(command)
    if verb == "create":
        return _do([pod.create_command(job)], tools.CHANGE)
    identity = f"{job.name}-{int(time.time())}"
    if verb == "run":
        return _do([pod.start_command(job, identity)], tools.CHANGE)
    if DRY_RUN.value:
        return _plan(pod, job, identity)
    return Watch(pod, job, identity).up()


def _archives() -> Path:
    from lm_jax.data.cache import cache_root

    folder = Path(cache_root(None)) / "archives"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"{folder} cannot be made: {e.strerror}\nset LM_JAX_CACHE to a folder that can") from e
    return folder


def _job(command: list[str]) -> Job:
    if not FLAGS["slice"].value:
        raise UserError("--slice is missing: the TPU slice, as v5p:4x4x4 or v6e-64")
    return job_of(FLAGS, command, shared_disk=False)


def _do(commands: list[list[str]], seconds: float | None, times: int = 1) -> int:
    """Runs commands one after the other, or shows them.

    Args:
      commands: their command lines.
      seconds: that each may take.
      times: how often one is tried that gives no answer.
    """
    for words in commands:
        if DRY_RUN.value:
            tools.show(words)
            continue
        for left in reversed(range(times)):
            try:
                tools.call(words, seconds=seconds, through=True)
                break
            except tools.TimedOut as e:
                if not left:
                    raise
                tools.say(f"{e}; trying again")
            except tools.ToolFailed as e:
                raise explained(e) from e
    return 0


def _plan(pod: Pod, job: Job, identity: str) -> int:
    """What `up` runs where nothing goes wrong."""
    for what, commands in (
        ("ask for the slice", [pod.create_command(job)]),
        (f"every {POLL_SECONDS.value:g} s, until state.state is ACTIVE", [pod.describe_command()]),
        ("an earlier job, if there is one", [pod.stop_command()]),
        ("the code, on all workers", pod.copy_commands(_CHECKOUT, _archives())),
        ("run, on all workers; again when one says neither running nor 0", [pod.start_command(job, identity)]),
        ("how it stands, by each worker", [pod.status_command(job)]),
        ("when all say 0", [] if KEEP.value else [pod.delete_command()]),
    ):
        if commands:
            print(f"# {what}")
        for words in commands:
            tools.show(words)
    return 0


class Watch:
    """`up`: looks how things stand, and does what is next. It keeps nothing that a look would not tell, so that it may
    be stopped and started at any time."""

    def __init__(self, pod: Pod, job: Job, identity: str) -> None:
        pod.create_command(job)  # refuses what the API does not serve before anything is asked
        self._pod, self._job, self._identity = pod, job, identity
        self._told = ""
        self._seen = False  # whether the job was seen at work since this watch began
        self._failed = 0  # requests that were refused, one after the other
        self._trouble = 0  # looks that told nothing, likewise

    def up(self) -> int:
        """Until the job has ended. Returns the exit status."""
        assert self._job.slice is not None
        old = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            while (status := self._look()) is None:
                time.sleep(POLL_SECONDS.value)
            return status
        except KeyboardInterrupt:
            self._tell("no longer watched: it runs on, and nobody starts it again. The same command watches it")
            return runtime.NOT_FINISHED
        finally:
            signal.signal(signal.SIGTERM, old)

    def _look(self) -> int | None:
        """One look, and the step that follows; an exit status at the end."""
        try:
            return self._step(self._pod.state())
        except tools.ToolFailed as e:
            self._trouble += 1
            if self._trouble >= _TRIES:
                raise explained(e) from e
            known = explained(e)
            if known is not e:
                raise known from e
            self._tell(f"{e} (tried {self._trouble} of {_TRIES} times)")
            return None

    def _step(self, state: State) -> int | None:
        if state.name == "ACTIVE":
            self._failed = 0
            return self._work()
        if state.name == "":
            self._tell("asking for the slice")
            tools.call(self._pod.create_command(self._job), seconds=tools.CHANGE)
        elif state.name == "SUSPENDED":
            self._tell("preempted: asking for another slice; the run goes on from its last step")
            tools.call(self._pod.delete_command(), seconds=tools.CHANGE)
        elif state.name == "FAILED":
            self._failed += 1
            if self._failed >= _FAILED_TRIES:
                raise Failure(f"{self._pod.name}: Google refused the slice {self._failed} times\n{state.reason[:400]}")
            self._tell(f"refused: {state.reason[:200]}; asking again")
            tools.call(self._pod.delete_command(), seconds=tools.CHANGE)
        else:
            self._tell(_WAITING.get(state.name, state.name.lower()))
        self._trouble = 0
        return None

    def _work(self) -> int | None:
        """What the workers say, and what follows from it."""
        assert self._job.slice is not None
        try:
            statuses, reason = self._pod.statuses(self._job), ""
        except tools.ToolFailed as e:
            statuses, reason = [], str(e).splitlines()[-1]
        what = verdict(statuses, self._job.slice.hosts)
        if what in ("final", "again") and not self._seen:
            what = "start"  # an earlier watch's end: whoever starts this one may have mended the code
        self._seen |= what in ("wait", "start")
        if what == "unreachable":
            self._unreachable(len(statuses), reason)
            return None
        if what == "wait":
            self._tell("running")
        elif what == "start":
            # First of all: what runs would lose the files that it runs from. Where a later command fails, the workers
            # have no job, and the next look begins here again.
            tools.call(self._pod.stop_command(), seconds=tools.CHANGE)
            self._tell("copying the code, and starting")
            for words in self._pod.copy_commands(_CHECKOUT, _archives()):
                tools.call(words, seconds=tools.CARRY)
            tools.call(self._pod.start_command(self._job, self._identity), seconds=tools.CHANGE)
        elif what == "again":
            stopped = sorted(set(statuses) - {"0", "running"})
            self._tell(f"stopped with status {', '.join(stopped)}: starting all workers again")
            self._told = ""
            tools.call(self._pod.start_command(self._job, self._identity), seconds=tools.CHANGE)
        else:
            return self._end(what, statuses)
        self._trouble = 0
        return None

    def _unreachable(self, answered: int, reason: str) -> None:
        assert self._job.slice is not None
        self._trouble += 1
        of = f"{answered} of {self._job.slice.hosts} workers answer" + (f": {reason}" if reason else "")
        if self._trouble < _TRIES:
            self._tell(f"{of} (looked {self._trouble} of {_TRIES} times)")
        elif not self._seen:  # the fault may be this machine's: a key, a closed port
            raise Failure(
                f"{self._pod.name}: {of}\nthe slice is left, and costs: {' '.join(self._pod.delete_command())}"
            )
        else:
            self._tell(f"{of}: asking for another slice")
            tools.call(self._pod.delete_command(), seconds=tools.CHANGE)
            self._trouble = 0

    def _end(self, what: str, statuses: list[str]) -> int:
        if what == "final":
            tools.call(self._pod.log_command(follow=False), seconds=tools.ASK, through=True)
        if KEEP.value:
            self._tell(f"the slice is kept, and costs: {' '.join(self._pod.delete_command())}")
        else:
            tools.call(self._pod.delete_command(), seconds=tools.CHANGE)
        if what == "done":
            self._tell("finished")
            return 0
        worst = ", ".join(sorted(set(statuses) - {"0", "running"}))
        raise Failure(
            f"{self._pod.name} ended with status {worst}, and is not started again\n"
            "the log's last lines, above, say why; the same command goes on from the last step"
        )

    def _tell(self, line: str) -> None:
        """A line, where it is another than the last."""
        if line != self._told:
            tools.say(f"{self._pod.name}: {line}")
        self._told = line


if __name__ == "__main__":
    cli.run(main, FLAGS, command=True)
