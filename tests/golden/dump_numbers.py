"""Writes docs/numbers.md: what a config's numbers are, and how they compare with published ones:

python -m tests.golden.dump_numbers

Every published figure is named with the place that it was read from. A figure of ours is computed here, anew each time.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from launch.cli import load
from launch.numbers import numbers, text
from lm_jax import costs
from lm_jax import numbers as lib
from lm_jax.config import build
from lm_jax.models.transformer import TransformerConfig
from lm_jax.training.run import RunConfig

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "docs" / "numbers.md"
CONFIGS = ROOT / "configs"
COMMAND = "python -m launch.numbers --config=configs/70b.py --chip=a100 --chips=2048 --tokens=2e12 --chip_hours=1720320"

# ---------------------------------------------------------------------------------------------------- published


class Case(NamedTuple):
    """A published figure and ours.

    Attributes:
      model: whose it is.
      what: what is counted.
      published: the figure; None: there is none, and ours stands alone.
      source: where it stands.
      ours: the same from lm_jax.
      shown: how both are written.
      apart: the largest difference, as a share of what is published, that its number of digits and the note explain.
      note: why it differs, or what was added; empty where it is the same.
    """

    model: str
    what: str
    published: float | None
    source: str
    ours: float
    shown: Callable[[float], str]
    apart: float
    note: str = ""


def gpt(layers: int, embed: int, heads: int, vocab: int, length: int) -> tuple[TransformerConfig, int]:
    """A GPT's matrices as a config of ours, and how many parameters the GPT has beside ours: biases of its six matrices
    a layer (9 D), offsets of its norms (2 D a layer and D), learned positions (T D)."""
    shape: dict[str, Any] = dict(feed_forward="squared_relu", feed_forward_dim=4 * embed, tied=True)
    c = TransformerConfig(layers=layers, embed=embed, heads=heads, vocab=vocab, **shape)
    return c, layers * 11 * embed + embed + length * embed


GPT_2, GPT_2_EXTRA = gpt(48, 1600, 25, 50_257, 1024)
GPT_3, GPT_3_EXTRA = gpt(96, 12_288, 96, 50_257, 2048)
MT_NLG, _ = gpt(105, 20_480, 128, 50_257, 2048)
OPT_13B, _ = gpt(40, 5120, 40, 50_272, 2048)
LLAMA_65B = TransformerConfig(layers=80, embed=8192, heads=64, feed_forward_dim=22_016, vocab=32_000)
LLAMA_2_7B = TransformerConfig(layers=32, embed=4096, heads=32, feed_forward_dim=11_008, vocab=32_000)
LLAMA_2_13B = TransformerConfig(layers=40, embed=5120, heads=40, feed_forward_dim=13_824, vocab=32_000)
LLAMA_2_70B = TransformerConfig(layers=80, embed=8192, heads=64, kv_heads=8, feed_forward_dim=28_672, vocab=32_000)
LLAMA_3_405B = TransformerConfig(
    layers=126, embed=16_384, heads=128, kv_heads=8, feed_forward_dim=53_248, vocab=128_256
)
PALM_540B = TransformerConfig(
    layers=118, embed=18_432, heads=48, kv_heads=1, head_dim=256, feed_forward_dim=73_728, vocab=256_000, tied=True
)
A100, H100, V4 = lib.CHIPS["a100"].peak, lib.CHIPS["h100"].peak, lib.CHIPS["v4"].peak


def exact(number: float) -> str:
    return f"{number:,.0f}"


def digits(number: float) -> str:
    return f"{number:.4g}".replace("e+", "e")


def billions(number: float) -> str:
    return f"{number / 1e9:.5g}e9"


def percent(number: float) -> str:
    return f"{number:.1%}"


def cases() -> Iterator[Case]:
    yield from _of_gpt()
    yield from _of_palm()
    yield from _of_llama()
    yield from _of_memory()


def _size(c: TransformerConfig) -> int:
    return costs.parameters(c)["total"]


def _of_gpt() -> Iterator[Case]:
    brown = "Brown et al. 2020, arXiv:2005.14165, "
    added = "ours, and the GPT's biases, offsets of norms and learned positions: "
    yield Case(
        "GPT-2 1.5B",
        "parameters",
        1_557_611_200,
        "the released shapes",
        _size(GPT_2) + GPT_2_EXTRA,
        exact,
        0.0,
        f"{added}{_size(GPT_2):,} + {GPT_2_EXTRA:,}",
    )
    size = _size(GPT_3) + GPT_3_EXTRA
    yield Case(
        "GPT-3 175B",
        "parameters",
        174.6e9,
        brown + "table D.1",
        size,
        billions,
        1e-4,
        f"{added}{_size(GPT_3):,} + {GPT_3_EXTRA:,}; 175.0B in table 2.1 is rounded",
    )
    yield Case(
        "GPT-3 175B",
        "training FLOPs, 300e9 tokens, 6 N",
        3.14e23,
        brown + "table D.1",
        6.0 * size * 300e9,
        digits,
        2e-3,
    )
    yield Case(
        "GPT-3 175B",
        "the same in petaflop/s-days",
        3640,
        brown + "table D.1",
        6.0 * size * 300e9 / 8.64e19,
        digits,
        2e-3,
    )
    yield Case(
        "GPT-3 175B",
        "training FLOPs, as lm_jax counts",
        3.14e23,
        brown + "table D.1",
        costs.training_flops(GPT_3, 2048, 300_000_000_000),
        digits,
        0.02,
        "not reproduced: the paper leaves attention's scores out, which are 1.4% at 2,048 tokens",
    )


def _of_palm() -> Iterator[Case]:
    chowdhery = "Chowdhery et al. 2022, arXiv:2204.02311, "
    flops, chips = lib.flops_per_token(PALM_540B, 2048), 6144
    rate = 238.3e3
    yield Case(
        "PaLM 540B",
        "parameters",
        540.35e9,
        chowdhery + "table 1",
        _size(PALM_540B),
        billions,
        1e-4,
        "ours has two norms a block, PaLM's parallel block one",
    )
    yield Case(
        "PaLM 540B",
        "MFU of 238.3K tokens/s on 6,144 TPU v4",
        0.462,
        chowdhery + "section 4.1",
        lib.implied_mfu(rate * flops["all_pairs"], chips / 3600, V4),
        percent,
        2e-3,
    )
    yield Case(
        "PaLM 540B",
        "the same without attention, 6 N",
        0.457,
        chowdhery + "section 4.1",
        lib.implied_mfu(rate * flops["chinchilla"], chips / 3600, V4),
        percent,
        2e-3,
    )
    yield Case(
        "PaLM 540B",
        "the same, causal, as lm_jax logs it",
        0.462,
        chowdhery + "section 4.1",
        lib.implied_mfu(rate * flops["causal"], chips / 3600, V4),
        percent,
        0.01,
        "not reproduced: half of the pairs of positions are masked, and lm_jax does not count them",
    )
    flops, rate = lib.flops_per_token(MT_NLG, 2048), 65.43e3
    yield Case(
        "MT-NLG 530B",
        "MFU of 65.43K tokens/s on 2,240 A100",
        0.302,
        chowdhery + "section 4.1",
        lib.implied_mfu(rate * flops["all_pairs"], 2240 / 3600, A100),
        percent,
        2e-3,
        "its 105 layers of 20,480 with 128 heads (Smith et al. 2022, arXiv:2201.11990), ids as GPT-2's",
    )
    yield Case(
        "MT-NLG 530B",
        "the same without attention, 6 N",
        0.297,
        chowdhery + "section 4.1",
        lib.implied_mfu(rate * flops["chinchilla"], 2240 / 3600, A100),
        percent,
        2e-3,
    )


def _of_llama() -> Iterator[Case]:
    llama, llama_2 = "Touvron et al. 2023, arXiv:2302.13971, ", "Touvron et al. 2023, arXiv:2307.09288, "
    llama_3 = "Grattafiori et al. 2024, arXiv:2407.21783, "
    flops = costs.training_flops(LLAMA_65B, 2048, 1_400_000_000_000)
    mfu = lib.implied_mfu(380 * costs.flops_per_token(LLAMA_65B, 2048), 1 / 3600, A100)
    hours = lib.training_hours(flops, 2048, A100, mfu)
    yield Case("LLaMA 65B", "parameters", 65.2e9, llama + "table 2", _size(LLAMA_65B), billions, 2e-3)
    yield Case(
        "LLaMA 65B",
        "days for 1.4e12 tokens on 2,048 A100",
        21,
        llama + "section 2.4",
        hours / 24,
        digits,
        0.015,
        f"at the MFU of the 380 tokens/s a GPU that the paper tells, {mfu:.1%}; it says approximately",
    )
    yield Case("LLaMA 65B", "A100-hours of that", 1_022_362, llama + "table 15", hours * 2048, exact, 2e-3)
    yield Case("Llama 2 70B", "parameters", 68_976_648_192, "the released shapes", _size(LLAMA_2_70B), exact, 0.0)
    yield Case("Llama 3.1 405B", "parameters", 405e9, llama_3 + "section 1", _size(LLAMA_3_405B), billions, 3e-3)
    flops_405b = 6.0 * _size(LLAMA_3_405B) * 15.6e12
    yield Case(
        "Llama 3.1 405B", "training FLOPs, 15.6e12 tokens, 6 N", 3.8e25, llama_3 + "section 1", flops_405b, digits, 2e-3
    )
    yield Case(
        "Llama 3.1 405B",
        "MFU of its 30.84e6 H100-hours, 6 N",
        0.38,
        "the model card; MFU: " + llama_3 + "table 4",
        lib.implied_mfu(flops_405b, 30.84e6, H100),
        percent,
        0.1,
        "not reproduced: 38% is the lowest of the paper's 38% to 43%, which hold while steps run; the "
        "hours are those of all training",
    )
    yield from _budgets(llama_2)


def _budgets(llama_2: str) -> Iterator[Case]:
    """Budgets for which no rate of use was published."""
    budgets = {"Llama 2 7B": (LLAMA_2_7B, 184_320), "Llama 2 13B": (LLAMA_2_13B, 368_640)}
    for name, (c, hours) in {**budgets, "Llama 2 70B": (LLAMA_2_70B, 1_720_320)}.items():
        flops = costs.training_flops(c, 4096, 2_000_000_000_000)
        implied = lib.implied_mfu(flops, hours, A100)
        yield Case(
            name,
            f"MFU that {hours:,} A100-hours for 2e12 tokens imply",
            None,
            llama_2 + "table 2",
            implied,
            percent,
            0.0,
        )


def _of_memory() -> Iterator[Case]:
    zero = "Rajbhandari et al. 2020, arXiv:1910.02054, section 3.1"
    held = lib.bytes_per_parameter(GPT_2, "adamw", "mixed")["total"]
    yield Case("any", "bytes a parameter, Adam, mixed precision", 16, zero, held, digits, 0.0)
    yield Case(
        "GPT-2 1.5B",
        "GB of weights, gradients and Adam's state",
        24,
        zero,
        held * 1_557_611_200 / 1e9,
        digits,
        0.05,
        "the paper takes 1.5e9 parameters, and says at least",
    )
    yield Case(
        "OPT 13B",
        "bytes of key-value cache a token",
        800 * 1024,
        "Kwon et al. 2023, arXiv:2309.06180, section 3",
        lib.cache_bytes(OPT_13B, 2),
        exact,
        0.0,
    )


# --------------------------------------------------------------------------------------------------------- page

HEAD = """\
# Numbers

