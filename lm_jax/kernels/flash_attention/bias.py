"""What is added to the scores by distance, as a description and never as a `T x S` array.

Shapes: N query heads, R entries of a table.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slopes:
    """`-slopes_N[n] * |q - k|` for a query at position `q` and a key at `k` (ALiBi; Press et al. 2022,
    arXiv:2108.12409)."""

    slopes_N: Array

    def of(self, q: Any, k: Any) -> Array:
        """`[N, ...]`, float32 or wider, for positions that broadcast against each other."""
        slopes = self.slopes_N.astype(jnp.promote_types(self.slopes_N.dtype, jnp.float32))
        distance = abs(q - k)
        return -jnp.reshape(slopes, (-1,) + (1,) * distance.ndim) * distance


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DistanceTable:
    """`table_NR[n, q - k - first]`, the index cut to the table's ends: any bias that depends on distance alone.

    Buckets (T5; Raffel et al. 2020, arXiv:1910.10683), kernels (KERPLE; Chi et al. 2022, arXiv:2205.09921) and
    Sandwich (Chi et al. 2023, arXiv:2212.10356) are functions that make such a table; its gradient flows on to what
    they learn.

    Attributes:
      table_NR: an entry a query head and distance.
      first: the distance `q - k` of entry 0; negative where queries see keys behind them.
    """

    table_NR: Array
    first: int = dataclasses.field(default=0, metadata={"static": True})

    def of(self, q: Any, k: Any) -> Array:
        """`[N, ...]`, float32 or wider, for positions that broadcast against each other."""
        table = self.table_NR.astype(jnp.promote_types(self.table_NR.dtype, jnp.float32))
        return table[:, jnp.clip(q - k - self.first, 0, table.shape[1] - 1)]


PositionBias = Slopes | DistanceTable
