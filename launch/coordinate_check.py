"""Whether a config's learning rate carries over to other sizes, by a few steps at each of them:

python -m launch.coordinate_check --config=configs/tiny.py --config.model.parametrization=mup \
  --config.model.base_embed=64 --widths=64,128,256,512 --png=widths.png

Models of several widths (or, with --depths, depths) are trained for a few steps on one batch of random tokens at the
config's full learning rate, and the mean change of each kind of activation is compared: where it goes with a power of
the size, no one learning rate serves all sizes. Prints the powers, and draws the picture of them. Exit status: 0 no
kind of activation grows or shrinks, 1 one does (the likely cause is named), 2 the user's mistake.
"""

from __future__ import annotations

from absl import flags
from ml_collections import ConfigDict

from launch import cli, runtime
from launch.train import objective

FLAGS = flags.FlagValues()
WIDTHS = flags.DEFINE_list("widths", None, "widths (model.embed) to compare: 64,128,256", flag_values=FLAGS)
DEPTHS = flags.DEFINE_list("depths", None, "depths (model.layers) to compare: 2,4,8", flag_values=FLAGS)
STEPS = flags.DEFINE_integer("steps", 5, "steps of training", lower_bound=1, flag_values=FLAGS)
SEEDS = flags.DEFINE_integer("seeds", 2, "initial values to take the mean over", lower_bound=1, flag_values=FLAGS)
LIMIT = flags.DEFINE_float("limit", 0.15, "the largest power that passes", lower_bound=0.0, flag_values=FLAGS)
PNG = flags.DEFINE_string("png", None, "where to draw the picture", flag_values=FLAGS)


def main(config: ConfigDict) -> int:
    from lm_jax.config import build
    from lm_jax.errors import Failure
    from lm_jax.paths import run_path, write_bytes_atomic
    from lm_jax.scaling import coordinates
    from lm_jax.training.run import RunConfig

    axis, sizes = _sizes()
    run = coordinates.checkable(build(RunConfig, config), STEPS.value)
    models = (coordinates.widened if axis == "width" else coordinates.deepened)(run.model, sizes)
    runtime.use_compilation_cache()
    scales = coordinates.measure(run, models, objective, steps=STEPS.value, seeds=SEEDS.value)
    title = f"{run.model.parametrization}, {run.optimizer.name} at {run.optimizer.learning_rate:g}"
    print(f"{title}: {axis} {', '.join(map(str, sizes))}, {STEPS.value} steps on one random batch")
    print(f"{'':6}  {'':13} {'change goes with':20} {'itself with':20}")
    checks = coordinates.verdicts(sizes, scales, axis, LIMIT.value)
    for check in checks:
        change, level = (f"{axis}^{power:+.2f}" for power in (check.change, check.level))
        print(f"{'ok' if check.ok else 'FAILED':6}  {check.kind:13} {change:20} {level:20} of {check.limit:g}")
    if PNG.value is not None:
        write_bytes_atomic(run_path(PNG.value), coordinates.draw(sizes, scales, axis, title))
    failed = [check for check in checks if not check.ok]
    if failed:
        raise Failure(f"FAIL: {len(failed)} kinds do; first of all, {failed[0].suspect}")
    print("PASS: no kind of activation moves with the size")
    return 0


def _sizes() -> tuple:
    """The axis and its sizes, in their order."""
    from lm_jax.errors import UserError

    given = {"width": WIDTHS.value, "depth": DEPTHS.value}
    if sum(bool(texts) for texts in given.values()) != 1:
        raise UserError("--widths: one of --widths and --depths is to be given\nfor instance --widths=64,128,256,512")
    ((axis, texts),) = ((axis, texts) for axis, texts in given.items() if texts)
    if not all(text.strip().isdigit() and int(text) > 0 for text in texts):
        raise UserError(f"--{axis}s: {','.join(texts)} are not whole numbers above 0")
    sizes = sorted({int(text) for text in texts})
    if len(sizes) < 2:
        raise UserError(f"--{axis}s: one size has nothing to be compared with\ngive two or more")
    return axis, sizes


if __name__ == "__main__":
    cli.run(main, FLAGS, config=True)
