"""The verdict on a config and a slice: whether it fits, where its bytes go, what bounds a step and how long it is."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jax.sharding import AbstractDevice

import lm_jax
from lm_jax import costs, hlo
from lm_jax.data.cache import cache_root
from lm_jax.models.transformer import TransformerConfig, transformer_specs
from lm_jax.params import named
from lm_jax.preflight import roofline
from lm_jax.preflight.buffers import Plan, read
from lm_jax.preflight.chips import CHIPS, Chip
from lm_jax.preflight.compiling import Compiled, compile_step
from lm_jax.sharding import MeshConfig, abstract
from lm_jax.slices import Slice
from lm_jax.training.memory import need
from lm_jax.training.run import RunConfig

LARGEST = 12  # buffers that a verdict lists

Verdict = dict[str, Any]


def preflight(
    config: RunConfig,
    where: Slice,
    *,
    slices: int = 1,
    machine_code: bool = False,
    cache: bool = True,
    advise: Callable[[bool], str] = lambda fits: "",
    tell: Callable[[str], None] = lambda text: None,
) -> Verdict:
    """Compiles a config's training step for a slice, and says what the compiler found.

    Args:
      config: the run's, its vocabulary known.
      where: the slice.
      slices: how many of it, joined by a network.
      machine_code: whether machine code is to be written too.
      cache: whether the answer to the same question may be one that was kept.
      advise: is handed whether it fits, and gives what else could be done; kept with the answer.
      tell: is handed what is going on.

    Returns:
      A record as `--json` writes it; docs/numbers.md says what is in it.

    Raises:
      UserError: where the layout does not suit the devices, or the step does not compile.
    """
    chip = CHIPS[where.generation]
    devices = where.chips * chip.per_chip * slices
    config.check_layout(devices)
    file = cache_root(None) / "preflight" / f"{_key(config, where, slices, machine_code)}.json"
    if cache and file.is_file():
        return {**json.loads(file.read_text()), "from_cache": True}
    compiled = compile_step(config, where.name, slices=slices, machine_code=machine_code, tell=tell)
    verdict = _verdict(config, where, slices, chip, compiled)
    verdict["advice"] = advise(verdict["fits"])
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(verdict))
    temporary.replace(file)
    return {**verdict, "from_cache": False}


def predicted(config: RunConfig, where: Slice, slices: int = 1) -> dict[str, int]:
    """What `costs.py` expects that a device needs, without the compiler: bytes by class, and `total`."""
    chip = CHIPS[where.generation]
    return need(config, where.chips * chip.per_chip * slices, device_of(where))


def device_of(where: Slice) -> AbstractDevice:
    """What a slice's devices are, for meshes that are only described."""
    return AbstractDevice(CHIPS[where.generation].kind, 1, "tpu")


def _verdict(config: RunConfig, where: Slice, slices: int, chip: Chip, compiled: Compiled) -> Verdict:
    devices = len(compiled.coordinates)
    mesh = config.mesh.sizes(devices)
    plan = read(compiled.dump, _gradient_shapes(config.model, config.mesh, devices, device_of(where)))
    record: Verdict = {
        "topology": where.name,
        "slices": slices,
        "devices": devices,
        "chips": where.chips * slices,
        "chip": compiled.kind,
        "mesh": mesh,
        "fits": compiled.refused is None,
        "compiler_says": compiled.refused,
        "bytes_per_device": {**plan.classes, "compiler_total": plan.total, "capacity": chip.memory},
        "predicted_total": predicted(config, where, slices)["total"],
        "gaps": plan.gaps,
        "host_bytes": plan.host,
        "machine_code_bytes": compiled.code_bytes,
        "analysed_bytes": compiled.analysed_bytes,
        "largest_buffers": _largest(plan),
        **_speed(config, where, slices, chip, compiled, mesh),
        "config": {"parameters": costs.parameters(config.model)["total"], **_sizes(config)},
        "versions": _versions(),
        "seconds": round(compiled.seconds, 1),
    }
    return record


