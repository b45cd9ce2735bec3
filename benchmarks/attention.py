"""How fast attention is and how much memory it takes, beside attention with all its scores in memory.

    python -m benchmarks.attention                          this machine, T from 256 to 4096, causal
    python -m benchmarks.attention --lengths=512,16384 --batch=1 --heads=2 --kv_heads=1 --json
    python -m benchmarks.attention --mask=packed --implementations=xla,plain
    python -m benchmarks.attention --tune --chip=v6e --head_dim=128 --dtype=bfloat16        a row for block_sizes.py

Columns: each of our implementations that can serve the call; `plain`, the formula with the scores in memory; `jax.nn`,
which is `jax.nn.dot_product_attention` as XLA compiles it. All run in one process, one after another in every round,
on the same random inputs, after their values and gradients have been compared; a time is the median over the rounds, a
ratio the median of the ratios within a round. Memory is what the compiled program needs beside its arguments and
results. So measure on an idle machine; the load is written beside the result.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.attention_tune import tune
from lm_jax.kernels.flash_attention import IMPLEMENTATIONS, AttentionMask, flash_attention
from lm_jax.kernels.flash_attention.implementation import Call

Array = jax.Array
Attend = Callable[[Array, Array, Array], Array]
MASKS = ("causal", "full", "window", "packed")
WINDOW = 512
DOCUMENTS = 8  # in a packed row
PARITY = {"float32": 1e-4, "bfloat16": 3e-2, "float16": 3e-3}  # of the largest difference over the largest value


def mask_of(kind: str, batch: int, length: int) -> AttentionMask:
    """The mask of a name of `MASKS`; packed rows hold `DOCUMENTS` documents of uneven length, drawn from a fixed
    seed."""
    if kind == "full":
        return AttentionMask(causal=False)
    if kind == "window":
        return AttentionMask(window=WINDOW)
    if kind == "packed":
        cuts = np.random.default_rng(0).integers(0, length, (batch, DOCUMENTS - 1))
        ids = jnp.asarray((np.arange(length)[None, :, None] >= cuts[:, None, :]).sum(2), jnp.int32)
        return AttentionMask(q_segment_ids=ids, kv_segment_ids=ids)
    return AttentionMask()


def plain(q: Array, k: Array, v: Array, mask: AttentionMask) -> Array:
    """The formula as one would write it: scores, softmax in float32, values."""
    T, N, H = q.shape[1:]
    S = k.shape[1]
    k, v = (jnp.repeat(a, N // a.shape[2], 2) for a in (k, v))
    scores = jnp.einsum("btnh,bsnh->bnts", q, k, preferred_element_type=jnp.float32) * H**-0.5
    scores = jnp.where(mask.allowed(T, S)[:, None], scores, -1e30)
    return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores, -1).astype(v.dtype), v)


def jax_nn(q: Array, k: Array, v: Array, mask: AttentionMask, kind: str) -> Array:
    """The library's, told as much about the mask as it can be told."""
    if kind in ("causal", "full"):
        return jax.nn.dot_product_attention(q, k, v, is_causal=kind == "causal", implementation="xla")
    see = mask.allowed(q.shape[1], k.shape[1])[:, None]
    return jax.nn.dot_product_attention(q, k, v, mask=see, implementation="xla")


def contestants(args: argparse.Namespace, arrays: tuple[Array, ...], mask: AttentionMask) -> dict[str, Attend]:
    """By name, those that were asked for and can serve the call."""
    q, k, v = arrays
    found: dict[str, Attend] = {}
    for name in args.implementations:
        if name == "plain":
            found[name] = functools.partial(plain, mask=mask)
        elif name == "jax.nn":
            found[name] = functools.partial(jax_nn, mask=mask, kind=args.mask)
        elif (why := IMPLEMENTATIONS[name].refuses(Call(q, k, v, mask, 1.0, return_lse=False))) is None:
            found[name] = functools.partial(flash_attention, mask=mask, implementation=name)
        else:
            print(f"{name} is left out: {why}")
    return found


class Program:
    """One contestant's forward pass or forward and backward pass, compiled."""

    def __init__(self, attend: Attend, arrays: tuple[Array, ...], gradient: Array | None) -> None:
        def both(q: Array, k: Array, v: Array, g: Array) -> Any:
            y, back = jax.vjp(attend, q, k, v)
            return (y, *back(g))

        self.arguments = arrays if gradient is None else (*arrays, gradient)
        self.compiled = jax.jit(attend if gradient is None else both).lower(*self.arguments).compile()
        self.memory = self.compiled.memory_analysis().temp_size_in_bytes

    def __call__(self) -> Any:
        return jax.block_until_ready(self.compiled(*self.arguments))

    def seconds(self) -> float:
        start = time.perf_counter()
        self()
        return time.perf_counter() - start


