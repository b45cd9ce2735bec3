"""Coordinate checks: whether a few steps of training move the activations of a large model as far as a small one's.

A learning rate carries over to another width only if, at every width, a step changes every kind of activation by the
same order of size. That is what the maximal-update parametrisation is made for (Yang et al. 2022, arXiv:2203.03466,
appendix D.1), and what a forgotten multiplier breaks. So: train models of several sizes for a few steps on one batch,
and fit the slope of `log(mean |change|)` against `log(size)`, a kind of activation at a time. The same over depths
checks CompleteP (Dey et al. 2025, arXiv:2505.01618).

The batch is of random tokens and the same at every step: what is asked is how far a given update carries, not what can
be learnt.

Powers at widths 64, 128, 512 after five steps of two layers, of the change of (what blocks add; the margin): with mup
at most 0.03 in size; 0.07. Standard: AdamW 0.26; 0.60, Lion 0.34; 0.92, Adafactor 0.11; 0.54, Muon 0.01; 0.57. So a
limit of 0.15 lies between them. (Norms hide what a block's weights do once they have moved far: look at early steps,
or at a lower rate.) Over depths 2, 4, 16 with AdamW the margin's goes with 0.06 under completep with an `embedding_std`
of 0.5, with 0.16 with one of 0.02: next to so small an embedding, what a shallow model adds to it is all there is.

Shapes: B batch, T length, D embed, L layers.
"""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from lm_jax.errors import ConfigError, UserError
from lm_jax.models.block import attention_branch, feed_forward_branch
from lm_jax.models.norms import norm
from lm_jax.models.positions import POSITIONS
from lm_jax.models.transformer import TransformerConfig, embed_tokens, logits, transformer_specs
from lm_jax.objectives.objective import Objective
from lm_jax.params import Tree, initialize, map_specs, unstacked
from lm_jax.sharding import MeshConfig, gather_weights, lay_out, one_device_mesh, partition
from lm_jax.training.program import make_program
from lm_jax.training.run import RunConfig
from lm_jax.training.state import TrainState

Array = jax.Array
MakeObjective = Callable[[RunConfig], Objective]
Axis = Literal["width", "depth"]

ROWS, LENGTH, VOCABULARY = 4, 32, 256  # the vocabulary where the config leaves it open
# What each kind passes through last, and so what is wrong where it is the first to move too far.
KINDS = {
    "embedding": "the embedding's learning rate",
    "attention": "the learning rates or initial sizes of attention's weights, or the scale of its scores",
    "feed_forward": "the learning rates or initial sizes of the feed-forward weights",
    "residual": "the sum of the blocks: what a block's output is multiplied by, or the rates of its weights",
    "logits": "the output: its multiplier, its initial size or its learning rate",
    "margin": "the output: its multiplier or its learning rate",
}
# A branch is to shrink with the depth, so that their sum does not grow.
CHECKED: dict[Axis, tuple[str, ...]] = {
    "width": tuple(KINDS),
    "depth": ("embedding", "residual", "logits", "margin"),
}
# Of these the change may shrink: logits start as a random function of size m^-0.5, which training draws anew, and so
# does over depths what the blocks add up to.
MAY_SHRINK: dict[Axis, tuple[str, ...]] = {"width": ("logits",), "depth": ("logits", "residual")}


class Scales(NamedTuple):
    """Mean absolute values by kind, `[sizes, steps + 1]`; at step 0 nothing has changed."""

    level: dict[str, Any]
    change: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Check:
    """How a kind of activation grows with the model: powers of the size, of its change and of itself, at the last
    step."""

    kind: str
    change: float
    level: float
    limit: float
    may_shrink: bool = False

    @property
    def ok(self) -> bool:
        least = -math.inf if self.may_shrink else -self.limit
        return least <= self.change <= self.limit and self.level <= self.limit  # NaN is not

    @property
    def suspect(self) -> str:
        return (
            f"{self.kind}: its change goes with size^{self.change:.2f}, itself with size^{self.level:.2f}\n"
            f"look at {KINDS[self.kind]}"
        )


# --------------------------------------------------------------------------------------------------------------- models


def widened(c: TransformerConfig, widths: Sequence[int]) -> dict[int, TransformerConfig]:
    """A model of each width. The narrowest has the config's heads; in the others there are more of the same (of wider
    ones as many, with `base_head_dim`). Feed-forward layers grow in proportion.

    Raises:
      UserError: where heads do not come out whole.
    """
    narrow = min(widths)
    models = {}
    for width in widths:
        if narrow % c.heads or width % narrow:
            unit = math.lcm(c.heads, narrow) if narrow % c.heads else narrow
            raise UserError(
                f"--widths: {width} cannot be cut into heads as {narrow} is into {c.heads}\ngive multiples of {unit}"
            )
        times = width // narrow
        more, wider = (times, 1) if c.base_head_dim is None else (1, times)
        models[width] = dataclasses.replace(
            c,
            embed=width,
            heads=c.heads * more,
            kv_heads=c.key_heads * more,
            head_dim=narrow // c.heads * wider,
            feed_forward_dim=max(1, round(c.inner * width / c.embed)),
        )
    return models


