"""The mesh and its table: what they lay out, and what they refuse. Devices are stood in for by an abstract mesh."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from lm_jax import sharding
from lm_jax.errors import ConfigError
from lm_jax.params import ParamSpec, zeros
from lm_jax.sharding import AXES, MeshConfig, partition


def abstract_mesh(**sizes: int) -> AbstractMesh:
    return AbstractMesh(tuple(sizes.get(a, 1) for a in AXES), AXES, axis_types=(AxisType.Explicit,) * len(AXES))


@pytest.mark.parametrize(
    ("config", "devices", "sizes"),
    [
        ({}, 8, (8, 1, 1, 1)),
        ({"tensor": 2}, 8, (4, 1, 1, 2)),
        ({"data": 1, "fsdp": -1}, 8, (1, 8, 1, 1)),
        ({"data": 2, "fsdp": 2, "tensor": 2}, 8, (2, 2, 1, 2)),
        ({"data": 1}, 1, (1, 1, 1, 1)),
    ],
)
def test_sizes(config: dict[str, int], devices: int, sizes: tuple[int, ...]) -> None:
    assert tuple(MeshConfig(**config).sizes(devices).values()) == sizes


@pytest.mark.parametrize(
    ("config", "devices", "says"),
    [
        (
            {"data": 3, "tensor": 2},
            8,
            "data=3 x fsdp=1 x sequence=1 x tensor=2 = 6 leaves some unused of the 8 devices",
        ),
        ({"data": 16}, 8, "wants more than the 8 devices"),
        ({"tensor": 3}, 8, "does not divide 8 devices"),
        ({"tensor": 0}, 8, "mesh.tensor: 0 is no size"),
        ({"sequence": -2}, 8, "mesh.sequence: -2 is no size"),
        ({"fsdp": -1}, 8, "more than one axis is -1"),
    ],
)
def test_wrong_meshes_are_told(config: dict[str, int], devices: int, says: str) -> None:
    with pytest.raises(ConfigError) as error:
        MeshConfig(**config).sizes(devices)
    assert says in str(error.value) and len(str(error.value).splitlines()) <= 3


def test_a_mesh_has_all_axes_explicit() -> None:
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    assert mesh.axis_names == AXES == sharding.one_device_mesh().axis_names
    assert set(mesh.axis_types) == {AxisType.Explicit} == set(sharding.one_device_mesh().axis_types)


def test_the_table() -> None:
    assert partition("batch", "length", "features") == P(("data", "fsdp"), "sequence", None)
    assert partition("embed", "heads", "head_dim") == P("fsdp", "tensor", None)
    assert partition("embed", "vocab", drop=("fsdp",)) == P(None, "tensor")
    assert partition() == P()
    assert {a for axes in sharding.TABLE.values() for a in axes} == set(AXES)


def test_two_dimensions_cannot_have_one_axis() -> None:
    with pytest.raises(ValueError, match="'fsdp' is wanted by both 'batch' and 'embed'"):
        partition("batch", "embed")
    with pytest.raises(ValueError, match="'tensor' is wanted by both 'heads' and 'vocab'"):
        partition("heads", None, "vocab")


def test_an_axis_has_to_divide() -> None:
    mesh = abstract_mesh(data=2, fsdp=3, tensor=4)
    assert partition("batch", "vocab", shape=(12, 8), mesh=mesh) == P(("data", "fsdp"), "tensor")
    with pytest.raises(ValueError, match="batch = 10 cannot be split evenly over data=2 x fsdp=3"):
        partition("batch", "vocab", shape=(10, 8), mesh=mesh)
    with pytest.raises(ValueError, match="vocab = 65 cannot be split evenly over tensor=4"):
        partition("batch", "vocab", shape=(12, 65), mesh=mesh)


def test_an_unknown_name_is_told() -> None:
    with pytest.raises(ValueError, match="unknown logical name 'hands': known are batch,"):
        partition("hands")


def test_without_a_mesh_nothing_is_laid_out() -> None:
    x = jnp.zeros((2, 3))
    assert sharding.constrain(x, "batch", None) is x
    assert sharding.out_sharding("batch") is None and sharding.axis_size("data") == 1


def test_constrain_lays_out(mesh: Any) -> None:
    laid = sharding.constrain(jnp.zeros((2, 3)), "batch", None)
    assert laid.sharding == NamedSharding(mesh, P(("data", "fsdp"), None))


SPECS = {"w": ParamSpec((6, 8), ("embed", "vocab"), zeros), "gain": ParamSpec((6,), ("norm",), zeros, fan_in=())}


def test_abstract_parameters() -> None:
    one = sharding.one_device_mesh()
    shapes = sharding.abstract(SPECS, one, jnp.bfloat16)
    assert (shapes["w"].shape, shapes["w"].dtype) == ((6, 8), jnp.bfloat16)
    assert shapes["w"].sharding == NamedSharding(one, P("fsdp", "tensor"))
    assert shapes["gain"].sharding == NamedSharding(one, P(None))
    with pytest.raises(ValueError, match="embed = 6 cannot be split evenly over fsdp=4"):
        sharding.abstract(SPECS, abstract_mesh(fsdp=4))


def test_on_mesh_takes_shardings_from_shapes() -> None:
    one = sharding.one_device_mesh()
    with jax.set_mesh(one):
        shapes = jax.eval_shape(lambda p: {"m": p["w"] * 2, "n": jnp.zeros(())}, sharding.abstract(SPECS, one))
    laid = sharding.on_mesh(one, shapes)
    assert laid["m"].sharding == NamedSharding(one, P("fsdp", "tensor"))
    assert laid["n"].sharding == NamedSharding(one, P())


def test_gathered_weights_are_whole_over_fsdp(mesh: Any) -> None:
    params = {"w": jnp.ones((6, 8)), "gain": jnp.ones((6,))}
    placed = jax.tree.map(lambda a, s: jax.device_put(a, s.sharding), params, sharding.abstract(SPECS, mesh))
    whole = sharding.gather_weights(placed, SPECS, jnp.bfloat16)
    assert whole["w"].sharding.spec == P(None, "tensor") and whole["w"].dtype == jnp.bfloat16
