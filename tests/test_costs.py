"""Costs against what is published, against the program that JAX traces, and against what XLA allocates."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, NamedSharding

from lm_jax import costs
from lm_jax.errors import ConfigError
from lm_jax.models.transformer import TransformerConfig, transformer_specs
from lm_jax.objectives.next_token import next_token
from lm_jax.params import Tree, count, initialize
from lm_jax.sharding import MeshConfig, abstract, one_device_mesh, partition
from lm_jax.training.program import Program, make_program
from lm_jax.training.run import OptimizerConfig, RunConfig, TrainConfig
from tests.support import tiny

# --------------------------------------------------------------------------------------------------------- parameters


@pytest.mark.parametrize(
    ("shape", "published"),
    [
        (dict(layers=32, embed=4096, heads=32, feed_forward_dim=11008), 6_738_415_616),
        (dict(layers=40, embed=5120, heads=40, feed_forward_dim=13824), 13_015_864_320),
        (dict(layers=80, embed=8192, heads=64, kv_heads=8, feed_forward_dim=28672), 68_976_648_192),
    ],
)
def test_parameters_of_llama_2_are_those_published(shape: dict[str, int], published: int) -> None:
    assert costs.parameters(TransformerConfig(vocab=32_000, **shape))["total"] == published


@pytest.mark.parametrize("changes", [{}, {"tied": True}, {"qk_norm": True}, {"norm": "rms_no_gain", "qk_norm": True}])
def test_parts_are_all_the_parameters(changes: dict[str, Any]) -> None:
    c = tiny.config(**changes)
    parts = costs.parameters(c)
    values = jax.eval_shape(lambda key: initialize(transformer_specs(c), key), jax.random.key(0))
    assert parts.pop("total") == count(transformer_specs(c)) == sum(a.size for a in jax.tree.leaves(values))
    assert parts.pop("without_embedding") == count(transformer_specs(c)) - c.ids * c.embed
    assert sum(parts.values()) == count(transformer_specs(c))
    assert parts["attention"] == 2 * (2 * 32 * 4 * 8 + 2 * 32 * 2 * 8)
    assert parts["norms"] == (0 if c.norm != "rms" else 2 * 2 * 32 + 32 + (2 * 2 * 8 if c.qk_norm else 0))
    assert parts["output"] == (0 if c.tied else c.ids * c.embed)


# -------------------------------------------------------------------------------------------------------------- FLOPs


def dot_flops(jaxpr: Any) -> int:
    """FLOPs of all matrix products of a program, those in loops as often as they run."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            ((over, _), _), left = equation.params["dimension_numbers"], equation.invars[0].aval
            total += 2 * equation.outvars[0].aval.size * int(np.prod([left.shape[d] for d in over]))
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        inner = [p for p in jax.tree.leaves(list(equation.params.values())) if hasattr(p, "eqns")]
        total += times * sum(dot_flops(getattr(p, "jaxpr", p)) for p in inner)
    return total


@pytest.mark.parametrize(
    "changes",
    [{}, {"tied": True}, {"scan": False}, {"feed_forward": "squared_relu", "kv_heads": 1}, {"head_dim": 16}],
)
def test_flops_are_those_of_the_traced_gradient(changes: dict[str, Any]) -> None:
    c, rows, length = tiny.config(**changes), 4, 16
    objective = next_token(c)

    def loss(params: Tree, batch: Any) -> jax.Array:
        return objective.terms(params, {}, {}, batch, jax.random.key(0))[0]["cross_entropy"]

    jaxpr = jax.make_jaxpr(jax.grad(loss))(tiny.parameters(c), tiny.batch(rows, length)).jaxpr
    # The plain attention multiplies all pairs of positions.
    assert dot_flops(jaxpr) == rows * length * costs.flops_per_token(c, length, causal=False)


def test_a_causal_position_sees_itself_and_those_before_it() -> None:
    c, length = tiny.config(), 16
    pairs = sum(1 for q in range(length) for k in range(length) if k <= q)
    saved = (length**2 - pairs) * 3 * 4 * c.layers * c.heads * c.head_size
    windowed = dataclasses.replace(c, window=3)
    pairs = sum(min(t + 1, 3) for t in range(length)) / length
    per_pair = 3 * c.layers * 2 * 2 * c.heads * c.head_size
    by_hand = costs.flops_per_token(c, length) + per_pair * (pairs - (length + 1) / 2)
    assert costs.flops_per_token(windowed, length) == pytest.approx(by_hand)
    all_pairs, causal = costs.flops_per_token(c, length, causal=False), costs.flops_per_token(c, length)
    assert length * (all_pairs - causal) == saved
    assert costs.training_flops(c, length, 1000) == 1000 * causal


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("TPU7x", 1153.5e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L40", None),
        ("NVIDIA A1000", None),
        ("TPU v55", None),
        ("cpu", None),
    ],
)
def test_peaks_by_a_device_s_name(kind: str, peak: float | None) -> None:
    assert costs.peak_flops(kind) == peak


