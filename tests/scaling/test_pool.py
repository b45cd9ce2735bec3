"""The pool of processes, with processes that only pretend to work."""

from __future__ import annotations

import sys
import time

import pytest

from lm_jax.scaling.pool import Job, Pool

# Does what its job says: `answer`, `die` by a signal or a status, `wait` until it is asked to stop (`deaf`: longer).
WORKER = """
import json, os, signal, sys, time
asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
setup = json.loads(sys.stdin.readline())
for line in sys.stdin:
    job = json.loads(line)
    if job["do"] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if job["do"] == "leave":
        os._exit(int(job["status"]))
    end = time.monotonic() + 30
    while job["do"] in ("wait", "deaf") and not (asked and job["do"] == "wait") and time.monotonic() < end:
        time.sleep(0.01)
    status = "saved" if asked else "failed" if job["do"] == "fail" else "finished"
    reason = f"{setup['cores']} {os.environ.get('SLOT')} {os.getpid()}"
    print(json.dumps({"status": status, "reason": reason}), flush=True)
"""


def pool(jobs: list[Job], slots: int = 1) -> Pool:
    made = Pool(
        [sys.executable, "-c", WORKER], jobs, [{"SLOT": str(i)} for i in range(slots)], [[i] for i in range(slots)]
    )
    made.start()
    return made


def finish(made: Pool) -> Pool:
    end = time.monotonic() + 60
    while made.working:
        assert time.monotonic() < end
        made.wait(0.05)
    return made


def job(name: str, do: str, devices: int = 1, **more: str) -> Job:
    return Job(name, {"do": do, **more}, devices)


def test_jobs_share_a_process_and_a_slot_s_environment() -> None:
    states = finish(pool([job(str(i), "answer") for i in range(3)])).states
    assert {s.status for s in states.values()} == {"finished"}
    assert len({s.reason for s in states.values()}) == 1  # one process did them all
    assert states["0"].reason.startswith("[0] 0 ")


def test_other_devices_are_another_process() -> None:
    states = finish(pool([job("a", "answer"), job("b", "answer", devices=2)])).states
    assert states["a"].reason != states["b"].reason


@pytest.mark.parametrize(
    ("do", "words"),
    [({"do": "kill"}, "ended by SIGKILL, maybe for want of memory"), ({"do": "leave", "status": "3"}, "with status 3")],
)
def test_a_process_that_dies_takes_one_job_with_it(do: dict[str, str], words: str) -> None:
    jobs = [Job("dies", do), job("lives", "answer"), job("fails", "fail"), job("goes on", "answer")]
    states = finish(pool(jobs)).states
    assert states["dies"].status == "failed" and words in states["dies"].reason
    assert [states[name].status for name in ("lives", "fails", "goes on")] == ["finished", "failed", "finished"]


def test_a_process_that_was_stopped_before_it_began_has_not_failed() -> None:
    states = finish(pool([job("a", "leave", status="75")])).states
    assert states["a"].status == "saved"


def test_stopping_has_every_process_save_and_starts_nothing_more() -> None:
    made = pool([job("a", "wait"), job("b", "wait"), job("c", "answer")], slots=2)
    end = time.monotonic() + 30
    while sum(s.status == "running" for s in made.states.values()) < 2:
        assert time.monotonic() < end
        time.sleep(0.01)
    time.sleep(0.3)  # both have their job
    made.stop()
    made.stop()
    finish(made)
    assert [made.states[name].status for name in "abc"] == ["saved", "saved", "waiting"]


def test_killing_ends_processes_that_do_not_hear() -> None:
    made = pool([job("a", "deaf"), job("b", "answer")])
    end = time.monotonic() + 30
    while made.states["a"].status != "running":
        assert time.monotonic() < end
        time.sleep(0.01)
    made.stop()
    made.kill()
    finish(made)
    assert [made.states[name].status for name in "ab"] == ["saved", "waiting"]
