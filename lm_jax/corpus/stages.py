"""The stages from raw files to shards, in the order in which they run.

Each is a function of the plan and a task's number that fills an empty folder; tasks of a stage know nothing of each
other, and whoever runs them (`local.py`, `cluster.py`) only sees to it that a stage begins when those before it have
ended. The work of a task that is done is never done again.

    index        (1)     the evaluation sets' runs of words
    clean        (parts) raw pieces -> documents; every rule
    lines        (1)     lines that many documents share
    sign         (parts) those lines out, contaminated documents out; hashes, signatures, bands
    duplicates   (1)     what repeats what; which documents are held out
    tokenizer    (1)     read, or learnt from the text that is left
    shards       (parts) token ids
    report       (1)     the ledger, the page, the manifest
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import re
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lm_jax.corpus import boilerplate, decontamination, duplicates, finish, folders, inputs, minhash, readers
from lm_jax.corpus import words as W
from lm_jax.corpus.config import PrepareConfig
from lm_jax.corpus.folders import Plan, Text
from lm_jax.corpus.ledger import Ledger
from lm_jax.corpus.rules import RULES, Document, Dropped
from lm_jax.data import tokenizers
from lm_jax.data.corpus import hold_out, text_hash, write_tokens
from lm_jax.data.opened import SAMPLE
from lm_jax.data.sources import Document as Sourced
from lm_jax.errors import UserError

Told = dict[str, Any]  # what a task tells beside its ledger


class Stage(NamedTuple):
    """A stage: what a task does, whether there is one task a part or one in all, and what a person reads."""

    run: Callable[[Plan, int, Path, Ledger], Told]
    per_part: bool
    doing: str


def run_task(out: Path, stage: str, task: int) -> float:
    """Does a task, unless it is done. Returns its seconds (0 if it was done).

    Raises:
      UserError: for raw files or settings that cannot be used.
      StorageError: where something cannot be read or written.
    """
    plan = folders.read_plan(out)
    final = plan.folder(stage, task)
    if final.is_dir():
        return 0.0
    start, processor = time.monotonic(), time.process_time()
    with folders.whole(final) as folder:
        ledger = Ledger()
        told = STAGES[stage].run(plan, task, folder, ledger)
        seconds = time.monotonic() - start
        spent = {"seconds": seconds, "processor": time.process_time() - processor, "memory": _peak_memory()}
        folders.write_record(folder, ledger, told=told, **spent)
    return seconds


def _peak_memory() -> int:
    """The most bytes that this process has held."""
    try:  # the other count begins, in a process that was started by another, with what that one held
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        found = None
    if found:
        return int(found[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def stages_of(plan: Plan) -> list[str]:
    """The stages that a config asks for, in order."""
    left_out = {"index"} if not plan.config.decontamination.sets else set()
    left_out |= {"lines"} if not plan.config.lines.max_documents else set()
    return [name for name in STAGES if name not in left_out]


def make_plan(out: Path, c: PrepareConfig) -> Plan:
    """The work that a config asks for, before any of it is begun.

    Raises:
      ConfigError: where something that is named is not there, or cannot be used.
    """
    given = _given(c)
    inputs.check_output(out, c.raw.names)
    found, ignored = inputs.find(c.raw.names)
    return Plan(out, c, found, inputs.parts(found, c.work.part_bytes), ignored, given)


def _given(c: PrepareConfig) -> dict[str, list[str]]:
    """By config key, what tells the files that are named but for the raw ones from others."""
    given = _sets(c)
    if c.tokens.tokenizer not in ("bytes", "sentencepiece"):
        given[_TOKENIZER] = [tokenizers.open_path(c.tokens.tokenizer, c.tokens.boundary, _TOKENIZER).fingerprint]
    return given


_TOKENIZER = "tokens.tokenizer"


def _sets(c: PrepareConfig) -> dict[str, list[str]]:
    """The files of the evaluation sets."""
    given = {}
    for name, source in c.decontamination.sets.items():
        key = f"decontamination.sets.{name}"
        files = decontamination.find(source, key)
        given[key] = [f"{file.path} ({file.size} bytes, written at {file.changed})" for file in files]
    return given


def tasks_of(plan: Plan, stage: str) -> int:
    return len(plan.parts) if STAGES[stage].per_part else 1


# --------------------------------------------------------------------------------------------------------------- index


def _index(plan: Plan, task: int, folder: Path, ledger: Ledger) -> Told:
    told = {"sets": decontamination.build(plan.config.decontamination, folder, plan.config.cleaning)}
    for key, files in _sets(plan.config).items():
        folders.check_given(key, plan.given.get(key), files, plan.out)
    return told


# --------------------------------------------------------------------------------------------------------------- clean


def _clean(plan: Plan, task: int, folder: Path, ledger: Ledger) -> Told:
    c = plan.config
    read = ledger.step("read")
    for name in c.cleaning.rules:  # in their order, also where no document comes so far
        ledger.step(name)
    lines, texts = [_NONE], [_NONE]
    sources: Counts = {}
    with folders.Documents(folder) as kept:
        for piece in plan.parts[task]:
            source = plan.known[piece.path].source
            for found in readers.read(piece, c.raw):
                if isinstance(found, readers.Broken):
                    read.drop(found.reason, found.size)
                    read.example(found.reason, found.origin, found.sample)
                    continue
                size = len(found.text.encode("utf-8"))
                read.keep(size, size)
                ledger.histogram("read").add(size, "")
                _add(sources, source, 1, size)
                if _apply_rules(found, size, plan, ledger):
                    document = Text(found.text, found.origin, found.language, source)
                    kept.write(document)
                    if c.lines.max_documents:
                        lines.append(np.unique(boilerplate.line_hashes(found.text, c.lines.min_characters)[1]))
                        digest = np.frombuffer(_digest(document)[:8], "<u8").astype(np.uint64)
                        texts.append(np.repeat(digest, len(lines[-1])))
    folders.check_unchanged(plan, task)
    if c.lines.max_documents:
        flat = np.concatenate(lines)
        order = np.argsort(flat, kind="stable")
        np.save(folder / "lines", flat[order])
        np.save(folder / "texts", np.concatenate(texts)[order])
    return {"sources": sources}


_NONE = np.zeros(0, np.uint64)
Counts = dict[int, list[int]]  # by source


def _add(counts: Counts, source: int, *more: int) -> None:
    counts[source] = [a + b for a, b in zip(counts.get(source, [0] * len(more)), more, strict=True)]


def _digest(document: Text) -> bytes:
    return hashlib.blake2b(document.data, digest_size=16).digest()


def _apply_rules(document: Document, size: int, plan: Plan, ledger: Ledger) -> bool:
    """Whether a document is kept; its text is then what the rules have made of it."""
    c = plan.config.cleaning
    for name in c.rules:
        step = ledger.step(name)
        document.pieces.clear()
        found = RULES[name](document, c)
        for piece, n in document.pieces.items():
            if n:
                step.pieces[piece] = step.pieces.get(piece, 0) + n
        if name == "language":
            ledger.histogram("identified").add(size, document.language)
        if isinstance(found, Dropped):
            step.drop(found.reason, size)
            step.example(found.reason, document.origin, document.text)
            return False
        if found == document.text:
            step.keep(size, size)
            continue
        if step.wants_example("changed"):
            step.example("changed", document.origin, document.text, found)
        after = len(found.encode("utf-8"))
        if not found.strip():
            step.drop("nothing is left", size)
            return False
        step.keep(size, after, changed=True)
        document.text, size = found, after
    return True


# --------------------------------------------------------------------------------------------------------------- lines


def _lines(plan: Plan, task: int, folder: Path, ledger: Ledger) -> Told:
    arrays = list(folders.arrays(plan, "clean", "lines"))
    texts = list(folders.arrays(plan, "clean", "texts"))
    found = boilerplate.frequent(arrays, texts, plan.config.lines.max_documents)
    np.save(folder / "frequent", found)
    return {"lines": int(sum(map(len, arrays))), "frequent": len(found)}


# ---------------------------------------------------------------------------------------------------------------- sign

BATCH, BATCH_CHARACTERS = 64, 2**20  # documents whose words are looked at in one call, and their characters


def _sign(plan: Plan, task: int, folder: Path, ledger: Ledger) -> Told:
    c = plan.config
    digests: list[bytes] = []
    hashes: list[int] = []
    sizes: list[int] = []
    signatures: list[np.ndarray] = []
    with folders.Documents(folder) as kept:
        for documents, words, offsets in _signed(plan, task, ledger):
            fresh = [_digest(document) for document in documents]
            for document in documents:
                kept.write(document)
                hash_, size = text_hash(document.text)
                hashes.append(hash_)
                sizes.append(size)
            digests += fresh
            if c.duplicates.near:
                flat, first = minhash.shingles_batch(words, offsets, c.duplicates.shingle)
                found = minhash.signatures_batch(flat, first, c.duplicates.permutations)
                for number in np.flatnonzero(np.diff(offsets) == 0).tolist():
                    # A text without words is like no other: its digest stands for its shingles.
                    alone = np.frombuffer(fresh[number], "<u8").astype(np.uint64)
                    found[number] = minhash.signatures([alone], c.duplicates.permutations)[0]
                signatures.append(found)
    np.save(folder / "digests", np.frombuffer(b"".join(digests), "<u8").reshape(-1, 2))
    np.save(folder / "hashes", np.array(hashes, np.uint64))
    np.save(folder / "sizes", np.array(sizes, np.int64))
    if c.duplicates.near:
        every = np.concatenate([np.zeros((0, c.duplicates.permutations), np.uint32), *signatures])
        np.save(folder / "signatures", every)
        np.save(folder / "bands", minhash.bands(every, c.duplicates.threshold))
    return {}


def _signed(plan: Plan, task: int, ledger: Ledger) -> Iterator[tuple[list[Text], np.ndarray, np.ndarray]]:
    """Documents of a part without frequent lines and without contaminated ones, in batches; and the hashes of their
    words, one text's behind another's, with the number of the first of each text."""
    c = plan.config
    frequent = index = None
    if c.lines.max_documents:
        ledger.step("shared_lines")
        frequent = np.load(plan.folder("lines", 0) / "frequent.npy")
    if c.decontamination.sets:
        ledger.step("decontamination")
        index = decontamination.load(plan.folder("index", 0), c.decontamination)
    documents: Iterator[Text] = folders.documents(plan.folder("clean", task))
    if frequent is not None:
        documents = (d for found in documents if (d := _without_lines(found, frequent, plan, ledger)) is not None)
    for batch in _batches(documents):
        words, offsets = W.normalised_batch([d.text for d in batch])
        if index is not None:
            slices = [slice(*pair) for pair in itertools.pairwise(offsets.tolist())]
            clean = [
                _is_clean(d, W.Words(*(a[s] for a in words)), index, ledger) for d, s in zip(batch, slices, strict=True)
            ]
            batch = [d for d, keep in zip(batch, clean, strict=True) if keep]
            hashes = [words.hashes[s] for s, keep in zip(slices, clean, strict=True) if keep]
            offsets = np.cumsum([0, *map(len, hashes)])
            yield batch, np.concatenate([np.zeros(0, np.uint64), *hashes]), offsets
        else:
            yield batch, words.hashes, offsets


def _batches(documents: Iterator[Text]) -> Iterator[list[Text]]:
    batch: list[Text] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if len(batch) == BATCH or size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _is_clean(document: Text, words: W.Words, index: decontamination.Index, ledger: Ledger) -> bool:
    """Whether a document has nothing in common with an evaluation set."""
    step, size = ledger.step("decontamination"), len(document.data)
    overlap = index.overlap(words.hashes)
    if overlap is None:
        step.keep(size, size)
        return True
    reason = f"overlaps {overlap[0]}"
    step.drop(reason, size)
    step.example(reason, document.origin, document.text[int(words.starts[overlap[1]]) :])
    return False


def _without_lines(document: Text, frequent: np.ndarray, plan: Plan, ledger: Ledger) -> Text | None:
    step, size = ledger.step("shared_lines"), len(document.data)
    text, gone = boilerplate.without(document.text, frequent, plan.config.lines.min_characters)
    if not gone:
        step.keep(size, size)
        return document
    step.pieces["lines that others share"] = step.pieces.get("lines that others share", 0) + gone
    if not text.strip():
        step.drop("nothing but lines that others share", size)
        step.example("nothing but lines that others share", document.origin, document.text)
        return None
    if step.wants_example("changed"):
        step.example("changed", document.origin, document.text, text)
    shorter = dataclasses.replace(document, text=text)
    step.keep(size, len(shorter.data), changed=True)
    return shorter


# ---------------------------------------------------------------------------------------------------------- duplicates


def _duplicates(plan: Plan, task: int, folder: Path, ledger: Ledger) -> Told:
    c = plan.config.duplicates
    near = list(folders.arrays(plan, "sign", "signatures")) if c.near else []
    found = duplicates.find(
        list(folders.arrays(plan, "sign", "digests")),
        list(folders.arrays(plan, "sign", "bands")) if c.near else [],
        near,
        exact=c.exact,
        near=c.near,
        threshold=c.threshold,
    )
    sizes = list(folders.arrays(plan, "sign", "sizes"))
    _count(found.status, np.concatenate(sizes), ledger, c.exact, c.near)
    kept = found.status == duplicates.KEPT
    if not kept.any():
        ledgers = [folders.read_record(plan.folder("clean", t))[0] for t in range(len(plan.parts))]
        raise UserError(f"no document is left\n{finish.most_common_reasons(ledgers)}")
    hashes = np.concatenate(list(folders.arrays(plan, "sign", "hashes")))
    held = np.zeros(len(hashes), bool)
    if plan.config.tokens.held_out > 0:
        try:
            held[kept] = hold_out(hashes[kept], plan.config.tokens.held_out, "what is left")
        except UserError as error:
            raise UserError(str(error).replace("data.held_out", "tokens.held_out")) from None
    np.save(folder / "status", found.status)
    np.save(folder / "held_out", held)
    np.save(folder / "first", found.first)
    lengths = [len(a) for a in sizes]
    counts = [int(part.sum()) for part in np.split(kept, np.cumsum(lengths)[:-1])]
    return {"kept": counts, "documents": lengths, "compared": found.compared, "alike": found.alike}


def _count(status: np.ndarray, sizes: np.ndarray, ledger: Ledger, exact: bool, near: bool) -> None:
    left = np.ones(len(status), bool)
    for name, code, reason in (
        ("exact_duplicates", duplicates.EXACT, "the same text as another"),
        ("near_duplicates", duplicates.NEAR, "nearly the text of another"),
    ):
        if not (exact if code == duplicates.EXACT else near):
            continue
        step = ledger.step(name)
        gone = left & (status == code)
        step.documents_in, step.bytes_in = int(left.sum()), int(sizes[left].sum())
        if gone.any():
            step.dropped[reason] = [int(gone.sum()), int(sizes[gone].sum())]
        left &= ~gone
        step.documents_out, step.bytes_out = int(left.sum()), int(sizes[left].sum())


def _ends(plan: Plan) -> np.ndarray:
    """How many documents there are up to the end of each part."""
    return np.cumsum(folders.read_record(plan.folder("duplicates", 0))[1]["told"]["documents"])


def _of_part(plan: Plan, name: str, task: int) -> np.ndarray:
    """Values of a part's documents, from what was written of all."""
    ends = _ends(plan)
    every = np.load(plan.folder("duplicates", 0) / f"{name}.npy", mmap_mode="r")
    return every[ends[task - 1] if task else 0 : ends[task]]


