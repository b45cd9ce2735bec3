"""Whether a layout computes what one device does: a config's own layout, shrunk, against one device and plain JAX.

Every check compares two ways to the same numbers and says which fault is likely where they differ. All in float32.

Shapes: B batch, T length, D embed.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from jax.sharding import Mesh, NamedSharding

from lm_jax.models.transformer import columns, hidden, logits, transformer_specs
from lm_jax.objectives.objective import Objective
from lm_jax.params import ParamSpec, Tree, map_specs, named, role
from lm_jax.sharding import AXES, MeshConfig, abstract, make_mesh, one_device_mesh, partition
from lm_jax.training.checkpoint import CheckpointConfig, Checkpointer
from lm_jax.training.program import Program, make_program
from lm_jax.training.run import RunConfig
from lm_jax.training.state import TrainState, abstract_state
from lm_jax.training.step import make_train_step

Batch = dict[str, np.ndarray]
MakeObjective = Callable[[RunConfig], Objective]

STEPS = 3
# What float32 leaves of two orders of summation. Twenty steps on any layout stay within 5e-6 of one device's loss.
_LOSS, _GRADIENT, _PARAMETERS, _HIDDEN = 5e-6, 2e-5, 1e-4, 2e-5


class Check(NamedTuple):
    """One comparison.

    Attributes:
      name: what is tried.
      compared: the two sides.
      difference: how far they are apart, relative to the right one.
      limit: how far they may be.
      suspect: what is likely wrong where they are further.
    """

    name: str
    compared: str
    difference: float
    limit: float
    suspect: str

    @property
    def ok(self) -> bool:
        return bool(self.difference <= self.limit)  # NaN is not


# -------------------------------------------------------------------------------------------------------- the shrinking


def shrunk_mesh(config: MeshConfig, devices: int) -> MeshConfig:
    """The mesh with every axis that it splits over, as large as so many devices allow: 2 for each first, in the order
    tensor, sequence, fsdp, data, then 4, and so on."""
    wanted = {axis: getattr(config, axis) for axis in AXES}
    sizes = dict.fromkeys(AXES, 1)
    grown = True
    while grown:
        grown = False
        for axis in reversed(AXES):
            fits = wanted[axis] == -1 or 2 * sizes[axis] <= wanted[axis]
            if fits and 2 * math.prod(sizes.values()) <= devices:
                sizes[axis] *= 2
                grown = True
    return dataclasses.replace(
        config, data=sizes["data"], fsdp=sizes["fsdp"], sequence=sizes["sequence"], tensor=sizes["tensor"]
    )


def shrunk(config: RunConfig, devices: int) -> RunConfig:
    """The config with the same parts, layout and policies and small numbers: two layers, short rows, float32."""
    mesh = shrunk_mesh(config.mesh, devices)
    tensor, sequence, fsdp = mesh.tensor, mesh.sequence, mesh.fsdp
    model, train = config.model, config.train
    group = min(model.heads // model.key_heads, 4)
    kv_heads = tensor * (1 if group > 1 else 2)
    if mesh.context == "all_to_all" and group == 1:
        kv_heads *= sequence
    elif mesh.context == "all_to_all":
        group = math.lcm(group, sequence)
    unit = math.lcm(16, fsdp)
    wide = 128 if config.optimizer.name == "adafactor" else 32  # from there on it factors second moments
    cuts = 2 * sequence * tensor
    length = -(-288 // cuts) * cuts  # more than two of attention's blocks of 128
    embed = -(-wide // unit) * unit
    small = dataclasses.replace(
        model,
        layers=2,
        embed=embed,
        heads=kv_heads * group,
        kv_heads=kv_heads,
        head_dim=16,
        feed_forward_dim=-(-wide // tensor) * tensor + 16 * tensor,
        vocab=64 * tensor,
        window=None if model.window is None else max(2, min(model.window, length // 3)),
        dtype="float32",
        output_init="scaled",  # outputs that start at zero would hide what lies before them
        base_embed=None if model.base_embed is None else embed // 2,  # so that all multipliers act
        base_layers=None if model.base_layers is None else 1,
        base_head_dim=None if model.base_head_dim is None else 8,
    )
    microbatches = 2 if train.microbatches > 1 else 1
    rows = 2 * mesh.data * fsdp * microbatches
    return dataclasses.replace(
        config,
        model=small,
        mesh=mesh,
        train=dataclasses.replace(
            train,
            steps=STEPS,
            tokens=None,
            batch_size=rows,
            length=length,
            microbatches=microbatches,
            remat="full" if train.remat == "auto" else train.remat,
        ),
        optimizer=dataclasses.replace(config.optimizer, warmup_steps=1),
        checkpoint=CheckpointConfig(),
    )


def on_one_device(config: RunConfig) -> RunConfig:
    """The same on a mesh of one device."""
    mesh = dataclasses.replace(config.mesh, data=1, fsdp=1, sequence=1, tensor=1)
    return dataclasses.replace(config, mesh=mesh)


def packed_rows(config: RunConfig, seed: int) -> Batch:
    """Rows of three documents, lengths at random, some of them with padding behind; the second row is all padding."""
    B, T, random = config.train.batch_size, config.train.length, np.random.default_rng(seed)
    tokens = random.integers(0, config.model.ids, (B, T + 1))
    segments, positions = np.full((B, T), -1), np.zeros((B, T), int)
    for row in range(B):
        cuts = [0] * 4 if row == 1 else [0, *sorted(random.choice(np.arange(2, T + 1), 3, replace=False).tolist())]
        for n, (start, end) in enumerate(itertools.pairwise(cuts)):
            segments[row, start:end], positions[row, start:end] = n, np.arange(end - start)
    whole = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "segment_ids": segments, "positions": positions}
    return {name: a.astype(np.int32) for name, a in whole.items()} | {"loss_mask": segments >= 0}


def documents(rows: Batch) -> Iterator[tuple[int, int, int]]:
    """Row, start and end of every document."""
    for row, ids in enumerate(rows["segment_ids"]):
        for n in range(int(ids.max()) + 1):
            at = np.flatnonzero(ids == n)
            yield row, int(at[0]), int(at[-1]) + 1


def parameters(specs: Tree, seed: int = 0) -> Tree:
    """Values of a trained model's size: gains are not one, projections are not small."""
    random = np.random.default_rng(seed)

    def one(s: ParamSpec) -> np.ndarray:
        noise = random.standard_normal(s.shape)
        if role(s) == "vector":
            return (1 + 0.2 * noise).astype(np.float32)
        return (noise * max(1, math.prod(s.shape[d] for d in s.fan_in)) ** -0.5).astype(np.float32)

    return map_specs(one, specs)


