"""What may see what, as a description and never as a `T x S` array.

Every implementation, the block schedule and the cost model read the same description. Integers in it stay Python
integers and are known when a program is traced; arrays may be traced.

Shapes: B batch, T queries, S keys.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Strided:
    """The strided pattern of sparse transformers (Child et al. 2019, arXiv:1904.10509), in blocks of positions.

    A query in block `i` sees key block `j` where `|i - j| < local`, or `i - j` is a multiple of `stride`.
    """

    block: int = 128
    local: int = 1
    stride: int = 4

    def __post_init__(self) -> None:
        _require_positive(self, "block", "local", "stride")

    def sees(self, i: Any, j: Any) -> Any:
        return (abs(i - j) < self.local) | ((i - j) % self.stride == 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LocalGlobal:
    """Local attention plus global blocks (Beltagy et al. 2020, arXiv:2004.05150; Zaheer et al. 2020, arXiv:2007.14062).

    A query in block `i` sees key block `j` where `|i - j| < local`; the first `global_blocks` are seen by all and see
    all.
    """

    block: int = 128
    local: int = 4
    global_blocks: int = 1

    def __post_init__(self) -> None:
        _require_positive(self, "block", "local", "global_blocks")

    def sees(self, i: Any, j: Any) -> Any:
        return (abs(i - j) < self.local) | (i < self.global_blocks) | (j < self.global_blocks)


Pattern = Strided | LocalGlobal
PATTERNS: dict[str, type[Pattern]] = {"strided": Strided, "local_global": LocalGlobal}


def _require_positive(pattern: Pattern, *names: str) -> None:
    for name in names:
        if getattr(pattern, name) < 1:
            raise ValueError(f"{type(pattern).__name__}.{name} is {getattr(pattern, name)}: use 1 or more")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionMask:
    """Which keys a query sees.

    Query `t` stands at position `q_offset + t`, key `s` at `s`. `causal`, `window` and `pattern` must all allow a key,
    or it stands before `prefix_length`; and in either case it must be there (`kv_length`) and in the same segment.

    Attributes:
      causal: a query sees no key behind its own position.
      window: a query sees keys less than so far away, itself included; None: any distance.
      prefix_length: keys before it are seen by all of the row (Raffel et al. 2020, arXiv:1910.10683); a scalar or
        `[B]`.
      q_segment_ids: `[B, T]` int32; equal ids see each other, 0 is an id like any other, a negative id is padding,
        which sees nothing and gives zeros.
      kv_segment_ids: `[B, S]`; given together with `q_segment_ids`.
      q_offset: where query 0 stands among the keys, a scalar or `[B]`; may be traced.
      kv_length: how many keys there are, a scalar or `[B]`; keys behind are not there. None: all of them.
      pattern: a pattern of blocks of positions, `Strided` or `LocalGlobal`.
    """

    causal: bool = dataclasses.field(default=True, metadata={"static": True})
    window: int | None = dataclasses.field(default=None, metadata={"static": True})
    prefix_length: Array | int | None = None
    q_segment_ids: Array | None = None
    kv_segment_ids: Array | None = None
    q_offset: Array | int = 0
    kv_length: Array | int | None = None
    pattern: Pattern | None = dataclasses.field(default=None, metadata={"static": True})

    def __post_init__(self) -> None:
        if (self.q_segment_ids is None) != (self.kv_segment_ids is None):
            raise ValueError("q_segment_ids and kv_segment_ids go together: one of them is missing")
        if self.window is not None and self.window < 1:
            raise ValueError(f"window is {self.window}: a query sees at least itself, so use 1 or more, or None")

    def by_position(self, q: Any, k: Any) -> Any:
        """Whether `causal`, `window` and `pattern` let a query at position `q` see a key at `k`; both broadcast."""
        see = q == q + k * 0  # True, in the shape of both
        if self.causal:
            see &= k <= q
        if self.window is not None:
            see &= abs(q - k) < self.window
        if self.pattern is not None:
            see &= self.pattern.sees(q // self.pattern.block, k // self.pattern.block)
        return see

    def allowed(self, T: int, S: int, first_query: Any = 0, first_key: Any = 0) -> Array:
        """`[B or 1, T, S]`, True where a query sees a key: of the whole, or of a block of `T x S` that starts at
        `first_query, first_key` (which may be traced)."""
        t, k = first_query + jnp.arange(T), first_key + jnp.arange(S)
        q = per_row(self.q_offset) + t[:, None]
        see = self.by_position(q, k)
        if self.prefix_length is not None:
            see |= k < per_row(self.prefix_length)
        if self.kv_length is not None:
            see &= k < per_row(self.kv_length)
        if self.q_segment_ids is not None and self.kv_segment_ids is not None:
            q_ids = jax.lax.dynamic_slice_in_dim(self.q_segment_ids, first_query, T, 1)[:, :, None]
            k_ids = jax.lax.dynamic_slice_in_dim(self.kv_segment_ids, first_key, S, 1)[:, None, :]
            see = see & (q_ids == k_ids) & (q_ids >= 0)
        return see


def per_row(x: Any) -> Any:
    """A scalar or `[B]` as `[1 or B, 1, 1]`."""
    return jnp.reshape(jnp.asarray(x), (-1, 1, 1))
