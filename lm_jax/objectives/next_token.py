"""Next-token prediction.

Shapes: B batch, T length.
"""

from typing import Any

import jax
import jax.numpy as jnp

from lm_jax.kernels.cross_entropy import cross_entropy
from lm_jax.models.transformer import TransformerConfig, columns, hidden, output_weight
from lm_jax.objectives.objective import Objective, Terms
from lm_jax.sharding import LAYOUT, Layout, ordered

Array = jax.Array
Batch = dict[str, Array]


def next_token(c: TransformerConfig, *, z_loss: float = 0.0, remat: str = "none", layout: Layout = LAYOUT) -> Objective:
    """Mean cross-entropy a counted target, and the z-loss where its weight is above 0.

    A batch has `tokens`, `targets`, `segment_ids`, `positions` (`[B, T]` int32) and `loss_mask` (`[B, T]` bool).
    With None as `segment_ids` each row is one document, and what knows no segments (cuDNN) can compute attention too.
    """
    names = ("cross_entropy", "z_loss") if z_loss else ("cross_entropy",)

    def weights(batch: Batch) -> Terms:
        counted = jnp.sum(batch["loss_mask"], dtype=jnp.float32)
        return dict.fromkeys(names, counted)

    def terms(params: Any, frozen: Any, extra: Any, batch: Batch, key: Array) -> tuple[Terms, Any]:
        del frozen, key
        order = columns(c, layout, batch["tokens"].shape[1])
        if order is not None:  # a loss is a sum over tokens, whatever their order
            batch = {name: ordered(a, 1, order) for name, a in batch.items()}
        x_BTD, _ = hidden(
            params,
            batch["tokens"],
            c=c,
            positions_BT=batch["positions"],
            segment_ids_BT=batch["segment_ids"],
            remat=remat,
            layout=layout,
        )
        sums = cross_entropy(
            x_BTD,
            output_weight(params, c),
            batch["targets"],
            batch["loss_mask"],
            z_loss=z_loss,
            soft_cap=c.logit_soft_cap,
            transposed=c.tied,
        )
        if not z_loss:
            return {"cross_entropy": sums.total}, extra
        z_term = z_loss * sums.log_z_squared  # its gradient comes with the total's
        return {"cross_entropy": sums.total - z_term, "z_loss": z_term}, extra

    return Objective(weights, terms)
