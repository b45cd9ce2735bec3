"""The self-test: what it makes of a config, and that it names planted faults."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from lm_jax.models.transformer import TransformerConfig
from lm_jax.sharding import MeshConfig
from lm_jax.training.optimizers import OptimizerConfig
from lm_jax.training.run import RunConfig
from lm_jax.training.selftest import Check, documents, packed_rows, shrunk, shrunk_mesh
from tests.support.processes import run_module, run_python

CHECK = Path(__file__).parents[1] / "multi_device" / "check_selftest.py"


@pytest.mark.parametrize(
    ("mesh", "devices", "sizes"),
    [
        (MeshConfig(), 8, (8, 1, 1, 1)),
        (MeshConfig(data=1, fsdp=-1), 8, (1, 8, 1, 1)),
        (MeshConfig(data=-1, fsdp=16, sequence=1, tensor=4), 8, (2, 2, 1, 2)),
        (MeshConfig(data=2, fsdp=4, sequence=4, tensor=4), 16, (2, 2, 2, 2)),
        (MeshConfig(data=1, tensor=3), 8, (1, 1, 1, 2)),
        (MeshConfig(data=-1, tensor=2), 6, (2, 1, 1, 2)),
        (MeshConfig(data=-1, tensor=8), 1, (1, 1, 1, 1)),
    ],
)
def test_the_mesh_keeps_every_axis_that_fits(mesh: MeshConfig, devices: int, sizes: tuple[int, ...]) -> None:
    small = shrunk_mesh(mesh, devices)
    assert (small.data, small.fsdp, small.sequence, small.tensor) == sizes
    assert small.devices <= devices


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
@pytest.mark.parametrize("context", ["gather", "ring", "all_to_all"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(32, 32), (64, 8), (8, 1)])
def test_what_is_shrunk_fits_its_mesh_and_keeps_its_kinds(
    optimizer: str, context: str, heads: int, kv_heads: int
) -> None:
    model = TransformerConfig(
        layers=80, embed=8192, heads=heads, kv_heads=kv_heads, vocab=32_000, window=4096, qk_norm=True, tied=True
    )
    mesh = MeshConfig(data=-1, fsdp=4, sequence=4, tensor=4, context=context, split_residual=True)
    config = RunConfig(model=model, mesh=mesh, optimizer=OptimizerConfig(name=optimizer))
    small = shrunk(config, 64)
    small.check_layout(64)
    assert small.model.qk_norm and small.model.tied and small.model.window
    assert (small.model.heads > small.model.key_heads) == (heads > kv_heads)
    assert small.mesh.context == context and small.mesh.split_residual


def test_what_is_shrunk_is_twice_its_base() -> None:
    sizes = {"parametrization": "completep", "base_embed": 256, "base_layers": 6, "base_head_dim": 64}
    model = TransformerConfig(layers=12, embed=1024, heads=16, vocab=300, **sizes)
    small = shrunk(RunConfig(model=model), 1).model
    assert small.scale == (2.0, 2.0) and small.attention_scale(small.head_size) == 8**0.5 / 16


def test_rows_have_documents_of_every_kind() -> None:
    rows = packed_rows(shrunk(RunConfig(model=TransformerConfig(vocab=300)), 4), 0)
    found = list(documents(rows))
    assert {row for row, _, _ in found} == set(range(len(rows["tokens"]))) - {1}
    for row, start, end in found:
        assert rows["positions"][row, start:end].tolist() == list(range(end - start))
    assert any(end < rows["tokens"].shape[1] for row, _, end in found) and rows["loss_mask"].sum() > 0


def test_what_is_not_a_number_fails() -> None:
    assert Check("a", "b", 0.0, 0.0, "").ok
    assert not Check("a", "b", math.nan, 1.0, "").ok and not Check("a", "b", 2.0, 1.0, "").ok


@pytest.mark.parametrize(
    ("fault", "named"),
    [
        pytest.param("none", "all is well", marks=pytest.mark.slow),
        ("leaked_segment", "failed segments: documents of one row see each other"),
        ("wrong_position", "failed positions: positions depend on where a document stands"),
        ("missing_reduction", "failed layout: loss: a sum over devices is missing"),
    ],
)
def test_planted_faults_are_named(fault: str, named: str) -> None:
    assert named in run_python(CHECK, fault, devices=8).stdout


def test_the_launcher_says_what_it_compared_and_what_is_wrong_with_a_config(tmp_path: Path) -> None:
    done = run_module("launch.selftest", "--config=configs/tiny.py", "--devices=2")
    assert "data 2 x fsdp 1" in done.stdout and done.stdout.endswith("all is well\n")
    wrong = run_module("launch.selftest", "--config=configs/tiny.py", "--config.mesh.zero=4", check=False)
    assert wrong.returncode == 2 and "mesh.zero" in wrong.stderr and "Traceback" not in wrong.stderr
