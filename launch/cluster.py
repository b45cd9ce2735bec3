"""Whether something else started this process as one of several: a Cloud TPU pod, GKE, SLURM, Open MPI, Kubernetes.

jax.distributed recognises these by itself, but has to be told to try; on a machine of its own, trying is an error, and
in a shell of a cluster it waits for processes that nobody started. So this asks jax's own detection, and counts.
"""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Mapping
from typing import Any

from lm_jax.errors import UserError

# jax's name for it: what people call it
NAMES = {
    "slurm": "SLURM",
    "ompi": "Open MPI",
    "gketpu": "GKE TPU",
    "gcetpu": "Cloud TPU",
    "K8sCluster": "Kubernetes",
}


@dataclasses.dataclass(frozen=True)
class Cluster:
    """What started the processes of this job, how many they are, and which of them this is."""

    name: str
    processes: int
    process: int


def find() -> Cluster | None:
    """The cluster that this process belongs to; None where it is alone.

    Raises:
      UserError: where a cluster is there, and does not say enough.
    """
    from jax._src import clusters  # jax has no public way to ask without connecting

    for kind in clusters.ClusterEnv._cluster_types:
        if kind.opt_in_only_method or not _sensible(kind, os.environ):
            continue
        name = NAMES.get(kind.name) or NAMES.get(kind.__name__, kind.__name__)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that jax[k8s] is not installed
                if not kind.is_env_present():
                    continue
            count = kind.get_process_count()
            return Cluster(name, count, kind.get_process_id()) if count > 1 else None
        except Exception as e:
            raise UserError(
                f"this looks like a job of several processes ({name}), but its environment cannot be read: "
                f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}\n"
                "give --coordinator_address, --num_processes and --process_id, or --num_processes=1 to run alone"
            ) from e
    return None


def _sensible(kind: Any, environment: Mapping[str, str]) -> bool:
    """Whether a cluster of this kind can be meant at all."""
    if "Tpu" in kind.__name__:
        platforms = environment.get("JAX_PLATFORMS", "").split(",")
        return platforms == [""] or "tpu" in platforms
    if kind.name == "slurm":
        # An interactive step (`salloc`) has one task, whatever number was allocated.
        return environment.get("SLURM_STEP_NUM_TASKS", "") != "1"
    if kind.__name__ == "K8sCluster":
        return "JOB_COMPLETION_INDEX" in environment  # jax needs an indexed Job; any other pod is alone
    return True
