"""What the TPU kernels share about the mask: its operands, and how it looks on a chunk of scores.

On a chunk, positions stand as a row (along lanes) for the one side and as columns (down sublanes) for the other; all
that depends on the query alone is computed on its small shape, so that a score costs one comparison a bound.

Shapes: B batch, T queries, S keys.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lm_jax.kernels.flash_attention.mask import AttentionMask, Pattern

Array = jax.Array
LANES = 128
VMEM_BYTES = 100 * 2**20  # of a chip's fast memory, that a kernel may take
LOG2E = 1.4426950408889634
Q_OFFSET, PREFIX_LENGTH, KV_LENGTH = range(3)  # the columns of `scalars_B3`


class Parts(NamedTuple):
    """What of a mask is known when a kernel is traced: the rules, and which operands there are."""

    causal: bool
    window: int | None
    pattern: Pattern | None
    prefix: bool
    length: bool
    segments: bool


def parts_of(mask: AttentionMask, padded: bool) -> Parts:
    """`padded`: keys were added behind the last one, which `kv_length` must hide."""
    prefix, length = mask.prefix_length is not None, padded or mask.kv_length is not None
    return Parts(mask.causal, mask.window, mask.pattern, prefix, length, mask.q_segment_ids is not None)


def scalars_B3(mask: AttentionMask, B: int, S: int) -> Array:
    """`[B, 3]` int32: `q_offset`, `prefix_length` and `kv_length` (at most `S`) of each row."""
    prefix = 0 if mask.prefix_length is None else mask.prefix_length
    rows = [
        jnp.broadcast_to(jnp.asarray(x, jnp.int32), (B,)) for x in (mask.q_offset, prefix, _at_most(mask.kv_length, S))
    ]
    return jnp.stack(rows, 1)


def segment_rows(mask: AttentionMask, T: int, S: int) -> tuple[Array, ...]:
    """`[B, 1, T]` and `[B, 1, S]` int32 ids, padded to `T` and `S`, or nothing; two ids are equal only where they see
    each other (padding is -1 among the queries and -2 among the keys)."""
    if mask.q_segment_ids is None or mask.kv_segment_ids is None:
        return ()
    return _id_row(mask.q_segment_ids, T, -1), _id_row(mask.kv_segment_ids, S, -2)


def _id_row(ids_BT: Array, length: int, padding: int) -> Array:
    ids = jnp.where(ids_BT < 0, padding, ids_BT.astype(jnp.int32))
    return jnp.pad(ids, ((0, 0), (0, length - ids.shape[1])), constant_values=padding)[:, None]


class Band(NamedTuple):
    """What a mask lets through by distance, `first <= row - lane <= last` (None: no such end), as a table.

    A chunk of scores takes its mask from the table by loading it where its positions stand, so that a score costs one
    `minimum` (v6e, 16 parts of 256 x 256, causal and window: 2,343 bundles, and 2,467 with comparisons). What lies
    between the ends of a wide band is left out of the table. A score that is not a number shows, seen or not.
    """

    first: int | None
    last: int | None
    rows: int  # of a chunk: what is loaded at once

    @property
    def _inside(self) -> int:
        """The lowest offset from which no score of a chunk is in front of the first distance."""
        assert self.first is not None
        return self.first + LANES - 1

    @property
    def _left_out(self) -> int:
        if self.first is None or self.last is None:
            return 0
        return max(0, self.last - (self._inside + self.rows - 1))

    @property
    def _ends(self) -> tuple[int, int]:
        """The lowest and the highest offset in the table; chunks beyond them look as those do."""
        if self.last is None:
            return self._inside - LANES + 1 - self.rows, self._inside
        last = self.last - self._left_out
        return (last - self.rows + 1 if self.first is None else self.first - self.rows), last + LANES

    def table(self) -> Array:
        """`[offsets and rows, 128]` float32: inf where a row and a lane see each other, and -inf."""
        low, high = self._ends
        distance = low + columns(high - low + self.rows) - row(LANES)
        see = distance == distance
        if self.first is not None:
            see &= distance >= self.first
        if self.last is not None:
            see &= distance <= self.last - self._left_out
        return jnp.where(see, jnp.inf, -jnp.inf).astype(jnp.float32)

    def at(self, offset: Any) -> Any:
        """Where in the table a chunk stands, `offset` from its first row to lane 0."""
        low, high = self._ends
        if self._left_out:
            offset = jnp.where(offset <= self._inside, offset, jnp.maximum(offset - self._left_out, self._inside))
        return jnp.clip(offset, low, high) - low


def band_of(parts: Parts, rows: int, keys_down: bool) -> Band | None:
    """For a mask that goes by distance, lengths and ids alone; keys stand down the rows, or queries do."""
    if parts.pattern is not None or parts.prefix or not (parts.causal or parts.window is not None):
        return None
    first = None if parts.window is None else 1 - parts.window
    last = 0 if parts.causal or first is None else -first
    return Band(first, last, rows) if keys_down else Band(-last, None if first is None else -first, rows)


def row(n: int) -> Array:
    """`[1, n]`: consecutive positions from 0, along lanes."""
    return jax.lax.broadcasted_iota(jnp.int32, (1, n), 1)


def columns(m: int) -> Array:
    """`[m, 128]`: consecutive positions from 0, down sublanes, the same in every lane. To be kept in VMEM: loading them
    costs nothing, while the compiler would make them anew for each score."""
    return jax.lax.broadcasted_iota(jnp.int32, (m, LANES), 0)


def row_as_columns(row_1m: Array) -> Array:
    """`[1, m]` in VMEM along lanes -> `[m, 128]`, the same in every lane."""
    return jnp.transpose(jnp.broadcast_to(row_1m, (LANES, row_1m.shape[1])))


def widen(columns_m: Array, n: int) -> Array:
    """`[m, 128]` -> `[m, n]`, the same in every column."""
    return jnp.concatenate([columns_m] * (n // LANES), axis=1)


class Bounds(NamedTuple):
    """The keys that a query sees by position, in the shape of the queries' positions; None where there is no such end.

    Attributes:
      low: the first key, None without a window.
      high: the end of the keys; with a window how many there are from `low`, because both ends are then one comparison
        (v6e, causal and window: 4,335 bundles for eight chunks, and 5,009 with one for each end).
      prefix: with a window or a pattern, the keys before it are seen too.
    """

    low: Any
    high: Any
    prefix: Any


def bounds(parts: Parts, prefix: Any, length: Any, q: Array) -> Bounds:
    """Args: the row's scalars and the positions of queries, all counted from the first key of a chunk."""
    low = None if parts.window is None else q - (parts.window - 1)
    high: Any = None
    if parts.causal:
        high = q + 1
    elif parts.window is not None:
        high = q + parts.window
    simple = low is None and parts.pattern is None  # then the prefix only moves the upper end
    if parts.prefix and simple and high is not None:
        high = jnp.maximum(high, prefix)
    if parts.length:
        high = jnp.full(q.shape, length) if high is None else jnp.minimum(high, length)
        prefix = jnp.minimum(prefix, length)
    if low is not None:
        high = jnp.maximum(high - low, 0)
    return Bounds(low, high, None if simple or not parts.prefix else prefix)


