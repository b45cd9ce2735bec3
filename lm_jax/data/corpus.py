"""From a source's documents to a store: what is held out, what a tokenizer learns from, and tokens counted in and
out."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lm_jax.data.progress import Progress
from lm_jax.data.sources import Document, Files, Policy, Reader
from lm_jax.data.store import Writer
from lm_jax.data.tokenizers import Tokenizer
from lm_jax.data.tokenizers.tokenizer import ignore
from lm_jax.errors import UserError

SIDES = ("train", "held_out", "test")
BATCH = 2**21  # characters that are encoded before they are written


class Corpus:
    """The documents of a source, surveyed once: which there are, and which are held out.

    A document is held out by a hash of its text, so it stays on its side when others come and go. Of a source with a
    single document the end of the text is held out; its two parts then count as two documents.

    Attributes:
      sizes: `[documents]` int64, bytes of UTF-8.
      held_out, test: `[documents]` bool.
      length: characters in all.
      dropped: how many things in the source were left out, by reason.
    """

    def __init__(self, files: Files, policy: Policy, share: float, test: float = 0.0) -> None:
        """Args: the files, how documents are taken from them, and the shares to hold out and to keep for a test.

        Raises:
          UserError: where there is no text, or what there is cannot be divided.
        """
        self.files, self.policy = files, policy
        reader = Reader(files, policy)
        found = []
        with Progress("reading documents", sum(p.stat().st_size for p in files.paths if p.exists())) as progress:
            for document in reader:
                found.append((text_hash(document.text), len(document.text)))
                progress.advance(found[-1][0][1])
        self._hashes = np.array([h for (h, _), _ in found], np.uint64)
        self.sizes = np.array([size for (_, size), _ in found], np.int64)
        self.length = sum(characters for _, characters in found)
        self.dropped = dict(reader.dropped)
        if not len(self._hashes):
            reasons = ", ".join(f"{n} {reason}" for reason, n in self.dropped.items())
            raise UserError(f"{files.label} has no text" + (f": left out were {reasons}" if reasons else ""))
        self._cut = 0  # characters before the part held out of a single document
        self.held_out = np.zeros(len(self._hashes), bool)
        if share > 0 and len(self._hashes) == 1:
            self._divide(share)
        elif share > 0:
            self.held_out = hold_out(self._hashes, share, files.label)
        self.test = np.zeros_like(self.held_out)
        if test > 0:
            self.test = self._keep(test)

    def _keep(self, share: float) -> np.ndarray:
        """Which documents are for the test: those whose hash is in the highest `share` of all hashes."""
        kept = self._hashes > np.uint64(2**64 - 1 - int(share * 2**64))
        if self._cut or not kept.any() or (kept | self.held_out).all():
            raise UserError(
                f"{self.files.label}: its {len(self._hashes)} documents are too few to keep {share:g} of them for a "
                "test\nset data.test=0, or add text"
            )
        return kept & ~self.held_out

    def _divide(self, share: float) -> None:
        (document,) = Reader(self.files, self.policy)
        self._cut = int(len(document.text) * (1 - share))
        sizes = [len(part.encode("utf-8")) for part in (document.text[: self._cut], document.text[self._cut :])]
        if 0 in sizes:
            raise UserError(
                f"{document.origin}: its {len(document.text)} characters are too few to hold {share:g} of them out"
            )
        self.sizes, self.held_out = np.array(sizes, np.int64), np.array([False, True])

    def __iter__(self) -> Iterator[Document]:
        """The documents in the order of `sizes` and `held_out`.

        Raises:
          UserError: where a file is no longer what was surveyed.
        """
        count = 0
        for document in Reader(self.files, self.policy):
            if count >= len(self._hashes) or text_hash(document.text)[0] != self._hashes[count]:
                raise UserError(
                    f"{document.origin}: changed while it was being read\nstart again when nothing writes to it"
                )
            count += 1
            if self._cut:
                prompt = document.prompt
                yield Document(document.text[: self._cut], document.origin, min(prompt, self._cut))
                yield Document(document.text[self._cut :], document.origin, max(prompt - self._cut, 0))
            else:
                yield document
        if count != len(self._hashes):
            raise UserError(
                f"{self.files.label}: changed while it was being read\nstart again when nothing writes to it"
            )

    def sample(self, limit: int) -> list[str]:
        """Documents to learn a vocabulary from: some that are not held out, by the order of their hashes.

        Args:
          limit: bytes from which on no more are taken; characters that are taken of any one document.
        """
        if self._cut:
            return [next(iter(self)).text[:limit]]
        order = np.argsort(self._hashes, kind="stable")
        order = order[~(self.held_out | self.test)[order]]
        before = np.cumsum(self.sizes[order]) - self.sizes[order]
        chosen = set(order[before < limit].tolist())
        return [d.text[:limit] for i, d in enumerate(self) if i in chosen]

    def characters(self) -> set[str]:
        """Every character of the source, held-out text included: without an id none of it could be scored."""
        found: set[str] = set()
        for document in self:
            found.update(document.text)
        return found


def text_hash(text: str) -> tuple[int, int]:
    """A text's hash, 64 bits, and its size in bytes."""
    data = text.encode("utf-8")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little"), len(data)


