"""Which shipped configs fit which slices: the table of docs/preflight.md, by `python -m benchmarks.what_fits`, or for
some of its slices by `python -m benchmarks.what_fits v5e:4x4`.

A config that does not fit as it is takes the nearest change that `costs.py` expects to fit. Needs libtpu, no TPU; some
twenty seconds a cell on two idle cores.
"""

from __future__ import annotations

import sys
from typing import Any

from launch.cli import load
from lm_jax import costs
from lm_jax.config import assign, build
from lm_jax.errors import UserError
from lm_jax.preflight.chips import Target, target_of
from lm_jax.preflight.verdict import Verdict, preflight
from lm_jax.training.memory import fitting, need
from lm_jax.training.run import RunConfig

CELLS = {
    "v5e:1x1": ("tiny", "shakespeare_char"),
    "v5e:4x4": ("125m", "350m", "760m", "1b"),
    "v6e:4x4": ("3b",),
    **dict.fromkeys(("v5e:16x16", "v5p:4x4x8", "v6e:16x16", "tpu7x:4x4x8"), ("1b", "7b", "13b", "70b")),
}


def cell(model: str, target: Target) -> tuple[str, Verdict]:
    """The flags that were needed, and the verdict."""
    values = load(f"configs/{model}.py")
    run = build(RunConfig, values).with_likely_vocab()
    room = target.chip.memory  # all of it: the compiler has the last word
    keys: dict[str, Any] = {}
    if run.train.batch_size % target.devices:  # a row a device at least
        assign(values, {"train.batch_size": target.devices})
        keys, run = {"train.batch_size": target.devices}, build(RunConfig, values).with_likely_vocab()
    if need(run, target.devices, target.device)["total"] > room:
        more = fitting(run, target.devices, room, device=target.device) or {}
        assign(values, more)
        keys |= more
        run = build(RunConfig, values).with_likely_vocab()
    return " ".join(f"{key}={value}" for key, value in keys.items()), preflight(run, target)


def main(argv: list[str]) -> int:
    print("| config | slice | with | fits | a device | costs.py | MFU | a step |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for name in argv[1:] or CELLS:
        for model in CELLS[name]:
            try:
                keys, found = cell(model, target_of(name))
            except UserError as e:
                print(f"| {model} | {name} | | no: {str(e).splitlines()[0]} | | | | |", flush=True)
                continue
            size, step = found["bytes_per_device"], found["step"]
            share = found["predicted_total"] / size["compiler_total"]
            answer = "yes" if found["fits"] else "no"
            print(
                f"| {model} | {name} | {keys and f'`{keys}`'} | {answer} | {costs.amount(size['compiler_total'])} of"
                f" {costs.amount(size['capacity'])} | {share:.2f} | {step['mfu']:.0%} | {step['seconds']:.3g} s |",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
