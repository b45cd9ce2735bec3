"""The step on layouts of eight devices against one device: loss, gradients, layouts. Its argument: which of them."""

import sys

import jax
import jax.numpy as jnp

from lm_jax.models.transformer import transformer_specs
from lm_jax.objectives.next_token import next_token
from lm_jax.params import named
from lm_jax.sharding import MeshConfig, abstract
from lm_jax.training.selftest import KEEP
from lm_jax.training.state import TrainState, abstract_state
from lm_jax.training.step import make_train_step
from tests.multi_device import layouts
from tests.support import tiny

C = tiny.config(heads=16, kv_heads=8, head_dim=4, feed_forward_dim=64, qk_norm=True)
NAMES = list(named(transformer_specs(C)))
BATCH, PARAMS = tiny.batch(16, 16), tiny.parameters(C)


def run(config: MeshConfig, microbatches: int = 2) -> tuple[TrainState, dict[str, float]]:
    mesh = layouts.mesh_of(config)
    with jax.set_mesh(mesh):
        specs = transformer_specs(C)
        shapes = abstract_state(specs, KEEP, mesh, config=config)
        zero = jnp.zeros((), jnp.int32)
        kept, key = jax.tree.map(jnp.zeros_like, PARAMS), jax.random.key(0)
        state = TrainState(PARAMS, {}, {}, kept, None, zero, zero, zero, key)
        state = jax.tree.map(lambda a, s: jax.device_put(a, s.sharding), state, shapes)
        objective = next_token(C, z_loss=1e-3, remat="full", layout=config.layout)
        cut = {"microbatches": microbatches, "clip_norm": 1e6, "specs": specs, "mesh": config}
        step = make_train_step(objective, KEEP, lambda updates: 0.0, **cut)
        new, metrics = jax.jit(step)(state, layouts.place_batch(BATCH, mesh))
        split = jax.tree.leaves(abstract(specs, mesh))
        for name, a, s in zip(NAMES, jax.tree.leaves(new.opt_state), split, strict=True):
            on_device = a.sharding.with_memory_kind(s.sharding.memory_kind)  # offloaded, it is on the host
            assert on_device.is_equivalent_to(s.sharding, a.ndim), f"{config}: the gradient of {name} is {a.sharding}"
        for name, a, s in zip(NAMES, jax.tree.leaves(new.params), jax.tree.leaves(shapes.params), strict=True):
            assert a.sharding.is_equivalent_to(s.sharding, a.ndim), f"{config}: {name} is {a.sharding}"
        return jax.device_get(new.replace(key=None)), {k: v.item() for k, v in metrics.items()}


def main(which: str) -> None:
    assert len(jax.devices()) == 8
    expected, metrics = run(layouts.ONE, microbatches=1)
    for config in getattr(layouts, which):
        state, got = run(config)
        assert got["batch_hash"] == metrics["batch_hash"] and got["targets"] == metrics["targets"], config
        for name in ("loss", "z_loss", "grad_norm"):
            assert abs(got[name] / metrics[name] - 1) < 1e-6, (config, name, got[name], metrics[name])
        leaves = zip(NAMES, jax.tree.leaves(state.opt_state), jax.tree.leaves(expected.opt_state), strict=True)
        worst = max((layouts.relative(a, b), name) for name, a, b in leaves)
        assert worst[0] < 5e-6, (config, worst)
        print(config, worst, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