# ----------------------------------------------------------------------------------------------------------- tokenizer


def _tokenizer(plan: Plan, task: int, folder: Path, ledger: Ledger) -> Told:
    c = plan.config.tokens
    if c.tokenizer == "bytes":
        found: tokenizers.Tokenizer = tokenizers.Bytes(c.boundary)
    elif c.tokenizer == "sentencepiece":
        found = tokenizers.train_sentencepiece(_sample(plan), c.vocab_size, c.boundary)
    else:
        found = tokenizers.open_path(c.tokenizer, c.boundary, _TOKENIZER)
        folders.check_given(_TOKENIZER, plan.given.get(_TOKENIZER), [found.fingerprint], plan.out)
    found.save(folder)
    return {"files": sorted(found.files()), "vocab_size": found.vocab_size, "kind": found.kind, "caveat": found.caveat}


def _sample(plan: Plan) -> list[str]:
    """Documents that are kept and not held out, by the order of their hashes, up to `SAMPLE` bytes."""
    hashes = np.concatenate(list(folders.arrays(plan, "sign", "hashes")))
    sizes = np.concatenate(list(folders.arrays(plan, "sign", "sizes")))
    folder = plan.folder("duplicates", 0)
    usable = np.flatnonzero((np.load(folder / "status.npy") == duplicates.KEPT) & ~np.load(folder / "held_out.npy"))
    order = usable[np.argsort(hashes[usable], kind="stable")]
    before = np.cumsum(sizes[order]) - sizes[order]
    chosen = np.zeros(len(hashes), bool)
    chosen[order[before < SAMPLE]] = True
    texts = []
    for task, mask in enumerate(np.split(chosen, _ends(plan)[:-1])):
        if mask.any():
            documents = folders.documents(plan.folder("sign", task))
            texts += [d.text[:SAMPLE] for d, wanted in zip(documents, mask.tolist(), strict=True) if wanted]
    return texts


