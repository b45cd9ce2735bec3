"""How fast a training step is, beside PyTorch's on the same machine.

    python -m benchmarks.step                          both sizes for the CPU, `nano` and `14m`
    python -m benchmarks.step --case=nano --json       one of them, the result as JSON on standard output
    python -m benchmarks.step --platform=gpu --config=configs/1b.py               a config's model on one GPU
    python -m benchmarks.step --platform=gpu --config=configs/1b.py --attention=pallas_gpu --segments

Ours is `make_train_step` with AdamW and clipping, as `launch.train` runs it: a new batch goes to the devices every
step, and metrics are read one step late. PyTorch's is `benchmarks/torch_twin.py`, eager and under `torch.compile`, with
as many threads. Each of the three is a process of its own, because the threads of one would spin in the other's time.
They start from the same weights; their first losses are compared before anything is timed. Then they take turns, a
block of steps each, so that a machine whose speed drifts is as unfair to all of them; a ratio is one of blocks in the
same round. Other work on the machine is not as unfair: PyTorch's threads wait for each other many times a step, ours
once, and a busy machine makes each wait long. So measure on an idle one; the load is written beside the result.

Needs PyTorch beside what the project installs. On a GPU all keep float32 weights and compute in bfloat16, and share its
memory; that side has not been measured yet. What is not given there is chosen for one GPU with room: layers unrolled,
nothing computed again, at most 16 rows of a config's batch, one document a row (so that cuDNN serves both sides;
`--segments` gives rows segment ids, as the training loop does), and no eager PyTorch, by estimate too large beside the
other two. PyTorch attends by its own fastest backend, found by timing them. MFU counts 6 FLOPs a token and weight, the
look-up of embeddings not among them, and causal attention exactly (`lm_jax.costs.flops_per_token`).
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
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.gpu_clocks import Clocks
from benchmarks.step_workers import Case, serve
from lm_jax.costs import flops_per_token, peak_flops
from lm_jax.errors import UserError
from lm_jax.kernels.flash_attention import IMPLEMENTATIONS
from lm_jax.models.transformer import REMAT, TransformerConfig, transformer_specs
from lm_jax.params import count

RUNNERS = ("ours", "eager", "compiled")
PARITY_STEPS = 3
PARITY = 1e-3  # relative; bf16 compute gets ten times as much
BUSY = 0.25  # processes a core that want to run, before ours
# With configs/1b.py ours plans 51 GiB for 16 rows of 2,048 (compiled ahead of time for an H200, which has 140).
GPU_ROWS = 16
# A GPU's step lasts a third of a second: a block has some ten of them, and its start and end weigh little.
ROUNDS, BLOCK_SECONDS = {"cpu": 20, "gpu": 12}, {"cpu": 0.7, "gpu": 3.0}
SAVED = Path(__file__).parent / "results"

NANO = TransformerConfig(
    layers=4, embed=128, heads=4, vocab=65, feed_forward="squared_relu", feed_forward_dim=512, tied=True, scan=False
)
SMALL = TransformerConfig(layers=6, embed=384, heads=6, vocab=8192, feed_forward_dim=1024, tied=True, scan=False)
CASES = {"nano": Case("nano", NANO, 64, 12), "14m": Case("14m", SMALL, 256, 8)}


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__.split("\n")[0])
    parser.add_argument("--case", action="append", choices=CASES, help="may be repeated (default: all)")
    parser.add_argument("--config", help="a config file's model instead, with its length")
    parser.add_argument("--platform", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--batch", type=int, help="rows of a step")
    parser.add_argument("--devices", type=int, default=1, help="on CPU: JAX devices, the batch split over them")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="on CPU: PyTorch's threads")
    yes_or_no = argparse.BooleanOptionalAction
    parser.add_argument("--scan", action=yes_or_no, help="layers scanned or unrolled (default: the case's)")
    parser.add_argument("--remat", choices=REMAT, help="what ours computes again (default: the case's)")
    parser.add_argument("--attention", choices=IMPLEMENTATIONS, help="who computes ours (default: the model's choice)")
    parser.add_argument("--segments", action=yes_or_no, help="whether our rows come with segment ids (default: on CPU)")
    parser.add_argument("--rounds", type=int, help=f"blocks of each (default: {ROUNDS})")
    parser.add_argument("--block-seconds", type=float, help=f"how long one of ours is to last ({BLOCK_SECONDS})")
    parser.add_argument("--without", action="append", default=[], choices=RUNNERS, help="leave one out")
    parser.add_argument("--eager", action=yes_or_no, help="PyTorch without torch.compile as well (default: on CPU)")
    parser.add_argument(
        "--json", nargs="?", const="-", help="also write the result as JSON; to standard output if no file is named"
    )
    parser.add_argument("--save", action="store_true", help="also write it to benchmarks/results")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--weights", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.rounds = args.rounds or ROUNDS[args.platform]
    args.block_seconds = args.block_seconds or BLOCK_SECONDS[args.platform]
    if not (args.platform == "cpu" if args.eager is None else args.eager):
        args.without.append("eager")
    return args


def cases(args: argparse.Namespace) -> list[Case]:
    """The cases that the command line asks for.

    Raises:
      UserError: where a config leaves open what has to be known.
    """
    chosen = [case_of_config(args.config)] if args.config else [CASES[name] for name in args.case or CASES]
    return [settled(case, args) for case in chosen]


def settled(case: Case, args: argparse.Namespace) -> Case:
    """A case with what the command line says of it, and on a GPU with what suits one that has room."""

    def first(given: Any, on_gpu: Any, own: Any) -> Any:
        return given if given is not None else on_gpu if args.platform == "gpu" else own

    model = dataclasses.replace(
        case.model,
        scan=first(args.scan, False, case.model.scan),
        attention_kernel=args.attention or case.model.attention_kernel,
    )
    remat = first(args.remat, "none", case.remat)
    if remat == "auto":
        raise UserError("train.remat: auto is settled by launch.train alone\nname a policy, as --remat=none")
    rows = first(args.batch, min(case.batch, GPU_ROWS), case.batch)
    segments = first(args.segments, False, case.segments)
    return dataclasses.replace(case, model=model, batch=rows, remat=remat, segments=segments)


def case_of_config(spec: str) -> Case:
    """A config's model, with the length, rows and remat of its training; an open vocabulary is taken as 32,000."""
    from launch.cli import load
    from lm_jax.config import build
    from lm_jax.training.run import RunConfig

    run = build(RunConfig, load(spec))
    model = run.model if run.model.vocab else dataclasses.replace(run.model, vocab=32_000)
    name, train = Path(spec.split(":")[0]).stem, run.train
    # There is no warm-up here, and a large model's first steps at its peak rate are as the smallest rounding is.
    return Case(name, model, train.length, train.batch_size, train.remat, learning_rate=1e-4)