def hold_out(hashes: np.ndarray, share: float, label: str = "the source") -> np.ndarray:
    """Which documents are held out `[documents]` bool: those whose hash is in the lowest `share` of all hashes.

    Equal texts are on the same side. Where chance leaves a side empty, the lowest hash is held out, or all but the
    highest.

    Raises:
      UserError: where all documents are the same text.
    """
    held = hashes < np.uint64(int(share * 2**64))
    if not held.any():
        held = hashes == hashes.min()
    if held.all():
        held = hashes != hashes.max()
    if not held.any():
        raise UserError(
            f"{label}: its {len(hashes)} documents are all the same text\nset data.held_out=0 to hold none out"
        )
    return held


# ----------------------------------------------------------------------------------------------------------- tokenising


ALTERED_KEY = "data.altered_documents"


@dataclasses.dataclass
class _Job:
    """What has been written, and what happened to documents and tokens. Tokens out are counted by the writer."""

    writer: Writer
    bad: str  # refuse or drop
    refuse_altered: bool
    altered_key: str  # the config key that says so
    dropped: collections.Counter[str]
    wrote: Callable[[int, int], None] | None
    entries: int = 0  # that have been looked at
    sides: list[int] = dataclasses.field(default_factory=list)  # of the documents that were written, in `SIDES`
    bytes: list[int] = dataclasses.field(default_factory=list)
    predicted_bytes: list[int] = dataclasses.field(default_factory=list)
    prompts: list[int] = dataclasses.field(default_factory=list)  # tokens of each document that are its prompt
    tokens_in: int = 0
    tokens_dropped: int = 0
    altered: int = 0
    first_altered: str = ""

    def drop(self, reason: str, tokens: int) -> None:
        self.dropped[reason] += 1
        self.tokens_dropped += tokens


def tokenise(corpus: Corpus, tokenizer: Tokenizer, directory: Path, *, altered: str = "accept") -> None:
    """Writes every document's ids, a boundary before and after each where the tokenizer has one, as a store.

    Args:
      corpus: the documents.
      tokenizer: what makes ids of them.
      directory: of the store.
      altered: "refuse" stops at the first document that the ids do not give back, "accept" counts them.

    Raises:
      UserError: names the file of a text that the tokenizer cannot encode, or does not give back.
    """
    with Progress("tokenising", corpus.length) as progress:
        sides = np.where(corpus.test, 2, corpus.held_out.astype(int)).tolist()
        write_tokens(
            zip(corpus, sides, corpus.sizes.tolist(), strict=True),
            tokenizer,
            directory,
            bad=corpus.policy.bad,
            altered=altered,
            dropped=corpus.dropped,
            with_test=bool(corpus.test.any()),
            advance=progress.advance,
        )
    tokenizer.save(directory)


Entry = tuple[Document, int, int]  # a document, its side in `SIDES`, its size in bytes


