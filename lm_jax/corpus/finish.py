"""The last stage: one ledger of all parts, the page about it, the tokenizer beside the shards, and the manifest, which
says that all of it is whole."""

from __future__ import annotations

import collections
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lm_jax import paths
from lm_jax.config import redact, to_dict
from lm_jax.corpus import duplicates, folders, report
from lm_jax.corpus.folders import Plan
from lm_jax.corpus.ledger import Ledger, by_size, merged
from lm_jax.data.joined import SHARDED
from lm_jax.data.store import MANIFEST, whole
from lm_jax.data.tokenizers import load
from lm_jax.errors import UserError

_SUMMED = ("documents", "dropped", "tokens", "targets", "bytes", "predicted_bytes")
_CLUSTERS, _MEMBERS = 6, 3  # that the page shows


def shard_names(plan: Plan) -> list[str | None]:
    """The name of each part's shard; None where nothing of the part is left."""
    kept = folders.read_record(plan.folder("duplicates", 0))[1]["told"]["kept"]
    names: list[str | None] = []
    for documents in kept:
        number = sum(name is not None for name in names)
        names.append(f"shard-{number:05d}" if documents else None)
    return names


def most_common_reasons(ledgers: Sequence[Ledger]) -> str:
    """What took most documents, in a line."""
    reasons = collections.Counter(
        {
            f"{reason} ({name})": documents
            for name, step in merged(ledgers).steps.items()
            for reason, documents, _ in by_size(step.dropped)
        }
    )
    listed = ", ".join(f"{n:,} {reason}" for reason, n in reasons.most_common(4))
    return f"left out: {listed}" if listed else "the sources are empty"


def finish(plan: Plan, stages: Sequence[str]) -> None:
    """Writes the report and, last, the manifest.

    Args:
      plan: of the work.
      stages: that have ended, in order.

    Raises:
      UserError: where a shard of the manifest is not there: the folder was tampered with.
    """
    records: dict[str, list[tuple[Ledger, dict[str, Any]]]] = {}
    for stage in stages:
        tasks = sorted((plan.work / stage).glob("part-*"))
        records[stage] = [folders.read_record(folder) for folder in tasks]
    shards = [told["told"] for _, told in records["shards"] if told["told"]["shard"]]
    manifest = _manifest(plan, shards)
    if not any(manifest["documents"].values()):
        lost = ", ".join(f"{n:,} {reason}" for reason, n in manifest["dropped"].items())
        raise UserError(f"no document is left: tokenising dropped {lost}\ngive other text, or another tokens.tokenizer")
    ledger = merged(ledger for found in records.values() for ledger, _ in found)
    _count_tokens(ledger, shards, manifest)
    ledger.check()
    found = report.Findings(
        ledger=ledger,
        manifest=manifest,
        config=redact(to_dict(plan.config)),
        files=_files(plan),
        clusters=_clusters(plan),
        tokenizer=records["tokenizer"][0][1]["told"],
        evaluation_sets=records["index"][0][1]["told"]["sets"] if "index" in records else {},
        compared=records["duplicates"][0][1]["told"],
        timings={stage: _timing([told for _, told in records[stage]]) for stage in stages},
        shards=[(shard["shard"], shard["manifest"]["documents"], shard["manifest"]["tokens"]) for shard in shards],
        sources=_sources(plan, [told["told"] for _, told in records["clean"]], shards),
    )
    for name, data in report.write(found).items():
        paths.write_bytes_atomic(paths.run_path(plan.out / name), data)
    load(plan.folder("tokenizer", 0)).save(plan.out)
    text = json.dumps(manifest, indent=1) + "\n"
    paths.write_text_atomic(paths.run_path(plan.out / MANIFEST), text)


def _manifest(plan: Plan, shards: Sequence[dict[str, Any]]) -> dict[str, Any]:
    names = [shard["shard"] for shard in shards]
    sums: dict[str, dict[str, int]] = {name: {} for name in _SUMMED}
    values = {"vocab_size": 0, "dtype": ""}
    for name in names:
        try:
            written = json.loads((plan.out / name / MANIFEST).read_bytes())
        except (OSError, ValueError) as error:
            raise UserError(
                f"{plan.out / name} is not whole: {error}\ndelete {plan.out} and prepare it again"
            ) from error
        for key, counts in sums.items():
            for side, n in written[key].items():
                counts[side] = counts.get(side, 0) + n
        values = {key: written[key] for key in values}
    return {"format": SHARDED, "shards": names, **sums, **values, "plan": plan.digest}