def _speed(
    config: RunConfig, where: Slice, slices: int, chip: Chip, compiled: Compiled, mesh: Mapping[str, int]
) -> dict[str, Any]:
    c, train, devices = config.model, config.train, len(compiled.coordinates)
    found = hlo.collectives(compiled.dump.program, mesh)
    torus = tuple(int(size) for size in where.topology.split("x"))
    links = {x.axes: roofline.links_of(compiled.coordinates, mesh, x.axes, chip, torus) for x in found}
    tokens = train.batch_size * train.length
    peak = costs.peak_flops(compiled.kind)
    assert peak is not None
    flops = costs.flops_per_token(c, train.length) * tokens / devices
    attention = costs.attention_flops(c, train.length) * tokens / devices
    again = train.remat in ("full", "dots", "offload")
    time = roofline.step_time(
        compiled.dump.program,
        found,
        chip,
        peak,
        links,
        attention_flops=(attention * (1 + again), 2.5 * attention),
        head_dim=c.head_size,
    )
    hours = train.total_steps * time.total / 3600
    return {
        "flops_per_device": flops,
        "collectives": [{**s._asdict(), "axes": list(s.axes)} for s in time.sent],
        "step": {
            "seconds": time.total,
            "bound_by": time.bound_by,
            "compute_seconds": time.compute,
            "memory_seconds": time.memory,
            "exposed_link_seconds": time.exposed,
            "mfu": flops / (time.total * peak),
            "tokens_per_second": tokens / time.total,
        },
        "run": {"steps": train.total_steps, "hours": hours, "chip_hours": hours * where.chips * slices},
    }


def _gradient_shapes(
    c: TransformerConfig, config: MeshConfig, devices: int, device: AbstractDevice
) -> set[tuple[int, ...]]:
    """Every shape that a weight's gradient can have on a device: its part or whole over fsdp, of a layer or of all."""
    mesh = costs.abstract_mesh(config, devices, device)
    found = set()
    for drop in ((), ("fsdp",)):
        weights: dict[str, Any] = named(abstract(transformer_specs(c), mesh, drop=drop))
        for name, a in weights.items():
            shape = a.sharding.shard_shape(a.shape)
            found |= {shape, shape[1:]} if name.startswith("blocks/") else {shape}
    return {shape for shape in found if math.prod(shape) > 1}


def _largest(plan: Plan) -> list[dict[str, Any]]:
    return [
        {
            "class": kind,
            "bytes": v.size,
            "dtype": v.dtype,
            "shape": list(v.shape),
            "from": v.source.rsplit("jit(train_step)/", 1)[-1],
        }
        for kind, v in plan.largest[:LARGEST]
    ]


def _sizes(config: RunConfig) -> dict[str, Any]:
    train = config.train
    return {
        "batch_size": train.batch_size,
        "length": train.length,
        "microbatches": train.microbatches,
        "remat": train.remat,
        "tokens": train.total_steps * train.tokens_per_step,
    }


def _versions() -> dict[str, str]:
    found = {"lm_jax": lm_jax.__version__}
    for package in ("jax", "jaxlib", "libtpu"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "none"
    return found


def _key(config: RunConfig, where: Slice, slices: int, machine_code: bool) -> str:
    """Of everything that the answer depends on: the config, the slice, versions, and this package's own text."""
    parts = [repr((config.model, config.mesh, config.optimizer, config.train)), where.name, str(slices)]
    parts += [str(machine_code), json.dumps(_versions(), sort_keys=True), _source_hash()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def _source_hash() -> str:
    root = Path(lm_jax.__file__).parent
    rooms = ("preflight", "models", "kernels", "objectives", "training")
    files = sorted([*root.glob("*.py"), *(f for room in rooms for f in (root / room).rglob("*.py"))])
    found = hashlib.sha256()
    for file in files:
        found.update(file.read_bytes())
    return found.hexdigest()
