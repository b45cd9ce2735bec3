"""Vocabularies learnt from text: byte-pair and unigram pieces by sentencepiece, byte-level BPE and WordPiece by
Hugging Face's library. The same texts and settings give the same tokenizer."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from lm_jax.data.tokenizers.huggingface import ALPHABET, HuggingFace, library
from lm_jax.data.tokenizers.sentencepiece import SPACE, SentencePiece, frequent_parts, train_model
from lm_jax.data.tokenizers.tokenizer import Tokenizer
from lm_jax.errors import UserError

KINDS = ("bpe", "unigram", "byte_bpe", "wordpiece")
END = "<|endoftext|>"  # the boundary of vocabularies that Hugging Face's library learns
UNKNOWN = "[UNK]"
_LARGEST_RUN = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """What vocabulary is wanted.

    Attributes:
      kind: "bpe" (Sennrich et al. 2016) or "unigram" (Kudo 2018) of characters, both by sentencepiece; "byte_bpe"
        (Radford et al. 2019), "wordpiece" (Schuster and Nakajima 2012), which does not give white space back.
      vocab_size: how many ids, all told; a small text may not have so many pieces.
      special: tokens that no text can spell, for the marks of a chat or of a task.
      split_digits: whether every digit is a token of its own.
      whitespace_runs: runs of 2 to so many spaces are one token each, for code; 0: none but those that are learnt.
      reserved: so many special tokens `<|reserved_0|>`, .. whose rows are there for later use.
      byte_fallback: of "bpe" and "unigram": what is not among the pieces is spelt in bytes; else it is unknown.
    """

    kind: str
    vocab_size: int
    special: tuple[str, ...] = ()
    split_digits: bool = False
    whitespace_runs: int = 0
    reserved: int = 0
    byte_fallback: bool = True

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(f"--kind: {self.kind!r} is unknown\ngive one of {', '.join(KINDS)}")
        if not (self.whitespace_runs == 0 or 2 <= self.whitespace_runs <= _LARGEST_RUN):
            raise UserError(
                f"--whitespace_runs: {self.whitespace_runs} is no length of a run\ngive 2 to {_LARGEST_RUN}, or 0"
            )
        if self.reserved < 0:
            raise UserError(f"--reserved: {self.reserved} is below 0\ngive how many ids to keep free")
        if self.kind == "wordpiece" and self.whitespace_runs:
            raise UserError("--whitespace_runs: WordPiece drops white space\nuse another kind, or leave the runs out")
        twice = [name for n, name in enumerate(self.names) if not name or name in self.names[:n]]
        if twice:
            raise UserError(f"--special: {twice[0]!r} is empty or named twice\ngive every special token once")
        least = self._least()
        if not least <= self.vocab_size <= 2**20:
            raise UserError(
                f"--vocab_size: {self.vocab_size} is no size of such a vocabulary\n"
                f"give {least} to {2**20}: {least} are for bytes, special tokens and some characters"
            )

    @property
    def names(self) -> tuple[str, ...]:
        """All special tokens but the boundary."""
        return (*self.special, *(f"<|reserved_{n}|>" for n in range(self.reserved)))

    @property
    def runs(self) -> list[int]:
        return list(range(2, self.whitespace_runs + 1))

    def _least(self) -> int:
        of_bytes = 256 if self.kind == "byte_bpe" or (self.byte_fallback and self.kind != "wordpiece") else 0
        return of_bytes + len(self.names) + len(self.runs) + 44


def train(texts: Sequence[str], c: Training, advance: Callable[[int], None]) -> Tokenizer:
    """The tokenizer learnt from some texts.

    Args:
      texts: the sample.
      c: what is wanted.
      advance: told how many more characters have been read; learning goes on after the last.

    Raises:
      UserError: where there is nothing to learn from.
    """
    if not any(texts):
        raise UserError("the source has no text to learn a vocabulary from")
    return _train_pieces(texts, c) if c.kind in ("bpe", "unigram") else _train_huggingface(texts, c, advance)


def _train_pieces(texts: Sequence[str], c: Training) -> SentencePiece:
    names, runs = c.names, [SPACE * n for n in c.runs]
    wrong = [name for name in names if name in ("<unk>", "<s>", "</s>")]
    if wrong:
        raise UserError(f"--special: {wrong[0]!r} is there already\nleave it out")
    options: dict[str, Any] = {"split_digits": c.split_digits, "eos_id": 1}
    if names:
        options["control_symbols"] = list(names)
    if runs:
        options["user_defined_symbols"] = runs
    return SentencePiece(
        train_model(
            texts, c.vocab_size, c.kind, byte_fallback=c.byte_fallback, others=len(names + tuple(runs)), **options
        ),
        exact_parts=True,
    )


def _train_huggingface(texts: Sequence[str], c: Training, advance: Callable[[int], None]) -> HuggingFace:
    tokenizers = library()
    cutters, models = tokenizers.pre_tokenizers, tokenizers.models
    digits = [cutters.Digits(individual_digits=True)] if c.split_digits else []
    special = [END, *c.names]
    size = c.vocab_size - len(c.runs)
    if c.kind == "byte_bpe":
        made = tokenizers.Tokenizer(models.BPE())
        last, made.decoder = cutters.ByteLevel(add_prefix_space=False), tokenizers.decoders.ByteLevel()
        settings = {"special_tokens": special, "initial_alphabet": sorted(ALPHABET)}
        trainer = tokenizers.trainers.BpeTrainer(vocab_size=size, show_progress=False, **settings)
    else:
        made = tokenizers.Tokenizer(models.WordPiece(unk_token=UNKNOWN))
        last, made.decoder = cutters.BertPreTokenizer(), tokenizers.decoders.WordPiece(cleanup=False)
        # Every character has two pieces, within a word and at its beginning: no more than half of the ids are for them.
        texts = list(frequent_parts(texts, (size - len(special)) // 4))
        # Named first, they have the same ids each time: the trainer itself takes them in the order of a hash table.
        alphabet = sorted({c for text in texts for c in text if not c.isspace()})
        settings = {"special_tokens": [*special, UNKNOWN, *alphabet, *(f"##{c}" for c in alphabet)]}
        trainer = tokenizers.trainers.WordPieceTrainer(vocab_size=size, show_progress=False, **settings)
    made.pre_tokenizer = cutters.Sequence([*digits, last])

    def read() -> Iterator[str]:
        for text in texts:
            yield text
            advance(len(text))

    made.train_from_iterator(read(), trainer)
    # Unknown and characters are what a text may hold, not marks: they must not count as special.
    values = json.loads(made.to_str())
    first = max(values["model"]["vocab"].values()) + 1
    values["added_tokens"] = [token for token in values["added_tokens"] if token["content"] in special]
    values["added_tokens"] += [_run(n, first + i) for i, n in enumerate(c.runs)]
    return HuggingFace(json.dumps(values, ensure_ascii=False).encode("utf-8"))


def _run(length: int, i: int) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    return {"id": i, "content": " " * length, **flags}
