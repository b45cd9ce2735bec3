"""The pictures of a corpus' report, as PNG."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lm_jax.corpus.ledger import Histograms, Step

LEFT, GONE, CAME = "#2b6cb0", "#d95f02", "#a0aec0"
_BARS = 12  # of languages and sources


def _figure(**options: Any) -> Any:
    from matplotlib.figure import Figure  # a second to import, in every worker, and only the last stage draws

    return Figure(**options)


def png(figure: Any) -> bytes:
    """A figure as a PNG."""
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110, metadata={"Software": None})
    return out.getvalue()


def amount(n: float) -> str:
    """A number in three digits with its unit: 950, 12.3k, 1.20M."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(n) >= 0.9995 * size:
            return f"{n / size:.3g}{unit}"
    return f"{n:.0f}"


def waterfall(steps: Sequence[tuple[str, Step]]) -> bytes:
    """What is left behind each step, and what it took: of documents and of bytes."""
    figure = _figure(figsize=(11, 1.4 + 0.36 * len(steps)), layout="constrained")
    grid: Any = figure.subplots(1, 2, sharey=True)
    names = [name.replace("_", " ") for name, _ in steps]
    at = np.arange(len(steps))[::-1]
    for axis, what in zip(grid, ("documents", "bytes"), strict=True):
        before = np.array([getattr(step, f"{what}_in") for _, step in steps], float)
        after = np.array([getattr(step, f"{what}_out") for _, step in steps], float)
        axis.barh(at, after, color=LEFT, height=0.72)
        axis.barh(at, np.maximum(before - after, 0), left=after, color=GONE, height=0.72)
        top = max(before.max(), after.max(), 1)
        for y, b, a in zip(at, before, after, strict=True):
            if b != a:
                sign = "−" if b > a else "+"
                axis.text(max(a, b) + 0.01 * top, y, f"{sign}{amount(abs(b - a))}", va="center", fontsize=8, color=GONE)
        axis.set(xlim=(0, 1.14 * top), title=f"{what}: {amount(before[0])} in, {amount(after[-1])} out")
        axis.xaxis.set_major_formatter(lambda n, _: amount(n))
        axis.spines[["top", "right"]].set_visible(False)
    grid[0].set_yticks(at, names)
    return png(figure)


def lengths(read: Histograms, kept: Histograms) -> bytes:
    """Documents by their length, as they came and as they were kept."""
    figure = _figure(figsize=(8, 3.6), layout="constrained")
    axis: Any = figure.subplots()
    bins = sorted({*read.lengths, *kept.lengths}) or [0]
    span = np.arange(bins[0], bins[-1] + 1)
    for histogram, color, label, width in ((read, CAME, "came in", 0.92), (kept, LEFT, "kept", 0.6)):
        axis.bar(span, [histogram.lengths.get(int(b), 0) for b in span], width, color=color, label=label)
    step = max(1, len(span) // 12)
    axis.set_xticks(span[::step], [amount(2.0 ** int(b)) for b in span[::step]])
    axis.set(xlabel="bytes of a document (from this power of two to the next)", ylabel="documents")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    return png(figure)


def languages(identified: Histograms, kept: Histograms) -> bytes:
    """Bytes by language, before and after."""

    def size(histogram: Histograms, language: str) -> int:
        return histogram.languages.get(language, [0, 0])[1]

    found = {*identified.languages, *kept.languages}
    sizes = {"cannot be told" if x == "und" else x: (size(identified, x), size(kept, x)) for x in sorted(found)}
    figure, axis = _before_and_after(sizes, ("identified", "kept"))
    axis.xaxis.set_major_formatter(lambda n, _: amount(n))
    axis.set(xlabel="bytes")
    return png(figure)


def mixture(shares: Mapping[str, tuple[float, float]]) -> bytes:
    """The share of each source of what came in, and of the tokens that result."""
    figure, axis = _before_and_after(shares, ("of the text in", "of the tokens"))
    axis.xaxis.set_major_formatter(lambda n, _: f"{n:.0%}")
    return png(figure)


def _before_and_after(values: Mapping[str, tuple[float, float]], labels: tuple[str, str]) -> tuple[Any, Any]:
    """Figure and axis with a bar for each name, before and after; the largest, and the rest together."""
    found = sorted(values, key=lambda name: -max(values[name]))
    shown, others = found[:_BARS], found[_BARS:]
    bars = [(_short(name), values[name]) for name in shown]
    if others:
        bars.append(("others", (sum(values[x][0] for x in others), sum(values[x][1] for x in others))))
    figure = _figure(figsize=(8, 1.2 + 0.34 * len(bars)), layout="constrained")
    axis: Any = figure.subplots()
    at = np.arange(len(bars))[::-1]
    for which, (color, height) in enumerate(((CAME, 0.86), (LEFT, 0.5))):
        axis.barh(at, [pair[which] for _, pair in bars], height, color=color, label=labels[which])
    axis.set_yticks(at, [name for name, _ in bars])
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    return figure, axis


def _short(name: str, most: int = 40) -> str:
    """The end of a long name, where paths differ; what cannot be drawn is left out."""
    plain = "".join(c if c.isprintable() else "?" for c in name.replace("$", r"\$"))
    return plain if len(plain) <= most else "…" + plain[1 - most :]


def clusters(sizes: Mapping[int, int]) -> bytes:
    """Clusters of duplicates by how many documents they have."""
    figure = _figure(figsize=(8, 3.2), layout="constrained")
    axis: Any = figure.subplots()
    axis.plot(list(sizes), list(sizes.values()), "o", color=LEFT)
    axis.set(xscale="log", yscale="log", xlabel="documents in a cluster", ylabel="clusters")
    axis.xaxis.set_major_formatter(lambda n, _: amount(n))
    axis.yaxis.set_major_formatter(lambda n, _: amount(n))
    axis.set_xlim(1.8, 1.3 * max(sizes, default=2))
    axis.set_ylim(0.7, 1.6 * max(sizes.values(), default=1))
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    return png(figure)
