"""What lies in a device's memory when a compiled step needs most of it, read from the compiler's own plan.

XLA decides on every buffer's place and lifetime before it writes machine code, and can write both down
(`--xla_dump_to`): `buffer-assignment.txt` has, for each allocation, the values in it with their offsets and sizes;
`live-range.txt` has each value's first and last instruction in the schedule. From the two follows which values are
alive at any instruction, and the optimized program says where each comes from.

Arguments are what the step is handed: parameters, optimizer state (with the average of the weights), the batch. All
others share one heap, whose size is what the compiler must reserve; what fills it at its fullest instruction is told
apart:

- `gradients`: shaped as a weight (one layer's, or all; a device's part, or whole over fsdp) and made by the backward
  pass, or accumulated there in float32;
- `activations`: made by the forward pass and read by the backward pass;
- `temporaries`: everything else: what a layer is computed with, what is computed again, weights gathered or cast.

What nobody holds at that instruction (gaps between buffers) is in none of them; it is told as `gaps`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

CLASSES = ("parameters", "gradients", "optimizer", "activations", "temporaries")


@dataclasses.dataclass(frozen=True)
class Dump:
    """The compiler's texts: `assignment`, `ranges`, and the optimized `program`."""

    assignment: str
    ranges: str
    program: str


class Value(NamedTuple):
    """A value in the heap: its place and size in bytes, its first and last instruction, its shape, where it is from."""

    name: str
    offset: int
    size: int
    first: int
    last: int
    dtype: str
    shape: tuple[int, ...]
    source: str


@dataclasses.dataclass(frozen=True)
class Plan:
    """A step's memory on each device, in bytes.

    Attributes:
      classes: by `CLASSES`, at the instruction where the heap is fullest.
      gaps: of the heap, held by nobody then.
      total: arguments, results that take no argument's place, and the heap.
      host: in the host's memory.
      largest: the values that fill the heap then, the largest first, with their class.
    """

    classes: dict[str, int]
    gaps: int
    total: int
    host: int
    largest: list[tuple[str, Value]]


def read(dump: Dump, weights: Iterable[tuple[int, ...]]) -> Plan:
    """The plan in a dump.

    Args:
      dump: of a training step `(state, batch)`.
      weights: the shapes that the gradient of a weight can have, see the head of this file.

    Raises:
      ValueError: for texts in another form.
    """
    allocations = _allocations(dump.assignment)
    sources = _sources(dump.program)
    arguments = _arguments(dump.program)
    classes = dict.fromkeys(CLASSES, 0)
    results = 0
    heap: tuple[int, list[tuple[str, int, int, str]]] = (0, [])
    host = 0
    for size, about, values in allocations:
        color = re.search(r"color (\d+)", about)
        if color and color[1] == "5":
            host += size
        if color:
            continue
        if number := re.search(r"\bparameter (\d+)", about):
            classes[_argument_class(arguments[int(number[1])])] += size
        elif "maybe-live-out" in about or "output shape" in about:
            results += size
        elif "preallocated-temp" in about and size > heap[0]:
            heap = size, values
    alive, held = _fullest(_values(heap[1], _live(dump.ranges), sources))
    shapes = {_plain(s) for s in weights}
    phases = _phases(dump.ranges, sources)
    largest = sorted(((_class(v, shapes, *phases), v) for v in alive), key=lambda pair: -pair[1].size)
    for kind, value in largest:
        classes[kind] += held[value.name]
    gaps = heap[0] - sum(held.values())
    total = sum(classes.values()) + gaps + results
    return Plan(classes, gaps, total, host, largest)


# ------------------------------------------------------------------------------------------------------------- classes


def _argument_class(name: str) -> str:
    if name.startswith("state.params"):
        return "parameters"
    return "optimizer" if name.startswith("state.") else "activations"  # the batch


def _phases(ranges: str, sources: Mapping[str, str]) -> tuple[int, int]:
    """Where in the schedule the backward pass begins and ends.

    The scheduler moves single instructions to either side: the beginning is where fewest stand on the wrong one.
    """
    order = [sources.get(name, "") for _, name in re.findall(r"^    (\d+):(\S+)$", ranges, re.MULTILINE)]
    backward = [i for i, source in enumerate(order) if "transpose(" in source]
    if not backward:
        return len(order), len(order)
    ahead = np.cumsum([0] + [("transpose(" not in s and "jvp(" in s) - ("transpose(" in s) for s in order])
    return int(np.argmax(ahead)), backward[-1]


