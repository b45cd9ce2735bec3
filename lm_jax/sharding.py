"""One mesh, one table.

The mesh always has the four axes of `AXES`, all of `AxisType.Explicit`, and axes of size 1 stay, so that a layout's
errors show on a laptop. `TABLE` says which mesh axes a logical name is split over. A weight's names and an activation's
are different names (`embed` of a weight goes to fsdp; `features` of the residual stream do not). No other file writes a
`PartitionSpec`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mesh_utils import create_device_mesh, create_hybrid_device_mesh
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from lm_jax.errors import ConfigError
from lm_jax.params import ParamSpec, Tree, map_specs

AXES = ("data", "fsdp", "sequence", "tensor")

TABLE: dict[str | None, tuple[str, ...]] = {
    # activations
    "batch": ("data", "fsdp"),
    "length": ("sequence",),
    "residual_length": ("sequence", "tensor"),  # between the regions of tensor parallelism, see `Layout`
    "key_length": (),  # keys and values are gathered over length before attention
    "features": (),
    # weights and activations
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "context_heads": ("tensor", "sequence"),  # of attention whose length is whole, its heads shared out further
    "context_kv_heads": ("tensor", "sequence"),
    "feed_forward": ("tensor",),
    "head_dim": (),
    # weights
    "embed": ("fsdp",),
    "norm": (),
    "layers": (),
    None: (),
}


CONTEXTS = ("gather", "ring", "all_to_all")


class Layout(NamedTuple):
    """The choices among layouts of activations that the sizes of mesh axes leave open; `MeshConfig` says what they
    mean."""

    context: str = "gather"
    split_residual: bool = False

    @property
    def residual(self) -> str:
        """The logical name of the residual stream's length."""
        return "residual_length" if self.split_residual else "length"


