"""Twenty steps on layouts of eight devices against one device; and each layout's checkpoint restored on each other.

Arguments: a list of layouts by name, an empty folder, and for one of two processes `HOST:PORT` and its number.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import jax
from etils import epath
from jax.sharding import Mesh

from lm_jax.objectives.next_token import next_token
from lm_jax.sharding import MeshConfig, make_mesh
from lm_jax.training.checkpoint import CheckpointConfig, Checkpointer
from lm_jax.training.optimizers import OptimizerConfig
from lm_jax.training.program import Program, make_program
from lm_jax.training.run import RunConfig, TrainConfig
from tests.multi_device import layouts
from tests.support import tiny

STEPS, BATCHES = 20, 5
LAYOUTS = {
    "sample": [MeshConfig(data=1, fsdp=2, sequence=2, tensor=2, zero=2, context="ring", split_residual=True)],
    "all": [
        *[MeshConfig(data=2, fsdp=4, zero=zero) for zero in (1, 2, 3)],
        *[dataclasses.replace(MeshConfig(data=1), **{axis: 8}) for axis in ("data", "fsdp", "sequence", "tensor")],
        *[MeshConfig(data=1, fsdp=2, sequence=4, context=c) for c in ("gather", "ring", "all_to_all")],
        *[MeshConfig(data=1, fsdp=2, sequence=2, tensor=2, split_residual=s, context="ring") for s in (False, True)],
        MeshConfig(data=2, sequence=2, tensor=2, context="all_to_all"),
        MeshConfig(data=2, fsdp=2, tensor=2, zero=1, split_residual=True),
        MeshConfig(data=2, fsdp=2, sequence=2, zero=2, offload_optimizer=True),
        MeshConfig(data=2, tensor=4),
        MeshConfig(data=4, sequence=2),
        MeshConfig(data=1, sequence=4, tensor=2),
    ],
}


def program(mesh_config: MeshConfig, mesh: Mesh) -> Program:
    model = tiny.config(heads=16, kv_heads=8, head_dim=4, feed_forward_dim=64, qk_norm=True)
    train = TrainConfig(steps=STEPS, batch_size=16, length=32, z_loss=1e-4, microbatches=2, remat="full")
    optimizer = OptimizerConfig(warmup_steps=4, learning_rate=3e-3)
    config = RunConfig(model=model, mesh=mesh_config, train=train, optimizer=optimizer)
    return make_program(
        config, mesh, next_token(model, z_loss=train.z_loss, remat=train.remat, layout=mesh_config.layout)
    )


def run(mesh_config: MeshConfig, mesh: Mesh, folder: Path | None) -> list[float]:
    """The losses; the last state is saved where a folder is given."""
    with jax.set_mesh(mesh):
        p, losses = program(mesh_config, mesh), []
        state = p.init()
        for step in range(STEPS):
            batch = layouts.place_batch(tiny.batch(16, 32, seed=step % BATCHES), mesh)
            state, metrics = p.train_step(state, batch)
            losses.append(float(metrics["loss"]))
        if folder is not None:
            checkpoints = Checkpointer(epath.Path(folder), CheckpointConfig())
            checkpoints.save(STEPS, state, {"rows": 0}, force=True)
            checkpoints.wait()
            checkpoints.close()
    return losses


def restore(mesh_config: MeshConfig, mesh: Mesh, folder: Path) -> None:
    """A checkpoint read onto a layout, which compares every leaf with the fingerprint that was saved with it."""
    with jax.set_mesh(mesh):
        wanted = program(mesh_config, mesh).abstract
        checkpoints = Checkpointer(epath.Path(folder), CheckpointConfig())
        restored = checkpoints.restore(wanted)
        checkpoints.close()
    assert restored is not None and restored.step == STEPS
    for a, want in zip(jax.tree.leaves(restored.tree), jax.tree.leaves(wanted), strict=True):
        assert a.sharding == want.sharding, (a.sharding, want.sharding)


def main(which: str, folder: str, address: str = "", process: str = "0") -> None:
    if address:
        jax.distributed.initialize(address, 2, int(process))
    assert jax.device_count() == 8
    one = make_mesh(layouts.ONE, jax.local_devices()[:1])
    want = run(layouts.ONE, one, None)
    assert want[-1] < want[0] - 0.1, want
    for n, config in enumerate(LAYOUTS[which]):
        got = run(config, make_mesh(config), Path(folder) / str(n))
        worst = max(abs(a / b - 1) for a, b in zip(got, want, strict=True))
        assert worst < 5e-6, (config, worst)
        print(config, worst, flush=True)
    for n in range(len(LAYOUTS[which])):
        for config in LAYOUTS[which]:
            restore(config, make_mesh(config), Path(folder) / str(n))
    print("restored on each other", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