# ----------------------------------------------------------------------------------------------------------- the checks


class Bench:
    """The shrunk config on its layout and on one device, and what both are fed."""

    def __init__(self, config: RunConfig, make_objective: MakeObjective, devices: list[jax.Device]) -> None:
        self.config, self.make_objective = config, make_objective
        self.mesh = make_mesh(config.mesh, devices[: config.mesh.devices])
        self.one = one_device_mesh()
        self.specs = transformer_specs(config.model)
        self.params = parameters(self.specs)
        self.rows = packed_rows(config, 0)

    def place(self, rows: Batch, mesh: Mesh) -> dict[str, jax.Array]:
        return {name: jax.device_put(a, NamedSharding(mesh, partition("batch", "length"))) for name, a in rows.items()}

    def gradients(self, config: RunConfig, mesh: Mesh) -> tuple[float, dict[str, np.ndarray]]:
        """The loss and the gradient of the first batch, through the training step."""
        with jax.set_mesh(mesh):
            shapes = abstract_state(self.specs, KEEP, mesh, config=config.mesh)
            zero = jnp.zeros((), jnp.int32)
            nothing = jax.tree.map(np.zeros_like, self.params)
            state = TrainState(self.params, {}, {}, nothing, None, zero, zero, zero, jax.random.key(0))
            state = jax.tree.map(lambda a, s: jax.device_put(a, s.sharding), state, shapes)
            step = make_train_step(
                self.make_objective(config),
                KEEP,
                lambda updates: 0.0,
                microbatches=config.train.microbatches,
                specs=self.specs,
                mesh=config.mesh,
            )
            new, metrics = jax.jit(step)(state, self.place(self.rows, mesh))
            leaves = zip(named(self.specs), jax.tree.leaves(new.opt_state), strict=True)
            return float(metrics["loss"]), {name: np.asarray(a) for name, a in leaves}

    def outputs(self, rows: Batch) -> np.ndarray:
        """`[B, T, D]` behind the last block on the layout, its columns in their own order."""
        c, layout = self.config.model, self.config.mesh.layout
        with jax.set_mesh(self.mesh):
            order = columns(c, layout, self.config.train.length)
            if order is not None:
                rows = {name: a[:, order] for name, a in rows.items()}
            weights = abstract(self.specs, self.mesh, drop=self.config.mesh.weights_drop)
            params = jax.tree.map(lambda a, s: jax.device_put(a, s.sharding), self.params, weights)
            placed = self.place(rows, self.mesh)
            x_BTD = np.asarray(_hidden(params, placed, c, layout))
        return x_BTD if order is None else x_BTD[:, np.argsort(order)]

    def program(self, config: RunConfig, mesh: Mesh) -> Program:
        return make_program(config, mesh, self.make_objective(config))