def write_tokens(
    entries: Iterable[Entry],
    tokenizer: Tokenizer,
    directory: Path,
    *,
    bad: str,
    altered: str,
    altered_key: str = ALTERED_KEY,
    dropped: Mapping[str, int] = types.MappingProxyType({}),
    with_test: bool = False,
    advance: Callable[[int], None] = ignore,
    wrote: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Writes the ids of documents as a store, without the tokenizer's own files.

    Args:
      entries: the documents.
      tokenizer: what makes ids of them.
      directory: of the store.
      bad: "refuse" or "drop" for a document that spells the boundary.
      altered: "refuse" stops at the first document that the ids do not give back, "accept" counts them.
      altered_key: the config key that says so, for messages.
      dropped: what was left out before, by reason.
      with_test: whether the store tells which documents are on the side "test".
      advance: is told how many more characters are done.
      wrote: is told, of each document that is written, its place among the entries and its tokens.

    Returns:
      What the manifest says of documents, tokens and bytes.

    Raises:
      UserError: names the origin of a text that the tokenizer cannot encode, or does not give back.
    """
    writer = Writer(directory, tokenizer.vocab_size)
    job = _Job(writer, bad, altered == "refuse", altered_key, collections.Counter(dropped), wrote)
    for batch in _batches(entries):
        _tokenise_batch(batch, _encode(batch, tokenizer, advance), tokenizer, job)
    manifest = _manifest(job)
    sides, prompts = np.array(job.sides, np.int8), np.array(job.prompts, np.int64)
    writer.finish(
        sides == 1, manifest, test=sides == 2 if with_test else None, prompts=prompts if prompts.any() else None
    )
    return manifest


def _batches(documents: Iterable[Entry]) -> Iterator[list[Entry]]:
    batch: list[Entry] = []
    size = 0
    for entry in documents:
        batch.append(entry)
        size += len(entry[0].text)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _tokenise_batch(batch: list[Entry], encoded: list[list[np.ndarray]], tokenizer: Tokenizer, job: _Job) -> None:
    edge = [] if tokenizer.boundary is None else [np.array([tokenizer.boundary], np.int32)]
    for (document, side, size), parts in zip(batch, encoded, strict=True):
        inner = np.concatenate(parts)
        ids = np.concatenate([*edge, inner, *edge])
        place, job.entries = job.entries, job.entries + 1
        job.tokens_in += len(ids)
        if edge and (inner == tokenizer.boundary).any():
            if job.bad == "refuse":
                raise UserError(
                    f"{document.origin}: spells the token that the tokenizer has for a document's boundary\n"
                    'mend it, or set data.bad_documents="drop" to leave such out and count them'
                )
            job.drop("spells the boundary", len(ids))
        elif len(ids) < 2:
            job.drop("fewer than two tokens", len(ids))
        else:
            job.writer.write(ids)
            job.sides.append(side)
            job.bytes.append(size)
            if job.wrote is not None:
                job.wrote(place, len(ids))
            job.prompts.append(len(edge) + len(parts[0]) if document.prompt else 0)
            # Without a boundary nothing predicts the first token: its bytes do not count in bits per byte.
            first = 0 if edge or document.prompt else tokenizer.bytes_of(int(ids[0]))
            job.predicted_bytes.append(size - len(document.text[: document.prompt].encode("utf-8")) - first)
            if not tokenizer.exact and (back := tokenizer.decode(inner)) != document.text:
                difference = first_difference(document.text, back)
                if job.refuse_altered:
                    raise altered_document(document.origin, difference, job.altered_key)
                job.altered += 1
                job.first_altered = job.first_altered or f"{document.origin}: {difference}"


def first_difference(text: str, back: str) -> str:
    """Where what came back is first another text than the one that was encoded."""
    pairs = enumerate(zip(text, back, strict=False))
    at = next((i for i, (a, b) in pairs if a != b), min(len(text), len(back)))
    there, instead = text[at : at + 12], back[at : at + 12]
    return f"character {at:,}, {there!r}, comes back as {instead!r}"


def altered_document(origin: str, difference: str, key: str = ALTERED_KEY) -> UserError:
    """What is said of a text that a tokenizer does not give back; `key` is the config key that accepts it."""
    return UserError(
        f"{origin}: the tokenizer does not give the text back: {difference}\n"
        "use a tokenizer that does (byte-level, or with byte fallback and without normalisation), or set\n"
        f'{key}="accept" to train on such text and count it'
    )


def _encode(batch: list[Entry], tokenizer: Tokenizer, advance: Callable[[int], None]) -> list[list[np.ndarray]]:
    """The ids of each document: of its prompt, where it has one, and of the rest, so that no token lies across."""
    texts = []
    for document, _, _ in batch:
        texts += [document.text[: document.prompt]] * bool(document.prompt) + [document.text[document.prompt :]]
    try:
        encoded = iter(tokenizer.encode_batch(texts, advance))
        return [[next(encoded) for _ in range(1 + bool(document.prompt))] for document, _, _ in batch]
    except UserError:
        for document, _, _ in batch:  # whose text was it?
            try:
                tokenizer.encode(document.text)
            except UserError as error:
                raise UserError(f"{document.origin}: {error}") from None
        raise


def _manifest(job: _Job) -> dict[str, Any]:
    lengths, where = np.array(job.writer.lengths, np.int64), np.array(job.sides, np.int8)
    out = int(lengths.sum())
    if job.tokens_in != out + job.tokens_dropped:
        raise RuntimeError(f"{job.tokens_in} tokens in, but {out} out and {job.tokens_dropped} dropped")
    sides = {side: where == i for i, side in enumerate(SIDES) if i < 2 or (where == i).any()}

    def by_side(values: np.ndarray | list[int]) -> dict[str, int]:
        return {side: int(np.asarray(values, np.int64)[mask].sum()) for side, mask in sides.items()}

    return {
        **({"altered": job.first_altered} if job.altered else {}),
        "format": 1,
        "documents": {**{side: int(mask.sum()) for side, mask in sides.items()}, "altered": job.altered},
        "dropped": dict(sorted(job.dropped.items())),
        "tokens": {"in": job.tokens_in, "out": out, "dropped": job.tokens_dropped, **by_side(lengths)},
        "targets": by_side(lengths - np.maximum(job.prompts, 1)),  # the loss counts no prompt
        "bytes": by_side(job.bytes),
        "predicted_bytes": by_side(job.predicted_bytes),
    }