def test_only_bfloat16_has_a_peak() -> None:
    assert costs.peak_flops("TPU v4", jnp.float32) is None
    assert costs.peak_flops("TPU v4", "bfloat16") == 275e12


# ------------------------------------------------------------------------------------------------------------- memory


def program(train: dict[str, Any], optimizer: str = "adamw", **model: Any) -> Program:
    shape = dict(layers=4, embed=128, heads=4, vocab=1024, dtype="float32") | model
    config = RunConfig(
        model=TransformerConfig(**shape),
        optimizer=OptimizerConfig(name=optimizer),
        train=TrainConfig(steps=10, **train),
    )
    return make_program(config, one_device_mesh(), next_token(config.model, remat=config.train.remat))


def estimate(p: Program) -> dict[str, int]:
    t = p.config.train
    settings = dict(batch_size=t.batch_size, length=t.length, remat=t.remat, microbatches=t.microbatches)
    return costs.memory(p.config.model, p.abstract, p.mesh, **settings)


SHAPES = [
    pytest.param(dict(train=dict(batch_size=8, length=128)), id="plain", marks=pytest.mark.slow),
    pytest.param(dict(train=dict(batch_size=8, length=128, remat="full"), vocab=4096, layers=2), id="remat"),
    pytest.param(
        dict(train=dict(batch_size=8, length=128, microbatches=4), optimizer="adafactor", scan=False, layers=2),
        id="micro-batches",
        marks=pytest.mark.slow,
    ),
]


@pytest.mark.parametrize("settings", SHAPES)
def test_memory_is_near_what_the_compiler_allocates(settings: dict[str, Any]) -> None:
    p = program(**settings)
    t = p.config.train
    rows = NamedSharding(p.mesh, partition("batch", "length"))
    kinds = dict(tokens=jnp.int32, targets=jnp.int32, segment_ids=jnp.int32, positions=jnp.int32, loss_mask=jnp.bool_)
    shape = (t.batch_size, t.length)
    batch = {name: jax.ShapeDtypeStruct(shape, kind, sharding=rows) for name, kind in kinds.items()}
    with jax.set_mesh(p.mesh):
        there = p.train_step.lower(p.abstract, batch).compile().memory_analysis()
    need = estimate(p)
    state = need["parameters"] + need["optimizer"]
    assert state == pytest.approx(there.argument_size_in_bytes, rel=0.01)
    assert need["total"] == pytest.approx(there.argument_size_in_bytes + there.temp_size_in_bytes, rel=0.25)


def test_each_part_answers_to_its_cause() -> None:
    plain = estimate(program(dict(batch_size=8, length=64)))
    rows = estimate(program(dict(batch_size=16, length=64)))
    remat = estimate(program(dict(batch_size=8, length=64, remat="full")))
    parts = estimate(program(dict(batch_size=8, length=64, microbatches=2)))
    adafactor = estimate(program(dict(batch_size=8, length=64), optimizer="adafactor"))
    assert sum(v for k, v in plain.items() if k != "total") == plain["total"]
    assert 1.5 * plain["activations"] < rows["activations"] < 2 * plain["activations"]  # weights are kept once
    stream = 8 * 64 * 128 * 4  # what goes into each of the four blocks and into the last norm
    assert 5 * stream < remat["activations"] < 5.5 * stream
    assert remat["working"] > plain["working"]
    attention = estimate(program(dict(batch_size=8, length=64, remat="attention")))
    given = 4 * (8 * 64 * 128 * 4 + 8 * 64 * 4 * 4)  # what attention gives in four blocks: output and log-sum-exp
    assert attention["activations"] == remat["activations"] + given
    assert parts["gradients"] == 2 * plain["gradients"] and parts["activations"] < plain["activations"]
    assert plain["optimizer"] > 2 * plain["parameters"] > adafactor["optimizer"]


