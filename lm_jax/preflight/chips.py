"""The accelerators that a step can be compiled for without them: memory, and how fast bytes move."""

from __future__ import annotations

import dataclasses

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """A JAX device: a chip, but for tpu7x, where it is one of a chip's two halves.

    Attributes:
      kind: its `device_kind`, by which `costs.peak_flops` knows its peak.
      memory: bytes that a program may use, as the compiler says when one needs more.
      memory_bandwidth: bytes a second between the chip's memory and its cores.
      link: bytes a second of one link to a neighbour, in one direction.
      dimensions: of the torus that the links make.
      wraps: along a dimension of how many chips (and multiples) the last is a neighbour of the first.
      network: bytes a second of a device's share of its host's network, in one direction.
      per_chip: devices a chip.
    """

    kind: str
    memory: int
    memory_bandwidth: float
    link: float
    dimensions: int
    wraps: int
    network: float
    per_chip: int = 1


# Bandwidths as Google's pages of each version give them (docs.cloud.google.com/tpu/docs/v5e, v5p, v6e, tpu7x): a chip's
# interconnect there is all links, both directions; the network is a host's, over its chips.
CHIPS = {
    "v5e": Chip("TPU v5 lite", int(15.75 * GIB), 819e9, 400e9 / 8, 2, 16, 200e9 / 8 / 8),
    "v5p": Chip("TPU v5", int(95.73 * GIB), 2765e9, 1200e9 / 12, 3, 4, 200e9 / 8 / 4),
    "v6e": Chip("TPU v6 lite", int(31.24 * GIB), 1638e9, 800e9 / 8, 2, 16, 1500e9 / 8 / 8 / 8),
    "tpu7x": Chip("TPU7x", int(94.74 * GIB), 7380e9 / 2, 1200e9 / 12, 3, 4, 100e9 / 8 / 2, 2),
}
