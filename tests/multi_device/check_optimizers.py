"""Each stage of `mesh.zero` under each optimizer, on eight devices against one: updates, and how the state is split.

Its arguments: names of optimizers.
"""

import sys
from typing import Any

import jax
import numpy as np

from lm_jax.objectives.next_token import next_token
from lm_jax.params import Tree, named, path_name
from lm_jax.sharding import MeshConfig, abstract
from lm_jax.training.optimizers import OptimizerConfig
from lm_jax.training.program import make_program
from lm_jax.training.run import RunConfig, TrainConfig
from lm_jax.training.state import TrainState
from tests.multi_device import layouts
from tests.support import tiny

C = tiny.config(heads=16, kv_heads=8, head_dim=4, feed_forward_dim=64, qk_norm=True)
STEPS = 2


def updates(name: str, mesh_config: MeshConfig) -> tuple[dict[str, np.ndarray], TrainState, Tree]:
    """What each of two steps on the same state's weights changes, by parameter; the last state; the specs."""
    mesh = layouts.mesh_of(mesh_config)
    # The rate is the same from the first step, so that the updates are of a size that can be compared. AdamW's first
    # update is a gradient's sign: of one near zero it would be rounding's, but for an eps of its size.
    rest = {"eps": 1e-4} if name == "adamw" else {}
    optimizer = OptimizerConfig(name=name, learning_rate=1e-2, warmup_steps=0, schedule="constant", **rest)
    train = TrainConfig(steps=STEPS, batch_size=16, length=16)
    config = RunConfig(model=C, mesh=mesh_config, train=train, optimizer=optimizer)
    with jax.set_mesh(mesh):
        program = make_program(config, mesh, next_token(C, layout=mesh_config.layout))
        state, found = program.init(), {}
        before = {k: np.asarray(v, np.float64) for k, v in named(state.params).items()}
        for step in range(STEPS):
            state, _ = program.train_step(state, layouts.place_batch(tiny.batch(16, 16), mesh))
            after = {k: np.asarray(v, np.float64) for k, v in named(state.params).items()}
            found |= {f"{k} of step {step + 1}": after[k] - before[k] for k in after}
            before = after
        return found, state, program.specs


def check_split(state: TrainState, specs: Tree, mesh_config: MeshConfig) -> None:
    """The optimizer's state is split over `fsdp` at every stage; the weights at the third alone."""
    mesh = layouts.mesh_of(mesh_config)
    with jax.set_mesh(mesh):
        whole: dict[str, Any] = named(abstract(specs, mesh, drop=mesh_config.weights_drop))
        split: dict[str, Any] = named(abstract(specs, mesh))
    seen = 0
    for path, leaf in jax.tree_util.tree_flatten_with_path(state.opt_state)[0]:
        for name, like in split.items():
            if path_name(path).endswith("/" + name) and leaf.shape == like.shape:
                assert leaf.sharding.is_equivalent_to(like.sharding, leaf.ndim), (mesh_config, name, leaf.sharding)
                seen += "fsdp" in str(like.sharding.spec)
    assert seen > 4, seen
    for name, leaf in named(state.params).items():
        assert leaf.sharding.is_equivalent_to(whole[name].sharding, leaf.ndim), (mesh_config, name, leaf.sharding)


def main(names: list[str]) -> None:
    assert len(jax.devices()) == 8
    for name in names:
        want, _, _ = updates(name, layouts.ONE)
        for zero in (1, 2, 3):
            mesh_config = MeshConfig(data=2, fsdp=2, tensor=2, zero=zero)
            got, state, specs = updates(name, mesh_config)
            check_split(state, specs, mesh_config)
            worst = max((layouts.relative(got[k], want[k]), k) for k in want)
            assert worst[0] < (1e-3 if name == "muon" else 1e-4), (name, zero, worst)
            print(name, zero, worst, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
