"""What a config costs: parameters, FLOPs and memory, from its model, its mesh and abstract trees; nothing runs here.

One source for the rate of use of a chip (MFU), for what a machine must have, and for the numbers that configs state.

Shapes: B rows, T length, D embed, V vocabulary (on a device: v).
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding

from lm_jax import tpu_memory
from lm_jax.kernels.cross_entropy import chunk_bytes
from lm_jax.models.transformer import TransformerConfig, hidden, transformer_specs
from lm_jax.params import Tree, named, role
from lm_jax.sharding import AXES, LAYOUT, MESH, Layout, MeshConfig, abstract, partition, platform

# ---------------------------------------------------------------------------------------------------------- parameters

_PARTS = {"attention": "attention", "feed_forward": "feed_forward", "output": "output", "embedding": "embedding"}


def parameters(c: TransformerConfig) -> dict[str, int]:
    """How many numbers the parameters hold: by part, `total`, and `without_embedding` (all but the look-up table).

    A tied table is the output projection as well, so there `without_embedding` leaves nothing of it (Kaplan et al.
    2020, arXiv:2001.08361, count so); `flops_per_token` counts the projection all the same.
    """
    counts = dict.fromkeys(("embedding", "attention", "feed_forward", "norms", "output"), 0)
    for name, spec in named(transformer_specs(c)).items():
        counts[_part(name)] += math.prod(spec.shape)
    total = sum(counts.values())
    return counts | {"total": total, "without_embedding": total - counts["embedding"]}


def _part(name: str) -> str:
    parts = name.split("/")
    if any(part.endswith("norm") for part in parts):
        return "norms"
    return next(part for part in parts if part in _PARTS)


# --------------------------------------------------------------------------------------------------------------- FLOPs


def flops_per_token(c: TransformerConfig, length: int, *, causal: bool = True) -> float:
    """Training FLOPs a token: three times the forward pass, which spends 2 for each weight of a matrix and for
    attention 2 for each feature, head and pair of positions, on scores and on values (Chowdhery et al. 2022,
    arXiv:2204.02311, appendix B). What remat computes again does not count.

    Args:
      c: the model, its vocabulary given.
      length: tokens of a row.
      causal: a position sees itself and those before it, (length + 1) / 2 on average, or those of them in the model's
        window. False: all of them, as published rates of use often count. Rows of several documents see less; that is
        not counted.
    """
    specs = named(transformer_specs(c)).values()
    weights = sum(math.prod(s.shape) for s in specs if role(s) in ("matrix", "head"))
    if c.tied:
        weights += c.ids * c.embed
    return 3.0 * (2 * weights + attention_flops(c, length, causal=causal))


def attention_flops(c: TransformerConfig, length: int, *, causal: bool = True) -> float:
    """Of these, those of one forward pass's scores and values. Args: as of `flops_per_token`."""
    w = min(c.window or length, length)
    seen = (w * (w + 1) / 2 + (length - w) * w) / length if causal else length
    return c.layers * 2 * 2 * c.heads * c.head_size * seen


def training_flops(c: TransformerConfig, length: int, tokens: int) -> float:
    """FLOPs of training on so many tokens in rows of `length`."""
    return tokens * flops_per_token(c, length)


# Dense bf16 peaks a JAX device, as their makers publish them, by how `device_kind` begins; the longer name goes first.
# A device is a chip, but for TPU v2, v3 and 7x, where it is one of a chip's two halves.
_PEAKS = {
    "TPU v2": 22.5e12,
    "TPU v3": 61.5e12,
    "TPU v4": 275e12,
    "TPU v5": 459e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v6": 918e12,
    "TPU7x": 1153.5e12,
    "NVIDIA A10": 125e12,
    "NVIDIA A10G": 70e12,
    "NVIDIA A100": 312e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA GH200": 989e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA GB200": 2500e12,
    "NVIDIA GeForce RTX 3090": 71e12,
    "NVIDIA GeForce RTX 4090": 165e12,
}


