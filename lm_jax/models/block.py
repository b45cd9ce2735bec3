"""A pre-norm decoder block: `x + attention(norm(x))`, then `x + feed_forward(norm(x))`.

Shapes: B batch, T length, D embed.
"""

import dataclasses
from typing import Any

import jax

from lm_jax.models.attention import AttentionConfig, KeyValueCache, attention, attention_specs
from lm_jax.models.feed_forward import FeedForwardConfig, feed_forward, feed_forward_specs
from lm_jax.models.norms import norm, norm_specs
from lm_jax.params import Initializer, Normal, zeros
from lm_jax.sharding import LAYOUT, Layout, constrain

Array = jax.Array
Params = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockConfig(AttentionConfig, FeedForwardConfig):
    """A block's attention, feed-forward and norms; every field is one of theirs."""

    def __post_init__(self) -> None:
        AttentionConfig.__post_init__(self)
        FeedForwardConfig.__post_init__(self)


def block_specs(c: BlockConfig, out_scale: float) -> dict[str, Any]:
    """The parameters of one block; `out_scale` times the usual size is what its two output projections start at."""

    def out(fan_in: int) -> Initializer:
        return Normal(out_scale * fan_in**-0.5) if out_scale else zeros

    return {
        "attention_norm": norm_specs(c, c.embed),
        "attention": attention_specs(c, out(c.heads * c.head_size)),
        "feed_forward_norm": norm_specs(c, c.embed),
        "feed_forward": feed_forward_specs(c, out(c.inner)),
    }


def block(
    params: Params,
    x_BTD: Array,
    *,
    c: BlockConfig,
    rotation: Any,
    segment_ids_BT: Array | None,
    cache: KeyValueCache | None = None,
    layout: Layout = LAYOUT,
    depth: float = 1.0,
) -> tuple[Array, KeyValueCache | None]:
    """`[B, T, D]` -> `[B, T, D]`, and the layer's cache where one is given.

    Arguments as of `attention`; `depth` is what the two sums over the model's blocks are divided by, a term each.
    """
    given = {"rotation": rotation, "segment_ids_BT": segment_ids_BT, "cache": cache, "layout": layout}
    y, cache = attention_branch(params, x_BTD, c=c, depth=depth, **given)
    x_BTD = x_BTD + y
    return x_BTD + feed_forward_branch(params, x_BTD, c=c, layout=layout, depth=depth), cache


def attention_branch(
    params: Params, x_BTD: Array, *, c: BlockConfig, layout: Layout = LAYOUT, depth: float = 1.0, **given: Any
) -> tuple[Array, KeyValueCache | None]:
    """What attention adds to the residual stream, and the layer's cache. Arguments as of `block`."""
    x_BTD = _normed(params["attention_norm"], x_BTD, c, layout)
    y, cache = attention(params["attention"], x_BTD, c=c, layout=layout, **given)
    return _shared(y, depth), cache


def feed_forward_branch(
    params: Params, x_BTD: Array, *, c: BlockConfig, layout: Layout = LAYOUT, depth: float = 1.0
) -> Array:
    """What the feed-forward layer adds to the residual stream. Arguments as of `block`."""
    x_BTD = _normed(params["feed_forward_norm"], x_BTD, c, layout)
    return _shared(feed_forward(params["feed_forward"], x_BTD, c=c, length=layout.residual), depth)


def _normed(params: Params, x_BTD: Array, c: BlockConfig, layout: Layout) -> Array:
    y = norm(params, x_BTD, c=c)
    return constrain(y, "batch", "length", "features") if layout.split_residual else y


def _shared(y_BTD: Array, depth: float) -> Array:
    return y_BTD if depth == 1 else y_BTD * (1 / depth)
