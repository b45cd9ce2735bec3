"""What the TPU kernels cost, by the compiler's own count, without a TPU; beside jax's splash attention.

    python -m benchmarks.tpu_cycles                                     v5e and v6e, forward and backward, causal
    python -m benchmarks.tpu_cycles --chip=v6e --mask=packed:8 --length=8192 --json

libtpu's compiler writes the final instruction bundles of a kernel, one row a cycle's issue. A loop's body times its
trips, which follow from the mask, added up over the kernel, is what it costs on a v6e to within what memory and scalar
units stall. On v5e and v5p the scheduler spaces matrix products closer than the unit takes them: there the larger of
bundles and the unit's busy cycles counts, loop by loop. `tile` is what 1024 x 1024 open scores of one head cost,
`masked` the same in the body for chunks that are partly open, `total` all of the kernel, XLA's estimate for what stands
around it (transposes) added. HBM is what the compiler says that the program reads and writes, over what it would if
every operand and result moved once; VMEM what the kernel allocates.

Splash is counted at the better of the `SPLASH_BLOCKS` by its live tiles and the starts and ends of its blocks; its
steps themselves cost it nothing here. Compiling takes up to a minute a row.
"""

from __future__ import annotations

import argparse
import glob
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

CHIPS = {
    "v5e": ("v5e:2x2", "v5litepod-4"),
    "v5p": ("v5p:2x2x1", "v5p-8"),
    "v6e": ("v6e:2x2", "v6e-4"),
    "tpu7x": ("tpu7x:2x2x1", "tpu7x-8"),
}
SLOW_UNIT = ("v5e", "v5p")  # chips whose matrix unit takes a row a cycle, and decides
SPLASH_BLOCKS = {
    "forward": ((1024, 1024, 512), (1024, 1024, 1024)),
    "backward": ((1024, 1024, 1024), (1024, 2048, 512)),
}


class Loop(NamedTuple):
    """The body of a loop: bundles, and cycles in which the busiest matrix unit has work."""

    bundles: int
    busy: int

    def cost(self, chip: str) -> int:
        return max(self) if chip in SLOW_UNIT else self.bundles


# --- reading the compiler's dump -------------------------------------------------------------------------------------


class Kernel(NamedTuple):
    """A kernel's text: its loops in order, the grid's first; the smallest region that holds nearly all matrix products;
    the bytes of VMEM that it allocates."""

    loops: list[Loop]
    core: Loop
    vmem: int


def read(dump: str, kernel: str, chip: str) -> Kernel:
    """What the compiler wrote about a kernel."""
    found = [f for f in glob.glob(f"{dump}/*{kernel}*final_bundles.txt") if "schedule-analysis" not in f]
    file = max(found, key=os.path.getsize)
    rows: list[tuple[int, str]] = []
    for line in Path(file).read_text().splitlines():
        start = re.match(r"\s*(0x[0-9a-f]+|0)\s+([A-Z]{2})?\s*:", line)
        if start:
            rows.append((int(start[1], 16), line))
        elif rows:
            rows[-1] = rows[-1][0], rows[-1][1] + line
    regions: dict[str, dict[str, int]] = {}
    for address, text in rows:
        for which, region in re.findall(r"(Start|End) region (\d+)", text):
            regions.setdefault(region, {})[which] = address
    whole = [(r["Start"], r["End"]) for r in regions.values() if len(r) == 2]
    loops = []
    for address, text in rows:
        if re.match(r"\s*\S+\s+LB", text):
            end = max(e for s, e in whole if 0 <= s - address <= 1)
            loops.append(_body([t for a, t in rows if address <= a <= end], chip))
    bodies = [_body([t for a, t in rows if s <= a <= e], chip) for s, e in whole]
    most = max(b.busy for b in bodies)
    core = min(b for b in bodies if b.busy >= 0.9 * most)
    first = glob.glob(f"{dump}/{os.path.basename(file).split('-')[0]}-*02-original.txt")[0]
    vmem = re.findall(r"space=vmem, size = 0x([0-9a-f]+)", Path(first).read_text())
    return Kernel(loops, core, sum(int(size, 16) for size in vmem))