KEEP = optax.GradientTransformation(  # changes nothing and remembers the gradient
    lambda params: jax.tree.map(jnp.zeros_like, params),
    lambda gradient, state, params=None: (jax.tree.map(jnp.zeros_like, gradient), gradient),
)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _hidden(params: Tree, rows: dict[str, jax.Array], c: Any, layout: Any) -> jax.Array:
    positions, ids = rows["positions"], rows["segment_ids"]
    return hidden(params, rows["tokens"], c=c, positions_BT=positions, segment_ids_BT=ids, layout=layout)[0]


def check_isolation(bench: Bench) -> Iterator[Check]:
    """What a token must not see changes nothing, and where a document stands changes nothing."""
    rows = bench.rows
    want = bench.outputs(rows)
    scale = np.abs(want).max()
    where = list(documents(rows))
    first = {row: end for row, start, end in where if start == 0}
    other = dict(rows, tokens=rows["tokens"].copy())
    for row, end in first.items():
        other["tokens"][row, :end] = (other["tokens"][row, :end] + 1) % bench.config.model.ids
    changed = np.abs(bench.outputs(other) - want)
    behind = np.zeros(rows["tokens"].shape, bool)
    for row, start, end in where:
        behind[row, start:end] = start > 0
    assert changed[~behind & (rows["segment_ids"] >= 0)].max() > 0.01 * scale  # what may change does
    yield Check(
        "segments",
        "documents behind another one, and the same behind a changed one",
        float(changed[behind].max() / scale),
        1e-6,
        "documents of one row see each other: segment ids are lost on the way to attention",
    )
    half = dict(rows, tokens=rows["tokens"].copy())
    before = np.zeros(rows["tokens"].shape, bool)
    for row, start, end in where:
        middle = (start + end + 1) // 2
        half["tokens"][row, middle:end] = (half["tokens"][row, middle:end] + 1) % bench.config.model.ids
        before[row, start:middle] = True
    yield Check(
        "order",
        "the first half of each document, and the same with another second half",
        float(np.abs(bench.outputs(half) - want)[before].max() / scale),
        1e-6,
        "tokens see those behind them: the causal mask is wrong for some part of the rows",
    )
    moved, pairs = _turned_round(rows)
    got = bench.outputs(moved)
    difference = max(float(np.abs(want[row, a : a + n] - got[row, b : b + n]).max() / scale) for row, a, b, n in pairs)
    yield Check(
        "positions",
        "each document, and the same elsewhere in its row",
        difference,
        _HIDDEN,
        "positions depend on where a document stands, or differ between the parts that a row is split into",
    )


