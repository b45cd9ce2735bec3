"""Whether a config's layout computes what one device does: `python -m launch.selftest --config=configs/7b.py`.

Before money is spent: the config's own mesh, policies and optimizer with a small model, on the devices that are here,
or on eight simulated ones. Prints what was compared and by how much it differed. Exit status: 0 all is well, 1 a check
failed (the likely cause is named), 2 the user's mistake.
"""

from __future__ import annotations

from absl import flags
from ml_collections import ConfigDict

from launch import cli, runtime
from launch.train import objective

FLAGS = flags.FlagValues()
DEVICES = flags.DEFINE_integer(
    "devices",
    8,
    "how many devices to simulate where there is no accelerator",
    lower_bound=1,
    upper_bound=64,
    flag_values=FLAGS,
)


def main(config: ConfigDict) -> int:
    import tempfile
    from pathlib import Path

    import jax

    from lm_jax.config import build
    from lm_jax.errors import Failure
    from lm_jax.training.run import RunConfig
    from lm_jax.training.selftest import Check, run_checks, shrunk

    run = build(RunConfig, config)
    runtime.use_compilation_cache()
    jax.config.update("jax_num_cpu_devices", DEVICES.value)

    small = shrunk(run, len(jax.devices()))
    mesh, model = small.mesh, small.model
    sizes = " x ".join(f"{axis} {size}" for axis, size in mesh.sizes(mesh.devices).items())
    print(f"{sizes}, zero {mesh.zero}, context {mesh.context}, on {jax.devices()[0].device_kind}")
    print(
        f"{model.layers} layers of {model.embed}, {model.heads} heads, {small.train.batch_size} rows of"
        f" {small.train.length}, {small.optimizer.name}"
    )
    failed: list[Check] = []
    with tempfile.TemporaryDirectory() as folder:
        for check in run_checks(small, objective, jax.devices(), Path(folder) / "checkpoints"):
            verdict = "ok" if check.ok else "FAILED"
            print(
                f"{verdict:6}  {check.name:22} {check.difference:8.1e} of {check.limit:7.0e}   {check.compared}",
                flush=True,
            )
            failed += [] if check.ok else [check]
    if failed:
        raise Failure(f"{len(failed)} checks failed; first of all, {failed[0].name}: {failed[0].suspect}")
    print("all is well")
    return 0


if __name__ == "__main__":
    cli.run(main, FLAGS, config=True)