def test_the_kept_probabilities_grow_with_the_square_of_the_length() -> None:
    def kept(length: int) -> int:
        return estimate(program(dict(batch_size=2, length=length), layers=2))["activations"]

    # T (T + 128) / 2 pairs in blocks of 128 queries, each with the keys up to its end.
    second_difference = kept(384) - 2 * kept(256) + kept(128)
    assert second_difference == 128**2 * 2 * 4 * 2 * 4  # a step^2 a row, head and layer, of 4 bytes


def state_on(c: TransformerConfig) -> Any:
    """AdamW's state as it would be laid out on a mesh."""
    return lambda mesh, config=None: (abstract(transformer_specs(c), mesh),) * 3


def test_a_mesh_divides_what_it_splits() -> None:
    c = tiny.config(embed=64, vocab=128, heads=8, kv_heads=4)
    one, four, tensor = (
        costs.memory(c, state_on(c)(mesh), mesh, batch_size=8, length=32)
        for mesh in (
            costs.abstract_mesh(MeshConfig(), 1),
            costs.abstract_mesh(MeshConfig(data=1, fsdp=4), 4),
            costs.abstract_mesh(MeshConfig(data=1, tensor=4), 4),
        )
    )
    for part in ("parameters", "gradients", "optimizer"):
        assert four[part] == pytest.approx(one[part] / 4, rel=0.1)
        assert tensor[part] == pytest.approx(one[part] / 4, rel=0.1)
    assert four["activations"] < one["activations"] / 2
    with pytest.raises(ConfigError, match="mesh"):
        costs.abstract_mesh(MeshConfig(data=3), 4)


def test_more_devices_with_as_many_rows_each_work_with_as_much() -> None:
    c = tiny.config(vocab=64, embed=64)

    def working(devices: int) -> int:
        mesh = costs.abstract_mesh(MeshConfig(data=devices), devices)
        return costs.memory(c, state_on(c)(mesh), mesh, batch_size=8 * devices, length=256)["working"]

    assert working(64) == working(1)


def test_a_large_model_is_estimated_without_a_device() -> None:
    c = TransformerConfig(
        layers=80, embed=8192, heads=64, kv_heads=8, feed_forward_dim=28672, vocab=32_000, dtype="bfloat16"
    )
    mesh = costs.abstract_mesh(MeshConfig(data=1, fsdp=-1), 64)
    need = costs.memory(c, state_on(c)(mesh), mesh, batch_size=64, length=4096, remat="full")
    assert need["parameters"] == pytest.approx(4 * 68_976_648_192 / 64, rel=0.01)
    assert need["activations"] == pytest.approx(80 * 4096 * 8192 * 2, rel=0.02)  # each block's input
    # A layer's weights in bf16 and what stands between its products, and a little more.
    layer, between = 2 * 855_654_400, 2 * 4096 * (3 * 8192 + 2 * 1024 + 3 * 28672)
    held = 4 * 32_000 * 8192 * 63 / 64 + need["parameters"] / 2  # the output's gradient, all weights in bf16
    assert layer + between < need["working"] - held < 2 * (layer + between)


def on_tpu(kind: str, c: TransformerConfig, mesh: MeshConfig, devices: int = 1, **settings: Any) -> dict[str, int]:
    found = costs.abstract_mesh(mesh, devices, AbstractDevice(kind, 1, "tpu"))
    with jax.sharding.use_abstract_mesh(found):
        return costs.memory(c, state_on(c)(found), found, config=mesh, **settings)


def test_a_ring_holds_sums_and_what_arrives_beside_attention() -> None:
    c = TransformerConfig(layers=2, embed=1024, heads=8, kv_heads=4, head_dim=128, vocab=1024, dtype="bfloat16")

    def need(context: str) -> dict[str, int]:
        mesh = MeshConfig(data=1, sequence=4, context=context)
        return on_tpu("TPU v5", c, mesh, 4, batch_size=64, length=2048, remat="full")

    q, kv = 64 * 512 * 8 * 128, 64 * 512 * 4 * 128
    ring, gathered = need("ring"), need("gather")
    sums, arriving, chunks = 4 * (q + 2 * kv), 2 * kv * (2 + 4), 2 * 4 * (q + kv) // 2
    others = 2 * kv * 2 * 3  # keys and values of the other devices' parts of a row, which are gathered else
    assert ring["working"] == pytest.approx(gathered["working"] - others + sums + arriving + chunks, rel=1e-3)
    ids = 4 * 64 * 2048  # of segments, which all layers get whole where keys are gathered
    assert ring["activations"] == pytest.approx(gathered["activations"] - ids, rel=1e-5)