def _class(value: Value, weights: set[tuple[int, ...]], start: int, end: int) -> str:
    weight = _plain(value.shape) in weights
    crosses = value.first < start <= value.last
    # An activation may have a weight's shape by chance: what says that it is one is where it was made.
    if crosses and value.dtype != "f32" and "jvp(" in value.source and "transpose(" not in value.source:
        return "activations"
    if weight and value.last >= start and value.first <= end:
        backward = "transpose(" in value.source and not re.search(r"rematted_computation|gather", value.source)
        # Sums over layers, chunks and micro-batches have no source of their own; weights cast or gathered for a product
        # are not in float32.
        if backward or value.dtype == "f32":
            return "gradients"
    if not weight and crosses:
        return "activations"
    return "temporaries"


def _plain(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape but for order and dimensions of one."""
    return tuple(sorted(d for d in shape if d != 1))


# ------------------------------------------------------------------------------------------------------------ the heap


def _fullest(values: list[Value]) -> tuple[list[Value], dict[str, int]]:
    """The values alive at the instruction at which they cover most bytes, and how many of them each covers (values may
    share their place; the first takes it)."""
    best, at = -1, 0
    for instant in sorted({v.first for v in values}):
        covered = sum(_covered([v for v in values if v.first <= instant <= v.last]).values())
        if covered > best:
            best, at = covered, instant
    alive = [v for v in values if v.first <= at <= v.last]
    return alive, _covered(alive)


def _covered(values: list[Value]) -> dict[str, int]:
    end, found = 0, {}
    for v in sorted(values, key=lambda v: (v.offset, -v.size)):
        stop = v.offset + v.size
        found[v.name] = max(0, stop - max(end, v.offset))
        end = max(end, stop)
    return found


# ----------------------------------------------------------------------------------------------------------- the texts

_ALLOCATION = re.compile(r"allocation \d+: size (\d+)(.*):$")
_VALUE = re.compile(r" value: <\d+ (.+?)(\{[\d,]*\})? (?:\(phi\) )?@\d+> \(size=(\d+),offset=(\d+)\): (.*)$")


def _allocations(text: str) -> list[tuple[int, str, list[tuple[str, int, int, str]]]]:
    """Size, description and values (name, size, offset, type) of each allocation."""
    found: list[tuple[int, str, list[tuple[str, int, int, str]]]] = []
    for line in text.splitlines():
        if m := _ALLOCATION.match(line):
            found.append((int(m[1]), m[2], []))
        elif m := _VALUE.match(line):
            found[-1][2].append((m[1] + (m[2] or "{}"), int(m[3]), int(m[4]), m[5]))
        elif line.startswith(" value:"):
            raise ValueError(f"a value in a form that is not known: {line[:200]}")
    if not found:
        raise ValueError("no allocation in what should be the compiler's plan of memory")
    return found


def _live(text: str) -> dict[str, tuple[int, int]]:
    section = text.partition("BufferLiveRange:")[2].partition("Live ranges at")[0]
    found = re.findall(r"^    (.+?)(\{[\d,]*\}):(\d+)-(\d+)$", section, re.MULTILINE)
    return {name + index: (int(first), int(last)) for name, index, first, last in found}


def _values(
    placed: list[tuple[str, int, int, str]], live: Mapping[str, tuple[int, int]], sources: Mapping[str, str]
) -> list[Value]:
    found = []
    for name, size, offset, type_ in placed:
        if name not in live:
            raise ValueError(f"the compiler's plan does not say when {name} is alive")
        first, last = live[name]
        m = re.match(r"\(?(\w+)\[([\d,]*)\]", type_)
        dtype, dims = (m[1], m[2]) if m and not type_.startswith("(") else ("", "")
        shape = tuple(int(d) for d in dims.split(",") if d)
        found.append(Value(name, offset, size, first, last, dtype, shape, sources.get(name.partition("{")[0], "")))
    return found


def _sources(program: str) -> dict[str, str]:
    """JAX's name of the operation that each instruction comes from."""
    found = re.findall(r'^\s*(?:ROOT )?%?(\S+) = .*?op_name="((?:[^"\\]|\\.)*)"', program, re.MULTILINE)
    return {name: source.replace("\\'", "'") for name, source in found}


def _arguments(program: str) -> dict[int, str]:
    """The step's arguments by number, as JAX names them: `state.params['output']`."""
    entry = program[program.index("\nENTRY ") :]
    found = re.findall(r"= .* parameter\((\d+)\).*?op_name=\"((?:[^\"\\]|\\.)*)\"", entry)
    return {int(number): name for number, name in found}
