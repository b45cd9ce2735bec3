"""How fast a training step is, beside PyTorch's on the same machine.

    python -m benchmarks.step                          both sizes for the CPU, `nano` and `14m`
    python -m benchmarks.step --case=nano --json       one of them, the result as JSON on standard output
    python -m benchmarks.step --platform=gpu --config=configs/1b.py --batch=4     a config's model on one GPU

Ours is `make_train_step` with AdamW and clipping, as `launch.train` runs it: a new batch goes to the devices every
step, and metrics are read one step late. PyTorch's is `benchmarks/torch_twin.py`, eager and under `torch.compile`, with
as many threads. Each of the three is a process of its own, because the threads of one would spin in the other's time.
They start from the same weights; their first losses are compared before anything is timed. Then they take turns, a
block of steps each, so that a machine whose speed drifts is as unfair to all of them; a ratio is one of blocks in the
same round. Other work on the machine is not as unfair: PyTorch's threads wait for each other many times a step, ours
once, and a busy machine makes each wait long. So measure on an idle one; the load is written beside the result.

Needs PyTorch beside what the project installs. On a GPU all three keep float32 weights and compute in bfloat16, and
share its memory; that side has not been measured yet.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from launch import runtime
from lm_jax.costs import flops_per_token, peak_flops
from lm_jax.errors import UserError
from lm_jax.models.transformer import TransformerConfig, transformer_specs
from lm_jax.params import count, path_name

RUNNERS = ("ours", "eager", "compiled")
OPTIMIZER: dict[str, Any] = {
    "learning_rate": 1e-3,
    "b1": 0.9,
    "b2": 0.95,
    "eps": 1e-8,
    "weight_decay": 0.1,
    "clip_norm": 1.0,
}
PARITY_STEPS = 3
PARITY = 1e-3  # relative; bf16 compute gets ten times as much
BUSY = 0.25  # processes a core that want to run, before ours
SAVED = Path(__file__).parent / "results"
Run = Callable[[int], tuple[float, list[float]]]  # how many steps -> seconds in all, losses


@dataclasses.dataclass(frozen=True)
class Case:
    """A model and the shape of its batch; `remat` is ours alone."""

    name: str
    model: TransformerConfig
    length: int
    batch: int
    remat: str = "none"


NANO = TransformerConfig(
    layers=4, embed=128, heads=4, vocab=65, feed_forward="squared_relu", feed_forward_dim=512, tied=True, scan=False
)
SMALL = TransformerConfig(layers=6, embed=384, heads=6, vocab=8192, feed_forward_dim=1024, tied=True, scan=False)
CASES = {"nano": Case("nano", NANO, 64, 12), "14m": Case("14m", SMALL, 256, 8)}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__.split("\n")[0])
    parser.add_argument("--case", action="append", choices=CASES, help="may be repeated (default: all)")
    parser.add_argument("--config", help="a config file's model instead, with its length")
    parser.add_argument("--platform", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--batch", type=int, help="rows of a step")
    parser.add_argument("--devices", type=int, default=1, help="on CPU: JAX devices, the batch split over them")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="on CPU: PyTorch's threads")
    parser.add_argument(
        "--scan", action=argparse.BooleanOptionalAction, help="layers scanned or unrolled (default: the case's)"
    )
    parser.add_argument("--rounds", type=int, default=20, help="blocks of each")
    parser.add_argument("--block-seconds", type=float, default=0.7, help="how long a block of ours is to last")
    parser.add_argument("--without", action="append", default=[], choices=RUNNERS, help="leave one out")
    parser.add_argument(
        "--json", nargs="?", const="-", help="also write the result as JSON; to standard output if no file is named"
    )
    parser.add_argument("--save", action="store_true", help="also write it to benchmarks/results")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--weights", help=argparse.SUPPRESS)
    return parser.parse_args()


def cases(args: argparse.Namespace) -> list[Case]:
    """The cases that the command line asks for."""
    chosen = [case_of_config(args.config)] if args.config else [CASES[name] for name in args.case or CASES]
    changes: dict[str, Any] = {} if args.batch is None else {"batch": args.batch}
    if args.scan is not None:
        chosen = [dataclasses.replace(c, model=dataclasses.replace(c.model, scan=args.scan)) for c in chosen]
    return [dataclasses.replace(c, **changes) for c in chosen]


def case_of_config(spec: str) -> Case:
    """A config's model, with the length, rows and remat of its training; an open vocabulary is taken as 32,000."""
    from launch.cli import load
    from lm_jax.config import build
    from lm_jax.training.run import RunConfig

    run = build(RunConfig, load(spec))
    if run.train.remat == "auto":
        raise SystemExit("train.remat: auto is settled by launch.train alone; name a policy")
    model = run.model if run.model.vocab else dataclasses.replace(run.model, vocab=32_000)
    return Case(Path(spec.split(":")[0]).stem, model, run.train.length, run.train.batch_size, run.train.remat)


