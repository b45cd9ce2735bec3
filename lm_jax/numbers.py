"""The numbers of a model that one works out before training it: bytes a parameter, activations, the key-value cache,
training time and its price, and what rate of use of the chips (MFU) a budget implies.

No layout of devices comes into it: `costs.memory` says what a device of a mesh needs. Nothing runs here.

Shapes: L layers, D embed, K key-value heads, H head dim.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractDevice, AbstractMesh

from lm_jax import costs
from lm_jax.config import did_you_mean
from lm_jax.errors import UserError
from lm_jax.models.transformer import TransformerConfig, transformer_specs
from lm_jax.params import ParamSpec, named, role
from lm_jax.sharding import MeshConfig

POLICIES = ("none", "dots", "attention", "full")  # of remat, those that keep everything on the chip

# --------------------------------------------------------------------------------------------------------------- chips


class Chip(NamedTuple):
    """A chip as one rents it.

    Attributes:
      kind: what jax calls its devices.
      devices: how many of them it is: two halves for some TPUs.
    """

    kind: str
    devices: int = 1

    @property
    def peak(self) -> float:
        """FLOPs a second in bfloat16, as its maker publishes them."""
        peak = costs.peak_flops(self.kind)
        assert peak is not None  # a test holds this for every chip
        return self.devices * peak


CHIPS = {
    "v2": Chip("TPU v2", 2),
    "v3": Chip("TPU v3", 2),
    "v4": Chip("TPU v4"),
    "v5e": Chip("TPU v5 lite"),
    "v5p": Chip("TPU v5p"),
    "v6e": Chip("TPU v6 lite"),
    "tpu7x": Chip("TPU7x", 2),
    "a10": Chip("NVIDIA A10"),
    "a10g": Chip("NVIDIA A10G"),
    "a100": Chip("NVIDIA A100"),
    "l4": Chip("NVIDIA L4"),
    "l40s": Chip("NVIDIA L40S"),
    "h100": Chip("NVIDIA H100"),
    "h100-nvl": Chip("NVIDIA H100 NVL"),
    "h100-pcie": Chip("NVIDIA H100 PCIe"),
    "h200": Chip("NVIDIA H200"),
    "h200-nvl": Chip("NVIDIA H200 NVL"),
    "gh200": Chip("NVIDIA GH200"),
    "b200": Chip("NVIDIA B200"),
    "gb200": Chip("NVIDIA GB200"),
    "rtx3090": Chip("NVIDIA GeForce RTX 3090"),
    "rtx4090": Chip("NVIDIA GeForce RTX 4090"),
}


def chip(name: str) -> Chip:
    """A chip by its short name.

    Raises:
      UserError: it is not known; names the nearest, or all.
    """
    known = CHIPS.get(name.lower())
    if known is None:
        raise UserError(f"--chip: unknown chip {name!r}\n{did_you_mean(name, list(CHIPS))}")
    return known


def mesh_of(chip: Chip) -> AbstractMesh:
    """A mesh of one such device, for what is traced to be what that device would run: its kernels, its dtype."""
    platform = "tpu" if chip.kind.startswith("TPU") else "gpu"
    mesh = costs.abstract_mesh(MeshConfig(), 1)
    return mesh.update(abstract_device=AbstractDevice(device_kind=chip.kind, num_cores=1, platform=platform))


def compute_dtype(c: TransformerConfig, chip: Chip) -> Any:
    """The numpy dtype in which a model computes on a chip."""
    with jax.sharding.use_abstract_mesh(mesh_of(chip)):
        return jnp.dtype(c.compute_dtype)


# --------------------------------------------------------------------------------------------------------------- FLOPs


def flops_per_token(c: TransformerConfig, length: int) -> dict[str, float]:
    """Training FLOPs a token in rows of `length`, by each of the usual ways to count.

    Returns:
      `causal`: what this project counts (`costs.flops_per_token`): matrices, and attention to what a position sees;
      `all_pairs`: the same with attention to every position of the row, as Chowdhery et al. 2022 (arXiv:2204.02311,
        appendix B) and most published rates of use count;
      `kaplan`: 6 N, N without the embedding (Kaplan et al. 2020, arXiv:2001.08361);
      `chinchilla`: 6 N, N all parameters (Hoffmann et al. 2022, arXiv:2203.15556). Neither 6 N knows attention.
    """
    counts = costs.parameters(c)
    return {
        "causal": costs.flops_per_token(c, length),
        "all_pairs": costs.flops_per_token(c, length, causal=False),
        "kaplan": 6.0 * counts["without_embedding"],
        "chinchilla": 6.0 * counts["total"],
    }


# -------------------------------------------------------------------------------------------------- bytes a parameter


class Recipe(NamedTuple):
    """Bytes a parameter that a scheme of precisions holds through a step, beside the optimizer's float32 state."""

    weights: int
    gradient: int
    master: int


RECIPES = {
    # Compute in float32. lm_jax holds the same when it computes in bfloat16: the float32 weights are the master copy,
    # and their bfloat16 casts live for a layer's compute (or as long as activations do; see `activations`).
    "float32": Recipe(4, 4, 0),
    # bfloat16 weights and gradients beside a float32 copy of the weights that the optimizer updates (Micikevicius et
    # al. 2018, arXiv:1710.03740; Rajbhandari et al. 2020, arXiv:1910.02054, section 3.1).
    "mixed": Recipe(2, 2, 4),
}


