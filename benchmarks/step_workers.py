"""The processes that `benchmarks/step.py` gives turns: our training step, and PyTorch's."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from launch import runtime
from lm_jax.errors import UserError
from lm_jax.models.transformer import TransformerConfig, transformer_specs
from lm_jax.params import path_name

OPTIMIZER: dict[str, Any] = {
    "b1": 0.9,
    "b2": 0.95,
    "eps": 1e-8,
    "weight_decay": 0.1,
    "clip_norm": 1.0,
}
Run = Callable[[int], tuple[float, list[float]]]  # how many steps -> seconds in all, losses
Peak = Callable[[], int | None]  # most bytes of the device's memory so far; None: it does not say


@dataclasses.dataclass(frozen=True)
class Case:
    """A model and the shape of its batch.

    Attributes:
      remat: of ours alone.
      segments: whether rows come with segment ids, as the training loop's do. PyTorch's attention has none of them.
    """

    name: str
    model: TransformerConfig
    length: int
    batch: int
    remat: str = "none"
    segments: bool = True
    learning_rate: float = 1e-3

    @property
    def optimizer(self) -> dict[str, Any]:
        """Of `OptimizerConfig`'s fields, those that the twin has too."""
        return OPTIMIZER | {"learning_rate": self.learning_rate}


def batches(case: Case) -> Iterator[np.ndarray]:
    """Rows of random token ids `[B, T + 1]`, the same for every worker."""
    rng = np.random.default_rng(0)
    while True:
        yield rng.integers(0, case.model.ids, (case.batch, case.length + 1), dtype=np.int32)


def serve(case: Case, args: argparse.Namespace) -> None:
    """A worker: reads a number of steps a line on standard input, takes them, and answers with seconds, losses and the
    most memory so far."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is no answer
    runtime.keep_freed_memory()  # as launch.train does; PyTorch gains by it as well, but less
    start = our_worker if args.worker == "ours" else torch_worker
    run, peak, about = start(case, args)
    print(json.dumps(about), file=answers, flush=True)
    for line in sys.stdin:
        seconds, losses = run(int(line))
        print(json.dumps({"seconds": seconds, "losses": losses, "peak_bytes": peak()}), file=answers, flush=True)


# ----------------------------------------------------------------------------------------------------------------- ours


def our_worker(case: Case, args: argparse.Namespace) -> tuple[Run, Peak, dict[str, Any]]:
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
    settings = OptimizerConfig(schedule="constant", warmup_steps=0, **case.optimizer)
    optimizer = make_optimizer(settings, specs, 1)
    mesh = make_mesh(MeshConfig(data=-1), jax.devices() if args.platform == "cpu" else jax.devices()[:1])
    jax.set_mesh(mesh)
    attention = attends(case)
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
        "positions": np.broadcast_to(np.arange(case.length, dtype=np.int32), shape).copy(),
        "loss_mask": np.ones(shape, bool),
        "segment_ids": np.zeros(shape, np.int32) if case.segments else None,
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

    device = mesh.devices.flat[0]
    about = {"jax": jax.__version__, "jaxlib": jaxlib.__version__, "device": device.device_kind}
    return run, lambda: peak_bytes(device), about | {"devices": mesh.size, "attention": attention}


def attends(case: Case) -> str:
    """Who computes attention on the current mesh.

    Raises:
      UserError: the one that the model names cannot.
    """
    import jax
    import jax.numpy as jnp

    from lm_jax.kernels.flash_attention import AttentionMask
    from lm_jax.kernels.flash_attention.api import choose
    from lm_jax.kernels.flash_attention.implementation import Call

    c, shape = case.model, (case.batch, case.length)
    q, k = (jax.ShapeDtypeStruct((*shape, n, c.head_size), c.compute_dtype) for n in (c.heads, c.key_heads))
    ids = jax.ShapeDtypeStruct(shape, jnp.int32) if case.segments else None
    given: Any = q, k, k, AttentionMask(window=c.window, q_segment_ids=ids, kv_segment_ids=ids)  # type: ignore[arg-type]
    call = Call(*given, scale=c.attention_scale(c.head_size), soft_cap=c.attention_soft_cap, return_lse=False)
    try:
        return choose(call, c.attention_kernel).name
    except ValueError as e:
        raise UserError(str(e)) from e


def peak_bytes(device: Any) -> int | None:
    """The most of a device's memory that this process has had in use; None on a CPU, which does not count it."""
    return (device.memory_stats() or {}).get("peak_bytes_in_use")


# -------------------------------------------------------------------------------------------------------------- PyTorch


def torch_worker(case: Case, args: argparse.Namespace) -> tuple[Run, Peak, dict[str, Any]]:
    """PyTorch's step, eager or compiled, from our weights."""
    import torch

    from benchmarks.torch_twin import fastest_attention, make_step

    if args.platform == "cpu":
        torch.set_num_threads(args.threads)
    device = torch.device("cpu" if args.platform == "cpu" else "cuda")
    cuda = device.type == "cuda"
    attention = fastest_attention(case.model, case.batch, case.length, device) if cuda else None
    with np.load(args.weights) as file:
        weights = dict(file)  # an `NpzFile` reads an array anew whenever it is asked for
    compiled = args.worker == "compiled"
    step = make_step(case.model, case.length, weights, case.optimizer, device, compiled=compiled, attention=attention)
    del weights
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
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start, losses

    about = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    if attention is not None:
        about["torch_attention"] = attention.name
    return run, lambda: torch.cuda.max_memory_allocated() if cuda else None, about
