"""Whether a config fits a slice of TPUs, how fast it could be, and why; without a TPU:

    python -m launch.preflight --config=configs/7b.py --topology=v5p:4x4x4

Compiles the real training step with the TPU's own compiler. Exit status: 0 it fits, 1 it does not, 2 the user's
mistake, 3 no verdict: the compiler or this program failed.
"""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags
from ml_collections import ConfigDict

from launch import cli
from lm_jax.errors import Failure, UserError

if TYPE_CHECKING:
    from lm_jax.preflight.chips import Target
    from lm_jax.training.run import RunConfig

FLAGS = flags.FlagValues()
TOPOLOGY = flags.DEFINE_string(
    "topology", None, "the slice: v5e:4x4, v5p-128; or GPUs: h200:8", required=True, flag_values=FLAGS
)
SLICES = flags.DEFINE_integer("slices", 1, "how many of it, joined by a network", lower_bound=1, flag_values=FLAGS)
JSON = flags.DEFINE_string("json", None, "a file for all that was found", flag_values=FLAGS)
PICTURE = flags.DEFINE_string("picture", None, "a PNG", flag_values=FLAGS)
SEARCH = flags.DEFINE_bool(
    "search", False, "try other meshes, remat and micro-batches, and compile the most promising", flag_values=FLAGS
)
TRIES = flags.DEFINE_integer("tries", 4, "how many --search compiles", lower_bound=1, flag_values=FLAGS)
MACHINE_CODE = flags.DEFINE_bool(
    "machine_code", False, "let the compiler write machine code too: minutes more", flag_values=FLAGS
)
CACHE = flags.DEFINE_bool("cache", True, "whether the same question may have its kept answer", flag_values=FLAGS)

DOES_NOT_FIT, NO_VERDICT = 1, 3


def main(config: ConfigDict, file: cli.ConfigFile) -> int:
    """The exit status; a script that asks must not take a failure for a config that does not fit."""
    try:
        return _main(config, file)
    except UserError:
        raise
    except Failure as e:
        print("\n".join(str(e).splitlines()[: cli.MAX_LINES]), file=sys.stderr, flush=True)
    except Exception:
        traceback.print_exc()
    return NO_VERDICT


def _main(config: ConfigDict, file: cli.ConfigFile) -> int:
    import jax

    jax.config.update("jax_platforms", "cpu")  # a TPU that is here is left alone
    from lm_jax.config import build
    from lm_jax.preflight import page
    from lm_jax.preflight.chips import target_of
    from lm_jax.preflight.search import search
    from lm_jax.preflight.verdict import preflight
    from lm_jax.training.memory import FILL, fastest_remat, with_remat
    from lm_jax.training.run import RunConfig

    run = build(RunConfig, config).with_likely_vocab()
    target = target_of(TOPOLOGY.value, SLICES.value)
    run.check_layout(target.devices)
    if run.train.remat == "auto":
        budget = run.train.memory_gb
        room = int(FILL * target.chip.memory if budget is None else budget * 1e9)
        run = with_remat(run, fastest_remat(run, target.devices, room, target.device))
    verdict = preflight(
        run,
        target,
        machine_code=MACHINE_CODE.value,
        cache=CACHE.value,
        advise=lambda fits: _advice(run, target, fits),
        tell=_tell,
    )
    verdict = {"config_file": file.spec, **verdict}
    _tell("")
    print(page.text(verdict, file.spec))
    found = search(run, target, verdict, tries=TRIES.value, tell=_tell) if SEARCH.value else []
    _tell("")
    verdict["search"] = [{"keys": f.keys, **f.verdict} for f in found]
    if found or verdict["advice"]:
        print("\n" + (page.table(found, target.name) if found else verdict["advice"]))
    if JSON.value:
        Path(JSON.value).write_text(json.dumps(verdict, indent=1) + "\n")
    if PICTURE.value:
        Path(PICTURE.value).write_bytes(page.picture(verdict, file.spec))
    return 0 if verdict["fits"] else DOES_NOT_FIT


def _advice(run: RunConfig, target: Target, fits: bool) -> str:
    """What costs.py expects to fit, or to fit and be faster; the compiler was not asked."""
    from launch.memory import remedy
    from lm_jax import costs
    from lm_jax.training.memory import AUTO, FILL, fastest_remat, need, with_remat

    if not fits:
        where: dict[str, Any] = {"device": target.device, "slices": target.slices}
        return "  by costs.py, " + remedy(run, target.devices, target.chip.memory, **where)
    room = int(FILL * target.chip.memory)
    policy = fastest_remat(run, target.devices, room, target.device)
    if run.train.remat not in AUTO or AUTO.index(policy) >= AUTO.index(run.train.remat):
        return ""
    size = costs.amount(need(with_remat(run, policy), target.devices, target.device)["total"])
    return f"  faster, and by costs.py it fits ({size}): --config.train.remat={policy}"


def _tell(text: str) -> None:
    """What is going on, on one line of a terminal that is written over."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    cli.run(main, FLAGS, config=True, file=True)
