"""The accelerators that a step can be compiled for without them: memory, and how fast bytes move."""

from __future__ import annotations

import dataclasses
import re

from jax.sharding import AbstractDevice

from lm_jax.errors import UserError
from lm_jax.slices import slice_of

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """A JAX device: a chip, but for tpu7x, where it is one of a chip's two halves.

    Attributes:
      kind: its `device_kind`, by which `costs.peak_flops` knows its peak.
      memory: bytes that a program may use: on TPUs as the compiler says when one needs more, on GPUs what JAX takes of
        them unless told otherwise (three quarters).
      memory_bandwidth: bytes a second between the chip's memory and its cores.
      link: bytes a second, in one direction, of one of a TPU's links to its neighbours, or of all of a GPU's to the
        others of its host.
      wraps: along a dimension of how many TPUs (and multiples) the last is a neighbour of the first.
      network: bytes a second of a device's share of its host's network, in one direction.
      per_chip: devices a chip.
    """

    kind: str
    memory: int
    memory_bandwidth: float
    link: float
    wraps: int
    network: float
    per_chip: int = 1

    @property
    def platform(self) -> str:
        return "tpu" if self.kind.startswith("TPU") else "gpu"


# Bandwidths of TPUs as Google's pages of each version give them (docs.cloud.google.com/tpu/docs/v5e, v5p, v6e, tpu7x):
# a chip's interconnect there is all links, both directions; the network is a host's, over its chips. Of GPUs, as
# NVIDIA's data sheets have them, with a 400 Gbit/s port a GPU.
CHIPS = {
    "v5e": Chip("TPU v5 lite", int(15.75 * GIB), 819e9, 400e9 / 8, 16, 200e9 / 8 / 8),
    "v5p": Chip("TPU v5", int(95.73 * GIB), 2765e9, 1200e9 / 12, 4, 200e9 / 8 / 4),
    "v6e": Chip("TPU v6 lite", int(31.24 * GIB), 1638e9, 800e9 / 8, 16, 1500e9 / 8 / 8 / 8),
    "tpu7x": Chip("TPU7x", int(94.74 * GIB), 7380e9 / 2, 1200e9 / 12, 4, 100e9 / 8 / 2, 2),
    "h100": Chip("NVIDIA H100", int(0.75 * 80 * GIB), 3350e9, 900e9 / 2, 1, 400e9 / 8),
    "h200": Chip("NVIDIA H200", int(0.75 * 140.4 * GIB), 4800e9, 900e9 / 2, 1, 400e9 / 8),
}
GPUS_OF_A_HOST = 8


@dataclasses.dataclass(frozen=True)
class Target:
    """What a step is compiled for.

    Attributes:
      name: `v5p:4x4x4`, `h200:8`.
      chip: of `CHIPS`.
      chips: how many.
      torus: how many TPUs a slice has along each dimension; empty for GPUs.
      slices: how many of it, joined by a network.
    """

    name: str
    chip: Chip
    chips: int
    torus: tuple[int, ...]
    slices: int = 1

    @property
    def devices(self) -> int:
        """All of them."""
        return self.chips * self.chip.per_chip * self.slices

    @property
    def device(self) -> AbstractDevice:
        """What they are, for meshes that are only described."""
        return AbstractDevice(self.chip.kind, 1, self.chip.platform)


def target_of(text: str, slices: int = 1) -> Target:
    """What `--topology` means: a slice as `lm_jax.slices` has them, or so many GPUs: `h200:8`.

    Raises:
      UserError: there is none, or it cannot be compiled for.
    """
    if gpus := re.fullmatch(r"(h\d+):(\d+)", text.strip().lower()):
        kind, count = gpus[1], int(gpus[2])
        if kind not in CHIPS:
            raise UserError(f"--topology: there is no compiler here for {kind}\nuse one of {', '.join(CHIPS)}")
        if (count > GPUS_OF_A_HOST and count % GPUS_OF_A_HOST) or count < 1:
            near = max(1, round(count / GPUS_OF_A_HOST)) * GPUS_OF_A_HOST
            raise UserError(f"--topology: hosts have {GPUS_OF_A_HOST} GPUs, not {text}\nthe nearest is {kind}:{near}")
        if slices > 1:
            raise UserError(f"--slices={slices} is for TPUs: write all GPUs, {kind}:{count * slices}")
        return Target(f"{kind}:{count}", CHIPS[kind], count, ())
    where = slice_of(text)
    if where.generation not in CHIPS:
        raise UserError(f"--topology: {where.name} cannot be compiled for\nuse one of {', '.join(CHIPS)}")
    torus = tuple(int(size) for size in where.topology.split("x"))
    return Target(where.name, CHIPS[where.generation], where.chips, torus, slices)
