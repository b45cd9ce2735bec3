"""For a process with eight devices: the layouts that the tests go through, and arrays on them."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from lm_jax.models.transformer import TransformerConfig, transformer_specs
from lm_jax.params import Tree
from lm_jax.sharding import MeshConfig, abstract, make_mesh, partition

ONE = MeshConfig(data=1)
PLAIN = [
    MeshConfig(data=8),
    MeshConfig(data=2, fsdp=2, tensor=2),
    MeshConfig(data=1, fsdp=2, sequence=2, tensor=2),
]
EIGHT = [MeshConfig(data=1, sequence=8), MeshConfig(data=1, tensor=8)]
SOME = [
    *PLAIN,
    MeshConfig(data=1, fsdp=2, sequence=2, tensor=2, zero=2, context="ring", split_residual=True),
    MeshConfig(data=2, sequence=2, tensor=2, context="all_to_all"),
]
OTHERS = [
    MeshConfig(data=2, fsdp=4, zero=1),
    MeshConfig(data=2, fsdp=4, zero=2),
    MeshConfig(data=1, fsdp=2, tensor=4, split_residual=True),
    MeshConfig(data=1, fsdp=2, sequence=4, context="ring"),
    MeshConfig(data=1, sequence=4, tensor=2, context="all_to_all", split_residual=True),
    MeshConfig(data=1, sequence=8, context="ring"),
    MeshConfig(data=2, sequence=2, tensor=2, context="ring", split_residual=True),
    MeshConfig(data=2, fsdp=2, sequence=2, context="all_to_all", zero=1),
    MeshConfig(data=1, fsdp=2, sequence=2, tensor=2, zero=1, split_residual=True),
    MeshConfig(data=1, fsdp=2, sequence=2, tensor=2, zero=2, offload_optimizer=True),
    MeshConfig(data=1, fsdp=8),
    *EIGHT,
    MeshConfig(data=2, fsdp=4),
    MeshConfig(data=4, sequence=2),
    MeshConfig(data=2, tensor=4),
    MeshConfig(data=1, fsdp=4, sequence=2),
    MeshConfig(data=1, fsdp=2, tensor=4),
    MeshConfig(data=1, sequence=4, tensor=2),
]


def mesh_of(config: MeshConfig) -> Mesh:
    """The mesh; on the first device alone for `ONE`."""
    return make_mesh(config, jax.devices()[: 1 if config == ONE else 8])


def place_params(params: Tree, c: TransformerConfig, mesh: Mesh) -> Tree:
    return jax.tree.map(lambda a, s: jax.device_put(a, s.sharding), params, abstract(transformer_specs(c), mesh))


def place_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    return {name: jax.device_put(a, NamedSharding(mesh, partition("batch", "length"))) for name, a in batch.items()}


def relative(a: Any, b: Any) -> float:
    """The norm of the difference over the norm."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))
