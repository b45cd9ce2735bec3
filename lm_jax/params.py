"""Parameters, declared once.

A module declares each of its parameters as a `ParamSpec` beside the function that uses it. Everything else that is
known about parameters is derived from that declaration, here: initial values, abstract shapes, counts, weight-decay
masks, roles (which optimizer rule applies), fan-in, and names. A tree of parameters is a nested dict of arrays; its
specs are the same nested dict of `ParamSpec`s.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

Array = jax.Array
Initializer = Callable[[Array, tuple[int, ...], Any], Array]
Tree = Any  # a nested dict of arrays (or of what stands for them)
Role = Literal["embedding", "head", "matrix", "vector"]


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """One parameter.

    Attributes:
      shape: its dimensions.
      axes: one logical name a dimension; `sharding.py` maps names to mesh axes.
      init: `(key, shape, dtype) -> Array`.
      fan_in: the dimensions that a contraction sums over; the others are fan-out. Empty for what is looked up or
        multiplied element by element.
      decay: whether weight decay applies.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    init: Initializer
    fan_in: tuple[int, ...] = (0,)
    decay: bool = True

    def __post_init__(self) -> None:
        if len(self.shape) != len(self.axes):
            raise ValueError(f"a parameter of shape {self.shape} has axes {self.axes}: one name a dimension")
        if any(not 0 <= d < len(self.shape) for d in self.fan_in):
            raise ValueError(f"fan_in {self.fan_in} names a dimension that shape {self.shape} does not have")


# ------------------------------------------------------------------------------------------------------- initial values


def ones(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    del key
    return jnp.ones(shape, dtype)


def zeros(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    del key
    return jnp.zeros(shape, dtype)


@dataclasses.dataclass(frozen=True)
class Normal:
    """A normal distribution of standard deviation `std`."""

    std: float

    def __call__(self, key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
        return (self.std * jax.random.normal(key, shape, jnp.float32)).astype(dtype)


def scaled_normal(fan_in: int) -> Normal:
    """`Normal` of variance `1 / fan_in`: a contraction over `fan_in` inputs of unit size gives outputs of unit size."""
    return Normal(fan_in**-0.5)


# ----------------------------------------------------------------------------------------------------- trees of specs


def is_spec(x: Any) -> bool:
    return isinstance(x, ParamSpec)


def map_specs(f: Callable[..., Any], specs: Tree, *rest: Tree) -> Tree:
    """`jax.tree.map` over specs, and over further trees of the same structure."""
    return jax.tree.map(f, specs, *rest, is_leaf=is_spec)


def path_name(path: tuple[Any, ...]) -> str:
    """A leaf's name: `blocks/attention/query`."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def named(specs: Tree) -> dict[str, ParamSpec]:
    """All specs by name, in the tree's order."""
    return {path_name(p): s for p, s in jax.tree_util.tree_flatten_with_path(specs, is_leaf=is_spec)[0]}


def stack(specs: Tree, n: int) -> Tree:
    """The specs of `n` layers of the same kind, stored as one array each with the layers in front."""

    def one(s: ParamSpec) -> ParamSpec:
        fan_in = tuple(d + 1 for d in s.fan_in)
        return dataclasses.replace(s, shape=(n, *s.shape), axes=("layers", *s.axes), fan_in=fan_in)

    return map_specs(one, specs)


def unstacked(spec: ParamSpec) -> ParamSpec:
    """One layer's share of a stacked spec (a spec that is not stacked is returned as it is)."""
    if spec.axes[:1] != ("layers",):
        return spec
    fan_in = tuple(d - 1 for d in spec.fan_in)
    return dataclasses.replace(spec, shape=spec.shape[1:], axes=spec.axes[1:], fan_in=fan_in)


# --------------------------------------------------------------------------------------------------- derived from specs


def initialize(specs: Tree, key: Array, dtype: Any = jnp.float32) -> Tree:
    """Initial values. A parameter's key comes from its name alone: adding one leaves every other bit for bit."""

    def one(path: tuple[Any, ...], s: ParamSpec) -> Array:
        name = path_name(path).encode()
        return s.init(jax.random.fold_in(key, zlib.crc32(name) & 0x7FFFFFFF), s.shape, dtype)

    return jax.tree_util.tree_map_with_path(one, specs, is_leaf=is_spec)


def count(specs: Tree) -> int:
    """How many numbers the parameters hold."""
    return sum(math.prod(s.shape) for s in named(specs).values())


def decay_mask(specs: Tree) -> Tree:
    """True where weight decay applies."""
    return map_specs(lambda s: s.decay, specs)


def role(spec: ParamSpec) -> Role:
    """What a parameter is to an optimizer: looked up, the output's projection, a weight matrix, or a vector of
    gains."""
    s = unstacked(spec)
    if len(s.shape) < 2:
        return "vector"
    if not s.fan_in:
        return "embedding" if "vocab" in s.axes else "vector"
    return "head" if "vocab" in s.axes else "matrix"


def describe(specs: Tree) -> Mapping[str, Mapping[str, Any]]:
    """Names, shapes, axes and roles as plain values: for golden dumps and manifests."""
    return {
        name: {
            "shape": list(s.shape),
            "axes": list(s.axes),
            "fan_in": list(s.fan_in),
            "decay": s.decay,
            "role": role(s),
        }
        for name, s in named(specs).items()
    }
