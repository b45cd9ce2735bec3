"""Compiles a config's training step for machines that are not here, with their own compiler, in a process of its own.

libtpu has the compiler for TPUs, and a topology's name stands for the chips; jax's CUDA plugin has that for GPUs, and
a description of one stands for it. libtpu decides on the program, its schedule and the place of every buffer in
seconds, and then writes machine code for minutes. Whoever asks what a step needs has the answer when the first part is
done: the process is ended there, unless it is to show that machine code comes out too.
"""

from __future__ import annotations

import ctypes
import dataclasses
import importlib.util
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lm_jax.errors import Failure, UserError
from lm_jax.preflight.buffers import Dump
from lm_jax.preflight.chips import GPUS_OF_A_HOST, Target
from lm_jax.training.run import RunConfig

# What libtpu is not to ask the network or other processes for; kernels of cuDNN and cuBLAS cannot be tried here.
_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "XLA_FLAGS": "--xla_gpu_autotune_level=0",
}
_LAST = "after_optimizations_after_buffer_assignment.txt"  # the compiler writes it behind all others that are read
_POLL_SECONDS = 0.1


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler made of a step.

    Attributes:
      dump: its plan of memory and the program.
      coordinates: of each device, in the mesh's order: slice (of GPUs, host), place in the torus, core of the chip.
      kind: the device's, as JAX calls it.
      refused: the compiler's words, where it found that the step does not fit; None where it does.
      code_bytes: of machine code, where it was written;
      analysed_bytes: what the finished program then says that it needs of a device, without its code.
      seconds: that tracing and compiling took.
    """

    dump: Dump
    coordinates: list[list[int]]
    kind: str
    refused: str | None
    code_bytes: int | None
    analysed_bytes: int | None
    seconds: float


def compile_step(
    config: RunConfig,
    target: Target,
    *,
    machine_code: bool = False,
    tell: Callable[[str], None] = lambda text: None,
) -> Compiled:
    """Compiles the training step of a config whose vocabulary is known.

    Args:
      config: the run's.
      target: what for.
      machine_code: whether to go on until machine code is written.
      tell: is handed what is going on, for a person.

    Raises:
      UserError: where the compiler is missing, or does not know the topology; where the step does not compile for
        another reason than memory.
    """
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="preflight") as name:
        folder = Path(name)
        (folder / "job").write_bytes(pickle.dumps((config, target)))
        command = [sys.executable, "-m", "lm_jax.preflight.compiling", str(folder)]
        with (folder / "log").open("wb") as log:
            flags = " ".join(filter(None, (os.environ.get("XLA_FLAGS"), _ENVIRONMENT["XLA_FLAGS"])))
            environment = {**os.environ, **_ENVIRONMENT, "XLA_FLAGS": flags}
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            _wait(process, folder, machine_code, started, tell)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        return _result(folder, process.returncode, time.monotonic() - started)


def _wait(
    process: subprocess.Popen, folder: Path, machine_code: bool, started: float, tell: Callable[[str], None]
) -> None:
    """Returns when what is wanted is in the folder, or the process has ended."""
    told = 0.0
    while process.poll() is None:
        if not machine_code and _planned(folder):
            return
        now = time.monotonic()
        if now - told > 1:
            told = now
            doing = "compiling" if (folder / "devices").exists() else "tracing"
            tell(f"{doing} ({now - started:.0f} s)")
        time.sleep(_POLL_SECONDS)


def _planned(folder: Path) -> bool:
    """Whether the compiler has written its plan, to the last line."""
    for file in folder.glob(f"dump/*.{_LAST}"):
        with file.open("rb") as f:
            f.seek(max(0, file.stat().st_size - 8))
            return f.read().rstrip().endswith(b"}")
    return False


def _result(folder: Path, status: int, seconds: float) -> Compiled:
    outcome: dict[str, Any] = {}
    if (folder / "outcome").exists():
        outcome = json.loads((folder / "outcome").read_text())
    refused = outcome.get("refused")
    if "error" in outcome:
        raise UserError(outcome["error"])
    texts = {
        key: next(iter(sorted(folder.glob(f"dump/*after_optimizations{ending}.txt"))), None)
        for key, ending in (("assignment", "-buffer-assignment"), ("ranges", "-live-range"), ("program", ""))
    }
    if None in texts.values():
        if refused:
            raise UserError(f"the compiler gives no plan of memory: {refused}")
        raise Failure(_ended(status, (folder / "log").read_text(errors="replace")))
    devices = json.loads((folder / "devices").read_text())
    dump = Dump(**{key: file.read_text() for key, file in texts.items() if file})
    code, analysed = outcome.get("code_bytes"), outcome.get("analysed_bytes")
    return Compiled(dump, devices["coordinates"], devices["kind"], refused, code, analysed, seconds)


def _ended(status: int, log: str) -> str:
    """Why there is no plan, in at most three lines."""
    if status < 0:
        name = signal.Signals(-status).name
        hint = "this machine's memory may not have been enough" if -status == signal.SIGKILL else "see its last words"
        first = f"no verdict: the compiler was ended by {name}; {hint}"
    else:
        first = f"no verdict: the compiler failed (status {status})"
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b|F\d{4} |\[?FATAL", line)] or lines[-1:]
    return "\n".join([first, *(line[:300] for line in errors[-2:])])


# ----------------------------------------------------------------------------------------------- in the process itself


def _main(folder: Path) -> None:
    if sys.platform == "linux":  # where whoever asked is killed, this ends too (prctl.h)
        ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)
    config, target = pickle.loads((folder / "job").read_bytes())
    try:
        outcome = _compile(config, target, folder)
    except UserError as e:
        outcome = {"error": str(e)}
    (folder / "outcome").write_text(json.dumps(outcome))


def _compile(config: RunConfig, target: Target, folder: Path) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import NamedSharding

    from lm_jax.objectives.next_token import next_token
    from lm_jax.sharding import make_mesh, partition
    from lm_jax.training.program import make_program

    train, c = config.train, config.model
    mesh = make_mesh(config.mesh, _devices(target))
    placed = list(mesh.devices.flat)
    if target.torus:
        coordinates = [[getattr(d, "slice_index", 0), *d.coords, d.core_on_chip] for d in placed]
    else:
        coordinates = [[d.id // GPUS_OF_A_HOST, 0, 0, 0, 0] for d in placed]
    with jax.set_mesh(mesh):
        objective = next_token(c, z_loss=train.z_loss, remat=train.remat, layout=config.mesh.layout)
        program = make_program(config, mesh, objective)
        rows = NamedSharding(mesh, partition("batch", "length"))
        kinds = dict.fromkeys(("tokens", "targets", "segment_ids", "positions"), jnp.int32) | {"loss_mask": jnp.bool_}
        shape = (train.batch_size, train.length)
        batch = {name: jax.ShapeDtypeStruct(shape, np.dtype(kind), sharding=rows) for name, kind in kinds.items()}
        step: Any = program.train_step
        lowered = step.trace(program.abstract, batch).lower(lowering_platforms=("tpu" if target.torus else "cuda",))
        (folder / "devices").write_text(json.dumps({"coordinates": coordinates, "kind": placed[0].device_kind}))
        try:
            compiled = lowered.compile(compiler_options={"xla_dump_to": str(folder / "dump")})
        except jax.errors.JaxRuntimeError as e:
            words = re.split(r"\n|HLO module", str(e))[0].strip()
            if "RESOURCE_EXHAUSTED" in str(e) and "HBM" in str(e).upper():
                return {"refused": re.sub(r"^RESOURCE_EXHAUSTED: (E\d+: )?(\w+: )?", "", words)}
            raise UserError(f"the compiler refuses this step: {words}") from e
    m = compiled.memory_analysis()
    analysed = m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes + m.temp_size_in_bytes
    return {"code_bytes": m.generated_code_size_in_bytes, "analysed_bytes": analysed}


def _devices(target: Target) -> list[Any]:
    from jax.experimental import topologies

    plugins: tuple[str, ...] = ("libtpu",)
    given: dict[str, Any] = {"topology_name": target.name, "num_slices": target.slices}
    if not target.torus:
        hosts = -(-target.chips // GPUS_OF_A_HOST)
        shape = f"1x{hosts}x{target.chips // hosts}"
        given = {"topology": shape, "target_config": _gpu(target)}
        plugins = ("jax_cuda12_plugin", "jax_cuda13_plugin")
    try:
        found = topologies.get_topology_desc(platform="tpu" if target.torus else "cuda", **given)
    except Exception as e:
        if not any(map(importlib.util.find_spec, plugins)):
            extra = "tpu" if target.torus else "cuda"
            what = f"compiling for {target.name} needs the compiler: pip install 'lm_jax[{extra}]'"
            raise UserError(f"{what} (the chips themselves are not needed)") from e
        reason = str(e).splitlines()[0][:150]
        raise UserError(f"--topology: the compiler does not know {target.name}: {reason}") from e
    return list(found.devices)


def _gpu(target: Target) -> str:
    """A Hopper GPU as XLA has them described (`xla.gpu.GpuTargetConfigProto` as text)."""
    device = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 48 * 1024,
        "shared_memory_per_core": 228 * 1024,
        "shared_memory_per_block_optin": 227 * 1024,
        "threads_per_core_limit": 2048,
        "registers_per_core_limit": 65536,
        "registers_per_block_limit": 65536,
        "core_count": 132,
        "fpus_per_core": 128,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 65535,
        "block_dim_limit_z": 65535,
        "memory_bandwidth": int(target.chip.memory_bandwidth),
        "l2_cache_size": 60 * 2**20,
        "clock_rate_ghz": 1.98,
        "device_memory_size": int(target.chip.memory / 0.75),
    }
    fields = " ".join(f"{name}: {value}" for name, value in device.items())
    return (
        f"gpu_device_info {{ {fields} cuda_compute_capability {{ major: 9 minor: 0 }} }} "
        'platform_name: "CUDA" dnn_version_info { major: 9 minor: 8 patch: 0 } '
        f'device_description_str: "{target.chip.kind}"'
    )


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