def deepened(c: TransformerConfig, depths: Sequence[int]) -> dict[int, TransformerConfig]:
    """A model of each depth."""
    return {depth: dataclasses.replace(c, layers=depth) for depth in depths}


def checkable(config: RunConfig, steps: int) -> RunConfig:
    """The config with its model, rule, rate and decay as they are, for a few steps at the full rate on one device."""
    if steps < 1:
        raise UserError(f"--steps: {steps} is too small\nuse 1 or more")
    optimizer = dataclasses.replace(config.optimizer, schedule="constant", warmup_steps=0, ema=None)
    train = dataclasses.replace(
        config.train, steps=steps, tokens=None, batch_size=ROWS, length=LENGTH, microbatches=1, remat="none"
    )
    vocab = config.model.vocab or VOCABULARY
    # The reference kernel compiles in a fraction of the time, and rows are short.
    model = dataclasses.replace(config.model, vocab=vocab, dtype="float32", attention_kernel="reference")
    return dataclasses.replace(config, model=model, mesh=MeshConfig(data=1), optimizer=optimizer, train=train)


# ---------------------------------------------------------------------------------------------------------- activations


def activations(params: Tree, batch: Mapping[str, Array], c: TransformerConfig) -> dict[str, Array]:
    """What `hidden` and `logits` compute on their way, by kind: of `attention` and `feed_forward` `[L, B, T, D]`, what
    each block adds; `margin` is one number, by how much the target's logit is above the mean one."""
    tokens_BT = batch["tokens"]
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    rotation = POSITIONS[c.position].prepare(positions_BT, c.head_size, c)
    specs = map_specs(unstacked, transformer_specs(c)["blocks"])
    depth = c.scale.depth

    def layer(x_BTD: Array, layer_params: Tree) -> tuple[Array, tuple[Array, Array]]:
        weights = gather_weights(layer_params, specs, c.compute_dtype)
        given = {"rotation": rotation, "segment_ids_BT": None}
        attended, _ = attention_branch(weights, x_BTD, c=c, depth=depth, **given)
        x_BTD = x_BTD + attended
        fed = feed_forward_branch(weights, x_BTD, c=c, depth=depth)
        return x_BTD + fed, (attended, fed)

    embedding = embed_tokens(params, tokens_BT, c)
    residual, (attended, fed) = jax.lax.scan(layer, embedding, params["blocks"])
    z = logits(params, norm(params["final_norm"], residual, c=c), c=c)
    target = jnp.sum(jax.nn.one_hot(batch["targets"], c.ids) * z, -1)  # no look-up in a split dimension
    margin = jnp.mean(target - jnp.mean(z, -1))
    blocks = {"attention": attended, "feed_forward": fed, "residual": residual}
    return {"embedding": embedding, **blocks, "logits": z, "margin": margin}


# --------------------------------------------------------------------------------------------------------- the training