def peak_flops(device_kind: str, dtype: Any = jnp.bfloat16) -> float | None:
    """FLOPs a second that a device can reach at most, by jax's name for it; None where no figure is published.

    Args:
      device_kind: of a `jax.Device`: `TPU v5 lite`, `NVIDIA H100 80GB HBM3`.
      dtype: of compute. Only bfloat16 has a peak of its own: what float32 reaches depends on the precision of matmuls.
    """
    if jnp.dtype(dtype) != jnp.bfloat16:
        return None
    for name in sorted(_PEAKS, key=len, reverse=True):
        if re.match(rf"{name}(?![0-9A-Z])", device_kind):
            return _PEAKS[name]
    return None


# -------------------------------------------------------------------------------------------------------------- memory


def abstract_mesh(config: MeshConfig, devices: int, device: AbstractDevice | None = None) -> AbstractMesh:
    """The mesh of a config over so many devices that need not be there.

    Args:
      config: the mesh's.
      devices: how many it has.
      device: what they are; None: as those of the default backend.

    Raises:
      ConfigError: where the axes do not take exactly so many.
    """
    sizes = tuple(config.sizes(devices).values())
    return AbstractMesh(sizes, AXES, axis_types=(AxisType.Explicit,) * len(AXES), abstract_device=device)


