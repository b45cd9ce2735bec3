"""Multi-head attention with grouped queries.

Shapes: B batch, T length, S key length, D embed, N query heads, K key-value heads, H head dim.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lm_jax.errors import ConfigError
from lm_jax.kernels.flash_attention import IMPLEMENTATIONS, AttentionMask, flash_attention
from lm_jax.models.linear import linear, linears
from lm_jax.models.norms import NormConfig, norm, norm_specs
from lm_jax.models.parametrization import ParametrizationConfig
from lm_jax.models.positions import POSITIONS, PositionConfig
from lm_jax.params import Initializer, ParamSpec, scaled_normal, zeros
from lm_jax.sharding import LAYOUT, Layout, constrain

Array = jax.Array
Params = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionConfig(NormConfig, PositionConfig, ParametrizationConfig):
    """How a layer attends.

    Attributes:
      embed: width of the residual stream.
      heads: query heads.
      kv_heads: key and value heads, each shared by `heads / kv_heads` query heads; None: one each.
      head_dim: width of a head; None: `embed / heads`.
      qk_norm: whether queries and keys are normalised a head (Henry et al. 2020, arXiv:2010.04245).
      window: a position sees those less than so far before it, itself included (Beltagy et al. 2020,
        arXiv:2004.05150); None: all of them.
      attention_soft_cap: scores become `cap * tanh(scores / cap)`; None: they stay (Gemma 2, arXiv:2408.00118).
      attention_sinks: whether each head learns a logit that takes its share of the softmax and gives nothing (Xiao et
        al. 2023, arXiv:2309.17453).
      attention_kernel: what computes it: `reference`, `xla`, `pallas_tpu`, `pallas_gpu`, `pallas_gpu_deterministic`
        or `cudnn`; None: the first of the platform's that can.
    """

    embed: int = 256
    heads: int = 4
    kv_heads: int | None = None
    head_dim: int | None = None
    qk_norm: bool = False
    window: int | None = None
    attention_soft_cap: float | None = None
    attention_sinks: bool = False
    attention_kernel: str | None = None

    def __post_init__(self) -> None:
        NormConfig.__post_init__(self)
        PositionConfig.__post_init__(self)
        ParametrizationConfig.__post_init__(self)
        for name in ("embed", "heads", "kv_heads", "head_dim", "window"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"model.{name}", f"{value} is too small", "use 1 or more")
        cap = self.attention_soft_cap
        if cap is not None and not 0 < cap < math.inf:
            raise ConfigError("model.attention_soft_cap", f"{cap} is out of range", "use a finite number above 0")
        if self.attention_kernel not in (None, *IMPLEMENTATIONS):
            known = ", ".join(IMPLEMENTATIONS)
            raise ConfigError("model.attention_kernel", f"unknown {self.attention_kernel!r}", f"use one of {known}")
        if self.kv_heads is None:
            object.__setattr__(self, "kv_heads", self.heads)
        if self.heads % self.key_heads:
            problem = f"{self.heads} query heads cannot share {self.kv_heads} key-value heads evenly"
            raise ConfigError("model.kv_heads", problem, f"use a divisor of {self.heads}")
        if self.head_dim is None:
            if self.embed % self.heads:
                problem = f"{self.heads} heads do not divide an embedding of {self.embed}"
                raise ConfigError("model.heads", problem, "change one of them, or give model.head_dim")
            object.__setattr__(self, "head_dim", self.embed // self.heads)
        if self.position == "rope" and self.head_size % 2:
            raise ConfigError(
                "model.head_dim", f"{self.head_dim} is odd", "rotary positions turn pairs: use an even number"
            )

    @property
    def key_heads(self) -> int:
        assert self.kv_heads is not None  # __post_init__ has filled it
        return self.kv_heads

    @property
    def head_size(self) -> int:
        assert self.head_dim is not None  # __post_init__ has filled it
        return self.head_dim


class KeyValueCache(NamedTuple):
    """Keys and values `[B, S, K, H]` of a layer that decoding has seen; `length` (`[B]` int32) says how many are
    filled."""

    keys: Array
    values: Array
    length: Array


def attention_specs(c: AttentionConfig, out: Initializer) -> dict[str, Any]:
    """`query`, `key`, `value`, `out` (which starts as `out` says), the gains of the two norms a head, the sinks."""
    into = scaled_normal(c.embed)
    kv = ParamSpec((c.embed, c.key_heads, c.head_size), ("embed", "kv_heads", "head_dim"), into)
    specs: dict[str, Any] = {
        "query": ParamSpec((c.embed, c.heads, c.head_size), ("embed", "heads", "head_dim"), into),
        "key": kv,
        "value": kv,
        "out": ParamSpec((c.heads, c.head_size, c.embed), ("heads", "head_dim", "embed"), out, fan_in=(0, 1)),
    }
    if c.qk_norm:
        specs |= {"query_norm": norm_specs(c, c.head_size), "key_norm": norm_specs(c, c.head_size)}
    if c.attention_sinks:
        specs["sinks"] = ParamSpec((c.heads,), ("heads",), zeros, fan_in=(), decay=False)
    return specs


def attention(
    params: Params,
    x_BTD: Array,
    *,
    c: AttentionConfig,
    rotation: Any,
    segment_ids_BT: Array | None,
    cache: KeyValueCache | None = None,
    layout: Layout = LAYOUT,
) -> tuple[Array, KeyValueCache | None]:
    """Causal attention within segments.

    Args:
      params: of `attention_specs`, in the dtype of compute.
      x_BTD: the normalised residual stream.
      c: the config.
      rotation: what the position encoding has prepared for these positions.
      segment_ids_BT: `[B, T]`; equal ids see each other, negative ones see nothing. None: each row is one segment.
      cache: what decoding has seen; the rows of `x` then stand behind it.
      layout: how the mesh is used. With `ring`, the columns of all arguments stand in the order of `ring_order`.

    Returns:
      `[B, T, D]`, its length laid out as the residual stream's, and the cache with these keys and values added (None if
      none was given).
    """
    rotate = POSITIONS[c.position].rotate
    names = [("heads", "head_dim"), ("kv_heads", "head_dim"), ("kv_heads", "head_dim")]
    q, k, v = linears(x_BTD, [params[name] for name in ("query", "key", "value")], ("features",), names)
    if c.qk_norm:
        q, k = norm(params.get("query_norm", {}), q, c=c), norm(params.get("key_norm", {}), k, c=c)
    q, k = rotate(q, rotation), rotate(k, rotation)
    if cache is None:
        mask = AttentionMask(window=c.window, q_segment_ids=segment_ids_BT, kv_segment_ids=segment_ids_BT)
    else:
        k, v = (constrain(a, "batch", "key_length", "kv_heads", "head_dim") for a in (k, v))
        mask, cache = _extend(cache, k, v, c.window)
        k, v = cache.keys, cache.values
    y = flash_attention(
        q,
        k,
        v,
        mask=mask,
        scale=c.attention_scale(c.head_size),
        soft_cap=c.attention_soft_cap,
        position_bias=POSITIONS[c.position].bias(c.heads),
        sinks_N=params.get("sinks"),
        implementation=c.attention_kernel,
        context=layout.context if cache is None else "gather",
    )
    return linear(y, params["out"], ("heads", "head_dim"), ("features",), layout.residual), cache


def _extend(
    cache: KeyValueCache, k_BTKH: Array, v_BTKH: Array, window: int | None
) -> tuple[AttentionMask, KeyValueCache]:
    """The cache with further keys and values behind what each row holds, and the mask that these queries need."""

    def put(old_SKH: Array, new_TKH: Array, at: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(old_SKH, new_TKH.astype(old_SKH.dtype), at, 0)

    keys = jax.vmap(put)(cache.keys, k_BTKH, cache.length)
    values = jax.vmap(put)(cache.values, v_BTKH, cache.length)
    length = cache.length + k_BTKH.shape[1]
    mask = AttentionMask(window=window, q_offset=cache.length, kv_length=length)
    return mask, KeyValueCache(keys, values, length)


def empty_cache(c: AttentionConfig, batch: int, length: int, dtype: Any) -> KeyValueCache:
    """A layer's cache for so many rows and positions."""
    zeros = jnp.zeros((batch, length, c.key_heads, c.head_size), dtype)
    zeros = constrain(zeros, "batch", "key_length", "kv_heads", "head_dim")
    return KeyValueCache(zeros, zeros, constrain(jnp.zeros((batch,), jnp.int32), "batch"))