What a config costs before anything is trained, on any machine and without the chips:

```sh
{command}
```

```
{page}
```

It takes the config's own length, batch and tokens where the command line gives none; `--json=FILE` writes the same
numbers. What a device of a mesh needs is another question: `launch.train` answers it before it starts.

## What they are

- **FLOPs a token.** Three forward passes; a forward pass spends 2 for each weight of a matrix (the output projection
  too, the look-up not), and attention 4 for each feature, head and pair of positions. The first two counts differ in
  whether positions that a causal mask hides count: lm_jax does not count them, most published rates of use do. 6 N has
  no attention's scores, and takes every parameter for a matrix: N with the look-up (Hoffmann et al.) or without it
  (Kaplan et al.; of a tied model then without the output projection too). What remat computes again is in none of them.
  `mfu` in a run's log is the first count's.
- **Bytes a parameter.** lm_jax holds float32 weights and gradients, and computes in bfloat16 from casts of them, so its
  mixed precision holds what full precision does. The textbook's holds bfloat16 weights and gradients beside a float32
  master copy, which comes to the same bytes. Either way mixed precision halves activations and traffic, not this.
  Micro-batches add a gradient (4 bytes). Adafactor's share is counted shape by shape as optax factors it: over a
  parameter's two largest dimensions (heads and head dim are two), and only where both are 128 or more; so attention
  with narrow heads keeps a number a weight.