def memory(
    c: TransformerConfig,
    state: Tree,
    mesh: Any,
    *,
    batch_size: int,
    length: int,
    remat: str = "none",
    microbatches: int = 1,
    config: MeshConfig = MESH,
) -> dict[str, int]:
    """Bytes that a training step needs on each device, by what they hold, and their `total`.

    `parameters` and `optimizer` (all of `state` but the parameters, the average of the weights among it) are exact.
    What the forward pass keeps is asked of JAX, layer for layer and on the mesh; what compilers make of it is
    estimated. Against `compiled.memory_analysis()` on CPU the total is right to a quarter (a test holds that).

    Args:
      c: the model, its vocabulary given.
      state: the state of training as shapes with shardings on the mesh: parameters, optimizer, average of the weights.
      mesh: a `Mesh`, or the `AbstractMesh` of machines that are not here.
      batch_size: rows of a step, over all devices.
      length: tokens of a row.
      remat: the policy, a name of `REMAT`.
      microbatches: into how many parts a step's rows are cut.
      config: the mesh's, for what of the state it splits and how it lays out activations.

    Returns:
      `parameters`, `gradients`, `optimizer`, `activations` (kept for the backward pass), `working` (what the largest
      layer computes with: recomputed activations and temporaries; or the output's logits and gradient; or, where that
      is more than the activations that are gone by then, optimizer state that visits from the host; and what stands
      beside), `total`.
    """
    mesh = mesh if isinstance(mesh, AbstractMesh) else mesh.abstract_mesh
    specs = transformer_specs(c)
    weights = tree_bytes(abstract(specs, mesh, drop=config.weights_drop))
    gradients = weights if config.zero != 2 else tree_bytes(abstract(specs, mesh))
    shape = (batch_size // microbatches, length)
    on_cpu = (mesh.abstract_device.platform if mesh.abstract_device else jax.default_backend()) == "cpu"
    if not c.scan and on_cpu:
        remat = "none"  # outside of a scan XLA for CPU finds that it is told to compute the same twice, and does not
    with jax.sharding.use_abstract_mesh(mesh):
        # A CPU's host is itself. Elsewhere what lies on the host comes to the device when activations are gone.
        optimizer = tree_bytes(state, host=platform() == "cpu") - weights
        kept, layer, output, logits = _phases(c, mesh, shape, remat, config.layout)
        # Before the loops over layers all weights are cast to a smaller dtype of compute; where nothing is computed
        # again that is kept by the layers.
        item = np.dtype(c.compute_dtype).itemsize
        cast = weights * item // 4 if item < 4 and remat != "none" else 0
    visiting = tree_bytes(state, host=True) - weights - optimizer
    need = {
        "parameters": weights,
        "gradients": gradients * (1 if microbatches == 1 else 2),
        "optimizer": optimizer,
        "activations": kept,
        "working": cast + max(layer, output, visiting - kept),
    }
    need = tpu_memory.without_fast(need, mesh, logits, scanned=c.scan)
    return need | {"total": sum(need.values())}


def _phases(
    c: TransformerConfig, mesh: AbstractMesh, shape: tuple[int, int], remat: str, layout: Layout
) -> tuple[int, int, int, int]:
    """Bytes on a device: what the forward pass keeps; what there is beside it while a layer's backward pass runs, and
    while the loss does; and, of the former, the logits' gradient."""
    on = platform()
    kept = _kept(c, mesh, shape, remat, layout)
    one_layer = dataclasses.replace(c, layers=1)
    again = _kept(one_layer, mesh, shape, "none", layout) if remat != "none" else 0
    # Where a layer is computed again, gradients take the place of most of what was (XLA for CPU does not let them).
    layer = again + (2 if not again or on == "cpu" else 1) * _largest(one_layer, mesh, shape, layout)
    if on == "tpu":
        laid_out, plain = tpu_memory.laid_out(c, mesh, shape)
        layer = max(layer, laid_out)
        # Without a loop, which would stack them as they are, half of these (q, k, v, the output) stay so laid out.
        kept += 0 if c.scan or again else c.layers * (laid_out - plain) // 2
    if layout.context == "ring":
        layer += tpu_memory.ring(c, mesh, shape)
    # The output's gradient is there whatever layer the backward pass is at: it is split over fsdp only in the end.
    whole = 4 * c.ids * c.embed // mesh.shape["tensor"]
    layer += whole - whole // mesh.shape["fsdp"]
    output, logits = _output(c, mesh, shape)
    if on == "cpu" or not logits:
        return kept, layer, output, 0
    # All rows are one chunk, and no loop: the weight's gradient is made from the logits' when the layers are through.
    return kept, layer + logits, output - logits, logits


def tree_bytes(tree: Tree, *, host: bool = False) -> int:
    """Bytes of abstract leaves on each device. Args: host: whether what lies in the host's memory counts too."""
    return sum(_bytes(leaf, host) for leaf in jax.tree.leaves(tree))


def _bytes(a: Any, host: bool = False) -> int:
    """A device's share of an array, by its sharding; all of it where it has none or is a share, inside `shard_map`.
    Nothing for what is in the host's memory, unless that counts."""
    sharding = getattr(a, "sharding", None)
    away = getattr(sharding, "memory_kind", None) == "pinned_host"
    if not host and (away or getattr(a, "memory_space", None) == jax.memory.Space.Host):
        return 0
    if sharding is None or AxisType.Manual in getattr(sharding.mesh, "axis_types", ()):
        shape = a.shape
    else:
        shape = sharding.shard_shape(a.shape)
    size = 8 if jax.dtypes.issubdtype(a.dtype, jax.dtypes.extended) else np.dtype(a.dtype).itemsize
    return math.prod(shape) * size


def _forward(
    c: TransformerConfig, mesh: Any, shape: tuple[int, int], remat: str, layout: Layout
) -> tuple[Callable, tuple]:
    """The forward pass up to the loss, and its abstract arguments. Scanned, so that it is traced in the time of one
    layer."""
    c = dataclasses.replace(c, scan=True)
    rows = NamedSharding(mesh, partition("batch", "length", shape=shape, mesh=mesh))
    ids = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=rows)

    def forward(params: Tree, tokens: Any, segments: Any) -> Any:
        return hidden(params, tokens, c=c, positions_BT=tokens, segment_ids_BT=segments, remat=remat, layout=layout)[0]

    return forward, (abstract(transformer_specs(c), mesh), ids, ids)


@functools.cache
def _kept(c: TransformerConfig, mesh: AbstractMesh, shape: tuple[int, int], remat: str, layout: Layout) -> int:
    """Bytes on a device that the forward pass leaves for the backward pass, beside its own arguments."""
    forward, arguments = _forward(c, mesh, shape, remat, layout)

    def residuals(params: Tree, *rest: Any) -> Any:
        return jax.vjp(lambda p: forward(p, *rest), params)[1]  # its leaves are what it holds

    jaxpr = jax.make_jaxpr(residuals)(*arguments).jaxpr
    given = {id(v) for v in jaxpr.invars}
    return sum(_bytes(v.aval) for v in {id(v): v for v in jaxpr.outvars if id(v) not in given}.values())


