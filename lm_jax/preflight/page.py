"""A verdict for a person: as text, and as a picture."""

from __future__ import annotations

import io
from typing import Any

from matplotlib.figure import Figure

from lm_jax import costs
from lm_jax.preflight.buffers import CLASSES
from lm_jax.preflight.search import Found
from lm_jax.preflight.verdict import Verdict

_COLORS = ("#2b6cb0", "#63b3ed", "#805ad5", "#dd6b20", "#718096")
_BAR = 40


def text(verdict: Verdict, name: str) -> str:
    """The verdict in some thirty lines."""
    size, config = verdict["bytes_per_device"], verdict["config"]
    slices = f"{verdict['slices']} x " if verdict["slices"] > 1 else ""
    answer = "fits" if verdict["fits"] else "DOES NOT FIT"
    share = size["compiler_total"] / size["capacity"]
    rows = f"{config['batch_size']} rows of {config['length']:,} in {config['microbatches']} micro-batch"
    lines = [
        f"{name} on {slices}{verdict['topology']} ({verdict['devices']} x {verdict['chip']}): {answer}",
        "",
        f"  {config['parameters']:,} parameters, {rows}{'es' if config['microbatches'] > 1 else ''}, remat"
        f" {config['remat']}; " + " ".join(f"{axis}={n}" for axis, n in verdict["mesh"].items()),
        "",
        f"  memory a device   {costs.amount(size['compiler_total'])} of {costs.amount(size['capacity'])}, {share:.0%}"
        f"; costs.py says {costs.amount(verdict['predicted_total'])}",
    ]
    for kind in CLASSES:
        bar = "#" * round(_BAR * min(1.0, size[kind] / size["capacity"]))
        lines.append(f"    {kind:<12} {costs.amount(size[kind]):>9}  {bar}")
    if verdict["host_bytes"]:
        lines.append(f"    {'on the host':<12} {costs.amount(verdict['host_bytes']):>9}")
    first = verdict["largest_buffers"][0]
    shape = f"{first['dtype']}[{','.join(map(str, first['shape']))}]"
    lines.append(f"    largest: {shape}, {costs.amount(first['bytes'])} of {first['class']}, {first['from'][-50:]}")
    step, run = verdict["step"], verdict["run"]
    lines += [
        "",
        f"  a step            {step['seconds']:.3g} s by the roofline, bound by {step['bound_by']}: arithmetic"
        f" {step['compute_seconds']:.3g}, memory {step['memory_seconds']:.3g},"
        f" links {step['exposed_link_seconds']:.3g}",
        f"                    MFU {step['mfu']:.0%}, {step['tokens_per_second']:,.0f} tokens a second",
        f"  the run           {run['steps']:,} steps, {run['hours']:,.3g} hours, {run['chip_hours']:,.3g} chip-hours",
        "",
        "  between devices, a device and step",
    ]
    for sent in verdict["collectives"][:6]:
        axes = "+".join(sent["axes"])
        hidden = f"{sent['overlaps']:.0%} beside other work"
        lines.append(
            f"    {sent['kind']:<18} {axes:<12} {sent['link']}  {costs.amount(sent['bytes']):>9}"
            f"  {sent['seconds']:8.3g} s  {hidden}"
        )
    return "\n".join(lines)


def table(found: list[Found], topology: str) -> str:
    """What a search compiled, the best first, and what follows from it."""
    width = max(len(overrides(f, topology)) for f in found)
    lines = [f"  {'tried':<{width}}  {'fits':<4} {'memory':>9}  {'a step':>8}  {'MFU':>4}"]
    for f in found:
        step, size = f.verdict["step"], f.verdict["bytes_per_device"]["compiler_total"]
        answer = "yes" if f.fits else "no"
        lines.append(
            f"  {overrides(f, topology):<{width}}  {answer:<4} {costs.amount(size):>9}  {step['seconds']:6.3g} s"
            f"  {step['mfu']:4.0%}"
        )
    best, own = found[0], next(f for f in found if not f.keys and f.verdict["topology"] == topology)
    if not best.fits:
        advice = "nothing that was tried fits: take a larger slice, or a smaller batch"
    elif best is own:
        advice = "none of the others is faster than the config as it is"
    elif best.verdict["topology"] != topology:
        advice = f"no layout fits {topology}; this does: {overrides(best, topology)}"
    elif own.fits:
        advice = f"faster ({best.seconds:.3g} s, not {own.seconds:.3g}): {overrides(best, topology)}"
    else:
        advice = f"this fits: {overrides(best, topology)}"
    return "\n".join([*lines, "", f"  {advice}"])


def overrides(found: Found, topology: str) -> str:
    """What to add to the command line."""
    there = found.verdict["topology"]
    words = [f"--topology={there}"] if there != topology else []
    return " ".join([*words, *([flags(found.keys)] if found.keys else [])]) or "as it is"


def flags(keys: dict[str, Any]) -> str:
    """Keys of the config as the command line takes them."""
    return " ".join(f"--config.{key}={value}" for key, value in keys.items())


def picture(verdict: Verdict, name: str) -> bytes:
    """A device's memory by class against what it has, and a step's time by what takes it, as a PNG."""
    size, step = verdict["bytes_per_device"], verdict["step"]
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    grid: Any = figure.subplots(2, 1)
    answer = "fits" if verdict["fits"] else "does not fit"
    figure.suptitle(f"{name} on {verdict['topology']}: {answer}")
    _stack(grid[0], {kind: size[kind] / 1e9 for kind in CLASSES}, "GB a device", _COLORS)
    grid[0].axvline(size["capacity"] / 1e9, color="#c53030", lw=2)
    grid[0].text(size["capacity"] / 1e9, 0.42, " capacity", color="#c53030", va="bottom", ha="right")
    parts = {key: step[f"{key}_seconds"] for key in ("compute", "memory", "exposed_link")}
    labels = {"compute": "arithmetic", "memory": "memory bandwidth", "exposed_link": "links"}
    _stack(
        grid[1], {labels[key]: value for key, value in parts.items()}, "seconds a step, by the roofline", _COLORS[::2]
    )
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110)
    return out.getvalue()


def _stack(axis: Any, parts: dict[str, float], label: str, colors: tuple[str, ...]) -> None:
    left = 0.0
    for (part, value), color in zip(parts.items(), colors, strict=False):
        axis.barh([0], [value], left=left, color=color, label=f"{part} {value:.3g}", height=0.7)
        left += value
    axis.set(yticks=[], xlabel=label, ylim=(-0.5, 0.6))
    axis.legend(ncols=len(parts), fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
