"""The decoder: embedding, blocks, final norm, output.

Shapes: B batch, T length, D embed, V vocabulary, L layers.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from lm_jax.errors import ConfigError
from lm_jax.kernels.flash_attention import ATTENDED, ring_order
from lm_jax.models.attention import KeyValueCache, empty_cache
from lm_jax.models.block import BlockConfig, block, block_specs
from lm_jax.models.linear import PRODUCT, linear
from lm_jax.models.norms import norm, norm_specs
from lm_jax.models.parametrization import Scale
from lm_jax.models.positions import POSITIONS
from lm_jax.params import Normal, ParamSpec, map_specs, scaled_normal, stack, unstacked, zeros
from lm_jax.sharding import LAYOUT, Layout, axis_size, constrain, gather_weights, out_sharding, platform

Array = jax.Array
Params = dict[str, Any]

REMAT = {
    "none": None,  # keep everything that the backward pass reads
    "dots": jax.checkpoint_policies.save_only_these_names(PRODUCT),  # keep products with weights
    "attention": jax.checkpoint_policies.save_only_these_names(ATTENDED),  # keep what attention gives
    "full": jax.checkpoint_policies.nothing_saveable,  # keep each block's input
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(  # keep products with weights on the host
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[PRODUCT],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig(BlockConfig):
    """The section `model`; the fields that are not here are those of the parts that it is made of.

    Attributes:
      layers: how many blocks.
      vocab: how many token ids; None: as many as the tokenizer has.
      tied: whether the output projection is the embedding.
      logit_soft_cap: logits become `cap * tanh(logits / cap)`; None: they stay (Gemma 2, arXiv:2408.00118).
      embedding_std: standard deviation that the embedding starts with.
      output_init: `scaled`: output projections start at `1 / sqrt(2 layers)` of the usual size (Radford et al. 2019);
        `zero`: they and the output of an untied model start at zero, so that every block starts as the identity.
      scan: whether the layers run as a scan (compiles once for all) or unrolled (faster on CPU); the stored layout is
        the same.
      dtype: of compute; `auto`: bfloat16 on TPU and GPU, float32 on CPU. Parameters, softmax, norms and loss are
        float32.
    """

    layers: int = 4
    vocab: int | None = None
    tied: bool = False
    logit_soft_cap: float | None = None
    embedding_std: float = 0.02
    output_init: Literal["scaled", "zero"] = "scaled"
    scan: bool = True
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("layers", 1), ("vocab", 2)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"model.{name}", f"{value} is too small", f"use {least} or more")
        for name in ("logit_soft_cap", "embedding_std"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"model.{name}", f"{value} is out of range", "use a number above 0")
        for name, known in (("output_init", ("scaled", "zero")), ("dtype", ("auto", *DTYPES))):
            if getattr(self, name) not in known:
                raise ConfigError(f"model.{name}", f"unknown {getattr(self, name)!r}", f"use one of {', '.join(known)}")

    @property
    def ids(self) -> int:
        """The vocabulary's size, as a plain int."""
        if self.vocab is None:
            raise ConfigError("model.vocab", "is open", "give a number, or a tokenizer that decides it")
        return self.vocab

    @property
    def compute_dtype(self) -> Any:
        """The dtype of compute; where `auto`, what the current mesh's devices are best at."""
        if self.dtype == "auto":
            return jnp.float32 if platform() == "cpu" else jnp.bfloat16
        return DTYPES[self.dtype]

    @property
    def scale(self) -> Scale:
        """How many times as wide and as deep as its base the model is."""
        width = 1.0 if self.base_embed is None else self.embed / self.base_embed
        return Scale(width, 1.0 if self.base_layers is None else self.layers / self.base_layers)


def transformer_specs(c: TransformerConfig) -> dict[str, Any]:
    """All parameters: `embedding` `[V, D]`, `blocks` (stacked), `final_norm`, and `output` `[D, V]` unless tied."""
    out_scale = (2 * (c.base_layers or c.layers)) ** -0.5 if c.output_init == "scaled" else 0.0
    specs = {
        "embedding": ParamSpec((c.ids, c.embed), ("vocab", "embed"), Normal(c.embedding_std), fan_in=(), decay=False),
        "blocks": stack(block_specs(c, out_scale), c.layers),
        "final_norm": norm_specs(c, c.embed),
    }
    if not c.tied:
        init = scaled_normal(c.base_embed or c.embed) if c.output_init == "scaled" else zeros
        specs["output"] = ParamSpec((c.embed, c.ids), ("embed", "vocab"), init)
    return specs


