"""What preparing a corpus may be asked for: a frozen dataclass a section, each with its own checks."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Literal

from lm_jax.corpus.minhash import PERMUTATIONS
from lm_jax.corpus.rules import RULES
from lm_jax.data import tokenizers
from lm_jax.data.config import SMALLEST_VOCABULARY
from lm_jax.errors import ConfigError


def _within(key: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:  # false for NaN
        raise ConfigError(key, f"{value} is out of range", f"give {low} to {high}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RawConfig:
    """What is read.

    Attributes:
      sources: files, directories, globs (`**` goes into folders), `gs://` and `s3://` paths, "python" (the running
        interpreter's own standard library) or `hf:NAME:CONFIG:SPLIT` (a Hugging Face data set; CONFIG may be empty).
      field: the field of a `.jsonl` line, the column of a `.parquet` file or of a data set, that holds the text.
      records: what a record of an ArrayRecord file is: "text" (UTF-8) or "json" (an object with `field`).
      bad: "quarantine" leaves out and counts what cannot be read as a document, "refuse" stops at the first.
      max_document_bytes: the largest document; larger ones cannot be documents. A worker needs some 60 times as much.
    """

    sources: str | tuple[str, ...] = "python"
    field: str = "text"
    records: Literal["text", "json"] = "text"
    bad: Literal["quarantine", "refuse"] = "quarantine"
    max_document_bytes: int = 2**24

    def __post_init__(self) -> None:
        if not self.names or not all(self.names):
            raise ConfigError("raw.sources", "is empty", 'name a file, a directory or a glob, or "python"')
        if not self.field:
            raise ConfigError("raw.field", "is empty", 'give the field that holds the text, such as "text"')
        _within("raw.max_document_bytes", self.max_document_bytes, 1, 2**28)

    @property
    def names(self) -> tuple[str, ...]:
        return (self.sources,) if isinstance(self.sources, str) else self.sources


@dataclasses.dataclass(frozen=True, kw_only=True)
class CleaningConfig:
    """Which rules a document goes through, in this order, and their limits. The limits are the papers'.

    Attributes:
      rules: names of rules: html, unicode, language, repeated_paragraphs, repeated_lines, gopher_quality,
        gopher_repetition, c4, personal_data.
      languages: which languages are kept (ISO 639-1, as "en"); empty keeps all, and only counts them.
      language_confidence: below it a document's language counts as unknown ("und").
      max_replaced: the largest share of characters that may be U+FFFD, what bad decoding leaves behind.
      repeated_line_characters: lines shorter than this may repeat within a document (`}`, `* * *`).
      min_words, max_words: of a document (Gopher).
      min_word_length, max_word_length: the mean, in characters (Gopher).
      max_symbols: hash signs, or ellipses, to a word (Gopher).
      max_bullet_lines, max_ellipsis_lines: shares of lines that begin with a bullet, or end with an ellipsis (Gopher).
      min_alphabetic_words: the share of words with at least one letter (Gopher).
      min_stop_words: how many of the, be, to, of, and, that, have, with must be there (Gopher); for text in English.
      c4_line_words: the fewest words of a line (C4).
      c4_sentences: the fewest sentences of a document (C4).
      c4_word_characters: a line with a longer word is left out (C4).
      mail, ip, phone: whether such are replaced (personal_data).
    """

    rules: tuple[str, ...] = ("html", "unicode", "language", "repeated_paragraphs", "repeated_lines", "personal_data")
    languages: tuple[str, ...] = ()
    language_confidence: float = 0.5
    max_replaced: float = 0.01
    repeated_line_characters: int = 40
    min_words: int = 50
    max_words: int = 100_000
    min_word_length: float = 3.0
    max_word_length: float = 10.0
    max_symbols: float = 0.1
    max_bullet_lines: float = 0.9
    max_ellipsis_lines: float = 0.3
    min_alphabetic_words: float = 0.8
    min_stop_words: int = 2
    c4_line_words: int = 5
    c4_sentences: int = 3
    c4_word_characters: int = 1000
    mail: bool = True
    ip: bool = True
    phone: bool = True

    def __post_init__(self) -> None:
        for name in self.rules:
            if name not in RULES:
                near = difflib.get_close_matches(name, RULES, n=1)
                hint = f"did you mean {near[0]}?" if near else f"the rules are {', '.join(RULES)}"
                raise ConfigError("cleaning.rules", f"{name!r} is unknown", hint)
        if len(set(self.rules)) < len(self.rules):
            raise ConfigError("cleaning.rules", "names a rule twice", "name every rule once")
        if self.languages and "language" not in self.rules:
            raise ConfigError("cleaning.languages", 'needs the rule "language"', 'add "language" to cleaning.rules')
        shares = ("language_confidence", "max_replaced", "max_bullet_lines", "max_ellipsis_lines")
        for name in (*shares, "min_alphabetic_words"):
            _within(f"cleaning.{name}", getattr(self, name), 0.0, 1.0)
        counts = ("min_words", "max_words", "min_stop_words", "c4_line_words", "c4_sentences", "c4_word_characters")
        sizes = ("min_word_length", "max_word_length", "max_symbols", "repeated_line_characters")
        for name in (*counts, *sizes):
            _within(f"cleaning.{name}", getattr(self, name), 0, 2**31)
        for least, most in (("min_words", "max_words"), ("min_word_length", "max_word_length")):
            low, high = getattr(self, least), getattr(self, most)
            if low > high:
                problem = f"{low} is above cleaning.{most}, which is {high}: no document would be kept"
                raise ConfigError(f"cleaning.{least}", problem, f"give {high} or less, or a larger cleaning.{most}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinesConfig:
    """Lines that many documents share: menus, licences, notices.

    Attributes:
      max_documents: a line that stands in more documents than this is taken out of all of them; 0 leaves all lines.
      min_characters: shorter lines stay, however often they occur.
    """

    max_documents: int = 0
    min_characters: int = 20

    def __post_init__(self) -> None:
        _within("lines.max_documents", self.max_documents, 0, 2**31)
        _within("lines.min_characters", self.min_characters, 1, 2**31)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DuplicatesConfig:
    """Of documents that are the same, or nearly, the first is kept.

    Attributes:
      exact: whether documents with the same text, after cleaning, are removed.
      near: whether those that MinHash finds to be alike are removed.
      threshold: the Jaccard similarity of the sets of shingles from which on documents are alike.
      permutations: length of a signature.
      shingle: words a shingle; a character of Chinese, Japanese, Thai and their like counts as a word.
    """

    exact: bool = True
    near: bool = True
    threshold: float = 0.8
    permutations: int = PERMUTATIONS
    shingle: int = 5

    def __post_init__(self) -> None:
        _within("duplicates.threshold", self.threshold, 0.3, 1.0)
        _within("duplicates.permutations", self.permutations, 16, 1024)
        _within("duplicates.shingle", self.shingle, 1, 100)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecontaminationConfig:
    """Documents that hold a piece of an evaluation set are dropped.

    Attributes:
      sets: files of each evaluation set, by name; every text in a record of theirs counts, whatever its field.
      words: how many words in a row make an overlap (13 in Brown et al. 2020). Case and punctuation do not count.
    """

    sets: Mapping[str, str] = dataclasses.field(default_factory=dict)
    words: int = 13

    def __post_init__(self) -> None:
        _within("decontamination.words", self.words, 3, 100)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokensConfig:
    """How the text that is left becomes tokens.

    Attributes:
      tokenizer: "bytes", "sentencepiece" (learnt from the text that is left), or the path of one that is there.
      vocab_size: ids of a "sentencepiece" tokenizer.
      boundary: whether a boundary token stands before and after every document.
      held_out: the share of documents that is never trained on, by a stable hash of their text.
      altered_documents: what is done with a document that the tokenizer does not give back: "refuse" or "accept".
    """

    tokenizer: str = "sentencepiece"
    vocab_size: int = 4096
    boundary: bool = True
    held_out: float = 0.1
    altered_documents: Literal["refuse", "accept"] = "refuse"

    def __post_init__(self) -> None:
        if self.tokenizer not in ("bytes", "sentencepiece") and not tokenizers.is_path(self.tokenizer):
            raise ConfigError(
                "tokens.tokenizer", f"{self.tokenizer!r} is unknown", "give bytes, sentencepiece or the path of one"
            )
        if self.tokenizer == "sentencepiece":
            _within("tokens.vocab_size", self.vocab_size, SMALLEST_VOCABULARY, 2**20)
        _within("tokens.held_out", self.held_out, 0.0, 0.5)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WorkConfig:
    """How the work is divided. Nothing here but `part_bytes` changes what comes out.

    Attributes:
      part_bytes: bytes of raw files that one worker takes at a time; a part is a shard of the output, unless nothing is
        left of it.
      processes: workers at a time on this machine; None is one a core.
      keep: whether the folder `work` stays when all is done.
    """

    part_bytes: int = 2**25
    processes: int | None = None
    keep: bool = False

    def __post_init__(self) -> None:
        _within("work.part_bytes", self.part_bytes, 1, 2**40)
        if self.processes is not None:
            _within("work.processes", self.processes, 1, 4096)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """All of it."""

    raw: RawConfig = dataclasses.field(default_factory=RawConfig)
    cleaning: CleaningConfig = dataclasses.field(default_factory=CleaningConfig)
    lines: LinesConfig = dataclasses.field(default_factory=LinesConfig)
    duplicates: DuplicatesConfig = dataclasses.field(default_factory=DuplicatesConfig)
    decontamination: DecontaminationConfig = dataclasses.field(default_factory=DecontaminationConfig)
    tokens: TokensConfig = dataclasses.field(default_factory=TokensConfig)
    work: WorkConfig = dataclasses.field(default_factory=WorkConfig)
