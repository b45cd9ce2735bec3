"""Chooses block sizes for a TPU and writes the row for `block_sizes.py`: `python -m benchmarks.attention --tune`.

On a TPU each candidate is timed there. Without one (`--chip=v6e`) the compiler's bundles are counted, as
`benchmarks.tpu_cycles` does. Candidates that do not fit the chip's fast memory are told of and left out.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import time
from collections.abc import Iterator
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import tpu_cycles
from lm_jax.kernels.flash_attention import AttentionMask, pallas_tpu_backward, pallas_tpu_forward
from lm_jax.kernels.flash_attention.block_sizes import row
from lm_jax.kernels.flash_attention.implementation import Call
from lm_jax.sharding import platform

LENGTH = 8192
ROUNDS = 20
KINDS = {"v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite", "tpu7x": "TPU7x"}


def candidates(what: str) -> Iterator[dict[str, Any]]:
    """Changes to the row that is there."""
    chunks = ((512, 512), (256, 512), (512, 1024), (1024, 512))
    if what == "forward":
        for (q, kv), mxu in itertools.product(chunks, (True, False)):
            yield {"q_chunk": q, "kv_chunk": kv, "sums_on_mxu": mxu}
    else:
        for (q, kv), ahead in itertools.product(chunks[:3], (True, False)):
            yield {"q_chunk": q, "kv_chunk": kv, "transpose_ahead": ahead}


def cost(args: argparse.Namespace, what: str, changes: dict[str, Any]) -> float:
    """Cycles by the compiler's count, or seconds on the TPU that is here."""
    if args.chip is None:
        return seconds(args, what, changes)
    flags = [f"--chip={args.chip}", f"--what={what}", f"--head_dim={args.head_dim}", f"--dtype={args.dtype}"]
    counted = tpu_cycles.in_a_process(tpu_cycles.parse([*flags, f"--blocks={json.dumps(changes)}"]))
    return counted["kernel"]


def seconds(args: argparse.Namespace, what: str, changes: dict[str, Any]) -> float:
    """The median of a causal call of `LENGTH` positions on the TPU that is here."""
    random = np.random.default_rng(0)
    shapes = [(1, LENGTH, n, args.head_dim) for n in (8, 2, 2, 8)]
    q, k, v, g = (jnp.asarray(random.standard_normal(s), args.dtype) for s in shapes)
    tuned = row(jax.devices()[0].device_kind, args.head_dim, args.dtype)

    def forward(q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
        call = Call(q, k, v, AttentionMask(), args.head_dim**-0.5)
        blocks = tuned.forward if what == "backward" else dataclasses.replace(tuned.forward, **changes)
        return pallas_tpu_forward.forward(call, blocks, interpret=False)

    def backward(q: jax.Array, k: jax.Array, v: jax.Array, out: jax.Array, lse: jax.Array) -> Any:
        call = Call(q, k, v, AttentionMask(), args.head_dim**-0.5)
        blocks = dataclasses.replace(tuned.backward, **changes)
        return pallas_tpu_backward.backward(call, out, lse, g, jnp.zeros_like(lse), blocks, interpret=False)

    program, arguments = jax.jit(forward), (q, k, v)
    if what == "backward":
        program, arguments = jax.jit(backward), (q, k, v, *jax.jit(forward)(q, k, v))
    times = []
    for _ in range(ROUNDS + 2):
        start = time.perf_counter()
        jax.block_until_ready(program(*arguments))
        times.append(time.perf_counter() - start)
    return median(times[2:])


def tune(args: argparse.Namespace) -> None:
    """Prints what every candidate costs, and the row of the best."""
    if args.chip is None and platform() != "tpu":
        raise SystemExit(f"--tune needs a TPU, or --chip={'|'.join(KINDS)} to count the compiler's bundles for one")
    kind = jax.devices()[0].device_kind if args.chip is None else KINDS[args.chip]
    tuned = row(kind, args.head_dim, args.dtype)
    work = [(what, changes) for what in ("forward", "backward") for changes in candidates(what)]
    found: dict[str, list[tuple[float, dict[str, Any]]]] = {"forward": [], "backward": []}
    start = time.perf_counter()
    for n, (what, changes) in enumerate(work, 1):
        try:
            found[what].append((cost(args, what, changes), changes))
            outcome = f"{found[what][-1][0]:.4g}"
        except (SystemExit, jax.errors.JaxRuntimeError) as problem:
            outcome = f"left out ({str(problem).strip().splitlines()[-1][:120]})"
        left = (time.perf_counter() - start) / n * (len(work) - n)
        print(f"{n} of {len(work)}, {left / 60:.0f} min left: {what} {changes}: {outcome}", flush=True)
    best = {}
    for what, now in (("forward", tuned.forward), ("backward", tuned.backward)):
        if not found[what]:
            raise SystemExit(f"no candidate for {what} could be measured: no row")
        best[what] = min(found[what], key=lambda f: f[0]), now
    numbers = " and ".join(f"{lowest:.4g}" for (lowest, _), _ in best.values())
    how = f"{numbers} {'seconds' if args.chip is None else 'cycles counted'}, causal, {LENGTH} positions, 8 heads on 2"
    forward, backward = (dataclasses.replace(now, **changes) for (_, changes), now in best.values())
    print(f"Row({kind!r}, {args.head_dim}, {args.dtype!r}, {forward}, {backward}, {how!r}),")
