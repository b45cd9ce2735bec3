"""From a `DataConfig` to rows: the one way that training and evaluation get their text."""

from __future__ import annotations

import dataclasses
import difflib
import json
import sys
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lm_jax.data import cache, tokenizers
from lm_jax.data.corpus import Corpus, altered_document, tokenise
from lm_jax.data.packing import PACKINGS, Plan
from lm_jax.data.sources import EMBEDDED, SUFFIXES, Files, Policy, find_files
from lm_jax.data.store import Store, whole
from lm_jax.data.tokenizers import Tokenizer
from lm_jax.errors import ConfigError, UserError

FORMAT = 1  # of what a cache entry holds: another number makes entries anew
SAMPLE = 8 * 2**20  # bytes that a vocabulary is learnt from: 2 s for 4,096 pieces on two cores (x86)
SMALLEST_VOCABULARY = 300  # 256 bytes, unknown, boundary, and some characters


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What a model reads.

    Attributes:
      source: a file, a directory or a glob of `.txt`, `.jsonl` and `.parquet` files, or several; or "python", the
        embedded default: the source text of the running interpreter's own standard library (`./python` is a folder of
        that name).
      field: the field of a `.jsonl` line, or the column of a `.parquet` file, that holds the text.
      tokenizer: "bytes"; "characters" (those of the source); "sentencepiece" (learnt from the source on first use);
        or the path of one that is there already: a folder that launch.train_tokenizer wrote, a `.model` file of
        sentencepiece, a `tokenizer.json` of Hugging Face, a `.tiktoken` file.
      vocab_size: ids of a "sentencepiece" tokenizer; the others have their own.
      boundary: whether a boundary token stands before and after every document.
      held_out: the share of documents that is never trained on, by a stable hash of their text; of a source with a
        single document, the last such share of its characters.
      packing: how documents share rows: "split" cuts the text of all of them into rows; "best_fit" and "first_fit" cut
        no document that fits a row, at the price of some padding.
      truncate: whether a document that is longer than a row is cut short instead of going on in another row; with
        "best_fit" and "first_fit".
      max_epochs: the most passes over the source that a run may ask for.
      bad_documents: "refuse" stops at what cannot be a document (bad UTF-8, a broken line, no text in the field, too
        large), "drop" leaves it out and counts it.
      altered_documents: what is done with a document that the tokenizer does not give back unchanged: "refuse" stops at
        the first, "accept" counts them.
      max_document_bytes: the largest document; a document is encoded in memory, in some 15 times its size.
      cache: where tokenizers and tokens are kept; None is $LM_JAX_CACHE, else ~/.cache/lm_jax.
      threads: threads that read rows.
    """

    source: str | tuple[str, ...] = EMBEDDED
    field: str = "text"
    tokenizer: str = "sentencepiece"
    vocab_size: int = 4096
    boundary: bool = True
    held_out: float = 0.1
    packing: str = "split"
    truncate: bool = False
    max_epochs: int = 8
    bad_documents: Literal["refuse", "drop"] = "refuse"
    altered_documents: Literal["refuse", "accept"] = "refuse"
    max_document_bytes: int = 2**28
    cache: str | None = None
    threads: int = 2

    def __post_init__(self) -> None:
        names = (self.source,) if isinstance(self.source, str) else self.source
        if not names or not all(names):
            raise ConfigError("data.source", "is empty", f'give a file, a directory or a glob, or "{EMBEDDED}"')
        if not self.field:
            raise ConfigError("data.field", "is empty", 'give the field that holds the text, such as "text"')
        if self.tokenizer not in tokenizers.NAMES and not tokenizers.is_path(self.tokenizer):
            near = difflib.get_close_matches(self.tokenizer, tokenizers.NAMES, n=1)
            known = f"give {', '.join(tokenizers.NAMES)} or the path of a tokenizer"
            raise ConfigError(
                "data.tokenizer", f"{self.tokenizer!r} is unknown", f"did you mean {near[0]}?" if near else known
            )
        if self.tokenizer == "sentencepiece" and not SMALLEST_VOCABULARY <= self.vocab_size <= 2**20:
            remedy = f"give {SMALLEST_VOCABULARY} to {2**20}: 256 are for bytes"
            raise ConfigError("data.vocab_size", f"{self.vocab_size} is no size of a vocabulary", remedy)
        if not 0 <= self.held_out <= 0.5:  # false for NaN
            raise ConfigError("data.held_out", f"{self.held_out} is no share to hold out", "give 0 (none) to 0.5")
        if self.packing not in PACKINGS:
            near = difflib.get_close_matches(self.packing, PACKINGS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"give one of {', '.join(PACKINGS)}"
            raise ConfigError("data.packing", f"{self.packing!r} is unknown", hint)
        if self.truncate and self.packing == "split":
            problem = 'goes with data.packing = "best_fit" or "first_fit": "split" leaves nothing out'
            raise ConfigError("data.truncate", problem)
        if self.bad_documents not in ("refuse", "drop"):
            raise ConfigError("data.bad_documents", f"{self.bad_documents!r} is unknown", "give refuse or drop")
        if self.altered_documents not in ("refuse", "accept"):
            raise ConfigError(
                "data.altered_documents", f"{self.altered_documents!r} is unknown", "give refuse or accept"
            )
        for name in ("max_epochs", "max_document_bytes", "threads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"data.{name}", f"{getattr(self, name)} is too small", "give 1 or more")

    @property
    def policy(self) -> Policy:
        return Policy(self.field, self.bad_documents, self.max_document_bytes)


@dataclasses.dataclass(frozen=True)
class TextSet:
    """Some text in rows.

    Attributes:
      store: its tokens.
      plan: its rows; one pass over them is `plan.rows_per_epoch`.
      bytes_per_target: bytes of UTF-8 for each target, for bits per byte: loss / ln 2 / bytes_per_target.
    """

    store: Store
    plan: Plan
    bytes_per_target: float


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A source, ready to train on.

    Attributes:
      tokenizer: what made the tokens; `tokenizer.vocab_size` is the smallest vocabulary of a model for them.
      train: rows in random order, epoch after epoch.
      held_out: rows in order, or None where `data.held_out` is 0.
      data: a fingerprint of the tokens: source, tokenizer, settings.
      description: a line for a person.
      notes: more lines: what was dropped, passed over or altered. Show them.
    """

    config: DataConfig
    tokenizer: Tokenizer
    train: TextSet
    held_out: TextSet | None
    data: str
    description: str
    notes: tuple[str, ...]

    @property
    def fingerprint(self) -> str:
        """Of what row `n` is: `data`, the rows' length, and the seed."""
        return self.train.plan.fingerprint

    def check_epochs(self, rows: int) -> None:
        """Refuses a run that would read its source too often.

        Args:
          rows: all rows that the run will have consumed: steps times batch size.

        Raises:
          ConfigError: names how many passes that is.
        """
        plan, most = self.train.plan, self.config.max_epochs
        if rows > most * plan.rows_per_epoch:
            passes = rows / plan.rows_per_epoch
            raise ConfigError(
                "data.max_epochs",
                f"the run asks for {passes:.1f} passes over the source's {plan.pairs:,} tokens; {most} are allowed",
                f"train on {most * plan.pairs:,} tokens or fewer, add text (data.source), or raise data.max_epochs",
            )