def test_a_small_model_lies_in_fast_memory_while_it_is_computed() -> None:
    c = tiny.config(layers=2, embed=128, heads=2, head_dim=64, vocab=256, dtype="bfloat16")
    large, small = (on_tpu(kind, c, MeshConfig(), batch_size=4, length=256) for kind in ("TPU v5 lite", "TPU v5"))
    assert large["working"] == large["gradients"] == 0 < min(small["working"], small["gradients"])
    assert large["activations"] == small["activations"] > 0  # a loop over layers stacks it
    assert large["total"] == sum(large[part] for part in ("parameters", "optimizer", "activations"))
    many = [on_tpu(kind, c, MeshConfig(), batch_size=4096, length=256) for kind in ("TPU v5 lite", "TPU v5")]
    assert many[1]["total"] - many[0]["total"] == 28 * 2**20  # what kernels leave of it


# ------------------------------------------------------------------------------------------------- what is there, fits


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Path]:
    """A machine with 8 MB available, and a process in the group /job/step."""
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "meminfo").write_text("MemTotal: 16000 kB\nMemAvailable:    8000 kB\n")
    (tmp_path / "proc" / "self" / "cgroup").write_text("0::/job/step\n")
    (tmp_path / "groups" / "job" / "step").mkdir(parents=True)
    yield tmp_path


def limit(group: Path, limit: str, used: int, cached: int = 0) -> None:
    (group / "memory.max").write_text(f"{limit}\n")
    (group / "memory.current").write_text(f"{used}\n")
    (group / "memory.stat").write_text(f"anon 1\ninactive_file {cached}\n")


def there(machine: Path) -> int | None:
    return costs.host_memory(machine / "proc", machine / "groups")


def test_host_memory_is_what_the_kernel_has_left(machine: Path) -> None:
    assert there(machine) == 8000 * 1024
    limit(machine / "groups" / "job" / "step", "max", 10)
    assert there(machine) == 8000 * 1024


def test_a_group_or_one_around_it_may_leave_less(machine: Path) -> None:
    limit(machine / "groups" / "job" / "step", "5000000", 2_000_000, cached=500_000)
    assert there(machine) == 3_500_000
    limit(machine / "groups" / "job", "4000000", 3_000_000)
    assert there(machine) == 1_000_000
    limit(machine / "groups" / "job", "4000000", 5_000_000)
    assert there(machine) == 0


def test_this_machine_s_devices_share_its_memory() -> None:
    whole, share = costs.host_memory(), costs.device_memory(jax.devices("cpu")[0])
    assert whole and share
    assert share == pytest.approx(whole / jax.local_device_count(backend="cpu"), rel=0.5)


def test_a_shortage_says_what_is_needed_and_what_is_there() -> None:
    need = {"parameters": 2_000_000_000, "optimizer": 4_000_000_000, "total": 6_000_000_000}
    assert costs.shortage(need, 6_000_000_000) is None
    line = costs.shortage(need, 5_999_999_999)
    assert line == "a device needs 6 GB (parameters 2 GB, optimizer 4 GB), and 6 GB are there"


MODEL = tiny.config(layers=8, embed=64, vocab=4096)


def suggestion(available: int) -> dict[str, Any] | None:
    """For `MODEL` on four devices, each with a copy of it."""
    settings: dict[str, Any] = dict(batch_size=32, length=32, remat="none", microbatches=1)
    return costs.suggest(MODEL, state_on(MODEL), MeshConfig(), 4, available, **settings)


def needed(remat: str, microbatches: int, data: int = 4, fsdp: int = 1) -> int:
    mesh: Any = costs.abstract_mesh(MeshConfig(data=data, fsdp=fsdp), 4)
    settings: dict[str, Any] = dict(batch_size=32, length=32, remat=remat, microbatches=microbatches)
    return costs.memory(MODEL, state_on(MODEL)(mesh), mesh, **settings)["total"]


def test_the_nearest_setting_that_fits_is_suggested() -> None:
    assert suggestion(needed("none", 1)) == {}
    assert suggestion(needed("full", 1)) == {"train.remat": "full"}
    finest = needed("full", 8)
    assert finest < needed("full", 1)
    assert suggestion(finest) == {"train.remat": "full", "train.microbatches": 8}
    sharded = needed("full", 8, data=1, fsdp=4)
    assert sharded < finest
    assert suggestion(sharded) == {
        "mesh.data": 1,
        "mesh.fsdp": 4,
        "train.remat": "full",
        "train.microbatches": 8,
    }
    assert suggestion(sharded // 2) is None
