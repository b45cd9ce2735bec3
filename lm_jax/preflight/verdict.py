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

import lm_jax
from lm_jax import costs, hlo
from lm_jax.data.cache import cache_root
from lm_jax.models.transformer import TransformerConfig, transformer_specs
from lm_jax.params import named
from lm_jax.preflight import roofline
from lm_jax.preflight.buffers import Plan, read
from lm_jax.preflight.chips import Target
from lm_jax.preflight.compiling import Compiled, compile_step
from lm_jax.sharding import MeshConfig, abstract
from lm_jax.training.memory import need
from lm_jax.training.run import RunConfig

LARGEST = 12  # buffers that a verdict lists

Verdict = dict[str, Any]


def preflight(
    config: RunConfig,
    target: Target,
    *,
    machine_code: bool = False,
    cache: bool = True,
    advise: Callable[[bool], str] | None = None,
    tell: Callable[[str], None] = lambda text: None,
) -> Verdict:
    """Compiles a config's training step for a slice, and says what the compiler found.

    Args:
      config: the run's, its vocabulary known.
      target: what for.
      machine_code: whether machine code is to be written too.
      cache: whether the answer to the same question may be one that was kept.
      advise: is handed whether it fits, and gives what else could be done; kept with the answer.
      tell: is handed what is going on.

    Returns:
      A record as `--json` writes it; docs/preflight.md says what is in it.

    Raises:
      UserError: where the layout does not suit the devices, or the step does not compile.
    """
    config.check_layout(target.devices)
    file = cache_root(None) / "preflight" / f"{_key(config, target, machine_code, advise is not None)}.json"
    if cache and file.is_file():
        return {**json.loads(file.read_text()), "from_cache": True}
    compiled = compile_step(config, target, machine_code=machine_code, tell=tell)
    verdict = _verdict(config, target, compiled)
    verdict["advice"] = advise(verdict["fits"]) if advise else ""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps(verdict))
        temporary.replace(file)
    except OSError as e:  # the answer is there; the next time is only slower
        tell(f"the answer is not kept: {e}")
    return {**verdict, "from_cache": False}


def predicted(config: RunConfig, target: Target) -> dict[str, int]:
    """What `costs.py` expects that a device needs, without the compiler: bytes by class, and `total`."""
    return need(config, target.devices, target.device)


def _verdict(config: RunConfig, target: Target, compiled: Compiled) -> Verdict:
    mesh = config.mesh.sizes(target.devices)
    plan = read(compiled.dump, _gradient_shapes(config.model, config.mesh, target))
    fits = compiled.refused is None and plan.total <= target.chip.memory
    record: Verdict = {
        "topology": target.name,
        "slices": target.slices,
        "devices": target.devices,
        "chips": target.chips * target.slices,
        "chip": compiled.kind,
        "mesh": mesh,
        "fits": fits,
        "compiler_says": compiled.refused,
        "bytes_per_device": {**plan.classes, "compiler_total": plan.total, "capacity": target.chip.memory},
        "predicted_total": predicted(config, target)["total"],
        "gaps": plan.gaps,
        "host_bytes": plan.host,
        "machine_code_bytes": compiled.code_bytes,
        "analysed_bytes": compiled.analysed_bytes,
        "largest_buffers": _largest(plan),
        **_speed(config, target, compiled, mesh),
        "config": {"parameters": costs.parameters(config.model)["total"], **_sizes(config)},
        "versions": _versions(),
        "seconds": round(compiled.seconds, 1),
    }
    return record


def _speed(config: RunConfig, target: Target, compiled: Compiled, mesh: Mapping[str, int]) -> dict[str, Any]:
    c, train, devices = config.model, config.train, target.devices
    found = hlo.collectives(compiled.dump.program, mesh)
    links = {x.axes: roofline.links_of(compiled.coordinates, mesh, x.axes, target) for x in found}
    tokens = train.batch_size * train.length
    peak = costs.peak_flops(compiled.kind)
    assert peak is not None
    flops = costs.flops_per_token(c, train.length) * tokens / devices
    in_kernels = roofline.attends_in_kernels(compiled.dump.program)
    attention = costs.attention_flops(c, train.length) * tokens / devices if in_kernels else 0.0
    again = train.remat in ("full", "dots", "offload")
    time = roofline.step_time(
        compiled.dump.program,
        found,
        target.chip,
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
        "run": {"steps": train.total_steps, "hours": hours, "chip_hours": hours * target.chips * target.slices},
    }


def _gradient_shapes(c: TransformerConfig, config: MeshConfig, target: Target) -> set[tuple[int, ...]]:
    """Every shape that a weight's gradient can have on a device: its part or whole over fsdp, of a layer or of all."""
    mesh = costs.abstract_mesh(config, target.devices, target.device)
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
    for package in ("jax", "jaxlib", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _key(config: RunConfig, target: Target, machine_code: bool, advised: bool) -> str:
    """Of everything that the answer depends on: the config, the slice, versions, this package's own text, and what the
    environment tells the compilers."""
    parts = [repr((config.model, config.mesh, config.optimizer, config.train)), repr(target)]
    flags = {name: value for name, value in os.environ.items() if name.startswith(("JAX_", "XLA_", "LIBTPU_"))}
    for own in ("JAX_PLATFORMS", "JAX_COMPILATION_CACHE_DIR"):
        flags.pop(own, None)
    parts += [
        str(machine_code),
        str(advised),
        json.dumps(flags, sort_keys=True),
        json.dumps(_versions(), sort_keys=True),
        _source_hash(),
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def _source_hash() -> str:
    root = Path(lm_jax.__file__).parent
    rooms = ("preflight", "models", "kernels", "objectives", "training")
    files = sorted([*root.glob("*.py"), *(f for room in rooms for f in (root / room).rglob("*.py"))])
    found = hashlib.sha256()
    for file in files:
        found.update(file.read_bytes())
    return found.hexdigest()
