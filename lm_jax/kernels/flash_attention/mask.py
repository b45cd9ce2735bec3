"""What may see what, as a description and never as a `T x S` array.

Shapes: B batch, T queries, S keys.
"""

import dataclasses

import jax
import jax.numpy as jnp

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionMask:
    """Which keys a query sees: those that every part allows.

    Attributes:
      causal: a query sees no key behind its own position.
      q_segment_ids: `[B, T]` int32; equal ids see each other, 0 is an id like any other, a negative id is padding,
        which sees nothing and gives zeros.
      kv_segment_ids: `[B, S]`; given together with `q_segment_ids`.
      q_offset: where query 0 stands among the keys (query `t` stands at `q_offset + t`), a scalar or `[B]`; may be
        traced.
      kv_length: how many keys there are, a scalar or `[B]`; keys behind are not there. None: all of them.
    """

    causal: bool = dataclasses.field(default=True, metadata={"static": True})
    q_segment_ids: Array | None = None
    kv_segment_ids: Array | None = None
    q_offset: Array | int = 0
    kv_length: Array | int | None = None

    def __post_init__(self) -> None:
        if (self.q_segment_ids is None) != (self.kv_segment_ids is None):
            raise ValueError("q_segment_ids and kv_segment_ids go together: one of them is missing")

    def allowed(self, T: int, S: int) -> Array:
        """`[B or 1, T, S]`, True where the query sees the key: what the plain implementation masks with."""
        q_BT1 = jnp.reshape(jnp.asarray(self.q_offset), (-1, 1, 1)) + jnp.arange(T)[:, None]
        k_S = jnp.arange(S)
        allowed = k_S <= q_BT1 if self.causal else jnp.ones((1, T, S), bool)
        if self.kv_length is not None:
            allowed &= k_S < jnp.reshape(jnp.asarray(self.kv_length), (-1, 1, 1))
        if self.q_segment_ids is not None and self.kv_segment_ids is not None:
            q, k = self.q_segment_ids[:, :, None], self.kv_segment_ids[:, None, :]
            allowed = allowed & (q == k) & (q >= 0)
        return allowed
