"""One function for attention: checks a call, lays it over the mesh, and chooses who computes it.

Shapes: B batch, T queries, S keys, N query heads, K key-value heads, H head dim.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from lm_jax.kernels.flash_attention import cudnn, pallas_gpu, pallas_tpu, reference, ring, xla
from lm_jax.kernels.flash_attention.bias import DistanceTable, PositionBias, Slopes
from lm_jax.kernels.flash_attention.implementation import Call, Implementation, Operands, Statics, split
from lm_jax.kernels.flash_attention.mask import AttentionMask
from lm_jax.sharding import (
    CONTEXTS,
    axis_size,
    constrain,
    merge_dims,
    on_each_device,
    on_one_device,
    part_index,
    platform,
    split_dim,
)

Array = jax.Array

IMPLEMENTATIONS: dict[str, Implementation] = {
    known.name: known
    for known in (
        reference.IMPLEMENTATION,
        xla.IMPLEMENTATION,
        pallas_tpu.IMPLEMENTATION,
        pallas_gpu.IMPLEMENTATION,
        pallas_gpu.DETERMINISTIC,
        cudnn.IMPLEMENTATION,
    )
}
# Which are tried by default on a platform, the first that can serve a call taking it. `pallas_gpu` is in no order: it
# has not run on a chip yet, and so it computes only what names it.
DEFAULTS = {"tpu": ("pallas_tpu", "xla"), "gpu": ("cudnn", "xla")}
_ELSEWHERE = ("xla",)
_FLOATS = (jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64)


def flash_attention(
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKH: Array,
    *,
    mask: AttentionMask,
    scale: float | None = None,
    soft_cap: float | None = None,
    position_bias: PositionBias | None = None,
    sinks_N: Array | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
    context: str = "gather",
) -> Any:
    """`softmax(soft_cap * tanh(q k^T * scale / soft_cap) + bias) v` over the keys that the mask lets a query see.

    (Vaswani et al. 2017, arXiv:1706.03762; in blocks, without the scores in memory: Dao et al. 2022, arXiv:2205.14135;
    grouped heads: Ainslie et al. 2023, arXiv:2305.13245: query head `n` reads key head `n // (N / K)`; soft cap: Gemma
    2, arXiv:2408.00118; sinks: Xiao et al. 2023, arXiv:2309.17453.) Sums are in float32, float64 for float64 arguments.

    On a mesh, rows are split over `batch`, heads over `heads` and queries over `length`; each device computes its own.

    Args:
      q_BTNH: queries; k_BSKH, v_BSKH: keys and values; all of one floating dtype.
      mask: what may see what.
      scale: of the scores; `H ** -0.5` if None.
      soft_cap: bounds the scores, before a bias is added; None: they are not bounded.
      position_bias: what is added by distance, `Slopes` or `DistanceTable`.
      sinks_N: a logit a head that takes its share of the softmax and gives nothing.
      return_lse: whether to give the logarithm of the softmax's denominator as well.
      implementation: one of `IMPLEMENTATIONS`; None: the first that can serve the call on this platform.
      context: how devices that share the length (mesh axis `sequence`) come to see all of it. `gather`: each gets all
        keys and values. `ring`: those of one device at a time (Liu et al. 2023, arXiv:2310.01889); what stands along
        the length must stand in `ring.ring_order`. `all_to_all`: each gets the whole length of some of the heads
        (Jacobs et al. 2023, arXiv:2309.14509).

    Returns:
      `[B, T, N, H]` in the dtype of the queries, zeros for a query that sees nothing. With `return_lse`, also
      `[B, T, N]` in float32, `log(sum(exp(scores)))`, the sink among them, -inf where there is nothing: results over
      parts of the keys can be merged exactly with it, and it is differentiable.

    Raises:
      ValueError: for shapes, dtypes, head counts and parts of the mask that do not fit each other, and for a named
        implementation or context that cannot serve the call.
    """
    _require(context in CONTEXTS, f"context is {context!r}: use one of {', '.join(CONTEXTS)}")
    scale = q_BTNH.shape[-1] ** -0.5 if scale is None else float(scale)
    soft_cap = None if soft_cap is None else float(soft_cap)
    call = Call(q_BTNH, k_BSKH, v_BSKH, _with_integers(mask), scale, soft_cap, position_bias, sinks_N, return_lse)
    check(call)
    call = call._replace(mask=_in_int32(call.mask))
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation is {implementation!r}: use one of {', '.join(IMPLEMENTATIONS)}, or None")
    return _on_the_mesh(call, implementation, context)


# --- the checks ------------------------------------------------------------------------------------------------------


def check(call: Call) -> None:
    """Raises ValueError where arguments do not fit each other, naming argument, value and rule."""
    q, k, v = call.q_BTNH, call.k_BSKH, call.v_BSKH
    for name, a in (("q_BTNH", q), ("k_BSKH", k), ("v_BSKH", v)):
        _require(a.ndim == 4, f"{name} has shape {a.shape}: it must have 4 dimensions, {', '.join(name[2:])}")
        _require(a.dtype in _FLOATS, f"{name} is {a.dtype}: use one of {', '.join(jnp.dtype(d).name for d in _FLOATS)}")
        _require(a.dtype == q.dtype, f"{name} is {a.dtype} and q_BTNH is {q.dtype}: they must be of one dtype")
        _require(0 not in a.shape, f"{name} has shape {a.shape}: no dimension may be 0")
    _require(k.shape == v.shape, f"k_BSKH has shape {k.shape} and v_BSKH {v.shape}: they must be the same")
    _require(k.shape[0] == q.shape[0], f"k_BSKH has {k.shape[0]} rows and q_BTNH {q.shape[0]}: they must be the same")
    _require(k.shape[3] == q.shape[3], f"k_BSKH has head dim {k.shape[3]} and q_BTNH {q.shape[3]}: they must be equal")
    N, K = q.shape[2], k.shape[2]
    _require(N % K == 0, f"k_BSKH has {K} heads, which {N} query heads of q_BTNH cannot share evenly")
    _require(np.isfinite(call.scale), f"scale is {call.scale}: it must be finite")
    cap = call.soft_cap
    _require(cap is None or 0 < cap < np.inf, f"soft_cap is {cap}: it must be above 0 and finite, or None")
    _check_heads("sinks_N", call.sinks_N, (N,))
    if isinstance(call.position_bias, DistanceTable):
        table = call.position_bias.table_NR
        _check_heads("position_bias.table_NR", table, (N, *table.shape[1:2]))
        _require(table.shape[1] > 0, f"position_bias.table_NR has shape {table.shape}: it needs an entry at least")
    elif isinstance(call.position_bias, Slopes):
        _check_heads("position_bias.slopes_N", call.position_bias.slopes_N, (N,))
    elif call.position_bias is not None:
        raise ValueError(f"position_bias is a {type(call.position_bias).__name__}: use Slopes or DistanceTable")
    _check_mask(call.mask, q.shape[0], q.shape[1], k.shape[1])


def _check_heads(name: str, a: Array | None, shape: tuple[int, ...]) -> None:
    if a is not None:
        _require(a.shape == shape, f"{name} has shape {a.shape}: with these query heads it must be {shape}")
        _require(a.dtype in _FLOATS, f"{name} is {a.dtype}: it must be floating")


def _check_mask(mask: AttentionMask, B: int, T: int, S: int) -> None:
    for name in ("window", "prefix_length", "q_offset", "kv_length"):
        x = getattr(mask, name)
        right = x is None or type(x) is int or (name != "window" and hasattr(x, "shape"))
        _require(right, f"mask.{name} is {x!r}: use an integer" + ("" if name == "window" else " or an array of them"))
    for name, length in (("q_segment_ids", T), ("kv_segment_ids", S)):
        ids = getattr(mask, name)
        if ids is not None:
            _require(ids.shape == (B, length), f"mask.{name} has shape {ids.shape}: it must be {(B, length)}")
            _require(jnp.issubdtype(ids.dtype, jnp.signedinteger), f"mask.{name} is {ids.dtype}: use int32")
    for name in ("prefix_length", "q_offset", "kv_length"):
        x = getattr(mask, name)
        if isinstance(x, int):
            _require(x >= 0, f"mask.{name} is {x}: it counts positions, so use 0 or more")
        elif x is not None:
            _require(x.shape in ((), (B,)), f"mask.{name} has shape {x.shape}: it must be a scalar or {(B,)}")
            _require(jnp.issubdtype(x.dtype, jnp.integer), f"mask.{name} is {x.dtype}: it must be an integer")


def _in_int32(mask: AttentionMask) -> AttentionMask:
    """Positions are compared with lengths, which a smaller dtype may not hold."""
    return jax.tree.map(lambda x: x if isinstance(x, int) else x.astype(jnp.int32), mask)


def _require(ok: Any, message: str) -> None:
    if not ok:
        raise ValueError(f"flash_attention: {message}")


def _with_integers(mask: AttentionMask) -> AttentionMask:
    """Numbers of numpy as Python's, which a program's trace knows; arrays of numpy as JAX's."""

    def one(x: Any) -> Any:
        if isinstance(x, np.integer) or (isinstance(x, np.ndarray) and x.ndim == 0):
            return int(x)
        return jnp.asarray(x) if isinstance(x, np.ndarray) else x

    return jax.tree.map(one, mask)


