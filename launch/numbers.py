"""The numbers of a config that one works out before training it, on any machine and without its devices:

python -m launch.numbers --config=configs/7b.py --chip=h100 --chips=256 --mfu=0.4 --price=2.5
python -m launch.numbers --config=configs/70b.py --chip=a100 --tokens=2e12 --chip_hours=1720320

Parameters by part, FLOPs a token by each usual count, bytes a parameter by optimizer and precision, what a layer keeps
for the backward pass, the key-value cache, training time and price at a rate of use of the chips (MFU); with
--chip_hours (or --hours on --chips) also the rate of use that such a budget implies. What a device of a mesh needs is
not among them. docs/numbers.md explains the numbers and compares them with published ones.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from launch import cli

FLAGS = flags.FlagValues()
CHIP = flags.DEFINE_string("chip", "h100", "the chip: v4, v5e, v5p, v6e, a100, h100, ..", flag_values=FLAGS)
CHIPS = flags.DEFINE_integer("chips", 1, "how many chips", flag_values=FLAGS)
MFU = flags.DEFINE_float("mfu", 0.4, "the share of the chips' peak that training reaches", flag_values=FLAGS)
PRICE = flags.DEFINE_float("price", None, "what a chip-hour costs", lower_bound=0.0, flag_values=FLAGS)
TOKENS = flags.DEFINE_string("tokens", None, "tokens of training, as 2e12; None: the config's", flag_values=FLAGS)
CHIP_HOURS = flags.DEFINE_float("chip_hours", None, "a budget, of which the MFU is told", flag_values=FLAGS)
HOURS = flags.DEFINE_float("hours", None, "the same as hours on all of --chips", flag_values=FLAGS)
JSON = flags.DEFINE_string("json", None, "where to write the numbers as JSON", flag_values=FLAGS)

Numbers = dict[str, Any]
Rows = Iterable[Sequence[str]]


def main(config: ConfigDict, file: cli.ConfigFile) -> int:
    from lm_jax.config import build
    from lm_jax.paths import run_path, write_text_atomic
    from lm_jax.training.run import RunConfig

    found = numbers(build(RunConfig, config), file.spec, **_asked())
    print(text(found))
    if JSON.value is not None:
        write_text_atomic(run_path(JSON.value), json.dumps(found, indent=1) + "\n")
    return 0


def _asked() -> dict[str, Any]:
    """The flags, as `numbers` takes them."""
    from lm_jax.errors import UserError

    if HOURS.value is not None and CHIP_HOURS.value is not None:
        raise UserError("--hours: --chip_hours is given as well\ngive one of them: chip-hours are hours times chips")
    tokens = None
    if TOKENS.value is not None:
        try:
            number = float(TOKENS.value)
        except ValueError:
            number = 0.0
        if not (number >= 1 and number.is_integer()):  # false of infinity and NaN as well
            raise UserError(f"--tokens: {TOKENS.value!r} is no number of tokens\nuse a whole number above 0, as 2e12")
        tokens = int(number)
    hours = CHIP_HOURS.value if HOURS.value is None else HOURS.value * CHIPS.value
    given = {"chip_name": CHIP.value, "chips": CHIPS.value, "mfu": MFU.value, "price": PRICE.value}
    return given | {"tokens": tokens, "chip_hours": hours}


# ------------------------------------------------------------------------------------------------------------- numbers


def numbers(
    run: Any,
    name: str,
    *,
    chip_name: str = "h100",
    chips: int = 1,
    mfu: float = 0.4,
    price: float | None = None,
    tokens: int | None = None,
    chip_hours: float | None = None,
) -> Numbers:
    """All that `text` prints, ready for JSON.

    Args:
      run: the RunConfig; where it leaves the vocabulary open, the one that its tokenizer is likely to have.
      name: what the config is called.
      chip_name: a name of `lm_jax.numbers.CHIPS`.
      chips: how many of them.
      mfu: the share of their peak that training reaches.
      price: of a chip-hour; None: no price.
      tokens: of training; None: the config's.
      chip_hours: a budget whose MFU is to be told; None: none.

    Raises:
      UserError: an unknown chip, or a number that cannot be.
    """
    from lm_jax import costs
    from lm_jax import numbers as lib

    chip = lib.chip(chip_name)
    open_vocab = run.model.vocab is None
    run = run.with_likely_vocab()
    c, length = run.model, run.train.length
    tokens = run.train.total_steps * run.train.tokens_per_step if tokens is None else tokens
    dtype = lib.compute_dtype(c, chip)
    flops = lib.flops_per_token(c, length)
    optimizers = dict.fromkeys(("sgd without momentum", "sgd", "adamw", "adafactor", run.optimizer.name))
    training = {"tokens": tokens, "flops": tokens * flops["causal"], "flops_all_pairs": tokens * flops["all_pairs"]}
    training |= {"chip": chip_name.lower(), "chips": chips, "mfu": mfu, "peak": chip.peak}
    if costs.peak_flops(chip.kind, dtype) is None:
        training["peak"] = None
    else:
        hours = lib.training_hours(training["flops"], chips, chip.peak, mfu)
        training |= {"hours": hours, "chip_hours": hours * chips}
        if price is not None:
            training |= {"price": price, "cost": hours * chips * price}
        if chip_hours is not None:
            implied = [lib.implied_mfu(training[key], chip_hours, chip.peak) for key in ("flops", "flops_all_pairs")]
            training |= {
                "budget_chip_hours": chip_hours,
                "implied_mfu": implied[0],
                "implied_mfu_all_pairs": implied[1],
            }
    shape = ("layers", "embed", "heads", "key_heads", "head_size", "feed_forward", "inner", "ids", "tied")
    return {
        "config": name,
        "model": {key: getattr(c, key) for key in shape} | {"vocabulary_assumed": open_vocab},
        "length": length,
        "dtype": dtype.name,
        "parameters": costs.parameters(c),
        "flops_per_token": flops,
        "optimizer": {"name": run.optimizer.name, "average": run.optimizer.ema is not None},
        "bytes_per_parameter": {
            name: {recipe: lib.bytes_per_parameter(c, name, recipe) for recipe in lib.RECIPES} for name in optimizers
        },
        "activations": lib.activations(c, length, chip),
        "cache_bytes_per_token": lib.caches(c, dtype.itemsize),
        "training": training,
    }


# ---------------------------------------------------------------------------------------------------------------- page


def text(n: Numbers) -> str:
    """The page: aligned columns, at most 100 wide."""
    m = n["model"]
    heads = f"{m['heads']} heads of {m['head_size']}"
    if m["key_heads"] != m["heads"]:
        heads += f" on {m['key_heads']} key-value heads"
    ids = f"{m['ids']:,} ids" + (" (assumed: its tokenizer decides)" if m["vocabulary_assumed"] else "")
    head = [
        f"{n['config']}: {m['layers']} layers of {m['embed']:,}, {heads},",
        f"{m['feed_forward']} of {m['inner']:,}, {ids}, {'tied' if m['tied'] else 'untied'}; {n['dtype']} compute",
    ]
    parts = [_parameters(n), _flops(n), _bytes(n), _activations(n), _cache(n), _training(n)]
    return "\n\n".join("\n".join(lines) for lines in (head, *parts))


def _parameters(n: Numbers) -> list[str]:
    counts = n["parameters"]
    rows = [(name.replace("_", " "), f"{k:,}", f"{k / counts['total']:.1%}") for name, k in counts.items() if k]
    return ["parameters", *_table(rows)]


def _flops(n: Numbers) -> list[str]:
    said = {
        "causal": "matrices, and attention to what a position sees (what lm_jax counts)",
        "all_pairs": "attention to all of the row (Chowdhery et al. 2022)",
        "kaplan": "6 N without the embedding (Kaplan et al. 2020)",
        "chinchilla": "6 N, all parameters (Hoffmann et al. 2022)",
    }
    own = n["flops_per_token"]["causal"]
    rows = [(said[key], f"{f:.4g}", f"{f / own - 1:+.1%}") for key, f in n["flops_per_token"].items()]
    rows[0] = (*rows[0][:2], "")
    return [f"training FLOPs a token, in rows of {n['length']:,}", *_table(rows)]


def _bytes(n: Numbers) -> list[str]:
    size = n["parameters"]["total"]
    rows = [("", "float32; lm_jax in bfloat16", "", "bfloat16 and a master copy", "")]
    for name, recipes in n["bytes_per_parameter"].items():
        row = [name + (" (config's)" if name == n["optimizer"]["name"] else "")]
        for held in recipes.values():
            sums = [held["weights"], held["gradient"], *([held["master"]] if held["master"] else []), held["state"]]
            row += [" + ".join(f"{b:.3g}" for b in sums) + f" = {held['total']:.4g}", _amount(held["total"] * size)]
        rows.append(tuple(row))
    lines = [
        "bytes a parameter: weights + gradient (+ master copy) + optimizer state; of the whole model",
        *_table(rows),
    ]
    if n["optimizer"]["average"]:
        lines.append(f"  and 4 for the average of the weights, {_amount(4 * size)}")
    return lines


def _activations(n: Numbers) -> list[str]:
    m, length = n["model"], n["length"]
    rows = [("remat", "a token and layer", "over embed", f"all layers, a row of {length:,}", "and weights kept again")]
    for policy, kept in n["activations"].items():
        row = kept["bytes"] * length * m["layers"]
        again = _amount(kept["weight_bytes"] * m["layers"]) if kept["weight_bytes"] else ""
        rows.append((policy, f"{kept['bytes']:,.0f} B", f"{kept['bytes'] / m['embed']:.1f}", _amount(row), again))
    return [f"activations kept for the backward pass, {n['dtype']} on {n['training']['chip']}", *_table(rows)]


def _cache(n: Numbers) -> list[str]:
    m, length = n["model"], n["length"]
    heads = {"own": m["key_heads"], "MHA": m["heads"], "GQA": 8, "MQA": 1}
    rows = [("", "heads", "a token", f"a row of {length:,}", f"tokens in {_amount(10**9)}")]
    for name, size in n["cache_bytes_per_token"].items():
        called = "this model" if name == "own" else f"as {name}"
        rows.append((called, str(heads[name]), f"{size:,} B", _amount(size * length), f"{10**9 // size:,}"))
    return [f"key-value cache, {n['dtype']}", *_table(rows)]


def _training(n: Numbers) -> list[str]:
    t = n["training"]
    lines = [f"training on {t['tokens']:.4g} tokens: {t['flops']:.3g} FLOPs"]
    if t["peak"] is None:
        return [*lines, f"  no time: a chip's peak is published for bfloat16, and this computes in {n['dtype']}"]
    chips = f"{t['chips']:,} x {t['chip']} of {t['peak'] / 1e12:,.5g} TFLOP/s at MFU {t['mfu']:.1%}"
    rows = [(chips, _duration(t["hours"]), f"{_count(t['chip_hours'])} chip-hours")]
    if "cost" in t:
        rows.append((f"at {t['price']:g} a chip-hour", _count(t["cost"]), ""))
    if "implied_mfu" in t:
        budget = f"{t['budget_chip_hours']:,.10g} chip-hours imply"
        rows.append((budget, f"MFU {t['implied_mfu']:.1%}", f"{t['implied_mfu_all_pairs']:.1%} counting all pairs"))
    lines += _table(rows)
    if t.get("implied_mfu", 0) > 1:
        lines.append("  more than these chips' peak: no such training can be")
    return lines


def _table(rows: Rows) -> list[str]:
    """Lines of aligned columns: the first to the left, the others to the right."""
    rows = [tuple(row) for row in rows]
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = []
    for first, *rest in rows:
        cells = [first.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(rest, widths[1:], strict=True))]
        lines.append(("  " + "  ".join(cells)).rstrip())
    return lines


def _amount(size: float) -> str:
    from lm_jax.costs import amount

    return amount(round(size))


def _count(number: float) -> str:
    """Four digits, written out."""
    return f"{float(f'{number:.4g}'):,.0f}" if number >= 1000 else f"{number:.4g}"


def _duration(hours: float) -> str:
    for size, unit in ((24 * 365.25, "years"), (24, "days"), (1, "hours"), (1 / 60, "minutes")):
        if hours >= 2 * size:
            return f"{hours / size:,.3g} {unit}" if hours < 1000 * size else f"{hours / size:,.0f} {unit}"
    return f"{hours * 3600:.3g} seconds"


if __name__ == "__main__":
    cli.run(main, FLAGS, config=True, file=True)