def _turned_round(rows: Batch) -> tuple[Batch, list[tuple[int, int, int, int]]]:
    """The rows with their documents in the opposite order; and row, old start, new start, length of each."""
    moved = {name: a.copy() for name, a in rows.items()}
    pairs = []
    for row in range(len(rows["tokens"])):
        at = 0
        for n, (_, start, end) in enumerate(reversed([d for d in documents(rows) if d[0] == row])):
            for name in moved:
                moved[name][row, at : at + end - start] = rows[name][row, start:end]
            moved["segment_ids"][row, at : at + end - start] = n
            pairs.append((row, start, at, end - start))
            at += end - start
    return moved, pairs


def check_gradients(bench: Bench) -> Iterator[Check]:
    """Loss and gradients of a batch: plain JAX, one device, the layout, and with other micro-batches."""
    config = bench.config
    one = on_one_device(config)
    whole = dataclasses.replace(one, train=dataclasses.replace(one.train, microbatches=1))
    plain = _plain(bench)
    want = bench.gradients(whole, bench.one)
    yield from _compared(
        "packing",
        "documents alone in plain JAX, and packed on one device",
        want,
        plain,
        "packed rows are not their documents",
    )
    got = bench.gradients(config, bench.mesh)
    yield from _compared("layout", "one device, and the layout", got, want, "")
    times = 1 if config.train.microbatches > 1 else 2
    other = dataclasses.replace(config, train=dataclasses.replace(config.train, microbatches=times))
    again = bench.gradients(other, bench.mesh)
    yield from _compared(
        "accumulation",
        f"{config.train.microbatches} micro-batches, and {times}",
        again,
        want,
        "micro-batches are not weighed by what counts in them",
    )


Gradient = tuple[float, dict[str, np.ndarray]]


def _compared(name: str, compared: str, got: Gradient, want: Gradient, suspect: str) -> Iterator[Check]:
    """The loss, and the parameter whose gradient is furthest off."""
    loss = abs(got[0] / want[0] - 1)
    summed = "a sum over devices is missing, or taken twice: the loss is {:.3g} times what it should be"
    yield Check(f"{name}: loss", compared, loss, _LOSS, suspect or summed.format(got[0] / want[0]))
    worst, leaf = max((relative(got[1][leaf], want[1][leaf]), leaf) for leaf in want[1])
    a, b = (x[1][leaf].astype(np.float64).ravel() for x in (got, want))
    share = a @ b / (b @ b)
    hint = suspect or f"a sum over devices is missing, or taken twice: it is {share:.3g} times what it should be"
    yield Check(f"{name}: gradients", f"{compared}; furthest off: {leaf}", worst, _GRADIENT, f"{leaf}: {hint}")


def _plain(bench: Bench) -> Gradient:
    """Loss and gradients without mesh, kernels, packing, remat or scan: each document in a row of its own."""
    c = dataclasses.replace(bench.config.model, scan=False, attention_kernel="reference")
    z_loss = bench.config.train.z_loss
    T = bench.config.train.length
    where = list(documents(bench.rows))
    alone = {name: np.zeros((len(where), T), a.dtype) for name, a in bench.rows.items()}
    for n, (row, start, end) in enumerate(where):
        for name, a in bench.rows.items():
            alone[name][n, : end - start] = a[row, start:end]

    def loss(params: Tree) -> jax.Array:
        z = logits(params, hidden(params, jnp.asarray(alone["tokens"]), c=c)[0], c=c)
        log_z = jax.nn.logsumexp(z, -1)
        label = jnp.take_along_axis(z, jnp.asarray(alone["targets"])[..., None], -1)[..., 0]
        each = log_z - label + z_loss * jnp.square(log_z)
        return jnp.sum(jnp.where(alone["loss_mask"], each, 0)) / alone["loss_mask"].sum()

    value, gradient = jax.jit(jax.value_and_grad(loss))(jax.tree.map(jnp.asarray, bench.params))
    leaves = zip(named(bench.specs), jax.tree.leaves(gradient), strict=True)
    return float(value), {name: np.asarray(a) for name, a in leaves}