def _body(rows: list[str], chip: str) -> Loop:
    busy: dict[str, int] = {}
    for text in rows:
        for op in re.findall(r"vmatmul[a-z0-9_.]*mxu[0-9]", text):
            lines = 16 if ".bf16" in op and ".lmr" not in op else 8  # a transposed operand comes in halves
            busy[op[-1]] = busy.get(op[-1], 0) + (lines if chip in SLOW_UNIT else lines // 2)
    return Loop(len(rows), max(busy.values(), default=0))


# --- what is compiled: in a process of its own, because the compiler is told where to write before it is loaded ------


def mask_of(kind: str, T: int) -> Any:
    """`causal`, `full`, `window:W`, or `packed:D`: D documents of equal length."""
    import jax.numpy as jnp

    from lm_jax.kernels.flash_attention.mask import AttentionMask

    name, _, number = kind.partition(":")
    if name == "packed":
        ids = (jnp.arange(T)[None] * int(number) // T).astype(jnp.int32)
        return AttentionMask(q_segment_ids=ids, kv_segment_ids=ids)
    return AttentionMask(causal=name != "full", window=int(number) if name == "window" else None)


def compile_it(args: argparse.Namespace, function: Any, shapes: list[tuple[tuple[int, ...], str]]) -> Any:
    import jax
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    chips = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[args.chip][0]).devices
    here = NamedSharding(Mesh(np.array(chips[:1]), ("x",)), PartitionSpec())
    arrays = [jax.ShapeDtypeStruct(shape, dtype, sharding=here) for shape, dtype in shapes]
    return jax.jit(function).trace(*arrays).lower(lowering_platforms=("tpu",)).compile()


def around(program: Any) -> int:
    """XLA's estimate of cycles for what is no kernel."""
    text = re.sub(r".*custom-call.*", "", program.as_text())
    return sum(int(n) for n in re.findall(r'estimated_cycles":"(\d+)"', text))


def ours(args: argparse.Namespace, dump: str) -> dict[str, Any]:
    """Compiles our kernel and adds up its loops."""
    import dataclasses

    import numpy as np

    from benchmarks import tpu_trips
    from lm_jax.kernels.flash_attention import block_sizes, pallas_tpu_backward, pallas_tpu_forward
    from lm_jax.kernels.flash_attention.implementation import Call

    T, N, K, H = args.length, args.heads, args.kv_heads, args.head_dim
    mask = mask_of(args.mask, T)
    kind = {"v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite", "tpu7x": "TPU7x"}[args.chip]
    row = block_sizes.row(kind, H, args.dtype)
    blocks = row.forward if args.what == "forward" else row.backward
    changed = json.loads(args.blocks) if args.blocks else {}
    blocks = dataclasses.replace(blocks, **changed)
    q, k, numbers = ((1, T, N, H), args.dtype), ((1, T, K, H), args.dtype), ((1, T, N), "float32")
    ids = ((1, T), "int32")

    def call(q: Any, k: Any, v: Any, ids: Any) -> Call:
        m = mask
        if m.q_segment_ids is not None:
            m = dataclasses.replace(m, q_segment_ids=ids, kv_segment_ids=ids)
        return Call(q, k, v, m, H**-0.5)

    def forward(q: Any, k: Any, v: Any, ids: Any) -> Any:
        return pallas_tpu_forward.forward(call(q, k, v, ids), blocks, interpret=False)

    def backward(q: Any, k: Any, v: Any, ids: Any, out: Any, lse: Any, g: Any, g_lse: Any) -> Any:
        grads = pallas_tpu_backward.backward(call(q, k, v, ids), out, lse, g, g_lse, blocks, interpret=False)
        return tuple(grads[:3])

    function, more = (forward, []) if args.what == "forward" else (backward, [q, numbers, q, numbers])
    program = compile_it(args, function, [q, k, k, ids, *more])
    loops, _, vmem = read(dump, f"flash_attention_{args.what}", args.chip)
    trips = tpu_trips.of_forward if args.what == "forward" else tpu_trips.of_backward
    plan = trips(mask, blocks, T, N, K)
    if len(loops) != len(plan.loops) + (plan.grid_steps > 1):
        raise SystemExit(f"the kernel has {len(loops)} loops and {len(plan.loops)} are known: {loops}")
    grid, inner = (loops[0], loops[1:]) if plan.grid_steps > 1 else (None, loops)
    costs = {name: loop.cost(args.chip) for (name, _), loop in zip(plan.loops, inner, strict=True)}
    total = sum(costs[name] * times for name, times in plan.loops)
    if grid is not None:
        total += (grid.bundles - sum(loop.bundles for loop in inner)) * plan.grid_steps
    traffic = program.cost_analysis().get("bytes accessed", math.nan)
    once = sum(math.prod(s) * np.dtype(d).itemsize for s, d in _moved(args.what, q, k, numbers))
    per_tile = {name: costs[loop] / area for name, (loop, area) in plan.tiles.items()}
    return {
        "tile": per_tile["open"],
        "masked": per_tile["masked"],
        "busy": max(
            loop.busy / plan.tiles["open"][1] for loop in inner if loop.cost(args.chip) == costs[plan.tiles["open"][0]]
        ),
        "kernel": total,
        "total": total + around(program),
        "hbm": traffic / once,
        "vmem": vmem,
        "blocks": dataclasses.asdict(blocks),
        "loops": [
            {"name": n, "bundles": x.bundles, "busy": x.busy, "trips": t}
            for (n, t), x in zip(plan.loops, inner, strict=True)
        ],
    }


def _moved(what: str, q: Any, k: Any, numbers: Any) -> list[Any]:
    """Operands and results, each once."""
    return [q, q, k, k, numbers] if what == "forward" else [q, q, q, q, k, k, k, k, numbers, numbers]


def splash(args: argparse.Namespace, dump: str) -> dict[str, Any]:
    """Compiles jax's splash attention and adds up its steps over live tiles."""
    import jax
    import numpy as np
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    from lm_jax.kernels.flash_attention.schedule import DEAD, tile_kinds

    T, N, K, H = args.length, args.heads, args.kv_heads, args.head_dim
    name, _, number = args.mask.partition(":")
    theirs = {"full": lambda: masks.FullMask((T, T)), "causal": lambda: masks.CausalMask((T, T))}
    theirs["window"] = lambda: masks.LocalMask((T, T), (int(number) - 1, 0), 0)
    if name not in theirs:
        raise SystemExit("splash is compared on full, causal and windowed masks")
    block_q, block_kv, compute = (int(n) for n in args.splash.split(","))
    sizes = {"block_q": block_q, "block_kv": block_kv, "block_kv_compute": compute}
    if args.what == "backward":
        sizes = {"block_q": 512, "block_kv": 512, "block_kv_compute": 512, "use_fused_bwd_kernel": True}
        sizes |= {"block_q_dkv": block_q, "block_kv_dkv": block_kv, "block_kv_dkv_compute": compute}
    many = masks.MultiHeadMask([theirs[name]()] * (N // K))
    attend = kernels.make_splash_mqa(many, block_sizes=kernels.BlockSizes(**sizes), head_shards=1, q_seq_shards=1)

    def forward(q: Any, k: Any, v: Any) -> Any:
        import jax.numpy as jnp

        q, k, v = (jnp.swapaxes(x[0], 0, 1) for x in (q * H**-0.5, k, v))
        out = jax.vmap(attend)(q.reshape(K, N // K, T, H), k, v)
        return jnp.swapaxes(out.reshape(N, T, H), 0, 1)[None]

    def both(q: Any, k: Any, v: Any, g: Any) -> Any:
        return jax.vjp(forward, q, k, v)[1](g)

    q, k = ((1, T, N, H), args.dtype), ((1, T, K, H), args.dtype)
    backward = args.what == "backward"
    program = compile_it(args, both if backward else forward, [q, k, k, q] if backward else [q, k, k])
    kernel = read(dump, "dkv" if backward else "splash", args.chip)
    mask = mask_of(args.mask, T)
    live = int((np.asarray(tile_kinds(mask, T, T, block_q, block_kv)) != DEAD).sum())
    # A loop over chunks of keys has the core as its body; straight code has them all in it.
    tile = kernel.core.cost(args.chip) * (block_kv // compute if len(kernel.loops) > 1 else 1)
    ends = kernel.loops[0].bundles - kernel.core.bundles  # for each block of queries (of keys, backward)
    rows = T // (block_kv if backward else block_q)
    total = N * (live * tile + rows * ends)
    return {
        "tile": tile * 2**20 / (block_q * block_kv),
        "kernel": total,
        "total": total + (0 if backward else around(program)),
        "vmem": kernel.vmem,
        "blocks": {"splash": args.splash},
    }


# --- the command -----------------------------------------------------------------------------------------------------


def child(args: argparse.Namespace) -> None:
    print(json.dumps((splash if args.splash else ours)(args, os.environ["LM_JAX_DUMP"])))


def in_a_process(args: argparse.Namespace, **changes: str) -> dict[str, Any]:
    """The result of one kernel."""
    settings = {**vars(args), **changes}
    with tempfile.TemporaryDirectory() as dump:
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_WORKER_HOSTNAMES": "localhost",
            "TPU_ACCELERATOR_TYPE": CHIPS[settings["chip"]][1],
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
            "LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true",
            "LM_JAX_DUMP": dump,
        }
        flags = [f"--{n}={v}" for n, v in settings.items() if v not in (None, "", False) and n not in ("json", "child")]
        command = [sys.executable, "-m", "benchmarks.tpu_cycles", "--child", *flags]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(flags)}:\n{done.stderr[-2000:]}")
        return json.loads(done.stdout.splitlines()[-1])


def row_of(args: argparse.Namespace, chip: str, what: str) -> dict[str, Any]:
    """Ours beside the best of splash, for one chip and pass."""
    mine = in_a_process(args, chip=chip, what=what)
    row = {"chip": chip, "what": what, "mask": args.mask, "ours": mine}
    if not args.mask.startswith("packed"):
        sizes = [",".join(map(str, b)) for b in SPLASH_BLOCKS[what]]
        rivals = [in_a_process(args, chip=chip, what=what, splash=s) for s in sizes]
        best = min(rivals, key=lambda r: r["kernel"])
        row |= {"splash": best, "over_splash": mine["kernel"] / best["kernel"]}
    return row


def show(row: dict[str, Any]) -> None:
    ours, best = row["ours"], row.get("splash")
    beside = f"   splash tile {best['tile']:.0f}, ours over splash {row['over_splash']:.2f}" if best else ""
    cost = f"tile {ours['tile']:.0f} (matrix unit {ours['busy']:.0f}), masked {ours['masked']:.0f}"
    whole = f"kernel {ours['kernel'] / 1e3:.0f}k, with transposes {ours['total'] / 1e3:.0f}k"
    memory = f"HBM {ours['hbm']:.2f}, VMEM {ours['vmem'] / 2**20:.0f} MiB"
    print(f"{row['chip']:6s}{row['what']:9s}{row['mask']:12s} {cost}, {whole}, {memory}{beside}", flush=True)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chip", help=f"of {', '.join(CHIPS)}; v5e and v6e where it is not given")
    parser.add_argument("--what", choices=("forward", "backward"), help="both where it is not given")
    parser.add_argument("--mask", default="causal", help="causal, full, window:W or packed:D")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    for name, value in (("length", 8192), ("heads", 8), ("kv_heads", 2), ("head_dim", 128)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--blocks", default="", help="fields of the blocks to change, as JSON")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--splash", default="", help=argparse.SUPPRESS)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.child:
        return child(args)
    rows = []
    for chip in [args.chip] if args.chip else ["v5e", "v6e"]:
        for what in [args.what] if args.what else ["forward", "backward"]:
            rows.append(row_of(args, chip, what))
            if not args.json:
                show(rows[-1])
    if args.json:
        print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