@functools.cache
def _largest(c: TransformerConfig, mesh: AbstractMesh, shape: tuple[int, int], layout: Layout) -> int:
    """Bytes on a device of the largest array that a layer's forward and backward pass makes: not the table, which is
    gathered before the first and behind the last of them."""
    forward, arguments = _forward(c, mesh, shape, "none", layout)

    def both(params: Tree, *rest: Any) -> Any:
        y, pull = jax.vjp(lambda p: forward(p, *rest), params)
        return pull(y)

    made = (v.aval for v in _made(jax.make_jaxpr(both)(*arguments).jaxpr))
    return max(_bytes(a) for a in made if c.ids not in a.shape)


def _made(jaxpr: Any) -> Iterator[Any]:
    """Every array that a program's operations give, those of the programs inside them instead of their own.

    A Pallas kernel's own are in the chip's fast memory. A look-up in a table has no layout of its own, nor has its
    gradient that is added up there: those arrays are counted as they lie before and behind.
    """
    moves = (e for e in jaxpr.eqns if e.primitive.name in ("reshard", "scatter-add"))
    passing = {id(v) for equation in moves for v in equation.invars}
    for equation in jaxpr.eqns:
        inside = {} if equation.primitive.name == "pallas_call" else equation.params
        inner = [p for p in jax.tree.leaves(list(inside.values())) if hasattr(p, "eqns")]
        for program in inner:
            yield from _made(getattr(program, "jaxpr", program))
        if not inner:
            yield from (v for v in equation.outvars if id(v) not in passing)


