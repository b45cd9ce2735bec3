"""Compiling for a TPU that is not there: `libtpu` has the compiler, and a topology's name stands for the chips."""

from __future__ import annotations

import os

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from lm_jax.sharding import AXES

CHIPS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}


def chips(topology: str, slices: int = 1) -> list[jax.Device]:
    """The chips of a topology such as `v5e:4x4`, to lower and compile for."""
    os.environ |= {
        "TPU_SKIP_MDS_QUERY": "1",  # do not ask the network what machine this is
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # processes that only compile do not share a chip
    }
    return list(topologies.get_topology_desc(platform="tpu", topology_name=topology, num_slices=slices).devices)


def mesh_of_chips(topology: str, sizes: tuple[int, int, int, int] = (1, 1, 1, 1)) -> Mesh:
    """A mesh over the first chips of a topology."""
    placed = np.array(chips(topology)[: int(np.prod(sizes))]).reshape(sizes)
    return Mesh(placed, AXES, axis_types=(AxisType.Explicit,) * len(AXES))