- **Activations.** What JAX's own differentiation leaves for the backward pass of one layer and one token, by remat
  policy, with the kernels and the dtype of the named chip. `none` keeps the bfloat16 casts of all weights as well. What
  a layer needs while it computes, and the logits, come on top.
- **Key-value cache.** `2 x layers x key-value heads x head dim` numbers a token, in the dtype of compute, as
  `launch.generate` stores them.
- **Training.** FLOPs / (chips x peak x MFU), and chip-hours x price. With `--chip_hours`, or `--hours` on `--chips`,
  the same equation is solved for the MFU. Peaks are the makers' for dense bfloat16, of a whole chip (a TPU v3 or 7x is
  two of JAX's devices).

## Against published figures

Published figures stand as their sources give them, ours as computed from the shapes.

| model | figure | published | ours | difference |
| --- | --- | --- | --- | --- |
"""

TAIL = """
This page is made by `python -m tests.golden.dump_numbers`; a test holds every row to the
difference that its note explains.
"""


def page() -> str:
    """All of docs/numbers.md."""
    run = build(RunConfig, load(str(CONFIGS / "70b.py")))
    asked = {"chip_name": "a100", "chips": 2048, "tokens": 2_000_000_000_000, "chip_hours": 1_720_320.0}
    shown = text(numbers(run, "configs/70b.py", **asked))
    rows, notes = [], []
    for case in cases():
        mark = ""
        if case.note:
            notes.append(f"{len(notes) + 1}. {case.model}, {case.what}: {case.note}.")
            mark = f" ({len(notes)})"
        if case.published is None:
            published, apart = f"not published (the hours: {case.source})", ""
        else:
            published = f"{case.shown(case.published)} ({case.source})"
            apart = f"{case.ours / case.published - 1:+.2%}" if case.ours != case.published else "the same"
        rows.append(f"| {case.model} | {case.what}{mark} | {published} | {case.shown(case.ours)} | {apart} |")
    return HEAD.format(command=COMMAND, page=shown) + "\n".join(rows) + "\n\n" + "\n".join(notes) + "\n" + TAIL


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    FILE.write_text(page())