def state_numbers(c: TransformerConfig, optimizer: str) -> int:
    """How many numbers an optimizer remembers of a model's parameters, its counters of steps left out.

    Args:
      c: the model, its vocabulary given.
      optimizer: a name of `STATE`.
    """
    return sum(STATE[optimizer](spec) for spec in named(transformer_specs(c)).values())


def _one_each(spec: ParamSpec) -> int:
    return math.prod(spec.shape)


def _factored(spec: ParamSpec) -> int:
    """Adafactor's second moment, as optax keeps it: two means, each over one of the parameter's two largest dimensions,
    where both are 128 or more; else one number each. What is not used stands there as a single number."""
    order = sorted(range(len(spec.shape)), key=lambda d: spec.shape[d])
    if len(order) < 2 or spec.shape[order[-2]] < 128:
        return math.prod(spec.shape) + 2
    return sum(math.prod(spec.shape) // spec.shape[d] for d in order[-2:]) + 1


def _muon(spec: ParamSpec) -> int:
    return math.prod(spec.shape) * (1 if role(spec) == "matrix" else 2)


STATE = {
    "sgd without momentum": lambda spec: 0,
    "sgd": _one_each,
    "lion": _one_each,
    "adamw": lambda spec: 2 * _one_each(spec),
    "adafactor": _factored,
    "muon": _muon,
}


def bytes_per_parameter(c: TransformerConfig, optimizer: str, recipe: str) -> dict[str, float]:
    """Bytes a parameter through a training step, activations left out.

    Args:
      c: the model, its vocabulary given.
      optimizer: a name of `STATE`; its state is float32.
      recipe: a name of `RECIPES`.

    Returns:
      `weights`, `gradient`, `master`, `state`, and their `total`.
    """
    state = 4 * state_numbers(c, optimizer) / costs.parameters(c)["total"]
    held = {**RECIPES[recipe]._asdict(), "state": state}
    return held | {"total": sum(held.values())}


# -------------------------------------------------------------------------------------------- activations and the cache


def activations(c: TransformerConfig, length: int, chip: Chip) -> dict[str, dict[str, float]]:
    """What a layer keeps for the backward pass on a chip, asked of JAX, by remat policy.

    Args:
      c: the model, its vocabulary given.
      length: tokens of a row.
      chip: whose kernels and dtype count.

    Returns:
      By name of `POLICIES`: `bytes`, of one layer and one token; `weight_bytes`, of one layer however many tokens there
      are: its weights in the dtype of compute, where they are kept too.
    """
    found = {}
    for policy in POLICIES:
        row, once = costs.kept_by_a_layer(c, mesh_of(chip), length, policy)
        found[policy] = {"bytes": row / length, "weight_bytes": once}
    return found


def cache_bytes(c: TransformerConfig, itemsize: int, kv_heads: int | None = None) -> int:
    """Bytes of the key-value cache a token: 2 L K H numbers in the dtype of compute, as generation stores them.

    A window does not make it shorter: the cache holds all tokens of a row.

    Args:
      c: the model.
      itemsize: bytes a number.
      kv_heads: key-value heads; None: the model's own.
    """
    return 2 * c.layers * (c.key_heads if kv_heads is None else kv_heads) * c.head_size * itemsize


def caches(c: TransformerConfig, itemsize: int) -> dict[str, int]:
    """`cache_bytes` of the model's own heads (`own`), and were they `MHA` (a key-value head a query head), `GQA` (8 of
    them, where they are shared evenly; Ainslie et al. 2023, arXiv:2305.13245) or `MQA` (one; Shazeer 2019,
    arXiv:1911.02150)."""
    heads = {"own": c.key_heads, "MHA": c.heads, "GQA": 8, "MQA": 1}
    return {name: cache_bytes(c, itemsize, k) for name, k in heads.items() if c.heads % k == 0}


# -------------------------------------------------------------------------------------------- time, price, the inverse


def training_hours(flops: float, chips: int, peak: float, mfu: float) -> float:
    """Hours of training: FLOPs / (chips * peak * MFU).

    Args:
      flops: of the whole training.
      chips: how many.
      peak: FLOPs a second of each.
      mfu: the share of the peak that goes into `flops`, above 0 and at most 1.

    Raises:
      UserError: a rate of use, or a number of chips, that there cannot be.
    """
    if not 0 < mfu <= 1:  # false of NaN as well
        raise UserError(f"--mfu: {mfu:g} is no share of the peak\nuse a number above 0, at most 1; 0.4 is usual")
    if chips < 1:
        raise UserError(f"--chips: {chips} is too few\nuse 1 or more")
    return flops / (chips * peak * mfu) / 3600


def implied_mfu(flops: float, chip_hours: float, peak: float) -> float:
    """The rate of use at which so many chip-hours are spent on so many FLOPs. Above 1 no chip can be.

    Raises:
      UserError: hours that are not above 0.
    """
    if not 0 < chip_hours < math.inf:
        raise UserError(f"--chip_hours: {chip_hours:g} is out of range\nuse a number above 0")
    return flops / (chip_hours * 3600 * peak)
