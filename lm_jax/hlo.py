"""The collectives of a compiled program, read from its optimized HLO text: kinds, mesh axes, bytes, how often.

Bytes are those of one device and one step, of the larger side of the operation: of the result of an all-gather, of the
operand of a reduce-scatter, and of the operand (as large as the result) of an all-reduce, an all-to-all and a
collective-permute. What a wire carries follows from them by the algorithm (a ring of n moves (n - 1) / n of them, twice
that for an all-reduce); this count does not depend on it. Padding of tiles is not in them.

An all-reduce of which nothing but a slice is used counts as a reduce-scatter: that is how XLA for TPU writes one (as a
fusion `all-reduce-scatter`, or with the slice in whatever reads the sum). An all-reduce of an array into which each
device has put its own part counts as an all-gather: so XLA for TPU gathers over groups that reach along three
dimensions of a large torus (seen for 64 devices of v5p:4x4x4 and 128 of v5p:4x4x8). What a wire carries may be twice as
much then; `Collective.as_all_reduce` tells.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")

Traffic = dict[tuple[str, tuple[str, ...]], float]  # bytes by kind and mesh axes


class Collective(NamedTuple):
    """One collective of a program.

    Attributes:
      kind: of `KINDS`.
      axes: the mesh axes over which its groups reach, in the mesh's order.
      bytes: of one time; see the head of this file.
      times: how often a step runs it: the product of the trip counts of the loops around it.
      as_all_reduce: whether the text has an all-reduce in its place.
      dtype: of its operand.
      source: JAX's name of the operation that it comes from.
      loop: the body of the loop it runs in; empty: none.
      overlaps: whether it runs beside what stands between its start and its end.
    """

    kind: str
    axes: tuple[str, ...]
    bytes: int
    times: int
    as_all_reduce: bool
    dtype: str
    source: str
    loop: str
    overlaps: bool


def measured(text: str, mesh: Mapping[str, int]) -> Traffic:
    """Bytes of a device and step by kind and mesh axes.

    Args:
      text: `compiled.as_text()`.
      mesh: the size of each mesh axis, in the order in which the program's devices were laid out.
    """
    traffic: Traffic = {}
    for c in collectives(text, mesh):
        traffic[c.kind, c.axes] = traffic.get((c.kind, c.axes), 0) + c.bytes * c.times
    return traffic


def collectives(text: str, mesh: Mapping[str, int]) -> list[Collective]:
    """Every collective of a program that runs, as `measured` counts them.

    Raises:
      ValueError: for a loop whose trip count the text does not tell, where collectives are in it; for groups in a form
        that is not known.
    """
    program = parse(text)
    entry = next(c for c in program.values() if c.entry)
    found = []
    started = {_same(op) for c in program.values() for op in c.ops.values() if op.kind and "Start" in _stages(c, op)}
    for where, op, times, loop in _walk(program, started, entry, 1, ""):
        groups = _groups(op.attributes, math.prod(mesh.values()))
        axes = _axes(groups, mesh)
        if not axes:
            continue
        assert op.kind is not None
        source = re.search(r'op_name="([^"]*)"', op.attributes)
        for i, name in enumerate(op.operands):
            kind = op.kind
            if kind == "all-reduce" and _only_sliced(program, where, op.name, i if op.operands[1:] else None):
                kind = "reduce-scatter"
            elif kind == "all-reduce" and _placed(program, where, name):
                kind = "all-gather"
            size = type_bytes(where.ops[name].type) * (len(groups[0]) if op.kind == "all-gather" else 1)
            dtype = where.ops[name].type.partition("[")[0]
            overlaps = op.code.endswith("-start") or "Start" in _stages(where, op)
            name_of = source[1] if source else ""
            found.append(Collective(kind, axes, size, times, kind != op.kind, dtype, name_of, loop, overlaps))
    return found


# ------------------------------------------------------------------------------------------------------------ the text


@dataclasses.dataclass
class Op:
    name: str
    type: str
    code: str
    operands: list[str]
    attributes: str
    root: bool
    inside: str  # the parentheses: a constant's value, a parameter's number

    @property
    def kind(self) -> str | None:
        """Of `KINDS`, also where it is the start of an asynchronous one."""
        code = self.code.removesuffix("-start")
        return "all-to-all" if code == "ragged-all-to-all" else code if code in KINDS else None


class Computation(NamedTuple):
    entry: bool
    ops: dict[str, Op]
    users: dict[str, list[Op]]


_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_SHAPE = re.compile(r"\b(\w+)\[([\d,]*)\]")
_NAME = re.compile(r"%([\w.\-]+)")


def parse(text: str) -> dict[str, Computation]:
    program: dict[str, Computation] = {}
    here: Computation | None = None
    for line in text.splitlines():
        if here is None:
            if head := _HEAD.match(line):
                here = program[head[2]] = Computation(bool(head[1]), {}, {})
        elif line.startswith("}"):
            here = None
        elif op := _op(line):
            here.ops[op.name] = op
            for name in op.operands:
                here.users.setdefault(name, []).append(op)
    return program


def _op(line: str) -> Op | None:
    left, equals, right = line.strip().partition(" = ")
    if not equals:
        return None
    end = _closing(right, 0) + 1 if right.startswith("(") else right.index(" ")
    rest = right[end:].lstrip()
    start = rest.index("(")
    stop = _closing(rest, start)
    inside = rest[start + 1 : stop]
    name = left.removeprefix("ROOT ").lstrip("%")
    root = left.startswith("ROOT ")
    return Op(name, right[:end], rest[:start], _NAME.findall(inside), rest[stop + 1 :], root, inside)


def _closing(text: str, start: int) -> int:
    """Where the parenthesis that opens at `start` closes."""
    depth = 0
    for m in re.compile(r'"(?:[^"\\]|\\.)*"|[()]').finditer(text, start):
        depth += (m[0] == "(") - (m[0] == ")")
        if depth == 0:
            return m.start()
    raise ValueError(f"a parenthesis is never closed: {text[:200]}")


def type_bytes(type_: str) -> int:
    """Of a type such as `bf16[8,128]{1,0}`, or of a tuple of them."""
    total = 0
    for dtype, dims in _SHAPE.findall(type_):
        bits = 8 if dtype == "pred" else int((re.search(r"\d+", dtype) or "0")[0])
        total += math.prod(int(d) for d in dims.split(",") if d) * max(bits, 8 if bits else 0) // 8
    return total


# ------------------------------------------------------------------------------------------------------ what runs when


def _walk(
    program: dict[str, Computation], started: set[str], here: Computation, times: int, loop: str
) -> Iterator[tuple[Computation, Op, int, str]]:
    """The collectives of a computation and of all that it calls, with how often they run and in which loop."""
    for op in here.ops.values():
        if op.kind:
            if _counts(started, here, op):
                yield here, op, times, loop
        elif op.code == "while":
            (body,) = called(op, "body")
            inside = list(_walk(program, started, program[body], 1, body))
            trips = trip_count(program, here, op) if inside else 0
            yield from ((where, inner, n * trips * times, within) for where, inner, n, within in inside)
        elif not op.code.endswith(("-done", "-update")):  # they name the computation of their start once more
            for name in called(op, "calls", "to_apply", "branch_computations"):
                yield from _walk(program, started, program[name], times, loop)


def called(op: Op, *keys: str) -> list[str]:
    """Computations that an operation names; of a conditional, all branches."""
    found = []
    for key in keys:
        if m := re.search(rf"\b{key}=(\{{[^}}]*\}}|%[\w.\-]+)", op.attributes):
            found += _NAME.findall(m[1])
    return found


_ASYNC = re.compile(r'custom_call_target="AsyncCollective(Start|Done)"')


def _counts(started: set[str], here: Computation, op: Op) -> bool:
    """Whether this is where a collective is to be counted.

    TPU's asynchronous fusions name one collective several times: in the fusion that starts it (a custom call
    `AsyncCollectiveStart` takes it), in those that compute while it runs, in the one that waits for it.
    """
    stages = _stages(here, op)
    return "Start" in stages or not (stages or _same(op) in started)


def _stages(here: Computation, op: Op) -> set[str]:
    """What becomes of a collective in its computation, if it is asynchronous: `Start` or `Done`."""
    found, stack, seen = set(), [op.name], set()
    while stack:
        for user in here.users.get(stack.pop(), ()):
            if m := _ASYNC.search(user.attributes):
                found.add(m[1])
            elif user.name not in seen:
                seen.add(user.name)
                stack.append(user.name)
    return found


def _same(op: Op) -> str:
    """What one collective's several mentions have in common."""
    channel = re.search(r"channel_id=\d+", op.attributes)
    return f"{op.code} {channel[0] if channel else ''} {_SHAPE.findall(op.type)}"


