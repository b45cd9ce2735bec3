"""What an implementation of attention is, and the one place where its gradient is declared.

Shapes: B batch, T queries, S keys, N query heads, K key-value heads, H head dim.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from lm_jax.kernels.flash_attention.bias import DistanceTable, PositionBias, Slopes
from lm_jax.kernels.flash_attention.mask import AttentionMask

Array = jax.Array
ATTENDED = "attention"  # the name by which remat policies know what comes out of here


class Call(NamedTuple):
    """One call of attention on one device, checked; see `flash_attention` for what the fields mean."""

    q_BTNH: Array
    k_BSKH: Array
    v_BSKH: Array
    mask: AttentionMask
    scale: float
    soft_cap: float | None = None
    position_bias: PositionBias | None = None
    sinks_N: Array | None = None
    return_lse: bool = True

    @property
    def group(self) -> int:
        """Query heads that share a key head."""
        return self.q_BTNH.shape[2] // self.k_BSKH.shape[2]


class Gradients(NamedTuple):
    """In the shapes and dtypes of what they are the gradients of; of the bias, of its one array."""

    q_BTNH: Array
    k_BSKH: Array
    v_BSKH: Array
    position_bias: Array | None = None
    sinks_N: Array | None = None


class Implementation(NamedTuple):
    """One way to compute attention.

    Attributes:
      name: what `flash_attention(implementation=...)` calls it.
      refuses: why it cannot serve a call (a phrase that ends a sentence), or None.
      attend: `call -> (out_BTNH in the dtype of the queries, lse_BTN float32)`, differentiable. `lse` is the logarithm
        of the sum of the exponentials of the scores a query sees, the sink's among them; -inf where it sees nothing.
        None may stand for it where the call does not want it.
      forward, backward: what `attend` is made of (see `with_gradient`), for who puts an outcome together of parts of
        the keys. `backward` is then given the `out`, `lse` and gradients of the whole, and None for what `forward`
        saved. None: it cannot serve as a part.
    """

    name: str
    refuses: Callable[[Call], str | None]
    attend: Callable[[Call], tuple[Array, Array | None]]
    forward: Callable[[Call], tuple[Array, Array, Any]] | None = None
    backward: Callable[[Call, Array, Array, Any, Array, Array], Gradients] | None = None


class Operands(NamedTuple):
    """The arrays of a call: what gradients are taken of, and what the mask holds by the names of its fields."""

    q_BTNH: Array
    k_BSKH: Array
    v_BSKH: Array
    position_bias: Array | None
    sinks_N: Array | None
    mask: dict[str, Any]


class Statics(NamedTuple):
    """What of a call is known when it is traced, hashable."""

    mask: AttentionMask  # its arrays taken out
    scale: float
    soft_cap: float | None
    bias: tuple[Any, ...] | None  # the class, and for a table its first distance
    return_lse: bool

    def join(self, a: Operands) -> Call:
        """The call again."""
        bias = None if self.bias is None else self.bias[0](a.position_bias, *self.bias[1:])
        arrays: dict[str, Any] = a.mask
        mask = dataclasses.replace(self.mask, **arrays)
        return Call(a.q_BTNH, a.k_BSKH, a.v_BSKH, mask, self.scale, self.soft_cap, bias, a.sinks_N, self.return_lse)


def split(call: Call) -> tuple[Statics, Operands]:
    """A call as what is known and what is traced."""
    fields = {f.name: getattr(call.mask, f.name) for f in dataclasses.fields(call.mask)}
    arrays: dict[str, Any] = {name: x for name, x in fields.items() if isinstance(x, jax.Array | np.ndarray)}
    nothing: dict[str, Any] = dict.fromkeys(arrays)
    mask = dataclasses.replace(call.mask, **nothing)
    kind: tuple[Any, ...] | None = None
    bias = None
    if isinstance(call.position_bias, DistanceTable):
        kind, bias = (DistanceTable, call.position_bias.first), call.position_bias.table_NR
    elif isinstance(call.position_bias, Slopes):
        kind, bias = (Slopes,), call.position_bias.slopes_N
    operands = Operands(call.q_BTNH, call.k_BSKH, call.v_BSKH, bias, call.sinks_N, arrays)
    return Statics(mask, call.scale, call.soft_cap, kind, call.return_lse), operands


Forward = Callable[[Call], tuple[Array, Array, Any]]
Backward = Callable[[Call, Array, Array, Any, Array, Array], Gradients]


def with_gradient(forward: Forward, backward: Backward) -> Callable[[Call], tuple[Array, Array]]:
    """`attend` out of two functions.

    Each is a jit of its own, so that it is compiled once for a call's shapes and for what of it is known when tracing,
    also where the caller has no jit: a loop outside of every jit is compiled anew whenever it runs. Inside of a jit
    nothing is left of these.

    Args:
      forward: `call -> out, lse, saved`. Out and lse are named `ATTENDED`: a remat policy that keeps them spares the
        backward pass this function, unless it reads what else was saved.
      backward: `(call, out, lse, saved, d_out, d_lse) -> Gradients`, `saved` being what forward gave.
    """

    @functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
    def run(statics: Statics, operands: Operands) -> tuple[Array, Array]:
        return run_alone(statics, operands)

    @functools.partial(jax.jit, static_argnums=0, inline=True)
    def run_alone(statics: Statics, operands: Operands) -> tuple[Array, Array]:
        out, lse, _ = forward(statics.join(operands))
        return out, lse

    @functools.partial(jax.jit, static_argnums=0, inline=True)
    def run_forward(statics: Statics, operands: Operands) -> Any:
        out, lse, saved = forward(statics.join(operands))
        # Named here, and not by who calls: only here is the lse that the backward pass reads.
        out, lse = checkpoint_name(out, ATTENDED), checkpoint_name(lse, ATTENDED)
        return (out, lse), (operands, out, lse, saved)

    @functools.partial(jax.jit, static_argnums=0, inline=True)
    def run_backward(statics: Statics, kept: Any, g: tuple[Array, Array]) -> tuple[Operands]:
        operands, out, lse, saved = kept
        d_out, d_lse = g
        # Of the -inf of a query that sees nothing there is no gradient, though merging parts may send NaN for it.
        d_lse = jnp.where(lse == -jnp.inf, 0, d_lse)
        grads = backward(statics.join(operands), out, lse, saved, d_out, d_lse)
        return (Operands(*grads, mask=dict.fromkeys(operands.mask)),)

    run.defvjp(run_forward, run_backward)
    return lambda call: run(*split(call))


def accumulator(*arrays: Array) -> Any:
    """The dtype of sums: float32, or float64 where an argument has it."""
    return functools.reduce(jnp.promote_types, (a.dtype for a in arrays), jnp.dtype(jnp.float32))