def visible(ends: Bounds, pattern: Array | None, k: Array, ids: tuple[Array, ...] = ()) -> Array | None:
    """Which scores of a chunk count, or None where all do.

    Args:
      pattern: what the pattern of blocks lets through, or None.
      k: positions of the keys, from the first: constants, so that only the small bounds move.
      ids: the segment ids of queries and keys; nothing where there are none.
    """
    see: Array | None = None
    if ends.low is not None:
        see = _unsigned(k - ends.low) < _unsigned(jnp.broadcast_to(ends.high, (k - ends.low).shape))
    elif ends.high is not None:
        see = k < ends.high
    see = _both(see, pattern)
    if ends.prefix is not None:
        assert see is not None
        see |= k < ends.prefix
    return _both(see, ids[0] == ids[1] if ids else None)


def pattern_sees(pattern: Pattern, q: Array, k: Array) -> Array:
    """For positions that broadcast against each other."""
    return pattern.sees(_block_of(q, pattern.block), _block_of(k, pattern.block))


def _block_of(position: Array, block: int) -> Array:
    """`position // block`, rounded down, of which Pallas can lower only the parts without knowing the chip."""
    return jax.lax.div(position - position % block, block)


def _unsigned(x: Array) -> Array:
    return jax.lax.bitcast_convert_type(x, jnp.uint32)


def _both(a: Array | None, b: Array | None) -> Array | None:
    if a is None or b is None:
        return b if a is None else a
    return a & b


def pack(i: Any, j: Any) -> Any:
    """Two indices in one int32: a kernel takes them apart without a division."""
    return (i << 16) | j


def unpack(work: Any) -> tuple[Any, Any]:
    return work >> 16, work & 0xFFFF


def _at_most(length: Array | int | None, S: int) -> Array | int:
    if length is None or isinstance(length, int):
        return S if length is None else min(length, S)
    return jnp.minimum(length, S)