def trip_count(program: dict[str, Computation], here: Computation, loop: Op) -> int:
    """How often a loop runs: as the compiler notes it, or from a condition `i < constant` and where `i` starts."""
    if m := re.search(r'known_trip_count"?\s*[:=]\s*\{\s*"?n"?\s*[:=]\s*"?(\d+)', loop.attributes):
        return int(m[1])
    (name,) = called(loop, "condition")
    ops = program[name].ops
    root = next(op for op in ops.values() if op.root)
    if root.code == "fusion":  # the comparison alone, wrapped
        inner = program[called(root, "calls")[0]].ops
        parameters = {int(op.inside): op.name for op in inner.values() if op.code == "parameter"}
        given = {parameters[i]: ops[name] for i, name in enumerate(root.operands)}
        root = next(op for op in inner.values() if op.root)
        ops = ops | inner | given
    sides = [ops[name] for name in root.operands]
    limits = [int(s.inside) for s in sides if s.code == "constant"]
    counters = [m[1] for s in sides if (m := re.search(r"index=(\d+)", s.attributes))]
    direction = re.search(r"direction=(\w+)", root.attributes)
    if len(limits) != 1 or len(counters) != 1 or direction is None or direction[1] not in ("LT", "GT"):
        raise ValueError(f"the trip count of {loop.name} is not to be seen: {root.name} = {root.code}({root.inside})")
    start = here.ops[loop.operands[0]]
    if start.code != "tuple":
        return limits[0]
    first = here.ops[start.operands[int(counters[0])]]
    while first.code in ("copy", "bitcast"):
        first = here.ops[first.operands[0]]
    return limits[0] - (int(first.inside) if first.code == "constant" else 0)