def prepare(config: DataConfig, *, length: int, seed: int) -> Prepared:
    """Tokenises a source, or finds it in the cache, and plans its rows.

    Args:
      config: what to read.
      length: tokens a row.
      seed: of the order of documents and rows.

    Raises:
      UserError: for a source that cannot be used; says which file and line.
    """
    files = find_files(config.source)
    directory = _entry(config, files, config.held_out, None)
    store, tokenizer = Store(directory), tokenizers.load(directory)
    _check_altered(store.manifest, config, files.label)
    held = _text_set(store, "held_out", length, None, files.label) if config.held_out > 0 else None
    train = _text_set(store, "train", length, seed, files.label, config)
    return Prepared(
        config=config,
        tokenizer=tokenizer,
        train=train,
        held_out=held,
        data=directory.name,
        description=_describe(files.label, store.manifest, tokenizer),
        notes=(*_notes(store.manifest, files.ignored, tokenizer, config), *_packed(train.plan)),
    )


def prepare_evaluation(
    config: DataConfig, tokenizer: Tokenizer, source: str | tuple[str, ...], *, length: int, key: str = "data.source"
) -> TextSet:
    """All of another text, in order, in the ids of a tokenizer that is there already.

    Args:
      config: how text is read; its source, tokenizer and `held_out` do not count.
      tokenizer: of the model that is evaluated.
      source: as in `DataConfig`.
      length: tokens a row.
      key: the config key that messages about the source name.

    Raises:
      UserError: for a source that cannot be used, and for text that the tokenizer cannot encode.
    """
    files = find_files(source, key)
    store = Store(_entry(config, files, 0.0, tokenizer))
    _check_altered(store.manifest, config, files.label)
    for note in _notes(store.manifest, files.ignored, tokenizer, None):
        print(f"{files.label}: {note}", file=sys.stderr)
    return _text_set(store, "train", length, None, files.label)


# ----------------------------------------------------------------------------------------------------------- the cache