def compare(programs: dict[str, Program], tolerance: float) -> None:
    """Raises where two contestants do not compute the same."""
    first, *others = programs
    want = jax.tree.leaves(programs[first]())
    for name in others:
        for x, y in zip(want, jax.tree.leaves(programs[name]()), strict=True):
            x, y = (np.asarray(a, np.float32) for a in (x, y))
            worst = float(np.abs(x - y).max() / np.abs(x).max())
            if not worst < tolerance:
                raise SystemExit(f"{name} and {first} differ by {worst:.1e} of the largest value: nothing was timed")


def measure(args: argparse.Namespace, length: int, backward: bool) -> dict[str, dict[str, float]]:
    """Milliseconds and bytes by contestant."""
    random = np.random.default_rng(0)
    shapes = [(args.batch, length, n, args.head_dim) for n in (args.heads, args.kv_heads, args.kv_heads, args.heads)]
    q, k, v, g = (jnp.asarray(random.standard_normal(s), args.dtype) for s in shapes)
    mask = mask_of(args.mask, args.batch, length)
    attends = contestants(args, (q, k, v), mask)
    if not attends:
        raise SystemExit("none of --implementations can serve this call: nothing was timed")
    programs = {name: Program(f, (q, k, v), g if backward else None) for name, f in attends.items()}
    compare(programs, PARITY[args.dtype])
    times: dict[str, list[float]] = {name: [] for name in programs}
    start = time.perf_counter()
    while len(next(iter(times.values()))) < 5 or time.perf_counter() - start < args.seconds:
        for name, program in programs.items():
            times[name].append(program.seconds())
    base = times["plain"] if "plain" in times else next(iter(times.values()))
    return {
        name: {
            "ms": 1e3 * median(t),
            "speed_over_plain": median(b / a for a, b in zip(t, base, strict=True)),
            "MiB": programs[name].memory / 2**20,
        }
        for name, t in times.items()
    }


def show(what: str, length: int, result: dict[str, dict[str, float]]) -> None:
    cells = [f"{n} {r['ms']:.1f} ms ({r['speed_over_plain']:.2f}x) {r['MiB']:.1f} MiB" for n, r in result.items()]
    print(f"T {length:6d}  {what:8s}  " + "   ".join(cells), flush=True)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [*IMPLEMENTATIONS, "plain", "jax.nn"]
    parser.add_argument("--implementations", default="xla,plain,jax.nn", help=f"of {', '.join(names)}")
    parser.add_argument("--lengths", default="256,512,1024,2048,4096")
    parser.add_argument("--mask", default="causal", choices=MASKS)
    parser.add_argument("--dtype", default="float32", choices=list(PARITY))
    for name, value in (("batch", 1), ("heads", 6), ("kv_heads", 6), ("head_dim", 64)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--seconds", type=float, default=10.0, help="of measuring a row at least")
    parser.add_argument("--tune", action="store_true", help="choose block sizes for a TPU instead")
    parser.add_argument("--chip", help="for --tune without a TPU: v5e, v5p, v6e or tpu7x")
    parser.add_argument("--json", action="store_true", help="the result as JSON on standard output, and nothing else")
    args = parser.parse_args(argv)
    args.lengths = [int(n) for n in args.lengths.split(",")]
    args.implementations = args.implementations.split(",")
    for name in args.implementations:
        if name not in names:
            parser.error(f"unknown implementation {name!r}: use some of {', '.join(names)}")
    if args.heads % args.kv_heads:
        parser.error(f"--heads: {args.heads} cannot share {args.kv_heads} key-value heads evenly: give --kv_heads too")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.tune:
        return tune(args)
    device = jax.devices()[0]
    rows = []
    load = os.getloadavg()[0]
    for length in args.lengths:
        for backward in (False, True):
            result = measure(args, length, backward)
            what = "both" if backward else "forward"
            rows.append({"length": length, "what": what, "result": result})
            if not args.json:
                show(what, length, result)
    settings = {n: getattr(args, n) for n in ("mask", "dtype", "batch", "heads", "kv_heads", "head_dim")}
    machine = {"device": device.device_kind, "cores": os.cpu_count(), "load": load, "jax": jax.__version__}
    if args.json:
        print(json.dumps({"machine": machine, "settings": settings, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