def batches(case: Case) -> Iterator[np.ndarray]:
    """Rows of random token ids `[B, T + 1]`, the same for every worker."""
    rng = np.random.default_rng(0)
    while True:
        yield rng.integers(0, case.model.ids, (case.batch, case.length + 1), dtype=np.int32)


# -------------------------------------------------------------------------------------------------------------- workers


def serve(args: argparse.Namespace) -> None:
    """A worker: reads a number of steps a line on standard input, takes them, and answers with seconds and losses."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is no answer
    runtime.keep_freed_memory()  # as launch.train does; PyTorch gains by it as well, but less
    (case,) = cases(args)
    start = our_worker if args.worker == "ours" else torch_worker
    run, about = start(case, args)
    print(json.dumps(about), file=answers, flush=True)
    for line in sys.stdin:
        seconds, losses = run(int(line))
        print(json.dumps({"seconds": seconds, "losses": losses}), file=answers, flush=True)


def our_worker(case: Case, args: argparse.Namespace) -> tuple[Run, dict[str, Any]]:
    """Our step as the training loop runs it. Writes its weights for the others."""
    import jax
    import jaxlib

    if args.platform == "cpu":
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", args.devices)

    from lm_jax.objectives.next_token import next_token
    from lm_jax.sharding import MeshConfig, make_mesh, partition
    from lm_jax.training.optimizers import OptimizerConfig, make_optimizer
    from lm_jax.training.schedules import learning_rate
    from lm_jax.training.state import init_state
    from lm_jax.training.step import make_train_step

    specs = transformer_specs(case.model)
    settings = OptimizerConfig(schedule="constant", warmup_steps=0, **OPTIMIZER)
    optimizer = make_optimizer(settings, specs, 1)
    mesh = make_mesh(MeshConfig(data=-1), jax.devices() if args.platform == "cpu" else jax.devices()[:1])
    jax.set_mesh(mesh)
    state = init_state(specs, optimizer, mesh, 0)
    leaves = jax.tree_util.tree_flatten_with_path(state.params)[0]
    weights: dict[str, Any] = {path_name(path): np.asarray(leaf) for path, leaf in leaves}
    np.savez(args.weights, **weights)
    objective = next_token(case.model, remat=case.remat)
    step = make_train_step(objective, optimizer, learning_rate(settings, 1), clip_norm=settings.clip_norm)
    step = jax.jit(step, donate_argnums=0)
    shape = (case.batch, case.length)
    sharding = jax.sharding.NamedSharding(mesh, partition("batch", "length", shape=shape, mesh=mesh))
    constant = {
        "segment_ids": np.zeros(shape, np.int32),
        "positions": np.broadcast_to(np.arange(case.length, dtype=np.int32), shape).copy(),
        "loss_mask": np.ones(shape, bool),
    }
    rows = batches(case)

    def run(steps: int) -> tuple[float, list[float]]:
        nonlocal state
        host = [next(rows) for _ in range(steps)]  # the loop's loader has them ready as well
        losses = []
        waiting: Any = None
        start = time.perf_counter()
        for r in host:
            batch = jax.device_put({"tokens": r[:, :-1], "targets": r[:, 1:], **constant}, sharding)
            state, metrics = step(state, batch)
            if waiting is not None:
                losses.append(float(jax.device_get(waiting)["loss"]))
            waiting = metrics
        losses.append(float(jax.device_get(waiting)["loss"]))
        jax.block_until_ready(state)
        return time.perf_counter() - start, losses

    about = {"jax": jax.__version__, "jaxlib": jaxlib.__version__, "device": mesh.devices.flat[0].device_kind}
    return run, about | {"devices": mesh.size}


def torch_worker(case: Case, args: argparse.Namespace) -> tuple[Run, dict[str, Any]]:
    """PyTorch's step, eager or compiled, from our weights."""
    import torch

    from benchmarks.torch_twin import make_step

    if args.platform == "cpu":
        torch.set_num_threads(args.threads)
    device = torch.device("cpu" if args.platform == "cpu" else "cuda")
    with np.load(args.weights) as weights:
        step = make_step(case.model, case.length, weights, OPTIMIZER, device, compiled=args.worker == "compiled")
    rows = batches(case)

    def run(steps: int) -> tuple[float, list[float]]:
        host = [next(rows) for _ in range(steps)]
        losses = []
        waiting: Any = None
        start = time.perf_counter()
        for r in host:
            loss = step(r[:, :-1], r[:, 1:])
            if waiting is not None:
                losses.append(waiting.item())
            waiting = loss
        losses.append(waiting.item())
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start, losses

    return run, {"torch": torch.__version__, "threads": torch.get_num_threads()}


