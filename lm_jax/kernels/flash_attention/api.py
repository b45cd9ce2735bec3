"""One function for attention: checks a call, lays it over the mesh, and chooses who computes it.

Shapes: B batch, T queries, S keys, N query heads, K key-value heads, H head dim.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from lm_jax.kernels.flash_attention import cudnn, pallas_tpu, reference, xla
from lm_jax.kernels.flash_attention.bias import DistanceTable, PositionBias, Slopes
from lm_jax.kernels.flash_attention.implementation import Call, Implementation, Operands, Statics, split
from lm_jax.kernels.flash_attention.mask import AttentionMask
from lm_jax.sharding import axis_size, on_each_device, on_one_device, part_index, platform

Array = jax.Array

IMPLEMENTATIONS: dict[str, Implementation] = {
    i.name: i for i in (reference.IMPLEMENTATION, xla.IMPLEMENTATION, pallas_tpu.IMPLEMENTATION, cudnn.IMPLEMENTATION)
}
# Which are tried by default on a platform, the first that can serve a call taking it.
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

    Returns:
      `[B, T, N, H]` in the dtype of the queries, zeros for a query that sees nothing. With `return_lse`, also
      `[B, T, N]` in float32, `log(sum(exp(scores)))`, the sink among them, -inf where there is nothing: results over
      parts of the keys can be merged exactly with it, and it is differentiable.

    Raises:
      ValueError: for shapes, dtypes, head counts and parts of the mask that do not fit each other, and for a named
        implementation that cannot serve the call.
    """
    scale = q_BTNH.shape[-1] ** -0.5 if scale is None else float(scale)
    soft_cap = None if soft_cap is None else float(soft_cap)
    call = Call(q_BTNH, k_BSKH, v_BSKH, _with_integers(mask), scale, soft_cap, position_bias, sinks_N, return_lse)
    check(call)
    call = call._replace(mask=_in_int32(call.mask))
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation is {implementation!r}: use one of {', '.join(IMPLEMENTATIONS)}, or None")
    return _on_the_mesh(call, implementation)


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


def _on_the_mesh(call: Call, name: str | None) -> Any:
    """Each device computes its own rows, heads and queries; keys are whole in length."""
    if on_one_device():
        return _answer(call, name)
    return _each_part(*split(call), name)


@functools.partial(jax.jit, static_argnums=(0, 2), inline=True)
def _each_part(statics: Statics, operands: Operands, name: str | None) -> Any:
    """Compiled once for the same call, as each implementation is, also where the caller has no jit."""
    queries_are_split = axis_size("sequence") > 1

    def one_device(a: Operands) -> Any:
        here = statics.join(a)
        if queries_are_split:
            first = part_index("length") * a.q_BTNH.shape[1]
            here = here._replace(mask=dataclasses.replace(here.mask, q_offset=here.mask.q_offset + first))
        return _answer(here, name)

    rows = ("batch", "length", "heads")
    out = (*rows, "head_dim")
    return on_each_device(
        one_device, (operands,), (_names(statics, operands),), (out, rows) if statics.return_lse else out
    )


def _answer(call: Call, name: str | None) -> Any:
    out, lse = choose(call, name).attend(call)
    return (out, lse) if call.return_lse else out


def _names(statics: Statics, a: Operands) -> Any:
    """`Operands` with the logical names of every array's dimensions."""
    keys: Any = ("batch", "key_length", "kv_heads", "head_dim")
    queries: Any = ("batch", "length", "heads", "head_dim")
    of_mask: dict[str, Any] = {name: ("batch",) * x.ndim for name, x in a.mask.items()}
    for name, length in (("q_segment_ids", "length"), ("kv_segment_ids", "key_length")):
        if name in a.mask:
            of_mask[name] = ("batch", length)
    bias: Any = None if statics.bias is None else ("heads",) if statics.bias[0] is Slopes else ("heads", None)
    sinks: Any = None if a.sinks_N is None else ("heads",)
    return Operands(queries, keys, keys, bias, sinks, of_mask)
