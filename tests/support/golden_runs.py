"""Twenty steps of every shipped config's tiny twin, on text that is made here: what golden runs record and compare."""

from __future__ import annotations

import dataclasses
import platform
from pathlib import Path

import jax
import jaxlib

from lm_jax.data.loader import Batches
from lm_jax.data.pipeline import prepare
from lm_jax.objectives.next_token import next_token
from lm_jax.sharding import one_device_mesh
from lm_jax.training.program import make_program
from lm_jax.training.run import RunConfig
from tests.support.small_run import write_text
from tests.support.twins import twin

FILE = Path(__file__).resolve().parents[1] / "golden" / "runs.json"


def conditions() -> dict[str, str]:
    """What a run's bits depend on: the same conditions give the same bits."""
    return {"jaxlib": jaxlib.__version__, "jax": jax.__version__, "processor": processor(), "system": platform.system()}


def processor() -> str:
    """The kind of processor: its name, and the vector instructions that XLA chooses by."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    facts = dict(line.split(":", 1) for line in lines if ":" in line and not line.startswith("processor"))
    facts = {key.strip(): value.strip() for key, value in facts.items()}
    flags = facts.get("flags", "").split()
    vectors = [flag for flag in ("avx", "avx2", "avx512f", "avx512_bf16", "amx_tile") if flag in flags]
    return " ".join([facts.get("model name", platform.machine()), *vectors])


def losses(config: RunConfig, folder: Path) -> list[float]:
    """The loss of each step of the config's twin, on one device."""
    small = twin(config)
    data = dataclasses.replace(small.data, source=str(write_text(folder / "text", documents=60)), max_epochs=100)
    small = dataclasses.replace(small, data=data)
    prepared = prepare(small.data, length=small.train.length, seed=small.train.seed)
    small = small.with_vocab(prepared.tokenizer.vocab_size)
    mesh, found = one_device_mesh(), []
    with jax.set_mesh(mesh):
        objective = next_token(small.model, z_loss=small.train.z_loss, remat=small.train.remat)
        program = make_program(small, mesh, objective)
        state = program.init()
        text = prepared.train
        with Batches(text.plan, text.store, mesh, batch_size=small.train.batch_size) as batches:
            for _, batch in zip(range(small.train.total_steps), batches, strict=False):
                state, metrics = program.train_step(state, batch)
                found.append(float(metrics["loss"]))
    return found