def check_steps(bench: Bench, directory: Path) -> Iterator[Check]:
    """Steps with the config's optimizer, and a checkpoint that changes its layout half-way."""
    batches = [packed_rows(bench.config, seed) for seed in range(1, STEPS + 1)]
    here, one = bench.config, on_one_device(bench.config)
    at_one, want = _train(bench.program(one, bench.one), bench, None, batches)
    on_layout = bench.program(here, bench.mesh)
    middle, early = _train(on_layout, bench, None, batches[:-1])
    checkpoints = Checkpointer(epath.Path(directory), CheckpointConfig(every=1), report=lambda line: None)
    with jax.set_mesh(bench.mesh):
        checkpoints.save(1, middle, {"rows": 0}, force=True)
        checkpoints.wait()
    at_end, late = _train(on_layout, bench, middle, batches[-1:])
    losses = [*early, *late]
    optimizer = bench.config.optimizer.name
    yield Check(
        f"{STEPS} steps: loss",
        f"one device, and the layout, with {optimizer}",
        max(abs(a / b - 1) for a, b in zip(losses, want, strict=True)),
        _LOSS * (10 if optimizer == "muon" else 1),  # its iteration amplifies what float32 leaves
        f"{optimizer} does something else on split parameters than on whole ones",
    )
    pairs = zip(named(bench.specs), jax.tree.leaves(at_end.params), jax.tree.leaves(at_one.params), strict=True)
    worst, leaf = max((relative(np.asarray(a), np.asarray(b)), name) for name, a, b in pairs)
    yield Check(
        f"{STEPS} steps: parameters",
        f"the same; furthest off: {leaf}",
        worst,
        _PARAMETERS * (10 if optimizer == "muon" else 1),
        f"{leaf}: {optimizer} does something else on split parameters than on whole ones",
    )
    other = bench.program(one, bench.one)
    with jax.set_mesh(bench.one):
        restored = checkpoints.restore(other.abstract)
    checkpoints.close()
    assert restored is not None  # it was just saved
    same = all(
        _bits(a) == _bits(b) for a, b in zip(jax.tree.leaves(restored.tree), jax.tree.leaves(middle), strict=True)
    )
    yield Check(
        "restore",
        "a checkpoint of the layout, and what one device reads of it, bit for bit",
        0.0 if same else math.inf,
        0.0,
        "checkpoints lose or change something when the layout changes",
    )
    _, after = _train(other, bench, restored.tree, batches[-1:])
    yield Check(
        "restore: next step",
        "going on from it on one device, and never having stopped",
        abs(after[0] / want[-1] - 1),
        _LOSS * (10 if optimizer == "muon" else 1),
        "the optimizer's state is not what it was",
    )


def _train(
    program: Program, bench: Bench, state: TrainState | None, batches: list[Batch]
) -> tuple[TrainState, list[float]]:
    """The state after these batches, and their losses; what is given stays whole."""
    losses = []
    with jax.set_mesh(program.mesh):
        if state is None:
            weights = jax.tree.map(lambda a, s: jax.device_put(a, s.sharding), bench.params, program.abstract.params)
            state = program.starting_from(program.init(), weights)
        else:
            state = jax.tree.map(lambda a: a.copy(), state)
        for rows in batches:
            state, metrics = program.train_step(state, bench.place(rows, program.mesh))
            losses.append(float(metrics["loss"]))
    return state, losses


def _bits(a: jax.Array) -> bytes:
    if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
        a = jax.random.key_data(a)
    return np.asarray(a).tobytes()


def relative(a: np.ndarray, b: np.ndarray) -> float:
    """The norm of the difference over the norm."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.linalg.norm(a - b)) / max(float(np.linalg.norm(b)), 1e-30)


def run_checks(
    config: RunConfig, make_objective: MakeObjective, devices: list[jax.Device], directory: Path
) -> Iterator[Check]:
    """All checks of a config that `shrunk` made, as they are done; those that point at a cause stand first.

    Args:
      config: the shrunk one.
      make_objective: from a config, what to minimise; its batches are packed rows of tokens.
      devices: at least as many as the mesh needs.
      directory: an empty folder for a checkpoint.
    """
    bench = Bench(config, make_objective, devices)
    yield from check_isolation(bench)
    yield from check_gradients(bench)
    yield from check_steps(bench, directory)