# -------------------------------------------------------------------------------------------------------------- workers


def shared_memory(programs: int) -> dict[str, str]:
    """What tells so many programs to share a GPU. Ours takes its share at once: a pool that grows does so in powers of
    two, and would leave PyTorch less. 0.42 is 58 GiB of an H200's, 0.3 is 41 (`GPU_ROWS`, and half of it)."""
    shares = {1: "0.75", 2: "0.42", 3: "0.3"}
    return {"XLA_PYTHON_CLIENT_MEM_FRACTION": shares[programs], "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}


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
        command += [
            f"--{'' if on else 'no-'}{name}" for name, on in (("scan", case.model.scan), ("segments", case.segments))
        ]
        command += [f"--remat={case.remat}"]
        command += [f"--attention={case.model.attention_kernel}"] if case.model.attention_kernel else []
        environment = shared_memory(len(RUNNERS) - len(set(args.without))) | os.environ
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
        """`seconds` in all, `losses`, and `peak_bytes` so far."""
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
    clocks = Clocks() if args.platform == "gpu" else None
    try:
        with tempfile.TemporaryDirectory() as folder:
            for kind in RUNNERS:
                if kind not in args.without:
                    workers.append(Worker(kind, case, args, f"{folder}/weights.npz"))
        about = {k: v for w in workers for k, v in w.about.items()}
        losses = {w.kind: w.run(PARITY_STEPS)["losses"] for w in workers}
        check_parity(losses, PARITY if args.platform == "cpu" else 10 * PARITY)
        times, spans, peaks = take_turns(workers, args.rounds, args.block_seconds)
        found = {kind: clocks.during(here) for kind, here in spans.items()} if clocks else {}
    finally:
        for worker in workers:
            worker.close()
        if clocks:
            clocks.close()
    flops = case.batch * case.length * flops_per_token(case.model, case.length)
    result: dict[str, Any] = {
        "model": dataclasses.asdict(case.model),
        "batch": case.batch,
        "length": case.length,
        "remat": case.remat,
        "segments": case.segments,
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
    result["tokens_per_second"] = {k: case.batch * case.length / median(ts) for k, ts in times.items()}
    result["peak_bytes"], result["clocks"] = peaks, found
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


def take_turns(
    workers: list[Worker], rounds: int, block_seconds: float
) -> tuple[dict[str, list[float]], dict[str, list[tuple[float, float]]], dict[str, int | None]]:
    """By worker: seconds a step, a figure a round; when its blocks began and ended; the most bytes of the device's
    memory that it took."""
    for worker in workers:
        worker.run(3)  # compilation is behind them since the first losses; caches are not
    steps = {w.kind: max(1, round(block_seconds / (w.run(3)["seconds"] / 3))) for w in workers}
    times: dict[str, list[float]] = {w.kind: [] for w in workers}
    spans: dict[str, list[tuple[float, float]]] = {w.kind: [] for w in workers}
    peaks: dict[str, int | None] = {}
    for i in range(rounds):
        for worker in workers[i % len(workers) :] + workers[: i % len(workers)]:
            start = time.perf_counter()
            answer = worker.run(steps[worker.kind])
            spans[worker.kind].append((start, time.perf_counter()))
            times[worker.kind].append(answer["seconds"] / steps[worker.kind])
            peaks[worker.kind] = answer["peak_bytes"]
    return times, spans, peaks


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
    about = result["about"]
    by = [
        f"{who} by {about[key]}"
        for who, key in (("ours", "attention"), ("PyTorch's", "torch_attention"))
        if key in about
    ]
    head = f"{case.name}: {result['parameters'] / 1e6:.2f}M parameters, batch {case.batch} x {case.length}"
    head += f", attention {', '.join(by)}" if by else ""
    lines = [
        head,
        f"  {'':10}{'ms a step: min':>16}{'median':>10}{'max':>10}{'ktokens/s':>12}{'TFLOP/s':>10}{'MFU':>8}"
        + f"{'GiB':>8}{'MHz':>7}{'W':>6}",
    ]
    for kind, ms in result["milliseconds"].items():
        rate = case.batch * case.length / ms["median"]
        mfu = f"{result['mfu'][kind]:8.1%}" if "mfu" in result else f"{'':8}"
        speed = f"{rate:12.1f}{result['tflops'][kind]:10.3f}"
        memory, clock = result["peak_bytes"][kind], result["clocks"].get(kind)
        end = f"{memory / 2**30:8.1f}" if memory else f"{'':8}"
        end += f"{clock['MHz']:7.0f}{clock['W']:6.0f}" if clock else ""
        lines.append(f"  {kind:10}{ms['min']:16.2f}{ms['median']:10.2f}{ms['max']:10.2f}{speed}{mfu}{end}".rstrip())
    for kind, r in result.get("speed_over", {}).items():
        lines.append(
            f"  speed over {kind}: {r['median']:.2f} (a round: {r['min']:.2f} to {r['max']:.2f}, {r['n']} rounds)"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    try:
        if args.worker:
            (case,) = cases(args)
            serve(case, args)
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