# ------------------------------------------------------------------------------------ what all-reduces stand for

# A plain `slice` is here because it is the same on every device: weights that were joined for one product are taken
# apart by it, and all of the parts are used.
_KEEPS = ("bitcast", "copy", "convert", "transpose", "reshape", "slice")


def _only_sliced(program: dict[str, Computation], here: Computation, name: str, part: int | None) -> bool:
    """Whether all that becomes of a value (of one part of a tuple), through changes of form, is that each device cuts
    something out of it."""
    exits: set[int | None] = set()
    return bool(here.users.get(name)) and _cut(program, here, name, part, exits) and not exits


def _cut(
    program: dict[str, Computation], here: Computation, name: str, part: int | None, exits: set[int | None]
) -> bool:
    """Whether every use of a value in a computation cuts it, or hands it out; at which places of the outcome goes to
    `exits`."""
    if here.ops[name].root:
        exits.add(part)
    for user in here.users.get(name, ()):
        if user.code == "get-tuple-element":
            index = int((re.search(r"index=(\d+)", user.attributes) or "0")[1])
            if part in (None, index) and not _cut(program, here, user.name, None, exits):
                return False
        elif user.code == "tuple" and user.root:
            exits |= {i for i, operand in enumerate(user.operands) if operand == name}
        elif user.code in _KEEPS or user.code.endswith(("-start", "-done")):
            if not _cut(program, here, user.name, part, exits):
                return False
        elif user.code == "fusion":
            inner, outcomes = program[called(user, "calls")[0]], set[int | None]()
            numbers = [i for i, operand in enumerate(user.operands) if operand == name]
            parameters = [op.name for op in inner.ops.values() if op.code == "parameter" and int(op.inside) in numbers]
            if not all(_cut(program, inner, parameter, None, outcomes) for parameter in parameters):
                return False
            if not all(_cut(program, here, user.name, outcome, exits) for outcome in outcomes):
                return False
        elif user.code != "dynamic-slice" or user.operands[0] != name:
            return False
    return True


