"""A compiled training step moves between chips what its layout calls for, and no more.

Byte for byte it mostly is the same; 5% are allowed of each kind and axis, and so is a thousandth of all bytes
(scalars).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding

from lm_jax.collectives import expected
from lm_jax.hlo import Traffic, collectives, measured
from lm_jax.models.transformer import TransformerConfig
from lm_jax.objectives.next_token import next_token
from lm_jax.sharding import MeshConfig, out_sharding, partition
from lm_jax.training.program import make_program
from lm_jax.training.run import RunConfig, TrainConfig
from tests.support.tpu import mesh_of_chips

# Compiles in some ten seconds; what a device computes alone does not matter here, so attention is the plainest.
SMALL = TransformerConfig(
    layers=3,
    embed=128,
    heads=4,
    kv_heads=2,
    feed_forward_dim=256,
    vocab=512,
    dtype="bfloat16",
    attention_kernel="reference",
)
LLAMA_7B = TransformerConfig(
    layers=32, embed=4096, heads=32, feed_forward_dim=11008, vocab=32000, norm_epsilon=1e-5, dtype="bfloat16"
)


def compiled_step(c: TransformerConfig, config: MeshConfig, topology: str, train: TrainConfig) -> str:
    """The optimized HLO of a training step on all chips of a topology."""
    chips = math.prod(int(n) for n in topology.split(":")[1].split("x"))
    mesh = mesh_of_chips(topology, tuple(config.sizes(chips).values()))  # type: ignore[arg-type]
    run = dataclasses.replace(RunConfig(), model=c, mesh=config, train=train)
    with jax.set_mesh(mesh):
        program = make_program(run, mesh, next_token(c, remat=train.remat, layout=config.layout))
        rows = NamedSharding(mesh, partition("batch", "length"))
        shape = train.batch_size, train.length
        batch = {
            name: jax.ShapeDtypeStruct(shape, jnp.bool_ if name == "loss_mask" else jnp.int32, sharding=rows)
            for name in ("tokens", "targets", "segment_ids", "positions", "loss_mask")
        }
        step: Any = program.train_step
        lowered = step.trace(program.abstract, batch).lower(lowering_platforms=("tpu",))
        # A look-up on v5p's sparse cores cannot be printed: its `async-update` has more operands than XLA reads back.
        options = {"xla_tpu_offload_gather_to_sparsecore": "false"} if topology.startswith("v5p") else None
        return lowered.compile(compiler_options=options).as_text()


def differences(called_for: Traffic, found: Traffic) -> dict[Any, tuple[float, float]]:
    """The kinds and axes where bytes are not those called for."""
    scalars = 1e-3 * sum(called_for.values())
    pairs = {key: (called_for.get(key, 0), found.get(key, 0)) for key in {*called_for, *found}}
    return {key: (a, b) for key, (a, b) in pairs.items() if abs(a - b) > 0.05 * a + scalars}


def check(c: TransformerConfig, config: MeshConfig, topology: str, **train: Any) -> None:
    run = TrainConfig(**{"remat": "full", **train})
    text = compiled_step(c, config, topology, run)
    chips = math.prod(int(n) for n in topology.split(":")[1].split("x"))
    cut: Any = {"batch_size": run.batch_size, "length": run.length, "microbatches": run.microbatches}
    called_for = expected(c, config, chips, remat=run.remat, **cut)
    found = measured(text, config.sizes(chips))
    for key in sorted({*called_for, *found}):
        print(*key, f"{called_for.get(key, 0):.0f} {found.get(key, 0):.0f}")
    assert differences(called_for, found) == {}


@pytest.mark.parametrize(
    "config",
    [
        MeshConfig(data=1, fsdp=2, tensor=2),
        *[
            pytest.param(config, marks=pytest.mark.slow)  # ten seconds each, on two busy cores
            for config in (
                MeshConfig(data=1, fsdp=4),
                MeshConfig(data=4),
                MeshConfig(data=2, fsdp=2),
                MeshConfig(data=2, fsdp=2, zero=1),
                MeshConfig(data=2, fsdp=2, zero=2),
                MeshConfig(data=1, fsdp=2, tensor=2, split_residual=True),
                MeshConfig(data=1, fsdp=2, sequence=2),
                MeshConfig(data=1, sequence=4, context="ring"),
                MeshConfig(data=1, fsdp=2, sequence=2, context="all_to_all"),
            )
        ],
    ],
    ids=str,
)
def test_a_small_step_moves_what_its_layout_calls_for(config: MeshConfig) -> None:
    check(SMALL, config, "v5e:2x2", batch_size=8, length=128)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("c", "train"),
    [
        (SMALL, {"microbatches": 2}),
        (dataclasses.replace(SMALL, tied=True), {}),
        (SMALL, {"remat": "none"}),
        (SMALL, {"remat": "dots"}),
    ],
    ids=["microbatches", "tied", "none", "dots"],
)
def test_so_do_other_ways_to_train_it(c: TransformerConfig, train: dict[str, Any]) -> None:
    check(c, MeshConfig(data=1, fsdp=2, tensor=2), "v5e:2x2", batch_size=8, length=128, **train)


@pytest.mark.slow  # minutes each
@pytest.mark.parametrize("config", [MeshConfig(data=1, fsdp=128), MeshConfig(data=1, fsdp=32, tensor=4)], ids=str)
def test_the_7b_step_moves_what_its_layout_calls_for(config: MeshConfig) -> None:
    check(LLAMA_7B, config, "v5p:4x4x8", batch_size=1024, length=4096)


def test_known_collectives_are_found() -> None:
    """One of each kind, two of them in a loop, on a mesh whose axes both have parts."""
    mesh = mesh_of_chips("v5e:2x2", (2, 1, 1, 2))
    with jax.set_mesh(mesh):
        rows, columns = (NamedSharding(mesh, partition(*names)) for names in (("batch", None), (None, "heads")))
        x = jax.ShapeDtypeStruct((512, 1024), jnp.float32, sharding=rows)
        w = jax.ShapeDtypeStruct((1024, 1024), jnp.float32, sharding=columns)

        def f(x: jax.Array, w: jax.Array) -> Any:
            def body(x: jax.Array, _: None) -> tuple[jax.Array, None]:
                y = jnp.tanh(jnp.dot(x, w))  # [512 / 2, 1024 / 2]
                return jnp.tanh(jnp.dot(y, w.T, out_sharding=out_sharding("batch", None))), None  # summed over tensor

            x = jax.lax.scan(body, x, None, length=5)[0]
            gathered = jax.sharding.reshard(x, partition(None, None))
            turned = jax.sharding.reshard(jnp.sin(x), partition(None, "batch"))
            return gathered, turned

        text = jax.jit(f).trace(x, w).lower(lowering_platforms=("tpu",)).compile().as_text()
    sizes = {"data": 2, "fsdp": 1, "sequence": 1, "tensor": 2}
    assert measured(text, sizes) == {
        ("all-reduce", ("tensor",)): 5 * 256 * 1024 * 4,
        ("all-gather", ("data",)): 512 * 1024 * 4,
        ("all-to-all", ("data",)): 256 * 1024 * 4,
    }, collectives(text, sizes)
