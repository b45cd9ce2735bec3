"""The self-test on a sound layout, and with faults planted on the layout alone. Its argument: which of them."""

import dataclasses
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from launch.train import objective
from lm_jax.kernels.flash_attention import AttentionMask
from lm_jax.models import attention, positions
from lm_jax.models.positions import POSITIONS
from lm_jax.models.transformer import TransformerConfig
from lm_jax.sharding import MeshConfig, axis_size
from lm_jax.training.optimizers import OptimizerConfig
from lm_jax.training.run import RunConfig, TrainConfig
from lm_jax.training.selftest import run_checks, shrunk

CONFIG = RunConfig(
    model=TransformerConfig(vocab=32_000, heads=32, kv_heads=8, layers=12, embed=1024),
    mesh=MeshConfig(data=-1, fsdp=8, sequence=2, tensor=4, zero=2),
    optimizer=OptimizerConfig(ema=0.99),
    train=TrainConfig(microbatches=4, batch_size=64, z_loss=1e-4, remat="full"),
)


def on_the_layout() -> bool:
    return axis_size("tensor") > 1


def missing_reduction() -> None:
    """The sums of the loss, and the gradient of the output, stay what each device has."""
    whole = jax.lax.psum
    jax.lax.psum = lambda x, axes, **k: x if on_the_layout() else whole(x, axes, **k)


def wrong_position() -> None:
    """The second half of a row counts from one too many."""
    rope = POSITIONS["rope"]

    def prepare(positions_BT: jax.Array, head_dim: int, c: Any) -> Any:
        T = positions_BT.shape[1]
        late = jnp.where(on_the_layout() & (jnp.arange(T) >= T // 2), 1, 0)
        return rope.prepare(positions_BT + late, head_dim, c)

    positions.POSITIONS["rope"] = rope._replace(prepare=prepare)


def leaked_segment() -> None:
    """Attention is not told where documents end."""

    def mask(**parts: Any) -> AttentionMask:
        whole = AttentionMask(**parts)
        return dataclasses.replace(whole, q_segment_ids=None, kv_segment_ids=None) if on_the_layout() else whole

    attention.AttentionMask = mask


def main(fault: str) -> None:
    assert len(jax.devices()) == 8
    small = shrunk(CONFIG, 8)
    assert small.mesh.sizes(8) == {"data": 1, "fsdp": 2, "sequence": 2, "tensor": 2}
    if fault != "none":
        globals()[fault]()
    with tempfile.TemporaryDirectory() as folder:
        for check in run_checks(small, objective, jax.devices(), Path(folder) / "checkpoints"):
            print(f"{check.name}: {check.difference:.1e} of {check.limit:.0e}", flush=True)
            if not check.ok:
                print(f"failed {check.name}: {check.suspect}")
                return
    print("all is well")


if __name__ == "__main__":
    main(sys.argv[1])