def _output(c: TransformerConfig, mesh: AbstractMesh, shape: tuple[int, int]) -> tuple[int, int]:
    """Bytes on a device of what the loss works with (`kernels/cross_entropy.py`), and of the logits where one chunk
    holds all of them, else 0."""
    v = c.ids // mesh.shape["tensor"]
    rows = tpu_memory.rows_of(mesh, shape)
    chunk = min(rows, max(1, chunk_bytes() // (4 * v)))
    item = np.dtype(c.compute_dtype).itemsize
    logits = 2 * 4 * chunk * v  # the logits, and the gradient that takes their place
    weight = (4 + 2 * item) * c.embed * v  # its gradient in float32, that and the weight itself in the dtype of compute
    return logits + weight + 2 * item * rows * c.embed, logits // 2 if chunk == rows else 0


def kept_by_a_layer(c: TransformerConfig, mesh: AbstractMesh, length: int, remat: str = "none") -> tuple[int, int]:
    """Bytes on a device that one layer leaves for the backward pass: for each row of `length` tokens, and once for all
    rows (its weights in the dtype of compute, where nothing is computed again)."""

    def kept(layers: int, rows: int) -> int:
        with jax.sharding.use_abstract_mesh(mesh):
            return _kept(dataclasses.replace(c, layers=layers), mesh, (rows, length), remat, LAYOUT)

    one = kept(2, 1) - kept(1, 1)
    if remat != "none":  # the cast is computed again with the rest: no need to tell the two apart
        return one, 0
    two = kept(2, 2) - kept(1, 2)
    return two - one, 2 * one - two


# -------------------------------------------------------------------------------------------- what is there, what fits


def device_memory(device: jax.Device) -> int | None:
    """Bytes that a device of this process can hold; None where it does not say.

    An accelerator tells its own limit. The devices of a host's CPU share what the machine (or the container that the
    process runs in) has left.
    """
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("bytes_limit")
    available = host_memory()
    return None if available is None else available // jax.local_device_count(backend="cpu")


def host_memory(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes of memory that this machine has left: the kernel's estimate, or what the control groups around this process
    leave of their limits, where that is less. All of it where no estimate is given, None where nothing is known."""
    found = re.search(r"MemAvailable:\s+(\d+) kB", _text(proc / "meminfo"))
    if found is None:
        names = getattr(os, "sysconf_names", {})
        known = {"SC_PHYS_PAGES", "SC_PAGE_SIZE"} <= set(names)
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if known else None
    left = [int(found[1]) * 1024]
    own = re.search(r"^0::/(.*)$", _text(proc / "self" / "cgroup"), re.MULTILINE)  # version 2 of control groups
    group = cgroups / (own[1] if own else "")
    for directory in (group, *group.parents):
        limit, used = _text(directory / "memory.max"), _text(directory / "memory.current")
        if limit.strip().isdigit() and used.strip().isdigit():
            cached = re.search(r"^inactive_file (\d+)", _text(directory / "memory.stat"), re.MULTILINE)
            left.append(int(limit) - int(used) + (int(cached[1]) if cached else 0))  # files' pages are given up at need
        if directory == cgroups:
            break
    return max(0, min(left))


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""


def shortage(need: Mapping[str, int], available: int) -> str | None:
    """What a device needs and what is there, in one line; None where it fits.

    Args:
      need: of `memory`.
      available: of `device_memory`.
    """
    if need["total"] <= available:
        return None
    parts = ", ".join(f"{name} {amount(size)}" for name, size in need.items() if name != "total")
    return f"a device needs {amount(need['total'])} ({parts}), and {amount(available)} are there"


def amount(size: int) -> str:
    """Bytes for a person: `1.50 GB`."""
    unit, name = next(((u, n) for u, n in ((10**12, "TB"), (10**9, "GB"), (10**6, "MB")) if size >= u), (10**3, "kB"))
    return f"{size / unit:.3g} {name}"


def suggest(
    c: TransformerConfig,
    make_state: Callable[[AbstractMesh, MeshConfig], Tree],
    config: MeshConfig,
    devices: int,
    available: int,
    *,
    batch_size: int,
    length: int,
    remat: str,
    microbatches: int,
    slices: int = 1,
    device: AbstractDevice | None = None,
) -> dict[str, Any] | None:
    """The nearest setting of the same model and batch that fits, as the config's keys to change; None where none does.

    Nearest is what changes least: the mesh as it is, then weights split over more and more devices (`mesh.fsdp`); on
    each mesh remat as it is, then full with as few micro-batches as will do.

    Args:
      c: the model, its vocabulary given.
      make_state: the abstract state of training on a mesh, as its config wants it.
      config: the mesh that did not fit.
      devices: how many there are.
      available: bytes on each device.
      batch_size, length, remat, microbatches: as of `memory`.
      slices: which `data` must be a multiple of.
      device: what the devices are; None: as those of the default backend.
    """
    for mesh_config, mesh_keys in _meshes(config, devices):
        mesh: Any = abstract_mesh(mesh_config, devices, device)
        parts = mesh.shape["data"] * mesh.shape["fsdp"] * microbatches
        if batch_size % parts or c.embed % mesh.shape["fsdp"] or mesh.shape["data"] % slices:
            continue
        state = make_state(mesh, mesh_config)
        if tree_bytes(state) + tree_bytes(abstract(transformer_specs(c), mesh)) > available:
            continue  # before anything is traced
        rows = batch_size // parts  # of a micro-batch on a device
        finer = [k for k in range(1, rows + 1) if rows % k == 0]

        def fits(
            policy: str, times: int, mesh: Any = mesh, state: Tree = state, mesh_config: MeshConfig = mesh_config
        ) -> bool:
            cut: dict[str, Any] = {"batch_size": batch_size, "length": length, "microbatches": microbatches * times}
            return memory(c, state, mesh, remat=policy, config=mesh_config, **cut)["total"] <= available

        if not fits("full", finer[-1]):
            continue
        policy, times = remat, 1
        if not fits(remat, 1):
            policy, times = "full", finer[bisect.bisect_left(finer, True, key=lambda k: fits("full", k))]
        changed = {"train.remat": policy} if policy != remat else {}
        return mesh_keys | changed | ({"train.microbatches": microbatches * times} if times > 1 else {})
    return None


def _meshes(config: MeshConfig, devices: int) -> Iterator[tuple[MeshConfig, dict[str, Any]]]:
    """The mesh as it is, then those with a larger `fsdp` at the cost of `data`, with the keys that make them."""
    yield config, {}
    sizes = config.sizes(devices)
    rows = sizes["data"] * sizes["fsdp"]
    for fsdp in range(sizes["fsdp"] + 1, rows + 1):
        if rows % fsdp == 0:
            keys = {"data": rows // fsdp, "fsdp": fsdp}
            yield (
                dataclasses.replace(config, data=rows // fsdp, fsdp=fsdp),
                {f"mesh.{axis}": size for axis, size in keys.items()},
            )