# --- who computes it -------------------------------------------------------------------------------------------------


def choose(call: Call, name: str | None) -> Implementation:
    """The implementation of that name, or the default of the platform; logs once what serves such calls and why.

    Raises:
      ValueError: where the named one refuses the call.
    """
    if name is not None:
        why = IMPLEMENTATIONS[name].refuses(call)
        _require(why is None, f"implementation {name!r} cannot serve this call: {why}")
        return IMPLEMENTATIONS[name]
    reasons = []
    for candidate in DEFAULTS.get(platform(), _ELSEWHERE):
        why = IMPLEMENTATIONS[candidate].refuses(call)
        if why is None:
            break
        reasons.append(f"{candidate} cannot: {why}")
    _tell(platform(), candidate, tuple(reasons))
    return IMPLEMENTATIONS[candidate]


@functools.cache
def _tell(where: str, name: str, reasons: tuple[str, ...]) -> None:
    """Once for every choice and its reasons."""
    because = "; ".join(reasons) or "the first choice there"
    logging.info("Attention on %s is computed by %s (%s).", where, name, because)


# --- over the mesh ---------------------------------------------------------------------------------------------------


def _on_the_mesh(call: Call, name: str | None, context: str) -> Any:
    """Each device computes its own rows, heads and queries; who sees which keys is `context`'s business."""
    if on_one_device():
        return _answer(call, name)
    return _each_part(*split(call), name, context)


