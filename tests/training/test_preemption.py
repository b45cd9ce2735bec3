"""Stopping when asked to: one process by its own signals, several after the same step."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lm_jax.training.preemption import StopSignal
from tests.support.processes import environment, run_python


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_asks_for_a_stop(number: signal.Signals, capfd: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(number)
    with StopSignal() as stop:
        assert not stop.should_stop(1)
        os.kill(os.getpid(), number)
        assert stop.should_stop(2) and stop.should_stop(3)
    assert signal.getsignal(number) == before
    assert ("saving and stopping" in capfd.readouterr().err) == (number == signal.SIGINT)


def test_a_second_interrupt_ends_at_once() -> None:
    code = """
import os, signal
from lm_jax.training.preemption import StopSignal
with StopSignal() as stop:
    os.kill(os.getpid(), signal.SIGINT)
    assert stop.should_stop(1)
    print("asked", flush=True)
    os.kill(os.getpid(), signal.SIGINT)
    print("still here", flush=True)
"""
    done = run_python(code, check=False)
    assert done.stdout == "asked\n" and done.returncode == -signal.SIGINT


_RUN = """
import sys, time
import jax, jax.numpy as jnp, numpy as np
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec as P
from lm_jax.sharding import MeshConfig, make_mesh
from lm_jax.training.checkpoint import CheckpointConfig, Checkpointer
from lm_jax.training.preemption import StopSignal

directory, port, me = epath.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
jax.distributed.initialize(f"localhost:{port}", 2, me, heartbeat_timeout_seconds=15)
mesh = make_mesh(MeshConfig(data=1, fsdp=4))
with jax.set_mesh(mesh), StopSignal() as stop:
    sharding, whole = NamedSharding(mesh, P("fsdp")), NamedSharding(mesh, P())
    like = {"w": jax.ShapeDtypeStruct((4096,), jnp.float32, sharding=sharding),
            "key": jax.ShapeDtypeStruct((), jax.random.key(0).dtype, sharding=whole)}
    make = jax.jit(lambda n: {"w": jnp.arange(4096.0) + n, "key": jax.random.key(n)},
                   out_shardings=jax.tree.map(lambda a: a.sharding, like))
    checkpoints = Checkpointer(directory, CheckpointConfig(every=20, keep=9))
    restored = checkpoints.restore(like)
    step = restored.step if restored else 0
    if restored:
        shards = [np.asarray(s.data) - np.arange(4096.0)[s.index] for s in restored.tree["w"].addressable_shards]
        assert all(np.all(s == step) for s in shards) and restored.metadata == {"rows": step}
    print("from", step, flush=True)
    while step < 3000:
        step += 1
        state = make(step)
        jax.block_until_ready(state)
        time.sleep(0.005 * (1 + me))  # one is slower than the other
        checkpoints.check()
        checkpoints.save(step, state, {"rows": step})
        if stop.should_stop(step):
            checkpoints.save(step, state, {"rows": step}, force=True)
            break
    checkpoints.wait()
    print("stopped after", step, "latest", checkpoints.latest, flush=True)
    checkpoints.close()
"""


def _start(directory: Path) -> list[subprocess.Popen[str]]:
    """Two processes of one job, on two devices each."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    return [
        subprocess.Popen(
            [sys.executable, "-c", _RUN, str(directory), str(port), str(me)],
            env=environment(2),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for me in range(2)
    ]


def _stop(processes: list[subprocess.Popen[str]], who: int, number: signal.Signals) -> tuple[int, int, list[str]]:
    """Waits until they run, signals one of them. Returns where both began, where both stopped, and their stderr."""
    try:
        began = []
        for process in processes:
            assert process.stdout is not None
            line = next((text for text in process.stdout if text.startswith("from")), "")
            assert line, process.communicate()[1]
            began.append(int(line.split()[1]))
        time.sleep(1)
        processes[who].send_signal(number)
        ends = [process.communicate(timeout=60) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], ends
    found = [re.search(r"stopped after (\d+) latest (\d+)", out) for out, _ in ends]
    assert all(match and match[1] == match[2] for match in found) and len({match[1] for match in found if match}) == 1
    assert began[0] == began[1] and found[0]
    return began[0], int(found[0][1]), [err for _, err in ends]


def test_two_processes_stop_together_and_fall_back_together(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    began, stopped, _ = _stop(_start(folder), 1, signal.SIGTERM)
    assert began == 0 and stopped < 3000

    shutil.rmtree(folder / str(stopped) / "state" / "ocdbt.process_1")
    older = max(int(p.name) for p in folder.iterdir() if p.name.isdecimal() and int(p.name) < stopped)
    began, again, errors = _stop(_start(folder), 0, signal.SIGINT)
    assert began == older and again > older
    lines = [[line for line in error.splitlines() if "damaged" in line] for error in errors]
    assert len(lines[0]) == 1 and f"checkpoint {stopped} is damaged" in lines[0][0] and lines[1] == []
    assert (folder / f"damaged-{stopped}").exists()
