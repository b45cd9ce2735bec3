"""What a layout's arithmetic calls for: the bytes of a training step's collectives, by kind and mesh axes.

`expected` counts from the config alone, `hlo.measured` from the program that a compiler made of it; what the second has
more than the first is a layout's mistake. Bytes are those of one device and one step, of the larger side of each
operation (`hlo.py` says it in full).

Shapes: B rows and T tokens of a row (b, t: a device's, of a micro-batch), D embed, V vocabulary, K key-value heads, N
query heads, H head dim, L layers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

import numpy as np

from lm_jax.hlo import Traffic
from lm_jax.kernels.cross_entropy import chunk_bytes
from lm_jax.kernels.flash_attention import AttentionMask
from lm_jax.kernels.flash_attention.ring import steps_of
from lm_jax.models.transformer import TransformerConfig, transformer_specs
from lm_jax.params import ParamSpec, named
from lm_jax.sharding import AXES, TABLE, MeshConfig

_ROWS = ("data", "fsdp", "sequence")  # the axes that split what a weight's gradient is summed over
_F32 = 4


def expected(
    c: TransformerConfig,
    mesh_config: MeshConfig,
    devices: int,
    *,
    batch_size: int,
    length: int,
    remat: str = "none",
    microbatches: int = 1,
) -> Traffic:
    """Bytes of a device and step by kind and mesh axes (those of more than one part).

    - Weights are gathered over `fsdp` in the dtype of compute: a layer's in the forward pass, and once more in the
      backward pass where there is remat; table and output once. With `zero` below 3 the new weights are, once, in
      float32.
    - Gradients are summed over all axes that split rows or length, in the dtype in which the product gives them: that
      of compute, and float32 for the output, whose chunks are added up. Each device then needs its part over `fsdp`:
      that is a reduce-scatter, but where gradients stay whole (no `fsdp`; the layers' with `zero` 1).
    - `tensor`: the sums behind both output projections, and in the backward pass those of the gradients of both inputs
      (with `split_residual` each is a reduce-scatter, and each input and each output's gradient is gathered); behind
      the look-up in the table (with `split_residual` the table is gathered, its gradient scattered); in the loss.
    - `sequence`: keys, values and their gradients, as `context` says.

    Not counted: the scalars of loss, metrics and guard, ids of tokens beside segments and positions, sinks and tables
    of biases, what an optimizer moves that needs whole matrices (Muon).

    Args:
      c: the model, its vocabulary given, and its dtype, unless a mesh is entered.
      mesh_config: the mesh.
      devices: how many it has.
      batch_size: rows of a step, over all devices.
      length: tokens of a row.
      remat: a name of `REMAT`.
      microbatches: into how many parts a step's rows are cut.
    """
    size = mesh_config.sizes(devices)
    rows = batch_size // (size["data"] * size["fsdp"] * microbatches)
    item = np.dtype(c.compute_dtype).itemsize
    step = _Step(c, mesh_config, size, rows, length, item, remat)
    _weights(step)
    _gradients(step)
    _tensor(step)
    {"gather": _gathered, "ring": _ring, "all_to_all": _all_to_all}[mesh_config.context](step)
    found = {key: n * microbatches for key, n in step.traffic.items()}
    if mesh_config.zero < 3:
        _add(found, size, "all-gather", ("fsdp",), _F32 * sum(step.numbers(s) for s in step.specs.values() if _over(s)))
    return found


def _add(traffic: Traffic, size: dict[str, int], kind: str, axes: Iterable[str], n: float) -> None:
    key = kind, tuple(a for a in AXES if a in axes and size[a] > 1)
    if key[1] and n:
        traffic[key] = traffic.get(key, 0) + n


def _over(spec: ParamSpec, axis: str = "fsdp") -> bool:
    """Whether a mesh axis splits a weight."""
    return any(axis in TABLE[name] for name in spec.axes)


@dataclasses.dataclass
class _Step:
    """One micro-batch on one device, and what it has sent so far."""

    c: TransformerConfig
    mesh: MeshConfig
    size: dict[str, int]
    rows: int
    length: int
    item: int
    remat: str
    traffic: Traffic = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        self.specs = named(transformer_specs(self.c))
        self.tokens = self.rows * self.length // self.size["sequence"]
        self.residual = self.item * self.tokens * self.c.embed  # bytes, whole over tensor

    def add(self, kind: str, axes: Iterable[str], n: float) -> None:
        _add(self.traffic, self.size, kind, axes, n)

    def numbers(self, spec: ParamSpec) -> int:
        """Of a weight that is whole over fsdp."""
        return math.prod(spec.shape) // (self.size["tensor"] if _over(spec, "tensor") else 1)

    def heads(self, heads: int) -> float:
        """Bytes of a device's part of keys, values, queries or what attention gives."""
        return self.item * self.tokens * heads * self.c.head_size / self.size["tensor"]


def _weights(step: _Step) -> None:
    if step.mesh.zero == 3:
        for name, spec in step.specs.items():
            again = name.startswith("blocks/") and step.remat != "none"
            times = 2 if again or (step.c.tied and name == "embedding") else 1
            step.add("all-gather", ("fsdp",), times * step.item * step.numbers(spec) * _over(spec))


def _gradients(step: _Step) -> None:
    whole_table = step.mesh.split_residual and step.size["tensor"] > 1
    for name, spec in step.specs.items():
        axes: tuple[str, ...] = _ROWS
        n = step.item * step.numbers(spec)
        in_a_layer = name.startswith("blocks/")
        scattered = _over(spec) and step.size["fsdp"] > 1 and (step.mesh.zero > 1 or not in_a_layer)
        if name == "output":
            n = _F32 * step.numbers(spec)
        elif name == "embedding" and whole_table:
            axes, n, scattered = AXES, step.item * math.prod(spec.shape), True
        elif name.endswith("/gain"):
            over_tensor = whole_table or name.split("/")[-2] in ("query_norm", "key_norm")
            axes, n = AXES if over_tensor else _ROWS, _F32 * step.numbers(spec)
        step.add("reduce-scatter" if scattered else "all-reduce", axes, n)
        if name == "embedding" and step.c.tied:
            step.add("reduce-scatter" if scattered else "all-reduce", _ROWS, _F32 * step.numbers(spec))


def _tensor(step: _Step) -> None:
    c, x, axes = step.c, step.residual, ("tensor",)
    # Two sums forward and two backward; what follows attention has to be known again before the feed-forward.
    sums = c.layers * (4 + (step.remat in ("full", "attention")))
    if step.mesh.split_residual:
        step.add("reduce-scatter", axes, sums * x)
        # Two inputs forward, and again with remat; the gradients of two outputs; what the last norm gives.
        step.add("all-gather", axes, (c.layers * (4 + 2 * (step.remat != "none")) + 1) * x)
        step.add("all-gather", axes, step.item * math.prod(step.specs["embedding"].shape))
    else:
        step.add("all-reduce", axes, (sums + 1) * x)
    # The gradient of the hidden states. Where the residual is split, each device needs a part of it, but a chunk's rows
    # are not those of a part: only a loss of one chunk scatters the sum.
    one_chunk = step.tokens <= chunk_bytes() * step.size["tensor"] // (_F32 * c.ids)
    step.add("reduce-scatter" if step.mesh.split_residual and one_chunk else "all-reduce", axes, x)
    # A row's largest logit, the sum of its exponentials, the target's logit.
    step.add("all-reduce", axes, 3 * _F32 * step.tokens)


def _gathered(step: _Step) -> None:
    s, axes = step.size["sequence"], ("sequence",)
    passes = step.c.layers * (1 + (step.remat != "none"))
    keys_and_values = 2 * s * step.heads(step.c.key_heads)
    ids = _F32 * s * step.tokens
    step.add("all-gather", axes, passes * keys_and_values + ids)
    step.add("reduce-scatter", axes, step.c.layers * keys_and_values)


def _ring(step: _Step) -> None:
    s, axes = step.size["sequence"], ("sequence",)
    if s == 1:
        return
    steps = steps_of(AttentionMask(window=step.c.window), step.length, s)
    keys_and_values = 2 * step.heads(step.c.key_heads)
    # Forward and backward; where the forward pass is done again, the backward pass has that one's first arrivals.
    again = step.remat in ("full", "dots", "offload")
    hops = 3 * (steps - 1) - 1 if again and steps > 1 else 2 * (steps - 1)
    there = hops * (keys_and_values + _F32 * step.tokens)
    # Gradients follow the keys and come home: at first one product's, in the dtype of compute, then sums in float32.
    back = keys_and_values * (1 + (steps - 1) * _F32 / step.item) if steps > 1 else 0
    step.add("collective-permute", axes, step.c.layers * (there + back))
    step.add("all-gather", axes, (4 * _F32 + 1) * s * step.tokens)  # the arrays of a batch, to be put in order


def _all_to_all(step: _Step) -> None:
    c, parts = step.c, step.size["tensor"] * step.size["sequence"]
    copies = next(n for n in range(1, c.heads + 1) if c.heads // c.key_heads % n == 0 and c.key_heads * n % parts == 0)
    moved = 2 * step.heads(c.heads) + 2 * step.heads(c.key_heads * copies)
    passes = 2 + (step.remat != "none")
    step.add("all-to-all", ("sequence",), c.layers * passes * moved)
    step.add("all-gather", ("sequence",), _F32 * step.size["sequence"] * step.tokens)  # segment ids