class Worker:
    """A worker's process, seen from the one that gives the turns."""

    def __init__(self, kind: str, case: Case, args: argparse.Namespace, weights: str) -> None:
        command = [sys.executable, "-m", "benchmarks.step", f"--worker={kind}", f"--weights={weights}"]
        command += [f"--config={args.config}"] if args.config else [f"--case={case.name}"]
        command += [
            f"--platform={args.platform}",
            f"--batch={case.batch}",
            f"--devices={args.devices}",
            f"--threads={args.threads}",
        ]
        command += ["--scan" if case.model.scan else "--no-scan"]
        environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # the three share a GPU
        pipe = subprocess.PIPE
        self.kind = kind
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)
        self.about = self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise UserError(
                f"the worker {self.kind!r} ended with status {self.process.wait()}; what it said stands above"
            )
        return json.loads(line)

    def run(self, steps: int) -> dict[str, Any]:
        """`seconds` in all and `losses`."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


# ------------------------------------------------------------------------------------------------------------ comparing


def compare(case: Case, args: argparse.Namespace) -> dict[str, Any]:
    """Starts the workers, checks that they compute the same, and lets them take turns."""
    workers: list[Worker] = []
    try:
        with tempfile.TemporaryDirectory() as folder:
            for kind in RUNNERS:
                if kind not in args.without:
                    workers.append(Worker(kind, case, args, f"{folder}/weights.npz"))
        about = {k: v for w in workers for k, v in w.about.items()}
        losses = {w.kind: w.run(PARITY_STEPS)["losses"] for w in workers}
        check_parity(losses, PARITY if args.platform == "cpu" else 10 * PARITY)
        times = take_turns(workers, args.rounds, args.block_seconds)
    finally:
        for worker in workers:
            worker.close()
    flops = case.batch * case.length * flops_per_token(case.model, case.length)
    result: dict[str, Any] = {
        "model": dataclasses.asdict(case.model),
        "batch": case.batch,
        "length": case.length,
        "remat": case.remat,
        "parameters": count(transformer_specs(case.model)),
        "about": about,
        "first_losses": losses,
        "milliseconds": {kind: spread([1000 * t for t in ts]) for kind, ts in times.items()},
    }
    others = [kind for kind in times if kind != "ours"]
    if "ours" in times:
        # Above 1: ours is faster. Blocks of the same round were next to each other in time.
        result["speed_over"] = {
            kind: spread([b / a for a, b in zip(times["ours"], times[kind], strict=True)]) for kind in others
        }
    result["tflops"] = {kind: flops / median(ts) / 1e12 for kind, ts in times.items()}
    peak = peak_flops(about.get("device", "")) if args.platform == "gpu" else None
    if peak:
        result["mfu"] = {kind: 1e12 * t / peak for kind, t in result["tflops"].items()}
    return result


def check_parity(losses: dict[str, list[float]], tolerance: float) -> None:
    """Raises UserError where the first losses differ: what is no twin is not worth timing."""
    for kind, others in losses.items():
        for a, b in zip(losses.get("ours", others), others, strict=True):
            if not math.isclose(a, b, rel_tol=tolerance):
                raise UserError(
                    f"first losses differ by more than {tolerance:g}: ours {losses['ours']}, {kind} {others}"
                )


def take_turns(workers: list[Worker], rounds: int, block_seconds: float) -> dict[str, list[float]]:
    """Seconds a step, a figure a round, by worker."""
    for worker in workers:
        worker.run(3)  # compilation is behind them since the first losses; caches are not
    steps = {w.kind: max(1, round(block_seconds / (w.run(3)["seconds"] / 3))) for w in workers}
    times: dict[str, list[float]] = {w.kind: [] for w in workers}
    for i in range(rounds):
        for worker in workers[i % len(workers) :] + workers[: i % len(workers)]:
            times[worker.kind].append(worker.run(steps[worker.kind])["seconds"] / steps[worker.kind])
    return times


def spread(values: list[float]) -> dict[str, float]:
    return {"min": min(values), "median": median(values), "max": max(values), "n": len(values)}


# ------------------------------------------------------------------------------------------------------------ reporting


def machine() -> dict[str, Any]:
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        name = models[0] if models else name
    return {
        "processor": name,
        "cores": os.cpu_count(),
        "system": platform.system(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "date": datetime.date.today().isoformat(),
        "load_at_start": os.getloadavg()[0],
    }


def table(case: Case, result: dict[str, Any]) -> str:
    """The result as lines of text."""
    head = f"{case.name}: {result['parameters'] / 1e6:.2f}M parameters, batch {case.batch} x {case.length}"
    lines = [
        head,
        f"  {'':10}{'ms a step: min':>16}{'median':>10}{'max':>10}{'ktokens/s':>12}{'TFLOP/s':>10}{'MFU':>8}",
    ]
    for kind, ms in result["milliseconds"].items():
        rate = case.batch * case.length / ms["median"]
        mfu = f"{result['mfu'][kind]:8.1%}" if "mfu" in result else f"{'':8}"
        speed = f"{rate:12.1f}{result['tflops'][kind]:10.3f}"
        lines.append(f"  {kind:10}{ms['min']:16.2f}{ms['median']:10.2f}{ms['max']:10.2f}{speed}{mfu}")
    for kind, r in result.get("speed_over", {}).items():
        lines.append(
            f"  speed over {kind}: {r['median']:.2f} (a round: {r['min']:.2f} to {r['max']:.2f}, {r['n']} rounds)"
        )
    return "\n".join(lines)


def main() -> int:
    args = arguments()
    try:
        if args.worker:
            serve(args)
            return 0
        report: dict[str, Any] = {"machine": machine(), "cases": {}}
        load = report["machine"]["load_at_start"]
        if args.platform == "cpu" and load > BUSY * (os.cpu_count() or 1):
            print(f"the machine is busy (load {load:.1f}): PyTorch suffers more, do not trust ratios", file=sys.stderr)
        for case in cases(args):
            result = compare(case, args)
            report["cases"][case.name] = result
            print(table(case, result), file=sys.stderr if args.json == "-" else sys.stdout, flush=True)
    except UserError as mistake:
        print(mistake, file=sys.stderr)
        return 2
    text = json.dumps(report, indent=1) + "\n"
    if args.save:
        SAVED.mkdir(exist_ok=True)
        (SAVED / f"step_{args.platform}.json").write_text(text)
    if args.json == "-":
        print(text, end="")
    elif args.json:
        Path(args.json).write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