LAYOUT = Layout()


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How large each mesh axis is. One of them may be -1: whatever devices the others leave.

    Attributes:
      data: copies of the model, each on its own rows of the batch. Where devices come in slices joined by a network,
        the slices are parts of this axis.
      fsdp: parts that weights, gradients and optimizer state are split into; each takes its own rows as well.
      sequence: parts that a row's length is split into.
      tensor: parts that heads, feed-forward features and vocabulary are split into.
      zero: what is split over `fsdp` (Rajbhandari et al. 2020, arXiv:1910.02054): 1, the optimizer's state (with the
        average of the weights); 2, the gradients too; 3, the weights too.
      context: how attention looks beyond its part of a row, where `sequence` splits it: `gather` brings keys and values
        together on each device; `ring` passes them round (Liu et al. 2023, arXiv:2310.01889); `all_to_all` splits heads
        instead of the length while it attends (Jacobs et al. 2023, arXiv:2309.14509).
      split_residual: whether `tensor` splits the length of what stands between attention and feed-forward (Korthikanti
        et al. 2022, arXiv:2205.05198): norms and kept activations are then a part each, for the same bytes moved.
      offload_optimizer: whether the optimizer's state (with the average of the weights) lies in the host's memory
        between steps.
    """

    data: int = -1
    fsdp: int = 1
    sequence: int = 1
    tensor: int = 1
    zero: int = 3
    context: str = "gather"
    split_residual: bool = False
    offload_optimizer: bool = False

    def __post_init__(self) -> None:
        if self.zero not in (1, 2, 3):
            raise ConfigError("mesh.zero", f"there is no stage {self.zero}", "use 1, 2 or 3")
        if self.context not in CONTEXTS:
            raise ConfigError("mesh.context", f"unknown {self.context!r}", f"use one of {', '.join(CONTEXTS)}")
        for axis in AXES:
            size = getattr(self, axis)
            if size < 1 and size != -1:
                raise ConfigError(
                    f"mesh.{axis}", f"{size} is no size of an axis", "use 1 or more, or -1 for the devices left"
                )
        if sum(getattr(self, axis) == -1 for axis in AXES) > 1:
            raise ConfigError("mesh", "more than one axis is -1", "give all but one of data, fsdp, sequence, tensor")

    @property
    def layout(self) -> Layout:
        """What model functions have to know of these choices."""
        return Layout(self.context, self.split_residual)

    @property
    def devices(self) -> int:
        """How many devices it takes where no axis is -1."""
        return math.prod(getattr(self, axis) for axis in AXES)

    @property
    def weights_drop(self) -> tuple[str, ...]:
        """The mesh axes that do not split weights though the table says so."""
        return () if self.zero == 3 else ("fsdp",)

    def sizes(self, devices: int) -> dict[str, int]:
        """Every axis's size on so many devices.

        Raises:
          ConfigError: where the axes do not take exactly the devices there are.
        """
        sizes = {axis: getattr(self, axis) for axis in AXES}
        fixed = math.prod(s for s in sizes.values() if s != -1)
        text = " x ".join(f"{a}={s}" for a, s in sizes.items())
        if -1 in sizes.values():
            if devices % fixed:
                hint = "choose sizes whose product divides them"
                given = {axis: s for axis, s in sizes.items() if s > 1}
                if len(given) == 1:
                    ((axis, size),) = given.items()
                    near = min((n for n in range(1, devices + 1) if devices % n == 0), key=lambda n: abs(n - size))
                    hint = f"the nearest that does is mesh.{axis}={near}"
                raise ConfigError("mesh", f"{text} does not divide {devices} devices", hint)
            return {axis: devices // fixed if s == -1 else s for axis, s in sizes.items()}
        if fixed != devices:
            verb = "wants more than" if fixed > devices else "leaves some unused of"
            raise ConfigError(
                "mesh", f"{text} = {fixed} {verb} the {devices} devices here", "make one axis -1 to take what is there"
            )
        return sizes


MESH = MeshConfig()


def slices_of(devices: Sequence[jax.Device]) -> int:
    """How many groups of devices there are that only a network joins: slices of TPUs, hosts of GPUs."""
    return len({getattr(d, "slice_index", 0) for d in devices})


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """The mesh of a config over the devices given (all there are, if none are). Enter it with `jax.set_mesh`.

    Where the devices come in slices that only a network joins, `data` takes the slices as its outer part, so that all
    other axes, and the rest of `data`, stay within one: fsdp then is hierarchical, its weights gathered within a slice
    and its gradients, already split, summed over the slices.

    Raises:
      ConfigError: where the axes do not take exactly the devices there are, or would cross slices of TPUs.
    """
    devices = jax.devices() if devices is None else devices
    sizes = tuple(config.sizes(len(devices)).values())
    slices = slices_of(devices)
    if slices > 1:
        if sizes[0] % slices and devices[0].platform != "tpu":
            # A slice of GPUs is a host, and their network bears what that of TPU slices does not.
            placed = np.array(sorted(devices, key=lambda d: d.id)).reshape(sizes)
            return Mesh(placed, AXES, axis_types=(AxisType.Explicit,) * len(AXES))
        if sizes[0] % slices:
            near = max(1, round(sizes[0] / slices)) * slices
            problem = f"{sizes[0]} cannot be split over {slices} slices, and no other axis may cross their network"
            raise ConfigError("mesh.data", problem, f"the nearest that fits is {near}")
        inner = (sizes[0] // slices, *sizes[1:])
        placed = create_hybrid_device_mesh(inner, (slices, 1, 1, 1), devices, allow_split_physical_axes=True)
        return Mesh(placed, AXES, axis_types=(AxisType.Explicit,) * len(AXES))
    # jax.make_mesh knows the chips' wiring; it silently takes fewer devices than there are, which `sizes` has ruled
    # out. It refuses an axis that takes a part of a dimension of the torus (2 of 4x4x4), which the wiring allows.
    try:
        return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Explicit,) * len(AXES), devices=devices)
    except NotImplementedError:
        placed = create_device_mesh(sizes, devices, allow_split_physical_axes=True)
        return Mesh(placed, AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def one_device_mesh() -> Mesh:
    """A mesh of one device: what a laptop, a test or a tool uses."""
    return Mesh(
        np.array(jax.devices()[:1]).reshape((1,) * len(AXES)), AXES, axis_types=(AxisType.Explicit,) * len(AXES)
    )


def partition(
    *names: str | None, shape: tuple[int, ...] | None = None, mesh: Any = None, drop: tuple[str, ...] = ()
) -> PartitionSpec:
    """The PartitionSpec of dimensions with these logical names.

    Args:
      names: a logical name a dimension.
      shape: where given (with `mesh`), each dimension is checked against what it is split into.
      mesh: the mesh to check against.
      drop: mesh axes to leave out (`("fsdp",)`: gathered over fsdp).

    Raises:
      ValueError: where two dimensions want the same mesh axis, or an axis does not divide a dimension.
    """
    entries: list[Any] = []
    taken: dict[str, str | None] = {}
    for d, name in enumerate(names):
        if name not in TABLE:
            raise ValueError(f"unknown logical name {name!r}: known are {', '.join(str(n) for n in TABLE if n)}")
        axes = tuple(a for a in TABLE[name] if a not in drop)
        for axis in axes:
            if axis in taken:
                raise ValueError(f"mesh axis {axis!r} is wanted by both {taken[axis]!r} and {name!r}")
            taken[axis] = name
        if shape is not None and mesh is not None:
            parts = math.prod(mesh.shape[a] for a in axes)
            if shape[d] % parts:
                over = " x ".join(f"{a}={mesh.shape[a]}" for a in axes)
                raise ValueError(f"{name} = {shape[d]} cannot be split evenly over {over}")
        entries.append(None if not axes else axes[0] if len(axes) == 1 else axes)
    return PartitionSpec(*entries)


def out_sharding(*names: str | None) -> PartitionSpec | None:
    """`partition`, or None where no mesh is entered: model functions also run as plain JAX on one device."""
    return None if jax.sharding.get_abstract_mesh().empty else partition(*names)


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """`x`, laid out by logical names on the current mesh (as it is where no mesh is entered)."""
    spec = out_sharding(*names)
    return x if spec is None else jax.sharding.reshard(x, spec)


def ordered(x: jax.Array, dim: int, order: np.ndarray) -> jax.Array:
    """`x` with what stands along a dimension in another order, laid out as before.

    It is whole along that dimension for a moment, so this is meant for ids and masks.
    """
    spec = jax.typeof(x).sharding.spec
    if jax.sharding.get_abstract_mesh().empty:
        return jnp.take(x, order, dim)
    whole = jax.sharding.reshard(x, PartitionSpec(*(None if d == dim else e for d, e in enumerate(spec))))
    return jax.sharding.reshard(jnp.take(whole, order, dim), spec)


def split_dim(x: jax.Array, dim: int, major: int, minor: int) -> jax.Array:
    """Dimension `dim` as two, `[major, minor]`, the major one split over the mesh as the whole was: nothing moves.

    (A plain reshape forgets how dimensions of size 1 are laid out, which is part of an array's type.)
    """
    spec = jax.typeof(x).sharding.spec
    shape = (*x.shape[:dim], major, minor, *x.shape[dim + 1 :])
    return _reshape(x, shape, (*spec[: dim + 1], None, *spec[dim + 1 :]))


def merge_dims(x: jax.Array, dim: int) -> jax.Array:
    """Dimensions `dim` and `dim + 1` as one, laid out as `dim` was; the other must be whole."""
    spec = jax.typeof(x).sharding.spec
    shape = (*x.shape[:dim], x.shape[dim] * x.shape[dim + 1], *x.shape[dim + 2 :])
    return _reshape(x, shape, (*spec[: dim + 1], *spec[dim + 2 :]))


def _reshape(x: jax.Array, shape: tuple[int, ...], spec: tuple[Any, ...]) -> jax.Array:
    meshless = jax.sharding.get_abstract_mesh().empty
    return jax.lax.reshape(x, shape, out_sharding=None if meshless else PartitionSpec(*spec))


def platform() -> str:
    """What the devices of the current mesh are (`cpu`, `tpu`, `gpu`, ..), also where they are only described; without a
    mesh, the default backend."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def axis_size(axis: str) -> int:
    """How many parts the current mesh has along an axis; 1 where no mesh is entered."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.shape[axis]


def device_kind() -> str:
    """The chip of the current mesh (`TPU v6 lite`, `NVIDIA H200`, ..); without a mesh, of the default backend."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.devices()[0].device_kind if device is None else device.device_kind


def on_one_device() -> bool:
    """Whether functions now see one device's arrays: no mesh is entered, or the inside of a `shard_map`."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.empty or AxisType.Manual in mesh.axis_types


def on_each_device(f: Callable[..., Any], args: Any, names: Any, out_names: Any) -> Any:
    """`f(*args)` with each device's own part of the arguments (`shard_map`), laid out by logical names.

    Args:
      f: sees arrays that all vary over the mesh axes of the outcome, also those that were replicated there (whose
        gradients are then summed over the devices).
      args: a tuple of trees of arrays.
      names: the same with a tuple of logical names in place of every array.
      out_names: the same of what `f` gives.
    """

    def specs(tree: Any) -> Any:
        return jax.tree.map(lambda names: partition(*names), tree, is_leaf=_is_names)

    in_specs, out_specs = specs(names), specs(out_names)
    args = jax.tree.map(jax.sharding.reshard, args, in_specs)
    axes = {a for names in jax.tree.leaves(out_names, is_leaf=_is_names) for name in names for a in TABLE[name]}

    def vary(a: jax.Array) -> jax.Array:
        missing = tuple(axes - jax.typeof(a).manual_axis_type.varying)
        return jax.lax.pcast(a, missing, to="varying") if missing else a

    def each(*a: Any) -> Any:
        return f(*jax.tree.map(vary, a))

    # Along which axes a value varies is part of its type, for JAX to check; Pallas' kernels for GPUs do not have it of
    # what they give, nor of the numbers in their loops. What is computed, and gradients, are the same without.
    checked = platform() not in ("gpu", "cuda")
    return jax.shard_map(each, in_specs=in_specs, out_specs=out_specs, check_vma=checked)(*args)


def _is_names(x: Any) -> bool:
    return type(x) is tuple and all(isinstance(n, str | None) for n in x)


def part_index(name: str) -> jax.Array:
    """Inside `on_each_device`: which part of a dimension with this logical name the device has."""
    return jax.lax.axis_index(TABLE[name])


def send_on(tree: Any, name: str, hops: int = 1) -> Any:
    """Inside `on_each_device`: the arrays of the device that stands `hops` before this one along a dimension with this
    logical name; the first one stands behind the last one."""
    axes = TABLE[name]
    parts = jax.lax.axis_size(axes)
    pairs = [(i, (i + hops) % parts) for i in range(parts)]
    return jax.tree.map(lambda a: jax.lax.ppermute(a, axes, pairs), tree)


def abstract(specs: Tree, mesh: Mesh | AbstractMesh, dtype: Any = np.float32, *, drop: tuple[str, ...] = ()) -> Tree:
    """The parameters as `ShapeDtypeStruct`s with their shardings on the mesh, whole over the axes of `drop`."""

    def one(s: ParamSpec) -> jax.ShapeDtypeStruct:
        spec = partition(*s.axes, shape=s.shape, mesh=mesh, drop=drop)
        return jax.ShapeDtypeStruct(s.shape, dtype, sharding=NamedSharding(mesh, spec))

    return map_specs(one, specs)


def lay_out(params: Tree, specs: Tree, *, drop: tuple[str, ...] = ()) -> Tree:
    """Parameters, or what is shaped like them, laid out as their specs say, whole over the axes of `drop`."""
    return map_specs(lambda s, a: jax.sharding.reshard(a, partition(*s.axes, drop=drop)), specs, params)


def on_host(tree: Tree) -> Tree:
    """Abstract leaves as `on_mesh` gives them, to lie in the memory of the devices' host."""

    def one(a: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        assert isinstance(a.sharding, NamedSharding)
        return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding.with_memory_kind("pinned_host"))

    return jax.tree.map(one, tree)


def in_memory(tree: Tree, host: bool) -> Tree:
    """Arrays in the host's memory, or in the devices' own; for use in a jitted function."""
    space = jax.memory.Space.Host if host else jax.memory.Space.Device
    return jax.tree.map(lambda a: jax.device_put(a, space), tree)


def on_mesh(mesh: Mesh | AbstractMesh, tree: Tree) -> Tree:
    """Abstract leaves (from `jax.eval_shape`) with shardings on this mesh, for init, restore and ahead-of-time use
    alike.

    Leaves of `jax.eval_shape` sit on an abstract mesh, and scalars have no sharding: those are replicated.
    """

    def one(a: Any) -> jax.ShapeDtypeStruct:
        sharding = getattr(a, "sharding", None)
        spec = sharding.spec if sharding is not None else PartitionSpec()
        return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(one, tree)


def gather_weights(params: Tree, specs: Tree, dtype: Any) -> Tree:
    """Weights in the compute dtype, whole over fsdp and split as before over the rest.

    The cast comes first: the gather then moves half the bytes.
    """

    whole = jax.sharding.get_abstract_mesh().empty

    def one(s: ParamSpec, w: Any) -> jax.Array:
        if isinstance(w, Twofold):
            return _whole(w.part, w.whole.astype(dtype))
        w = w.astype(dtype)
        return w if whole else jax.sharding.reshard(w, partition(*s.axes, drop=("fsdp",)))

    return map_specs(one, specs, params)


class Twofold(NamedTuple):
    """A weight that is whole over fsdp while its gradient is to be a part: the gradient is taken of `part`, which is
    what a device updates of it. `gather_weights` gives the whole."""

    part: jax.Array
    whole: jax.Array


def parts_of_layers(params: Tree, specs: Tree) -> Tree:
    """Whole parameters, those of layers in parts over fsdp: no byte moves. What the gradient is to be taken of."""
    return map_specs(lambda s, w: jax.sharding.reshard(w, partition(*s.axes)) if _layered(s) else w, specs, params)


def twofold_layers(parts: Tree, params: Tree, specs: Tree) -> Tree:
    """The parameters that a model is to be given for that: a layer's gradient is then split before the next one's is
    made, and never stands whole beside the others'."""
    return map_specs(lambda s, part, whole: Twofold(part, whole) if _layered(s) else part, specs, parts, params)


def _layered(spec: ParamSpec) -> bool:
    return spec.axes[:1] == ("layers",)


@jax.custom_vjp
def _whole(part: jax.Array, whole: jax.Array) -> jax.Array:
    del part
    return whole


def _whole_backward(part: jax.Array, g: jax.Array) -> tuple[jax.Array, None]:
    return jax.sharding.reshard(g, jax.typeof(part).sharding.spec).astype(part.dtype), None


_whole.defvjp(lambda part, whole: (whole, part), _whole_backward)


def on_whole_matrices(f: Callable[[jax.Array], jax.Array], x: jax.Array, batch_dims: int) -> jax.Array:
    """`f(x)` where `f` needs whole matrices: on a mesh, the devices share the matrices out among them.

    The mesh axes that split the matrices, and as many others as there are layers for, split the first dimension
    instead, which is filled up with zeros if need be. (An all-to-all moves each weight once there and once back; a
    plain gather would move it to every device, and every device would do all the work.)

    Args:
      f: acts on `[batch..., matrix dimensions...]` and keeps the shape.
      x: the same.
      batch_dims: how many dimensions stand before the matrices', 1 at least.
    """
    sharding = jax.typeof(x).sharding
    sizes = sharding.mesh.shape
    spec = (*sharding.spec, *[None] * (x.ndim - len(sharding.spec)))
    per_dim = [() if e is None else e if isinstance(e, tuple) else (e,) for e in spec]
    taken = {a for dim in per_dim for a in dim}
    moving = [a for dim in per_dim[batch_dims:] for a in dim]
    parts = math.prod(sizes[a] for a in (*per_dim[0], *moving))
    for axis, kind in zip(sharding.mesh.axis_names, sharding.mesh.axis_types, strict=True):
        if kind == AxisType.Explicit and axis not in taken and parts * sizes[axis] <= x.shape[0]:
            moving.append(axis)
            parts *= sizes[axis]
    # One axis at a time: XLA knows each such move as an all-to-all, and gathers everything when asked for two at once.
    layouts = [per_dim]
    for axis in moving:
        rest = [tuple(a for a in dim if a != axis) for dim in layouts[-1]]
        layouts.append([(*rest[0], axis), *rest[1:]])
    fill = -x.shape[0] % parts
    y = jnp.pad(x, [(0, fill)] + [(0, 0)] * (x.ndim - 1)) if fill else x
    for layout in layouts[1:]:
        y = jax.sharding.reshard(y, PartitionSpec(*layout))
    y = f(y)
    for layout in reversed(layouts[:-1]):
        y = jax.sharding.reshard(y, PartitionSpec(*layout))
    return y[: x.shape[0]]
