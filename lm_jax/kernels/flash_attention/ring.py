"""Attention over a length that devices share: keys and values go round a ring of them (Liu et al. 2023,
arXiv:2310.01889).

Each device keeps its queries and computes with one device's keys after the other; the results are merged by their
log-sum-exps. The backward pass goes round once more, with the log-sum-exp of the whole, so it needs no second forward
pass, and what is kept for it does not grow with the number of devices. The next keys are sent before the present ones
are computed with, and the gradients of keys follow them one step behind, so that both moves have a step's time.

Under a causal mask a device with a contiguous piece of the row would have the less to do the earlier its piece stands.
So the row is cut in two chunks a device, and device `i` of `n` holds chunks `i` and `2n - 1 - i` (the order of Llama 3,
arXiv:2407.21783, section 3.3.2; striped, to the same end: Brandon et al. 2023, arXiv:2311.09431): in each step each
device then has two open pairs of chunks to compute. `ring_order` says how positions stand. A window already is equal
work for all, and without a causal mask all see all: there the order stays as it is.

Shapes: B batch, N query heads, K key-value heads, H head dim; T positions, of the whole row in `ring_order` and
`refuses` and of one device elsewhere.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm_jax.kernels.flash_attention.implementation import (
    Call,
    Gradients,
    Implementation,
    accumulator,
    with_gradient,
)
from lm_jax.kernels.flash_attention.mask import AttentionMask
from lm_jax.sharding import axis_size, part_index, send_on

Array = jax.Array


# ------------------------------------------------------------------------------------------------------------ the order


def ring_order(length: int, parts: int, window: int | None = None, causal: bool = True) -> np.ndarray:
    """`[length]`: the position of what stands at each place of a row that `parts` devices share in a ring.

    Tokens, positions, targets and segment ids all go by it: `tokens_BT[:, order]`. It is the plain order where the mask
    has a window or is not causal.

    Raises:
      ValueError: where the length cannot be cut so.
    """
    zigzag = _zigzag(causal, window)
    why = _uneven(length, parts, zigzag)
    if why is not None:
        raise ValueError(f"ring_order: {why}")
    if not zigzag:
        return np.arange(length)
    chunks = np.arange(length).reshape(2 * parts, -1)
    return np.stack([chunks[:parts], chunks[: parts - 1 : -1]], 1).reshape(-1)


def _zigzag(causal: bool, window: int | None) -> bool:
    return causal and window is None


def _uneven(length: int, parts: int, zigzag: bool) -> str | None:
    pieces = 2 * parts if zigzag else parts
    if length % pieces == 0:
        return None
    near = max(1, round(length / pieces)) * pieces
    return f"{parts} devices hold {pieces} chunks, which do not divide a length of {length}: use {near}"


def steps_of(mask: AttentionMask, length: int, parts: int) -> int:
    """How many devices' keys a device computes with: all, or under a causal mask those that its window reaches."""
    if mask.window is None or not mask.causal:
        return parts
    return min(parts, 1 + -(-(mask.window - 1) // (length // parts)))


def refuses(call: Call, parts: int) -> str | None:
    """Why a call cannot go round a ring of so many devices, or None."""
    mask, T, S = call.mask, call.q_BTNH.shape[1], call.k_BSKH.shape[1]
    if T != S:
        return f"queries and keys are the same positions there, and these are {T} and {S}"
    given = {
        "prefix_length": mask.prefix_length is not None,
        "pattern": mask.pattern is not None,
        "kv_length": mask.kv_length is not None,
        "q_offset": not (isinstance(mask.q_offset, int) and mask.q_offset == 0),
    }
    found = [name for name, is_given in given.items() if is_given]
    if found:
        return f"positions stand in an order of its own, and it has no {', no '.join('mask.' + f for f in found)}"
    return _uneven(T, parts, _zigzag(mask.causal, mask.window))


# ------------------------------------------------------------------------------------------------------------- the work


class Span(NamedTuple):
    """Some of a device's positions; the start may be traced."""

    start: Any
    size: int

    def of(self, x_BT: Array) -> Array:
        return jax.lax.dynamic_slice_in_dim(x_BT, self.start, self.size, 1)

    def put(self, x_BT: Array, part_BT: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(x_BT, part_BT.astype(x_BT.dtype), self.start, 1)

    def add(self, x_BT: Array, part_BT: Array) -> Array:
        return self.put(x_BT, self.of(x_BT) + part_BT.astype(x_BT.dtype))


class Part(NamedTuple):
    """One call of an implementation: some queries against some of the keys that are here."""

    queries: Span
    keys: Span
    distance: Any  # from the first of the keys to the first of the queries
    causal: bool
    own: bool  # where the sinks enter: once a query

    @property
    def places(self) -> tuple[Any, Any, Any]:
        return self.queries.start, self.keys.start, self.distance

    def at(self, query: Any, key: Any, distance: Any) -> Part:
        queries, keys = self.queries._replace(start=query), self.keys._replace(start=key)
        return self._replace(queries=queries, keys=keys, distance=distance)


class _Keys(NamedTuple):
    """What travels."""

    k: Array
    v: Array
    ids_BT: Array | None


def parts_of(mask: AttentionMask, T: int, n: int, me: Any, step: Any, by_distance: bool) -> tuple[Part, ...]:
    """What device `me` of `n` computes with the keys that it has in a step.

    Args:
      T: positions a device.
      step: 0 with its own keys (a Python integer then), later with those of the device so many before it.
      by_distance: whether scores depend on how far apart positions are.
    """
    own = isinstance(step, int) and step == 0
    everything, sender = Span(0, T), me if own else (me - step) % n
    if not _zigzag(mask.causal, mask.window):
        return (Part(everything, everything, 0 if own else (me - sender) * T, mask.causal, own),)
    size = T // 2
    early, late = Span(0, size), Span(size, size)
    apart = (2 * n - 1 - me - sender) * size  # from the sender's early chunk to the late one here
    if own and not by_distance:
        return (Part(everything, everything, 0, True, True),)  # who stands before whom is as in a row of these alone
    if own:
        return (
            Part(early, early, 0, True, True),
            Part(late, late, 0, True, True),
            Part(late, early, apart, False, False),
        )
    # All stands before the late chunk here but the sender's late chunk, if the sender stands before this device; then
    # the early chunk here sees the sender's early one instead. One call for both, so that all devices do the same.
    which = Span(jnp.where(sender < me, 0, size), size)
    return Part(late, early, apart, False, False), Part(which, which, abs(me - sender) * size, False, False)


def _each(parts: tuple[Part, ...], compute: Callable[[Part, Any], Any], sums: Any) -> Any:
    """`sums = compute(part, sums)` for every part; as a loop where they differ in their places alone, so that kernels,
    which take long to compile, stand once in the program."""
    first = parts[0]
    if len({(part.queries.size, part.keys.size, part.causal, part.own) for part in parts}) > 1 or len(parts) == 1:
        return functools.reduce(lambda sums, part: compute(part, sums), parts, sums)
    places = [jnp.stack([jnp.asarray(x) for x in xs]) for xs in zip(*(part.places for part in parts), strict=True)]
    return jax.lax.scan(lambda sums, at: (compute(first.at(*at), sums), None), sums, places)[0]


def _call_of(call: Call, keys: _Keys, part: Part) -> Call:
    """A part as a call of its own."""
    mask = call.mask
    by_distance = part.causal or mask.window is not None or call.position_bias is not None
    mask = dataclasses.replace(mask, causal=part.causal, q_offset=part.distance if by_distance else 0)
    if mask.q_segment_ids is not None and keys.ids_BT is not None:
        q_ids, k_ids = part.queries.of(mask.q_segment_ids), part.keys.of(keys.ids_BT)
        mask = dataclasses.replace(mask, q_segment_ids=q_ids, kv_segment_ids=k_ids)
    return call._replace(
        q_BTNH=part.queries.of(call.q_BTNH),
        k_BSKH=part.keys.of(keys.k),
        v_BSKH=part.keys.of(keys.v),
        mask=mask,
        sinks_N=call.sinks_N if part.own else None,
        return_lse=True,
    )


class _Ring(NamedTuple):
    """A device's place, and how far round it goes."""

    call: Call
    n: int
    steps: int
    me: Array

    @classmethod
    def of(cls, call: Call) -> _Ring:
        n, T = axis_size("sequence"), call.q_BTNH.shape[1]
        me = part_index("length")
        missing = tuple(jax.typeof(call.q_BTNH).manual_axis_type.varying - jax.typeof(me).manual_axis_type.varying)
        me = jax.lax.pcast(me, missing, to="varying") if missing else me  # as all that it is computed with
        return cls(call, n, steps_of(call.mask, n * T, n), me)

    def parts(self, step: Any) -> tuple[Part, ...]:
        T, by_distance = self.call.q_BTNH.shape[1], self.call.position_bias is not None
        return parts_of(self.call.mask, T, self.n, self.me, step, by_distance)

    def go(self, compute: Callable[[Any, _Keys, Any], Any], state: Any) -> Any:
        """`state = compute(step, keys, state)` for every step, the next keys being on their way meanwhile."""

        def step(carry: Any, s: Any) -> tuple[Any, None]:
            keys, state = carry
            arriving = send_on(keys, "length")
            return (arriving, compute(s, keys, state)), None

        carry: Any = _Keys(self.call.k_BSKH, self.call.v_BSKH, self.call.mask.kv_segment_ids), state
        if self.steps > 1:
            carry, _ = step(carry, 0)
        if self.steps > 2:
            carry, _ = jax.lax.scan(step, carry, jnp.arange(1, self.steps - 1))
        return compute(self.steps - 1, *carry)


# ------------------------------------------------------------------------------------------------------------ both ways


class Sums(NamedTuple):
    """The outcome over the keys so far."""

    out_BTNH: Array
    lse_BTN: Array

    def merged(self, other: Sums) -> Sums:
        """With that over other keys; zeros and -inf where neither has seen any."""
        highest = jnp.maximum(self.lse_BTN, other.lse_BTN)
        finite = jnp.where(highest == -jnp.inf, 0, highest)
        mine, others = jnp.exp(self.lse_BTN - finite), jnp.exp(other.lse_BTN - finite)
        total = mine + others
        some = total != 0  # a NaN stays one
        inside = jnp.where(some, total, 1)
        out = self.out_BTNH * (mine / inside)[..., None] + other.out_BTNH * (others / inside)[..., None]
        return Sums(out, jnp.where(some, finite + jnp.log(inside), -jnp.inf))


def _forward(implementation: Implementation, call: Call) -> tuple[Array, Array, None]:
    assert implementation.forward is not None
    forward, ring, dtype = implementation.forward, _Ring.of(call), _sums_dtype(call)

    def compute(keys: _Keys, part: Part, sums: Sums) -> Sums:
        out, lse, _ = forward(_call_of(call, keys, part))
        here = Sums(*(part.queries.of(x) for x in sums)).merged(Sums(out.astype(dtype), lse.astype(dtype)))
        return Sums(*(part.queries.put(x, y) for x, y in zip(sums, here, strict=True)))

    def step(s: Any, keys: _Keys, sums: Sums) -> Sums:
        return _each(ring.parts(s), functools.partial(compute, keys), sums)

    nothing = jnp.zeros_like(call.q_BTNH, dtype)
    out, lse = ring.go(step, Sums(nothing, nothing[..., 0] - jnp.inf))
    return out.astype(call.q_BTNH.dtype), lse, None


def _backward(
    implementation: Implementation, call: Call, out: Array, lse: Array, _: None, d_out: Array, d_lse: Array
) -> Gradients:
    assert implementation.backward is not None
    backward, ring, dtype = implementation.backward, _Ring.of(call), _sums_dtype(call)
    of_queries = out, lse, d_out, d_lse

    def compute(keys: _Keys, part: Part, sums: Gradients) -> Gradients:
        out, lse, d_out, d_lse = (part.queries.of(x) for x in of_queries)
        more = backward(_call_of(call, keys, part), out, lse, None, d_out, d_lse)
        return Gradients(
            part.queries.add(sums.q_BTNH, more.q_BTNH),
            part.keys.add(sums.k_BSKH, more.k_BSKH),
            part.keys.add(sums.v_BSKH, more.v_BSKH),
            _sum(sums.position_bias, more.position_bias),
            _sum(sums.sinks_N, more.sinks_N),
        )

    def step(s: Any, keys: _Keys, sums: Gradients) -> Gradients:
        todo = functools.partial(compute, keys)
        if isinstance(s, int) and s == 0:
            return _each(ring.parts(s), todo, sums)
        so_far = sums.k_BSKH, sums.v_BSKH
        dk, dv = send_on(so_far, "length")  # after the keys that they belong to
        # Apart from those that arrive, so that nothing waits for them.
        sums = sums._replace(k_BSKH=jnp.zeros_like(so_far[0]), v_BSKH=jnp.zeros_like(so_far[1]))
        sums = _each(ring.parts(s), todo, sums)
        return sums._replace(k_BSKH=sums.k_BSKH + dk, v_BSKH=sums.v_BSKH + dv)

    # In the order of `Gradients`; a part without sinks has no gradient of them.
    bias = None if call.position_bias is None else jax.tree.leaves(call.position_bias)[0]
    like = Gradients(call.q_BTNH, call.k_BSKH, call.v_BSKH, bias, call.sinks_N)
    sums = ring.go(step, jax.tree.map(lambda x: jnp.zeros_like(x, dtype), like))
    dk, dv = send_on((sums.k_BSKH, sums.v_BSKH), "length", 1 - ring.steps)  # home again
    sums = sums._replace(k_BSKH=dk, v_BSKH=dv)
    return jax.tree.map(lambda sum_, x: sum_.astype(x.dtype), sums, like)


def _sums_dtype(call: Call) -> Any:
    return accumulator(call.q_BTNH, call.k_BSKH, call.v_BSKH)


def _sum(so_far: Array | None, more: Array | None) -> Array | None:
    return so_far if so_far is None or more is None else so_far + more.astype(so_far.dtype)


@functools.cache
def attend(implementation: Implementation) -> Callable[[Call], tuple[Array, Array]]:
    """`call -> out, lse` of a device's own queries, inside `on_each_device`; differentiable. The call's arrays are the
    device's parts along `length`, standing in `ring_order`.

    Args:
      implementation: computes a device's parts; one that has `forward` and `backward`.
    """
    return with_gradient(functools.partial(_forward, implementation), functools.partial(_backward, implementation))
