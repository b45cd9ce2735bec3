"""Stopping when asked to: one process by its own signals, several after the same step."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

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
import shutil, sys, time
import jax, jax.numpy as jnp, numpy as np
from etils import epath
from jax.experimental.multihost_utils import sync_global_devices
from jax.sharding import NamedSharding, PartitionSpec as P
from lm_jax.sharding import MeshConfig, make_mesh
from lm_jax.training.checkpoint import CheckpointConfig, Checkpointer
from lm_jax.training.preemption import StopSignal

directory, port, me = epath.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
jax.distributed.initialize(f"localhost:{port}", 2, me, heartbeat_timeout_seconds=15)
mesh = make_mesh(MeshConfig(data=1, fsdp=4))
with jax.set_mesh(mesh), StopSignal() as stop:
    like = {
        "w": jax.ShapeDtypeStruct((4096,), jnp.float32, sharding=NamedSharding(mesh, P("fsdp"))),
        "key": jax.ShapeDtypeStruct((), jax.random.key(0).dtype, sharding=NamedSharding(mesh, P())),
    }
    shardings = jax.tree.map(lambda a: a.sharding, like)
    make = jax.jit(lambda n: {"w": jnp.arange(4096.0) + n, "key": jax.random.key(n)}, out_shardings=shardings)
    checkpoints = Checkpointer(directory, CheckpointConfig(every=1000))
    assert checkpoints.restore(like) is None
    for step in range(1, 10_000):
        state = jax.block_until_ready(make(step))
        time.sleep(0.005 * (1 + me))  # one is slower than the other
        checkpoints.check()
        checkpoints.save(step, state, {"rows": step}, force=step == 1)
        if step == 3:
            print("ready", flush=True)
        if stop.should_stop(step):
            break
    checkpoints.save(step, state, {"rows": step}, force=True)
    checkpoints.wait()
    print("stopped", step, checkpoints.latest, flush=True)
    sync_global_devices("saved")
    if me == 0:  # what the second process wrote, and it alone reads here
        shutil.rmtree(directory / str(step) / "state" / "ocdbt.process_1")
    sync_global_devices("damaged")
    restored = checkpoints.restore(like)
    for shard in restored.tree["w"].addressable_shards:
        assert np.array_equal(shard.data, np.arange(4096, dtype="f")[shard.index] + restored.step)
    assert restored.metadata == {"rows": restored.step}
    print("restored", restored.step, flush=True)
    checkpoints.close()
"""


def test_two_processes_stop_together_and_fall_back_together(tmp_path: Path) -> None:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = str(s.getsockname()[1])
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment(2)}
    command = [sys.executable, "-c", _RUN, str(tmp_path / "c"), port]
    processes = [subprocess.Popen([*command, str(me)], **pipes) for me in range(2)]
    try:
        for process in processes:
            assert any(line == "ready\n" for line in process.stdout or ()), process.communicate()[1]
        processes[1].send_signal(signal.SIGINT)
        ends = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], ends
    step = (tmp_path / "c").glob("damaged-*").__next__().name.removeprefix("damaged-")
    for out, _ in ends:
        assert f"stopped {step} {step}\nrestored 1\n" in out
    told = [[line for line in err.splitlines() if "damaged" in line] for _, err in ends]
    assert len(told[0]) == 1 and told[1] == []
    assert told[0][0].startswith(f"checkpoint {step} is damaged (") and told[0][0].endswith(
        "going on from checkpoint 1"
    )