def hidden(
    params: Params,
    tokens_BT: Array,
    *,
    c: TransformerConfig,
    positions_BT: Array | None = None,
    segment_ids_BT: Array | None = None,
    cache: KeyValueCache | None = None,
    remat: str = "none",
    layout: Layout = LAYOUT,
) -> tuple[Array, KeyValueCache | None]:
    """The normalised residual stream behind the last block.

    Args:
      params: of `transformer_specs`, float32.
      tokens_BT: token ids; an id beyond the vocabulary gives NaN.
      c: the config.
      positions_BT: `[B, T]`; None: counted from 0, or from what the cache holds.
      segment_ids_BT: `[B, T]`; None: each row is one segment.
      cache: `init_cache`'s, with the layers in front, or None.
      remat: what the backward pass computes again instead of keeping: a name of `REMAT`.
      layout: how the mesh is used. The tokens, and all that is given of them, stand in the order of `columns`.

    Returns:
      `[B, T, D]` in the dtype of compute, and the cache (None if none was given).
    """
    if positions_BT is None:
        start = jnp.zeros((), jnp.int32) if cache is None else cache.length[0][:, None]  # every layer holds as much
        order = None if cache is not None else columns(c, layout, tokens_BT.shape[1])
        offsets = jnp.arange(tokens_BT.shape[1]) if order is None else jnp.asarray(order)
        positions_BT = jnp.broadcast_to(start + offsets, tokens_BT.shape)
    rotation = POSITIONS[c.position].prepare(positions_BT, c.head_size, c)
    if segment_ids_BT is not None and layout.context != "ring":  # once, and not again in each layer's backward pass
        segment_ids_BT = constrain(segment_ids_BT, "batch", "key_length")
    layer_specs = map_specs(unstacked, transformer_specs(c)["blocks"])

    def layer(
        x_BTD: Array, layer_params: Params, layer_cache: KeyValueCache | None
    ) -> tuple[Array, KeyValueCache | None]:
        weights = gather_weights(layer_params, layer_specs, c.compute_dtype)
        given = {"rotation": rotation, "segment_ids_BT": segment_ids_BT, "cache": layer_cache, "layout": layout}
        return block(weights, x_BTD, c=c, depth=c.scale.depth, **given)

    if remat != "none":
        layer = jax.checkpoint(layer, policy=REMAT[remat], prevent_cse=not c.scan)
    x_BTD = embed_tokens(params, tokens_BT, c, layout.residual)
    x_BTD, cache = _run_layers(layer, x_BTD, params["blocks"], cache, c)
    x_BTD = norm(params["final_norm"], x_BTD, c=c)
    return constrain(x_BTD, "batch", "length", "features") if layout.split_residual else x_BTD, cache


def columns(c: TransformerConfig, layout: Layout, length: int) -> np.ndarray | None:
    """The order in which a row's tokens are to stand when `hidden` is given them; None: as they are."""
    parts = axis_size("sequence")
    return ring_order(length, parts, c.window) if layout.context == "ring" and parts > 1 else None


def embed_tokens(params: Params, tokens_BT: Array, c: TransformerConfig, length: str = "length") -> Array:
    """`[B, T, D]`, where the residual stream begins. The table is gathered over fsdp first: a look-up in a table split
    over features would be rebuilt whole."""
    table = constrain(params["embedding"].astype(c.compute_dtype), "vocab", None)
    # "fill" makes an id beyond the vocabulary NaN, so that the step is refused; the default for plain indexing clamps
    # it.
    return table.at[tokens_BT].get(
        mode="fill", wrap_negative_indices=False, out_sharding=out_sharding("batch", length, "features")
    )


def _run_layers(
    layer: Any, x_BTD: Array, blocks: Params, cache: KeyValueCache | None, c: TransformerConfig
) -> tuple[Array, KeyValueCache | None]:
    if c.scan:
        return jax.lax.scan(lambda x, per_layer: layer(x, *per_layer), x_BTD, (blocks, cache))
    # Taking every layer out at once makes the gradient one concatenation; indexing would add up L arrays of full size.
    leaves, structure = jax.tree.flatten((blocks, cache))
    caches = []
    for layer_leaves in zip(*(_unstack(a, c.layers) for a in leaves), strict=True):
        layer_params, layer_cache = jax.tree.unflatten(structure, layer_leaves)
        x_BTD, layer_cache = layer(x_BTD, layer_params, layer_cache)
        caches.append(layer_cache)
    return x_BTD, None if cache is None else jax.tree.map(lambda *layers: jnp.stack(layers), *caches)


def _unstack(stacked: Array, layers: int) -> tuple[Array, ...]:
    return tuple(jnp.squeeze(a, 0) for a in jax.lax.split(stacked, (1,) * layers, axis=0))


def output_weight(params: Params, c: TransformerConfig) -> Array:
    """`[D, V]` in the dtype of compute, whole over fsdp and split over the vocabulary; divided by the model's width
    over its base's."""
    w = params["embedding"].T if c.tied else params["output"]
    if c.scale.width != 1:  # before the cast, which would round it once more
        w = w * (1 / c.scale.width)
    return constrain(w.astype(c.compute_dtype), None, "vocab")


def logits(params: Params, x_BTD: Array, *, c: TransformerConfig) -> Array:
    """`[B, T, V]` float32 from `hidden`'s result. Training never calls this: `kernels/cross_entropy.py` works in
    chunks."""
    z = linear(x_BTD, output_weight(params, c), ("features",), ("vocab",)).astype(jnp.float32)
    return z if c.logit_soft_cap is None else c.logit_soft_cap * jnp.tanh(z / c.logit_soft_cap)


def init_cache(c: TransformerConfig, batch: int, length: int) -> KeyValueCache:
    """An empty key-value cache for decoding, with the layers in front of every array."""
    layer = empty_cache(c, batch, length, c.compute_dtype)
    return jax.tree.map(lambda a: jnp.broadcast_to(a, (c.layers, *a.shape)), layer)
