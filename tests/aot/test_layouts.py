"""Meshes and memories of machines that are not here: slices joined by a network, and what lies on a host."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from lm_jax.errors import ConfigError
from lm_jax.models.transformer import TransformerConfig
from lm_jax.objectives.next_token import next_token
from lm_jax.sharding import MeshConfig, make_mesh, partition
from lm_jax.training.program import make_program
from lm_jax.training.run import RunConfig, TrainConfig
from tests.support.tpu import chips


def test_slices_are_the_outer_part_of_data() -> None:
    devices = chips("v5e:2x4", slices=2)
    mesh = make_mesh(MeshConfig(data=4, fsdp=4), devices)
    of = np.vectorize(lambda d: d.slice_index)(mesh.devices)[:, :, 0, 0]
    np.testing.assert_array_equal(of, np.repeat([0, 1], 8).reshape(4, 4))
    with pytest.raises(ConfigError, match=r"mesh.data: 1 cannot be split over 2 slices(.|\n)*nearest that fits is 2"):
        make_mesh(MeshConfig(data=1, fsdp=16), devices)


def test_an_axis_may_take_a_part_of_a_dimension_of_the_torus() -> None:
    devices = chips("v5p:4x4x4")
    mesh = make_mesh(MeshConfig(data=1, fsdp=-1, tensor=2), devices)
    assert mesh.devices.shape == (1, 32, 1, 2) and set(mesh.devices.flat) == set(devices)
    apart = [np.abs(np.subtract(a.coords, b.coords)).sum() for a, b in mesh.devices.reshape(-1, 2)]
    assert apart == [1] * 32  # who shares a layer's products are neighbours


def compiled(mesh: MeshConfig, remat: str) -> jax.stages.Compiled:
    """A step of a model of 14M parameters for four chips."""
    model = TransformerConfig(layers=4, embed=512, heads=4, vocab=1024, dtype="bfloat16")
    config = RunConfig(model=model, mesh=mesh, train=TrainConfig(batch_size=16, length=1024, remat=remat))
    on = make_mesh(mesh, chips("v5e:2x2"))
    with jax.set_mesh(on):
        objective = next_token(model, remat=remat, layout=mesh.layout)
        program = make_program(config, on, objective)
        rows = NamedSharding(on, partition("batch", "length"))
        ids = dict.fromkeys(("tokens", "targets", "segment_ids", "positions"), jnp.int32) | {"loss_mask": jnp.bool_}
        batch = {name: jax.ShapeDtypeStruct((16, 1024), dtype, sharding=rows) for name, dtype in ids.items()}
        return program.train_step.lower(program.abstract, batch).compile()


@pytest.mark.slow
def test_what_is_offloaded_lies_on_the_host() -> None:
    mesh = MeshConfig(data=1, fsdp=4)
    plain = compiled(mesh, "none").memory_analysis()
    away = compiled(dataclasses.replace(mesh, offload_optimizer=True), "offload").memory_analysis()
    moments = plain.argument_size_in_bytes - away.argument_size_in_bytes
    assert moments == pytest.approx(away.host_argument_size_in_bytes, rel=0.01) and moments > 2 * 4 * 13e6 / 4
    # Rows a chip, layers, length, bytes; query, key, value, out, gate and up: what `down` gives, nothing reads again.
    products = 4 * 4 * 1024 * 2 * (4 * 512 + 2 * 1408)
    assert away.host_temp_size_in_bytes == pytest.approx(products, rel=0.05)
    assert away.temp_size_in_bytes < plain.temp_size_in_bytes - 0.8 * products
