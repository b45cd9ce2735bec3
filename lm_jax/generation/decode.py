"""Text that a model continues, token by token on a key-value cache.

One jitted program reads the prompts and draws the tokens. Prompts and results are padded to sizes that are powers of
two, so that other prompts find it compiled.

Shapes: B rows, P padded prompt length, M room for new tokens, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from lm_jax.errors import ConfigError, UserError
from lm_jax.generation.sampling import SamplingConfig, sample
from lm_jax.models.attention import KeyValueCache
from lm_jax.models.transformer import TransformerConfig, hidden, init_cache, logits, transformer_specs
from lm_jax.sharding import AXES, abstract, constrain, one_device_mesh

Array = jax.Array
Params = dict[str, Any]

LEAST_ROOM = 32  # tokens; below, padding costs nothing that one could notice


def generate(
    params: Params,
    prompts: Sequence[Sequence[int]],
    *,
    c: TransformerConfig,
    max_tokens: int,
    sampling: SamplingConfig | None = None,
    seed: int = 0,
    stop_id: int | None = None,
    max_length: int | None = None,
) -> list[list[int]]:
    """The tokens that follow each prompt.

    A row depends on its prompt, its place among the prompts, and the seed; not on the other rows. (Sums may be rounded
    otherwise where the number of rows or the bucket of their lengths differs.)

    It runs on the mesh that the parameters are on, in whatever layout (parameters without a mesh: on one device); the
    rows are filled up with copies until the mesh divides them, and the copies dropped. Where there are several
    processes, all of them call it with the same arguments, and each gets the whole result.

    Args:
      params: of `transformer_specs(c)`.
      prompts: token ids, at least one each; their lengths may differ.
      c: the model's config.
      max_tokens: most tokens a row gets.
      sampling: how tokens are drawn; None: greedy.
      seed: of the draws, 0 to 2^32 - 1. A draw's key is made from the seed, the row and the position.
      stop_id: a row ends where it draws this id, which is not part of the result; None: there is none.
      max_length: most tokens a row has, prompt included; None: any number. Beyond the length that it was trained on, a
        model gets worse and no error is raised: give that length here to end there.

    Raises:
      UserError: a prompt is empty, too long, or holds an id beyond the vocabulary; or the model gives NaN or infinity.
    """
    if not prompts:
        return []
    limits = _limits(prompts, c, max_tokens, max_length)
    params, mesh = _place(params, c)
    rows = -len(prompts) % (mesh.shape["data"] * mesh.shape["fsdp"]) + len(prompts)
    lengths = np.array([len(p) for p in prompts] + [len(prompts[0])] * (rows - len(prompts)), np.int32)
    tokens = np.zeros((rows, _room(int(lengths.max()))), np.int32)
    for row, n in enumerate(lengths):
        tokens[row, :n] = prompts[row if row < len(prompts) else 0]
    limits = np.pad(limits, (0, rows - len(prompts)))  # copies draw nothing
    # Scanned layers: what a user waits for is one block's compilation instead of all.
    static = _Static(dataclasses.replace(c, scan=True), sampling or SamplingConfig(temperature=0.0), _room(max_tokens))
    with jax.set_mesh(mesh):
        stop = np.int32(-1 if stop_id is None else stop_id)
        found, counts, finite = _generate(static, params, tokens, lengths, limits, np.uint32(seed), stop)
    if not finite:
        raise UserError("the model's logits are NaN or infinite\nits weights are damaged: take another checkpoint")
    return [row[:n].tolist() for row, n in zip(np.asarray(found), np.asarray(counts)[: len(prompts)], strict=False)]


class _Static(NamedTuple):
    c: TransformerConfig
    sampling: SamplingConfig
    room: int


def _room(n: int) -> int:
    """The power of two that holds `n`."""
    return max(LEAST_ROOM, 1 << (n - 1).bit_length())


def _limits(
    prompts: Sequence[Sequence[int]], c: TransformerConfig, max_tokens: int, max_length: int | None
) -> np.ndarray:
    """How many tokens each row may get, `[B]` int32, after all that can be wrong with the arguments."""
    if max_tokens < 1:
        raise ConfigError("max_tokens", f"{max_tokens} is too small", "use 1 or more")
    for row, prompt in enumerate(prompts):
        if not len(prompt):
            raise UserError(
                f"prompt {row} is empty\ngive at least one token: that which begins a document, for instance"
            )
        wrong = next((i for i in prompt if not 0 <= i < c.ids), None)
        if wrong is not None:
            raise UserError(f"prompt {row} has the token id {wrong}: the model's ids are 0 to {c.ids - 1}")
        if max_length is not None and len(prompt) >= max_length:
            raise UserError(
                f"prompt {row} has {len(prompt)} tokens and max_length is {max_length}: nothing can follow it"
            )
    room = [max_tokens if max_length is None else min(max_tokens, max_length - len(p)) for p in prompts]
    return np.array(room, np.int32)


def _place(params: Params, c: TransformerConfig) -> tuple[Params, Mesh]:
    """The parameters on a mesh whose `sequence` is 1: decoding has no length to split, so its devices take rows."""
    sharding = getattr(jax.tree.leaves(params)[0], "sharding", None)
    if not isinstance(sharding, NamedSharding):
        mesh = one_device_mesh()
        return jax.device_put(params, jax.tree.map(lambda a: a.sharding, abstract(transformer_specs(c), mesh))), mesh
    old = sharding.mesh
    assert isinstance(old, Mesh) and old.axis_names == AXES
    if old.shape["sequence"] == 1:
        return params, old
    data, fsdp, sequence, tensor = old.devices.shape
    devices = old.devices.transpose(0, 2, 1, 3).reshape(data * sequence, fsdp, 1, tensor)
    mesh = Mesh(devices, AXES, axis_types=old.axis_types)

    def move(a: Array) -> Array:
        """Weights are not split over data or sequence: every device keeps the part that it has."""
        assert isinstance(a.sharding, NamedSharding)
        parts = [s.data for s in a.addressable_shards]
        return jax.make_array_from_single_device_arrays(a.shape, NamedSharding(mesh, a.sharding.spec), parts)

    return jax.tree.map(move, params), mesh


class _Loop(NamedTuple):
    """What the loop carries.

    Attributes: how many tokens are drawn, and which; how many of them count in each row; which rows are done; the
    cache, and what it says of the next token; whether all logits of open rows were finite.
    """

    drawn: Array
    tokens_BM: Array
    count_B: Array
    done_B: Array
    cache: KeyValueCache
    logits_BV: Array
    finite: Array


@functools.partial(jax.jit, static_argnums=0)
def _generate(
    static: _Static, params: Params, tokens_BP: Array, length_B: Array, limit_B: Array, seed: Array, stop_id: Array
) -> tuple[Array, Array, Array]:
    """`[B, M]` tokens, how many of them count (`[B]`), and whether the model behaved; whole on every device."""
    c, B = static.c, tokens_BP.shape[0]
    # Once, not at every token; the final norm stays as it is, for it is not among the weights that a block casts.
    params = {
        k: v if k == "final_norm" else jax.tree.map(lambda w: w.astype(c.compute_dtype), v) for k, v in params.items()
    }
    tokens_BP = constrain(tokens_BP, "batch", "length")
    length_B, limit_B = (constrain(a, "batch") for a in (length_B, limit_B))
    row_B = constrain(jnp.arange(B), "batch")
    key = jax.random.key(seed)

    def keys(position_B: Array) -> Array:
        return jax.vmap(lambda row, at: jax.random.fold_in(jax.random.fold_in(key, row), at))(row_B, position_B)

    def draw(state: _Loop) -> _Loop:
        token_B = sample(state.logits_BV, keys(length_B + state.drawn), static.sampling)
        stopped_B = state.done_B | (token_B == stop_id)
        tokens_BM = jax.lax.dynamic_update_slice_in_dim(state.tokens_BM, token_B[:, None], state.drawn, 1)
        count_B = state.count_B + ~stopped_B
        following_BV, cache = _follow(params, token_B[:, None], state.cache, c)
        return _Loop(
            drawn=state.drawn + 1,
            tokens_BM=tokens_BM,
            count_B=count_B,
            done_B=stopped_B | (count_B >= limit_B),
            cache=cache,
            logits_BV=following_BV,
            finite=state.finite & _finite(state),
        )

    cache = init_cache(c, B, tokens_BP.shape[1] + static.room)
    zero_B = jnp.zeros_like(length_B)
    nothing_BM = constrain(jnp.zeros((B, static.room), jnp.int32), "batch", None)
    first, cache = _read(params, tokens_BP, length_B, cache, c)
    state = _Loop(jnp.int32(0), nothing_BM, zero_B, limit_B <= 0, cache, first, jnp.bool_(True))
    state = jax.lax.while_loop(lambda s: jnp.any(~s.done_B) & s.finite, draw, state)
    return constrain(state.tokens_BM, None, None), constrain(state.count_B, None), state.finite


def _read(
    params: Params, tokens_BP: Array, length_B: Array, cache: KeyValueCache, c: TransformerConfig
) -> tuple[Array, KeyValueCache]:
    """What follows each prompt, `[B, V]`, and the cache that holds them.

    Prompts are padded behind their end, where no token of theirs looks; then the cache is told their true lengths, so
    that new keys take the padding's places one by one, and what is left of it is behind every query.
    """
    following_BV, cache = _follow(params, tokens_BP, cache, c, length_B - 1)
    return following_BV, cache._replace(length=jnp.broadcast_to(length_B, cache.length.shape))


def _follow(
    params: Params, tokens_BT: Array, cache: KeyValueCache, c: TransformerConfig, at_B: Array | int = 0
) -> tuple[Array, KeyValueCache]:
    """The logits `[B, V]` behind the token at place `at` of each row, and the cache with all these tokens."""
    x_BTD, longer = hidden(params, tokens_BT, c=c, cache=cache)
    assert longer is not None
    here_BT = jnp.arange(tokens_BT.shape[1]) == jnp.reshape(jnp.asarray(at_B), (-1, 1))
    x_B1D = jnp.sum(jnp.where(here_BT[:, :, None], x_BTD, 0), 1, keepdims=True)
    return constrain(logits(params, x_B1D, c=c)[:, 0], "batch", None), longer


def _finite(state: _Loop) -> Array:
    return jnp.all(jnp.isfinite(state.logits_BV) | state.done_B[:, None])
