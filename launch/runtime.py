"""What every launcher that computes does first: devices of this machine, other processes of the job, the compilation
cache."""

from __future__ import annotations

import ctypes
import math
import os
import signal
import sys
from types import FrameType
from typing import TYPE_CHECKING, Any

from absl import flags

from lm_jax.errors import Failure, UserError

if TYPE_CHECKING:
    from launch.cluster import Cluster
    from lm_jax.training.run import RunConfig

NOT_FINISHED = 75  # the exit status that asks to be started again
_PROCESS_FLAGS = ("coordinator_address", "num_processes", "process_id")
_PEER_SILENT_SECONDS = 40  # jax ends the job then; training/peers.py, which says who is gone, comes before it


def define_process_flags(values: flags.FlagValues) -> None:
    """The flags by which the processes of a job find each other; none of them for a job of one process, and where
    a cluster says it (launch/cluster.py)."""
    flags.DEFINE_string(
        "coordinator_address", None, "HOST:PORT of the first of the job's processes", flag_values=values
    )
    flags.DEFINE_integer(
        "num_processes",
        None,
        "how many processes the job has; 1 alone: do not look for others",
        lower_bound=1,
        flag_values=values,
    )
    flags.DEFINE_integer("process_id", None, "which of them this is, from 0", lower_bound=0, flag_values=values)


def exit_on_signals() -> None:
    """Until a run has something to save, SIGTERM and Ctrl-C end it at once, and say so by the exit status."""

    def leave(number: int, frame: FrameType | None) -> None:
        del number, frame
        os.write(2, b"stopped while starting: the same command goes on\n")
        os._exit(NOT_FINISHED)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, leave)


def start(values: flags.FlagValues, config: RunConfig) -> None:
    """Makes the devices of the job known to JAX. To be called once, before any of them is touched.

    Raises:
      UserError: where the process flags do not fit together, or a cluster does not say enough.
    """
    import jax

    from launch import cluster

    given: dict[str, Any] = {name: values[name].value for name in _PROCESS_FLAGS}
    missing = [name for name, value in given.items() if value is None]
    alone = given["num_processes"] == 1 and len(missing) == 2
    if missing and len(missing) < len(given) and not alone:
        raise UserError(f"--{missing[0]} is missing: coordinator_address, num_processes and process_id go together")
    if not missing and given["process_id"] >= given["num_processes"]:
        raise UserError(
            f"--process_id={given['process_id']} is out of range: {given['num_processes']} processes count from 0"
        )
    found = cluster.find() if len(missing) == len(given) else None
    processes = found.processes if found else given["num_processes"] or 1
    keep_freed_memory()
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", cpu_devices(config, processes))
    use_compilation_cache()
    if not missing:
        jax.distributed.initialize(**given, heartbeat_timeout_seconds=_PEER_SILENT_SECONDS)
    elif found is not None:
        _connect(found)


def _connect(found: Cluster) -> None:
    """Finds the other processes as the cluster says."""
    import jax

    if found.process == 0:
        print(
            f"{found.name}: one of {found.processes} processes, found by the environment", file=sys.stderr, flush=True
        )
    try:
        jax.distributed.initialize(heartbeat_timeout_seconds=_PEER_SILENT_SECONDS)
    except (RuntimeError, ValueError, OSError) as e:
        raise Failure(
            f"process {found.process} of {found.processes} ({found.name}) did not find the others: "
            f"{(str(e).strip() or type(e).__name__).splitlines()[0]}\n"
            "give --coordinator_address, --num_processes and --process_id, or --num_processes=1 to run alone"
        ) from e


def cpu_devices(config: RunConfig, processes: int = 1) -> int:
    """How many devices JAX is to make of this machine's cores, where there is nothing better: as many as the mesh
    names, at most one a core.

    What the mesh leaves open is one: XLA spreads a single device's work over all cores. (Two devices on two cores, each
    with its rows, are within 6% of that, some models faster and some slower, and hold the model twice.)
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    sizes = (config.mesh.data, config.mesh.fsdp, config.mesh.sequence, config.mesh.tensor)
    return max(1, min(cores, math.prod(s for s in sizes if s != -1)) // processes)


def keep_freed_memory() -> None:
    """On Linux with glibc: memory that a step frees stays with the process, for the next step.

    XLA on CPU takes all temporary memory of a step in one piece and gives it back behind it. glibc hands pieces above
    32 MiB back to the system, which clears them page by page when the next step touches them: a sixth of the processor
    time of a step (13.9M parameters on two cores, x86). To be called before there are threads.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    # malloc.h: M_ARENA_MAX (other arenas cannot hold large pieces), M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
    for parameter, value in ((-8, 1), (-4, 0), (-1, 2**31 - 1), (-2, 2**26)):
        mallopt(parameter, value)


def use_compilation_cache() -> None:
    """JAX's cache of compiled programs, beside tokenizers and tokens: the second start of a config compiles nothing."""
    import jax

    from lm_jax.data.cache import cache_root

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(cache_root(None) / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