def _placed(program: dict[str, Computation], here: Computation, name: str) -> bool:
    """Whether a value is, but for changes of form, an array into which something smaller was put."""
    op = here.ops[name]
    if op.code == "dynamic-update-slice":
        return True
    if op.code in ("bitcast", "copy", "convert", "transpose", "reshape", "copy-start", "copy-done"):
        return _placed(program, here, op.operands[0])
    if op.code == "fusion":
        inner = program[called(op, "calls")[0]]
        return _placed(program, inner, next(o.name for o in inner.ops.values() if o.root))
    return False


# -------------------------------------------------------------------------------------------------------------- groups


def _groups(attributes: str, devices: int) -> np.ndarray | list[list[int]]:
    """Which devices, by their place in the mesh, an operation joins."""
    if m := re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", attributes):
        return [[int(i) for i in pair.split(",")] for pair in re.findall(r"\{([\d,]+)\}", m[1])]
    m = re.search(r"replica_groups=(.*)", attributes)
    if m is None:
        raise ValueError(f"no groups in {attributes[:200]!r}")
    text = m[1]
    if text.startswith("{}"):
        return [list(range(devices))]
    if text.startswith("{{"):
        return [
            [int(i) for i in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", text[: text.index("}}") + 1])
        ]
    if m := re.match(rf"\[([\d,]+)\]<={_IOTA}", text):
        return _iota(m[2], m[3]).reshape(_ints(m[1]))
    if m := re.match(
        rf"(?:mesh)?\[([^\]]*)\](?:,? ?device_ids=\(?{_IOTA.replace('<=', '')}\)?)?[, ]*\{{([^}}]*)\}}", text
    ):
        return _named_groups(*m.groups())
    raise ValueError(f"groups in a form that is not known: {text[:200]}")


_IOTA = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"


def _ints(text: str) -> list[int]:
    return [int(i) for i in text.split(",")]


def _iota(dims: str, order: str | None) -> np.ndarray:
    """`[4,2]T(1,0)`: counted up in this shape, then transposed."""
    sizes = _ints(dims)
    return np.arange(math.prod(sizes)).reshape(sizes).transpose(_ints(order) if order else range(len(sizes)))


def _named_groups(mesh: str, dims: str | None, order: str | None, axes: str) -> np.ndarray:
    """`mesh['a'=2,'b'=4] {'b'}`, where `'b':(2)2` is a part of an axis: the 2 behind the first 2 of it."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)}
    wanted = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes)
    shape: list[int] = []
    moving: dict[int, int] = {}  # dimensions that a group reaches along, and their order
    for name, size in sizes.items():
        cuts = sorted({1, size, *(c for n, a, b in wanted if n == name and a for c in (int(a), int(a) * int(b)))})
        for low, high in itertools.pairwise(cuts):
            for place, (n, a, b) in enumerate(wanted):
                if n == name and (not a or int(a) <= low < int(a) * int(b)):
                    moving[len(shape)] = place
            shape.append(high // low)
    ids = (np.arange(math.prod(shape)) if dims is None else _iota(dims, order)).reshape(shape)
    inner = sorted(moving, key=lambda d: (moving[d], d))
    outer = [d for d in range(len(shape)) if d not in moving]
    return ids.transpose(outer + inner).reshape(-1, math.prod(shape[d] for d in inner))


def _axes(groups: np.ndarray | list[list[int]], mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes along which the places of a group differ, over all groups."""
    moving = set()
    for group in groups:
        places = np.stack(np.unravel_index(np.asarray(group), tuple(mesh.values())))
        moving |= {axis for axis, place in zip(mesh, places, strict=True) if len(set(place.tolist())) > 1}
    return tuple(axis for axis in mesh if axis in moving)