@functools.partial(jax.jit, static_argnums=(0, 2, 3), inline=True)
def _each_part(statics: Statics, operands: Operands, name: str | None, context: str) -> Any:
    """Compiled once for the same call, as each implementation is, also where the caller has no jit."""
    call = statics.join(operands)
    if axis_size("sequence") > 1 and context == "ring":
        return _in_a_ring(call, name)
    if axis_size("sequence") > 1 and context == "all_to_all":
        return _over_more_heads(call, name)
    queries_are_split = axis_size("sequence") > 1

    def one_device(a: Operands) -> Any:
        here = statics.join(a)
        if queries_are_split:
            first = part_index("length") * a.q_BTNH.shape[1]
            here = here._replace(mask=dataclasses.replace(here.mask, q_offset=here.mask.q_offset + first))
        return _answer(here, name)

    return _on_each_device(one_device, call, ("length", "key_length", "heads", "kv_heads"))


def _in_a_ring(call: Call, name: str | None) -> Any:
    """Queries and keys split over `length`."""
    why = ring.refuses(call, axis_size("sequence"))
    _require(why is None, f"context 'ring' cannot serve this call: {why}")
    statics, _ = split(call)

    def one_device(a: Operands) -> Any:
        here = statics.join(a)
        # Parts are merged by their log-sum-exp, so who computes them must give it.
        out, lse = ring.attend(choose(here._replace(return_lse=True), name))(here)
        return (out, lse) if call.return_lse else out

    return _on_each_device(one_device, call, ("length", "length", "heads", "kv_heads"))