def _entry(config: DataConfig, files: Files, share: float, tokenizer: Tokenizer | None) -> Path:
    """The cache entry of some files, its name a hash of all that decides its content; built where it is not there.

    Args:
      share: of the documents, to hold out.
      tokenizer: None for the one that the config asks for.
    """
    root = cache.cache_root(config.cache)
    contents = cache.content_hashes(files.paths, root)
    if tokenizer is None and config.tokenizer not in tokenizers.NAMES:
        tokenizer = tokenizers.open_path(config.tokenizer, config.boundary)
    trained = config.vocab_size if config.tokenizer == "sentencepiece" else None
    settings = {
        "format": FORMAT,
        "contents": [f"{path.suffix.lower()} {h}" for path, h in zip(files.paths, contents, strict=True)],
        "policy": dataclasses.asdict(config.policy),
        "held_out": share,
        "tokenizer": tokenizer.fingerprint if tokenizer else [config.tokenizer, config.boundary, trained],
    }

    def build(directory: Path) -> None:
        corpus = Corpus(files, config.policy, share)
        tokenise(corpus, tokenizer or _learn(config, corpus), directory, altered=config.altered_documents)

    return cache.entry(root, cache.digest(json.dumps(settings, sort_keys=True)), build, whole)


def _check_altered(manifest: dict[str, Any], config: DataConfig, label: str) -> None:
    """Refuses tokens that were made while altered documents were accepted, where they are not."""
    if config.altered_documents == "refuse" and manifest["documents"]["altered"]:
        raise altered_document(label, manifest.get("altered", "some document does not come back"))


def _learn(config: DataConfig, corpus: Corpus) -> Tokenizer:
    if config.tokenizer == "bytes":
        return tokenizers.Bytes(config.boundary)
    if config.tokenizer == "characters":
        return tokenizers.Characters(corpus.characters(), config.boundary)
    return tokenizers.train_sentencepiece(corpus.sample(SAMPLE), config.vocab_size, config.boundary)


def _text_set(
    store: Store, side: str, length: int, seed: int | None, label: str, config: DataConfig | None = None
) -> TextSet:
    """Rows of a side of a store, packed as the config says; without one, as evaluation wants them: all of the text."""
    documents = np.flatnonzero(store.held_out if side == "held_out" else ~store.held_out)
    packed: dict[str, Any] = {"packing": config.packing, "truncate": config.truncate} if config else {}
    lengths, content = store.lengths[documents], store.directory.name
    try:
        plan = Plan(documents, lengths, length=length, seed=seed, content=content, **packed)
    except UserError as error:
        what = "what is held out" if side == "held_out" else "the text"
        raise UserError(f"{label}: {what} is too short: {error}") from None
    return TextSet(store, plan, store.manifest["predicted_bytes"][side] / store.manifest["targets"][side])


# ------------------------------------------------------------------------------------------------------- for the reader


def _describe(label: str, manifest: dict[str, Any], tokenizer: Tokenizer) -> str:
    documents, tokens = manifest["documents"], manifest["tokens"]
    line = (
        f"{_amount(sum(manifest['bytes'].values()))}B of {label}: {_count(documents['train'], 'document')}, "
        f"{_amount(tokens['train'])}tokens, vocabulary {tokenizer.vocab_size:,} ({tokenizer.kind})"
    )
    if documents["held_out"]:
        line += f"; held out {_count(documents['held_out'], 'document')}, {_amount(tokens['held_out'])}tokens"
    return line


def _notes(manifest: dict[str, Any], ignored: int, tokenizer: Tokenizer, config: DataConfig | None) -> tuple[str, ...]:
    notes = []
    if manifest["dropped"]:
        reasons = ", ".join(f"{n:,} {reason}" for reason, n in manifest["dropped"].items())
        notes.append(f"left out: {reasons}")
    if ignored:
        notes.append(f"passed over {_count(ignored, 'file')} of other kinds than {', '.join(SUFFIXES)}")
    if altered := manifest["documents"]["altered"]:
        notes.append(
            f"the tokenizer does not give {_count(altered, 'document')} back unchanged; "
            "bits per byte count the original bytes"
        )
    if config and config.tokenizer not in tokenizers.NAMES and tokenizer.caveat:
        notes.append(f"{config.tokenizer} may alter text: {tokenizer.caveat}")
    if config and config.tokenizer == "sentencepiece" and tokenizer.vocab_size < config.vocab_size:
        notes.append(
            f"the text is too small for {config.vocab_size:,} pieces: the vocabulary is {tokenizer.vocab_size:,}"
        )
    return tuple(notes)


def _packed(plan: Plan) -> list[str]:
    if plan.packing == "split":
        return []
    share = plan.pairs / (plan.rows_per_epoch * plan.length)
    notes = [f"packed by {plan.packing}: {_count(plan.rows_per_epoch, 'row')} an epoch, {share:.1%} full"]
    if plan.left_out:
        total = plan.pairs + plan.left_out
        notes.append(f"truncated: {plan.left_out:,} of {total:,} tokens are beyond their row and never trained on")
    return notes


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun}" + ("" if n == 1 else "s")


def _amount(n: int) -> str:
    """A number with what goes before its unit: "12.3 M"."""
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if n >= size:
            return f"{n / size:.1f} {unit}"
    return f"{n} "