def sign(shard: Path, plan: Plan) -> None:
    """Adds to a shard's manifest which plan it is of."""
    manifest = json.loads((shard / MANIFEST).read_bytes()) | {"plan": plan.digest}
    (shard / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")


def is_shard_of(shard: Path, plan: Plan) -> bool:
    """Whether a shard that is there is whole.

    Raises:
      UserError: where it is of another plan.
    """
    if not whole(shard):
        return False
    if json.loads((shard / MANIFEST).read_bytes()).get("plan") != plan.digest:
        raise UserError(f"{shard} was made by another config or of other raw files\n{folders.REMEDY}")
    return True


def _count_tokens(ledger: Ledger, shards: Sequence[dict[str, Any]], manifest: dict[str, Any]) -> None:
    """The last step of the ledger, from what the shards' manifests say; tokens in are tokens out and dropped."""
    before = list(ledger.steps.values())[-1]
    step = ledger.step("tokenise")
    step.documents_in, step.bytes_in = before.documents_out, before.bytes_out
    step.documents_out = manifest["documents"]["train"] + manifest["documents"]["held_out"]
    step.bytes_out = sum(manifest["bytes"].values())
    reasons: collections.Counter[str] = collections.Counter()
    for shard in shards:
        reasons.update(shard["manifest"]["dropped"])
    gone = step.bytes_in - step.bytes_out
    for reason, documents in reasons.items():  # the bytes are known for all reasons together alone
        step.dropped[reason] = [documents, gone]
        gone = 0
    tokens = manifest["tokens"]
    if tokens["in"] != tokens["out"] + tokens["dropped"]:
        raise RuntimeError(f"{tokens['in']} tokens in, but {tokens['out']} out and {tokens['dropped']} dropped")


def _files(plan: Plan) -> dict[str, Any]:
    kinds: dict[str, list[int]] = {}
    for file in plan.files:
        counts = kinds.setdefault(file.kind, [0, 0])
        counts[0] += 1
        counts[1] += file.size
    return {"kinds": kinds, "ignored": plan.ignored, "parts": len(plan.parts)}


def _sources(plan: Plan, read: Sequence[dict[str, Any]], shards: Sequence[dict[str, Any]]) -> dict[str, report.Source]:
    """What came in of each source, and what the shards have of it."""

    def total(told: Sequence[dict[str, Any]], number: int, width: int) -> list[int]:
        found = [of["sources"].get(str(number), [0] * width) for of in told]
        return [sum(column) for column in zip(*found, strict=True)] or [0] * width

    return {
        name: report.Source(
            sum(file.source == number for file in plan.files), *total(read, number, 2), *total(shards, number, 3)
        )
        for number, name in enumerate(plan.config.raw.names)
    }


def _timing(told: Sequence[dict[str, Any]]) -> dict[str, float]:
    return {
        "tasks": len(told),
        "seconds": sum(t["seconds"] for t in told),
        "processor": sum(t["processor"] for t in told),
        "memory": max((t["memory"] for t in told), default=0),
    }


# ------------------------------------------------------------------------------------------------------------ clusters


def _clusters(plan: Plan) -> report.Clusters:
    """How large clusters of duplicates are, and some members of the largest."""
    folder = plan.folder("duplicates", 0)
    first, status = np.load(folder / "first.npy", mmap_mode="r"), np.load(folder / "status.npy", mmap_mode="r")
    repeats = np.flatnonzero(status != duplicates.KEPT)
    heads, counts = np.unique(np.asarray(first[repeats]), return_counts=True)
    sizes = counts + 1
    bins, documents = np.unique(sizes, return_counts=True)
    largest = np.argsort(-sizes, kind="stable")[:_CLUSTERS]
    wanted: dict[int, list[int]] = {}
    for head in heads[largest].tolist():
        members = repeats[np.asarray(first[repeats]) == head]
        near = members[np.asarray(status[members]) == duplicates.NEAR]  # more to be seen than in equal ones
        wanted[head] = [head, *np.concatenate([near, members])[: _MEMBERS - 1].tolist()]
    texts = _texts(plan, {number for members in wanted.values() for number in members})
    examples = [
        (int(size), [texts[number] for number in dict.fromkeys(wanted[head])])
        for head, size in zip(heads[largest].tolist(), sizes[largest].tolist(), strict=True)
    ]
    return report.Clusters(dict(zip(bins.tolist(), documents.tolist(), strict=True)), examples)


def _texts(plan: Plan, numbers: set[int]) -> dict[int, tuple[str, str]]:
    """Origin and beginning of documents, by their number in all parts."""
    found = {}
    offset = 0
    for task, array in enumerate(folders.arrays(plan, "sign", "sizes")):
        here = {number - offset for number in numbers if offset <= number < offset + len(array)}
        if here:
            last = max(here)
            for number, document in enumerate(folders.documents(plan.folder("sign", task))):
                if number in here:
                    found[number + offset] = (document.origin, document.text[: report.SHOWN])
                if number == last:
                    break
        offset += len(array)
    return found


def summary(manifest: dict[str, Any]) -> str:
    """What a folder of shards holds, in a line."""
    documents, tokens = manifest["documents"], manifest["tokens"]
    held = f"; held out {documents['held_out']:,} documents, {tokens['held_out']:,} tokens" * bool(
        documents["held_out"]
    )
    return (
        f"{len(manifest['shards'])} shards: {documents['train']:,} documents, {tokens['train']:,} tokens, "
        f"vocabulary {manifest['vocab_size']:,}{held}"
    )


def finished(plan: Plan) -> dict[str, Any] | None:
    """The manifest, where all is done. Where a shard is gone or damaged since, what has to be done again is removed.

    Raises:
      UserError: where the manifest is none of this plan's.
    """
    path = plan.out / MANIFEST
    try:
        with paths.storage_errors("read", path):
            manifest = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}\n{folders.REMEDY}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != SHARDED or not _has_all(manifest):
        raise UserError(f"{path} is not one that this command writes, or is damaged\n{folders.REMEDY}")
    if manifest.get("plan") != plan.digest:
        raise UserError(f"{path} was made by another config or of other raw files\n{folders.REMEDY}")
    lost = [name for name in manifest["shards"] if not is_shard_of(plan.out / name, plan)]
    if not lost:
        return manifest
    # The manifest last: killed in between, the next one sees the same and goes on.
    for folder in (*(plan.out / name for name in lost), plan.work / "shards", plan.work / "report"):
        if folder.exists():
            with paths.storage_errors("remove", folder):
                shutil.rmtree(folder)
    path.unlink()
    return None


def _has_all(manifest: dict[str, Any]) -> bool:
    names = manifest.get("shards")
    return (
        isinstance(names, list)
        and all(isinstance(name, str) and re.fullmatch(r"shard-\d+", name) for name in names)
        and all(isinstance(manifest.get(key), dict) for key in _SUMMED)
        and isinstance(manifest.get("vocab_size"), int)
    )
