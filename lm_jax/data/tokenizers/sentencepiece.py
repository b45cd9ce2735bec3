"""Tokenizers of sentencepiece: given models, and byte-pair models learnt from a text."""

from __future__ import annotations

import collections
import itertools
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from lm_jax.data.cache import digest
from lm_jax.data.tokenizers import model_file
from lm_jax.data.tokenizers.tokenizer import DESCRIPTION, Tokenizer, describe, ignore, refuse_surrogates, slabs
from lm_jax.errors import UserError

MODEL = "tokenizer.model"

PART = 2**12  # characters that are encoded at a time: three times as fast as whole files, for 1 token in 70,000 more
SENTENCE = 2000  # characters; what training sees at a time
SPACE = "▁"  # how sentencepiece writes a space: it cannot tell the two apart, so the character itself is spelt in bytes
_UNLEARNT = "\t\0▅" + SPACE  # characters that sentencepiece's trainer keeps for itself: spelt in bytes


_THREADS = os.cpu_count() or 1


class SentencePiece(Tokenizer):
    """A sentencepiece model (Kudo and Richardson 2018).

    The boundary is the model's end-of-sentence id, else its beginning-of-sentence id, else one more id after its last.
    A model that normalises text or has no bytes to fall back on does not give every text back: `exact` is False, and
    whoever encodes checks.
    """

    kind = "sentencepiece"
    exact = False

    def __init__(self, model: bytes, boundary: bool = True, *, exact_parts: bool = False) -> None:
        """Args:
          model: a `.model` file.
          boundary: whether there is an id for it.
          exact_parts: whether ids are those of the library for the whole text. Long texts are then cut only where no
            piece reaches over. Else after a line's end: 1 token in 70,000 more.

        Raises:
          UserError: where the bytes are no sentencepiece model.
        """
        import sentencepiece

        try:
            self.processor = sentencepiece.SentencePieceProcessor(model_proto=model)
            size = self.processor.vocab_size()
        except RuntimeError as error:
            raise UserError("is no sentencepiece model, or is damaged") from error
        if size == 0:
            raise UserError("is a sentencepiece model without a single piece")
        self.model = model
        ends = [i for i in (self.processor.eos_id(), self.processor.bos_id()) if i >= 0]
        self.boundary = (ends[0] if ends else size) if boundary else None
        self.vocab_size = size + (boundary and not ends)
        self.names_boundary = bool(ends)
        controls = [i for i in range(size) if self.processor.is_control(i)]
        self.special = {self.processor.id_to_piece(i): i for i in controls}
        self.exact_parts = exact_parts
        # Whether two parts of a text may be encoded one after the other: a model may put a space before each.
        self._splits = self.processor.decode(self.processor.encode("a") + self.processor.encode("b")) == "ab"
        # The bytes of the character that would come back as a space, where the model has bytes.
        pieces = [self.processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode("utf-8")]
        self._space = pieces if self._splits and all(self.processor.is_byte(i) for i in pieces) else None
        self.caveat = self._why_inexact(all(self.processor.is_byte(i) for i in pieces))
        # Pairs of characters that stand in a piece: between others a byte-pair model is cut without changing an id. A
        # unigram model is not cut: the library adds up scores in float32, which over a long text decides near ties.
        self._inside: set[str] = set()
        self._cuts = not exact_parts or (not self.caveat and model_file.model_type(model) == model_file.BPE)
        if exact_parts and self._cuts:
            texts = (self.processor.id_to_piece(i).replace(SPACE, " ") for i in range(size))
            self._inside = {a + b for text in texts for a, b in itertools.pairwise(text)}

    def _why_inexact(self, has_bytes: bool) -> str:
        if not has_bytes:
            return "it has no bytes to fall back on"
        if not self._splits:
            return "it puts a space in front"
        for text in ("  a  b  ", "\n", "ﬁ", "e\u0301"):
            if self.processor.decode(self.processor.encode(text)) != text:
                return f"it normalises text ({text!r} does not come back)"
        return ""

    def encode(self, text: str) -> np.ndarray:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str], advance: Callable[[int], None] = ignore) -> list[np.ndarray]:
        # The texts' parts, each with the number of its text, in slabs of even work for the threads.
        out: list[list[np.ndarray]] = [[] for _ in texts]
        for slab in slabs((i, part) for i, text in enumerate(texts) for part in self._parts(text)):
            encoded = self.processor.encode([part for _, part in slab], num_threads=_THREADS, out_type="numpy")
            for (i, part), ids in zip(slab, encoded, strict=True):
                out[i].append(np.array(self._space, np.int32) if self._space and part == SPACE else ids)
            advance(sum(len(part) for _, part in slab))
        return [np.concatenate(pieces, dtype=np.int32) if pieces else np.zeros(0, np.int32) for pieces in out]

    def _parts(self, text: str) -> Iterator[str]:
        """A text in parts of bounded size, cut after a line's end where there is one, and around each `SPACE`."""
        refuse_surrogates(text)
        if not self._splits:
            yield text
            return
        for run in re.split(f"({SPACE})", text) if self._space and SPACE in text else [text]:
            start = 0
            while self._cuts and len(run) - start > PART:
                end = (
                    self._cut(run, start)
                    if self.exact_parts
                    else run.rfind("\n", start, start + PART) + 1 or start + PART
                )
                yield run[start:end]
                start = end
            yield run[start:]

    def _cut(self, run: str, start: int) -> int:
        """The first place after `PART` characters where no piece reaches over; else the run's end."""
        places = range(start + PART, len(run))
        return next((end for end in places if run[end - 1 : end + 1] not in self._inside), len(run))

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self.processor.decode(self._text_ids(ids).tolist())

    def bytes_of(self, token: int) -> int:
        return 1 if self.processor.is_byte(token) else len(self.decode([token]).encode("utf-8"))

    def files(self) -> dict[str, bytes]:
        parts = {"parts": "exact"} if self.exact_parts else {}
        description = describe(kind=self.kind, boundary=self.boundary is not None, model=digest(self.model), **parts)
        return {DESCRIPTION: description, MODEL: self.model}