def _over_more_heads(call: Call, name: str | None) -> Any:
    """The length whole, and heads split over `sequence` as well; the outcome goes back to where the queries were."""
    N, K, tensor, sequence = call.q_BTNH.shape[2], call.k_BSKH.shape[2], axis_size("tensor"), axis_size("sequence")
    devices = tensor * sequence
    if N % devices:
        near = min((d for d in range(1, N + 1) if N % (tensor * d) == 0), key=lambda d: abs(d - sequence), default=None)
        advice = f"use {near * devices // sequence} of them (mesh.sequence={near})" if near else "change mesh.tensor"
        what = f"tensor={tensor} x sequence={sequence} = {devices} devices"
        _require(
            False, f"context 'all_to_all' cannot share {N} query heads of q_BTNH among {what}: {advice}, or 'ring'"
        )
    # As few copies of a key head as give each device whole ones; a copy serves fewer query heads.
    copies = next(c for c in range(1, N // K + 1) if call.group % c == 0 and K * c % devices == 0)
    k, v = (_repeated(x, copies) for x in (call.k_BSKH, call.v_BSKH))
    call = call._replace(k_BSKH=k, v_BSKH=v)
    statics, _ = split(call)
    layout = "key_length", "key_length", "context_heads", "context_kv_heads"
    result = _on_each_device(lambda a: _answer(statics.join(a), name), call, layout)
    names = ("batch", "length", "heads", "head_dim")
    return jax.tree.map(lambda x: constrain(x, *names[: x.ndim]), result)


def _repeated(x_BSKH: Array, copies: int) -> Array:
    if copies == 1:
        return x_BSKH
    x = split_dim(constrain(x_BSKH, "batch", "length", "kv_heads", "head_dim"), 2, x_BSKH.shape[2], 1)
    shape = (*x.shape[:3], copies, x.shape[4])
    return merge_dims(jnp.broadcast_to(x, shape, out_sharding=jax.typeof(x).sharding), 2)


def _on_each_device(f: Callable[[Operands], Any], call: Call, layout: tuple[str, str, str, str]) -> Any:
    """`f` of each device's operands.

    Args:
      f: gives `out`, and `lse` where the call wants it.
      layout: the logical names of queries' and keys' length and heads.
    """
    length, key_length, heads, kv_heads = layout
    statics, operands = split(call)
    queries: Any = ("batch", length, heads, "head_dim")
    keys: Any = ("batch", key_length, kv_heads, "head_dim")
    of_mask: dict[str, Any] = {name: ("batch",) * x.ndim for name, x in operands.mask.items()}
    for name, its_length in (("q_segment_ids", length), ("kv_segment_ids", key_length)):
        if name in of_mask:
            of_mask[name] = ("batch", its_length)
    bias: Any = None if statics.bias is None else (heads,) if statics.bias[0] is Slopes else (heads, None)
    sinks: Any = None if operands.sinks_N is None else (heads,)
    names = Operands(queries, keys, keys, bias, sinks, of_mask)
    return on_each_device(f, (operands,), (names,), (queries, queries[:3]) if call.return_lse else queries)


def _answer(call: Call, name: str | None) -> Any:
    out, lse = choose(call, name).attend(call)
    return (out, lse) if call.return_lse else out