# -------------------------------------------------------------------------------------------------------------- shards


def _shards(plan: Plan, task: int, folder: Path, ledger: Ledger) -> Told:
    """The shard of a part, which stands in the output's folder and not in the task's."""
    name = finish.shard_names(plan)[task]
    if name is None:
        return {"shard": None}
    tokenizer = _load_tokenizer(plan.folder("tokenizer", 0))
    status, held = _of_part(plan, "status", task), _of_part(plan, "held_out", task)
    histogram = ledger.histogram("kept")
    came: list[tuple[int, int]] = []  # source and bytes of each entry
    sources: Counts = {}

    def entries() -> Iterator[tuple[Sourced, int, int]]:
        documents = folders.documents(plan.folder("sign", task))
        for document, code, side in zip(documents, status.tolist(), held.tolist(), strict=True):
            if code == duplicates.KEPT:
                histogram.add(len(document.data), document.language)
                came.append((document.source, len(document.data)))
                yield Sourced(document.text, document.origin), int(side), len(document.data)

    def wrote(place: int, tokens: int) -> None:
        source, size = came[place]
        _add(sources, source, 1, size, tokens)

    final = plan.out / name
    with folders.whole(final, lambda there: finish.is_shard_of(there, plan)) as shard:
        altered, key = plan.config.tokens.altered_documents, "tokens.altered_documents"
        manifest = write_tokens(entries(), tokenizer, shard, bad="drop", altered=altered, altered_key=key, wrote=wrote)
        finish.sign(shard, plan)
    return {"shard": name, "manifest": manifest, "sources": sources}


@functools.lru_cache(maxsize=1)
def _load_tokenizer(folder: Path) -> tokenizers.Tokenizer:
    return tokenizers.load(folder)


# -------------------------------------------------------------------------------------------------------------- report


def _report(plan: Plan, task: int, folder: Path, ledger: Ledger) -> Told:
    finish.finish(plan, stages_of(plan)[:-1])
    return {}


STAGES: dict[str, Stage] = {
    "index": Stage(_index, False, "reading evaluation sets"),
    "clean": Stage(_clean, True, "cleaning"),
    "lines": Stage(_lines, False, "finding shared lines"),
    "sign": Stage(_sign, True, "signing"),
    "duplicates": Stage(_duplicates, False, "finding duplicates"),
    "tokenizer": Stage(_tokenizer, False, "making the tokenizer"),
    "shards": Stage(_shards, True, "tokenising"),
    "report": Stage(_report, False, "writing the report"),
}