def train_sentencepiece(
    texts: Sequence[str], vocab_size: int, boundary: bool, special: Sequence[str] = ()
) -> SentencePiece:
    """A byte-pair model (Sennrich et al. 2016) of these texts that gives every text back exactly.

    No normalisation, no space put in front, every space and line end kept; what is not among its pieces is spelt in
    bytes. The same texts give the same model. A small text may not have `vocab_size` pieces in it: there are then
    fewer.

    Args:
      texts: the sample to learn from.
      vocab_size: how many ids, bytes and boundary included; at least 300.
      boundary: whether there is an id for it.
      special: further tokens, which no text spells.

    Raises:
      UserError: where there is nothing to learn from.
    """
    options: dict[str, Any] = {"control_symbols": list(special), "others": len(special)} if special else {}
    return SentencePiece(train_model(texts, vocab_size, "bpe", eos_id=1 if boundary else -1, **options), boundary)


def train_model(
    texts: Sequence[str],
    vocab_size: int,
    model_type: str,
    *,
    byte_fallback: bool = True,
    others: int = 0,
    **options: Any,
) -> bytes:
    """A `.model` without normalisation, every space and line end kept.

    Args:
      texts: the sample to learn from.
      vocab_size: how many ids; fewer where the texts have not so many pieces.
      model_type: "bpe" or "unigram".
      byte_fallback: whether what is not among its pieces is spelt in bytes; else it is unknown.
      others: how many of the ids `options` give to further symbols.
      options: more of the trainer's own.

    Raises:
      UserError: where there is nothing to learn from.
    """
    import sentencepiece

    model, given = _Writer(), (256 if byte_fallback else 0) + 2 + others
    settings: dict[str, Any] = dict(
        model_type=model_type,
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        character_coverage=1.0,  # `frequent_parts` has left the rare ones out
        byte_fallback=byte_fallback,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        max_sentence_length=8 * SENTENCE,  # bytes: none of ours is longer, for longer ones are skipped
        unk_id=0,
        bos_id=-1,
        pad_id=-1,
        num_threads=2,  # stands in the model's bytes, so a fixed number
        minloglevel=2,
    )
    parts = frequent_parts(texts, (vocab_size - given) // 2)
    try:
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=parts, model_writer=model, **settings | options)
    except RuntimeError as error:
        raise UserError(f"no sentencepiece vocabulary of {vocab_size} can be learnt from this text: {error}") from error
    return bytes(model.data)


class _Writer:
    """What the trainer writes the model into: it wants a file."""

    def __init__(self) -> None:
        self.data = b""

    def write(self, data: bytes) -> None:
        self.data += data


def frequent_parts(texts: Sequence[str], characters: int) -> Iterator[str]:
    """The texts in short parts, broken at characters that are to be spelt in bytes.

    Those are all but the commonest: the trainer gives an id to every character it sees, and a text in Chinese has more
    of them than a small vocabulary has ids.
    """
    counts: collections.Counter[str] = collections.Counter()
    for text in texts:
        counts.update(text)
    kept = {c for c, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:characters]} - set(_UNLEARNT)
    rare = "".join(sorted(set(counts) - kept))
    splitter = re.compile(f"[{re.escape(rare)}]+") if rare else None
    empty = True
    for text in texts:
        for part in splitter.split(text) if splitter else [text]:
            for start in range(0, len(part), SENTENCE):
                empty = False
                yield part[start : start + SENTENCE]
    if empty:
        raise UserError("the source has no text to learn a vocabulary from")
