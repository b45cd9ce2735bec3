"""Preflight's roofline beside published steps on TPUs: `python -m benchmarks.published_steps`.

MaxText's own tables (MaxText/configs/v5e/README.md and v5p/README.md, github.com/AI-Hypercomputer/maxtext) give TFLOP/s
a chip of models whose shapes, batches, meshes and remat are in the scripts beside them. Those count all pairs of
positions in attention, so a step's time follows from them; the same models in our program are compiled for the same
slices, and the roofline is compared with that time. Needs libtpu, no TPU.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

from lm_jax import costs
from lm_jax.models.transformer import TransformerConfig
from lm_jax.preflight.chips import target_of
from lm_jax.preflight.verdict import preflight
from lm_jax.sharding import MeshConfig
from lm_jax.training.run import RunConfig, TrainConfig


class Published(NamedTuple):
    """A row of the tables, and what its script says of the run."""

    name: str
    topology: str
    tflops: float  # a chip and second
    embed: int
    layers: int
    heads: int
    feed_forward: int
    rows: int  # a chip
    tensor: int
    remat: str


LENGTH, VOCABULARY, HEAD_DIM = 2048, 32_000, 128
ROWS = (
    Published("16B", "v5e:16x16", 120, 4096, 32, 64, 28672, 6, 1, "full"),
    Published("32B", "v5e:16x16", 132, 8192, 32, 64, 28672, 4, 1, "full"),
    Published("32B", "v5p:4x4x4", 328, 8192, 32, 64, 28672, 7, 4, "dots"),
)


def compare(row: Published) -> tuple[float, float, bool]:
    """Seconds of a published step, of our roofline, and whether ours fits."""
    target = target_of(row.topology)
    model = TransformerConfig(
        layers=row.layers,
        embed=row.embed,
        heads=row.heads,
        head_dim=HEAD_DIM,
        feed_forward_dim=row.feed_forward,
        vocab=VOCABULARY,
    )
    mesh = MeshConfig(data=1, fsdp=-1, tensor=row.tensor)
    train = TrainConfig(batch_size=row.rows * target.devices, length=LENGTH, remat=row.remat)
    verdict = preflight(RunConfig(model=model, mesh=mesh, train=train), target)
    flops = costs.flops_per_token(model, LENGTH, causal=False) * row.rows * LENGTH
    return flops / (row.tflops * 1e12), verdict["step"]["seconds"], verdict["fits"]


def main() -> int:
    print(f"{'model':<6} {'slice':<10} {'published':>10} {'roofline':>8} {'share':>6}")
    for row in ROWS:
        published, roofline, fits = compare(row)
        note = "" if fits else "  (ours does not fit)"
        print(f"{row.name:<6} {row.topology:<10} {published:9.2f}s {roofline:7.2f}s {roofline / published:6.0%}{note}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