def random_batch(vocab: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Random tokens, a document a row."""
    tokens = np.random.default_rng(seed).integers(0, vocab, (ROWS, LENGTH + 1)).astype(np.int32)
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (ROWS, LENGTH))
    whole = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "positions": positions}
    return whole | {"segment_ids": np.zeros_like(positions), "loss_mask": np.ones((ROWS, LENGTH), bool)}


def trained(config: RunConfig, make_objective: MakeObjective, steps: int, seeds: int) -> Scales:
    """The scales of one model at every step, `[1, steps + 1]`, as means over seeds."""
    mesh = one_device_mesh()
    program = make_program(config, mesh, make_objective(config))
    c, specs = config.model, program.specs

    @jax.jit  # all of a run at once: most of the time goes into compiling
    def run(key: Array, batch: dict[str, Array]) -> Scales:
        params, zero = lay_out(initialize(specs, key), specs), jnp.zeros((), jnp.int32)
        state = TrainState(params, {}, {}, program.optimizer.init(params), None, zero, zero, zero, key)
        nothing = jax.tree.map(jnp.zeros_like, jax.eval_shape(lambda: activations(params, batch, c)))

        def step(carry: tuple[TrainState, dict[str, Array]], i: Array) -> tuple[tuple, Scales]:
            state, first = carry
            now = activations(state.params, batch, c)
            first = jax.tree.map(lambda a, b: jnp.where(i == 0, a, b), now, first)
            level = {kind: jnp.mean(jnp.abs(a)) for kind, a in now.items()}
            change = {kind: jnp.mean(jnp.abs(a - first[kind])) for kind, a in now.items()}
            return (program.train_step(state, batch)[0], first), Scales(level, change)

        return jax.lax.scan(step, (state, nothing), jnp.arange(steps + 1))[1]

    with jax.set_mesh(mesh):
        rows = NamedSharding(mesh, partition("batch", "length"))
        batch = {name: jax.device_put(a, rows) for name, a in random_batch(c.ids).items()}
        # This generator compiles in half of the time; whose numbers they are is nothing to the check.
        keys = [jax.random.key(config.train.seed + i, impl="unsafe_rbg") for i in range(seeds)]
        runs = [run(key, batch) for key in keys]
    return jax.tree.map(lambda *each: np.mean(np.stack(each), 0)[None], *runs)


def measure(
    config: RunConfig,
    models: Mapping[int, TransformerConfig],
    make_objective: MakeObjective,
    *,
    steps: int = 5,
    seeds: int = 2,
) -> Scales:
    """The scales of models by size, in the order of the sizes.

    Args:
      config: `checkable`'s.
      models: by size.
      make_objective: from a config, what to minimise; its batches are rows of tokens.
      steps: steps of training.
      seeds: how many initial values to take the mean over.
    """
    configs = [dataclasses.replace(config, model=models[size]) for size in sorted(models)]
    parts = [trained(each, make_objective, steps, seeds) for each in configs]
    return Scales(*({kind: np.concatenate([part[i][kind] for part in parts]) for kind in KINDS} for i in range(2)))


# ---------------------------------------------------------------------------------------------------------- the verdict


def slope(sizes: Sequence[int], values: np.ndarray) -> float:
    """The power of the size that the values follow, by least squares; 0 where all of them are 0, NaN where some are or
    where one is not finite."""
    if not values.any():
        return 0.0
    if not (np.isfinite(values).all() and (values > 0).all()):
        return math.nan
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def verdicts(sizes: Sequence[int], scales: Scales, axis: Axis, limit: float) -> list[Check]:
    """A check a kind, in the order of the forward pass: the first that fails is where to look."""
    if len(set(sizes)) < 2:
        raise ConfigError(axis, f"{list(sizes)} has no slope", "give two sizes or more")
    sizes = sorted(sizes)
    powers = {
        kind: [slope(sizes, values[kind][:, -1]) for values in (scales.change, scales.level)] for kind in CHECKED[axis]
    }
    return [Check(kind, change, level, limit, kind in MAY_SHRINK[axis]) for kind, (change, level) in powers.items()]


# ---------------------------------------------------------------------------------------------------------- the picture


def draw(sizes: Sequence[int], scales: Scales, axis: Axis, title: str) -> bytes:
    """The change (above) and the size (below) of each kind against the model's, a line a step, as a PNG: flat lines
    are what a parametrisation that transfers has."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import: only where it is needed
    from matplotlib.figure import Figure

    ink, sizes = "#333a45", sorted(sizes)
    figure = Figure(figsize=(2.6 * len(KINDS), 5.6), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, len(KINDS), squeeze=False)
    steps = next(iter(scales.level.values())).shape[1]
    for column, kind in enumerate(KINDS):
        for row, (values, first) in enumerate(((scales.change[kind], 1), (scales.level[kind], 0))):
            axes = panels[row][column]
            for step in range(first, steps):
                shade = 0.25 + 0.75 * step / max(1, steps - 1)
                label = f"step {step}" if row else None
                axes.plot(sizes, values[:, step], "o-", color="#2a6f97", alpha=shade, markersize=3, label=label)
            axes.set_xscale("log", base=2)
            axes.set_yscale("log", base=2)
            axes.set_xticks(sizes, [str(size) for size in sizes])
            axes.minorticks_off()
            axes.tick_params(labelsize=7, colors=ink)
            axes.grid(color="#e3e6ea", linewidth=0.8)
            power = slope(sizes, values[:, -1])
            what = f"change of {kind}" if row == 0 else kind
            axes.set_title(f"{what}: {axis}^{power:+.2f}", fontsize=8, color=ink)
            low, high = axes.get_ylim()
            if high < 4 * low:  # a flat line is to look flat
                middle = math.sqrt(low * high)
                axes.set_ylim(middle / 2, middle * 2)
    panels[1][0].legend(fontsize=6, frameon=False)
    panels[1][0].set_xlabel(axis, fontsize=8, color=ink)
    panels[0][0].set_ylabel("mean |change|", fontsize=8, color=ink)
    panels[1][0].set_ylabel("mean |value|", fontsize=8, color=ink)
    figure.suptitle(title, color=ink, fontsize=10, fontweight="bold", x=0.01, ha="left")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
