"""Text to token ids and back: bytes, characters and sentencepiece.

Each tokenizer has a fixed number of ids and, where documents are to be told apart, one id that stands before and after
each document and that no text can spell. A tokenizer is kept as JSON and, for sentencepiece, its `.model` file: nothing
of it is ever executed.
"""

from __future__ import annotations

import abc
import collections
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lm_jax.data.cache import digest
from lm_jax.errors import ConfigError, UserError

NAMES = ("bytes", "characters", "sentencepiece")
DESCRIPTION, MODEL = "tokenizer.json", "tokenizer.model"

PART = 2**12  # characters that are encoded at a time: three times as fast as whole files, for 1 token in 70,000 more
SLAB = 2**20  # characters that threads share
SENTENCE = 2000  # characters; what training sees at a time
SPACE = "▁"  # how sentencepiece writes a space: it cannot tell the two apart, so the character itself is spelt in bytes
_UNLEARNT = "\t\0▅" + SPACE  # characters that sentencepiece's trainer keeps for itself: spelt in bytes


def _ignore(count: int) -> None:
    """Tells nobody."""


class Tokenizer(abc.ABC):
    """What every tokenizer does.

    Attributes:
      kind: its name.
      vocab_size: ids are 0 .. vocab_size - 1.
      boundary: the id before and after each document, or None.
      exact: `decode(encode(text)) == text` for every text, by construction; where not, whoever encodes checks.
    """

    kind: str
    vocab_size: int
    boundary: int | None
    exact = True

    @abc.abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """Ids `[tokens]` int32 of a text, without boundaries.

        Raises:
          UserError: where the text has something that no id stands for.
        """

    @abc.abstractmethod
    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of some ids, boundaries left out; bytes that are no UTF-8 show as U+FFFD.

        Raises:
          ValueError: where an id is not below `vocab_size`.
        """

    @abc.abstractmethod
    def bytes_of(self, token: int) -> int:
        """How many bytes of UTF-8 an id (not the boundary) stands for."""

    @abc.abstractmethod
    def files(self) -> dict[str, bytes]:
        """What `from_files` makes the same tokenizer of: contents by file name."""

    def encode_batch(self, texts: Sequence[str], advance: Callable[[int], None] = _ignore) -> list[np.ndarray]:
        """`encode` of each text; `advance` is told how many more characters are done."""
        out = []
        for text in texts:
            out.append(self.encode(text))
            advance(len(text))
        return out

    @property
    def fingerprint(self) -> str:
        """A hash of everything that decides how text is encoded."""
        return digest(*(part for name, data in sorted(self.files().items()) for part in (name, data)))

    def save(self, directory: Any) -> None:
        """Writes the tokenizer's files into a folder (any path object: `pathlib`, `etils.epath`)."""
        for name, data in self.files().items():
            (directory / name).write_bytes(data)

    def _text_ids(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        array = np.asarray(ids, dtype=np.int64).reshape(-1)
        if array.size and (array.min() < 0 or array.max() >= self.vocab_size):
            raise ValueError(f"ids must be in 0 .. {self.vocab_size - 1}, not {array.min()} .. {array.max()}")
        return array if self.boundary is None else array[array != self.boundary]


class Bytes(Tokenizer):
    """The bytes of UTF-8: 256 ids, and 256 for the boundary."""

    kind = "bytes"

    def __init__(self, boundary: bool = True) -> None:
        self.boundary = 256 if boundary else None
        self.vocab_size = 256 + boundary

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._text_ids(ids).astype(np.uint8).tobytes().decode("utf-8", errors="replace")

    def bytes_of(self, token: int) -> int:
        return 1

    def files(self) -> dict[str, bytes]:
        return {DESCRIPTION: _json(kind=self.kind, boundary=self.boundary is not None)}


class Characters(Tokenizer):
    """The characters of a source in the order of their code points, and the boundary after the last."""

    kind = "characters"

    def __init__(self, characters: Iterable[str], boundary: bool = True) -> None:
        self.codes = np.array(sorted({ord(c) for c in characters}), dtype=np.uint32)
        if not self.codes.size:
            raise UserError("a tokenizer of characters needs a text with at least one")
        self.boundary = len(self.codes) if boundary else None
        self.vocab_size = len(self.codes) + boundary

    def encode(self, text: str) -> np.ndarray:
        codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        ids = np.searchsorted(self.codes, codes)
        unknown = self.codes[np.minimum(ids, len(self.codes) - 1)] != codes
        if unknown.any():
            at = int(unknown.argmax())
            raise UserError(
                f"character {text[at]!r} (U+{codes[at]:04X}) is none of the tokenizer's {len(self.codes)}\n"
                'data.tokenizer="bytes" or "sentencepiece" would know every character'
            )
        return ids.astype(np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self.codes[self._text_ids(ids)].tobytes().decode("utf-32-le")

    def bytes_of(self, token: int) -> int:
        return len(self.decode([token]).encode("utf-8"))

    def files(self) -> dict[str, bytes]:
        text = self.codes.tobytes().decode("utf-32-le")
        return {DESCRIPTION: _json(kind=self.kind, boundary=self.boundary is not None, characters=text)}


class SentencePiece(Tokenizer):
    """A sentencepiece model (Kudo and Richardson 2018).

    The boundary is the model's end-of-sentence id, else its beginning-of-sentence id, else one more id after its last.
    A model that normalises text or has no bytes to fall back on does not give every text back: `exact` is False, and
    whoever encodes counts.
    """

    kind = "sentencepiece"
    exact = False

    def __init__(self, model: bytes, boundary: bool = True) -> None:
        """Raises UserError where the bytes are no sentencepiece model."""
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
        # Whether two parts of a text may be encoded one after the other: a model may put a space before each.
        self._splits = self.processor.decode(self.processor.encode("a") + self.processor.encode("b")) == "ab"
        # The bytes of the character that would come back as a space, where the model has bytes.
        pieces = [self.processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode("utf-8")]
        self._space = pieces if self._splits and all(self.processor.is_byte(i) for i in pieces) else None

    def encode(self, text: str) -> np.ndarray:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str], advance: Callable[[int], None] = _ignore) -> list[np.ndarray]:
        # The texts' parts, each with the number of its text, in slabs of even work for the threads.
        out: list[list[np.ndarray]] = [[] for _ in texts]
        for slab in _slabs((i, part) for i, text in enumerate(texts) for part in self._parts(text)):
            encoded = self.processor.encode([part for _, part in slab], num_threads=os.cpu_count() or 1)
            for (i, part), ids in zip(slab, encoded, strict=True):
                out[i].append(np.array(self._space if self._space and part == SPACE else ids, np.int32))
            advance(sum(len(part) for _, part in slab))
        return [np.concatenate(pieces) if pieces else np.zeros(0, np.int32) for pieces in out]

    def _parts(self, text: str) -> Iterator[str]:
        """A text in parts of bounded size, cut after a line's end where there is one, and around each `SPACE`."""
        if not self._splits:
            yield text
            return
        for run in re.split(f"({SPACE})", text) if self._space and SPACE in text else [text]:
            start = 0
            while len(run) - start > PART:
                end = run.rfind("\n", start, start + PART) + 1 or start + PART
                yield run[start:end]
                start = end
            yield run[start:]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self.processor.decode(self._text_ids(ids).tolist())

    def bytes_of(self, token: int) -> int:
        return 1 if self.processor.is_byte(token) else len(self.decode([token]).encode("utf-8"))

    def files(self) -> dict[str, bytes]:
        description = _json(kind=self.kind, boundary=self.boundary is not None, model=digest(self.model))
        return {DESCRIPTION: description, MODEL: self.model}


def _slabs(parts: Iterable[tuple[int, str]]) -> Iterator[list[tuple[int, str]]]:
    slab: list[tuple[int, str]] = []
    size = 0
    for part in parts:
        slab.append(part)
        size += len(part[1])
        if size >= SLAB:
            yield slab
            slab, size = [], 0
    if slab:
        yield slab


def _json(**values: object) -> bytes:
    return (json.dumps({"format": 1, **values}, sort_keys=True, ensure_ascii=True) + "\n").encode("ascii")


# ------------------------------------------------------------------------------------------------- keeping and training


def from_files(files: dict[str, bytes]) -> Tokenizer:
    """The tokenizer that `files()` describes.

    Raises:
      UserError: where they describe none, or the model is not the one that was saved.
    """
    try:
        values = json.loads(files[DESCRIPTION])
        if values["format"] != 1:
            raise UserError(f"{DESCRIPTION} is of format {values['format']!r}; this version reads format 1")
        kind, boundary = values["kind"], bool(values["boundary"])
        if kind == "bytes":
            return Bytes(boundary)
        if kind == "characters":
            return Characters(values["characters"], boundary)
        if kind == "sentencepiece":
            if digest(files[MODEL]) != values["model"]:
                raise UserError(f"{MODEL} is damaged: it is not the model that {DESCRIPTION} names")
            return SentencePiece(files[MODEL], boundary)
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(f"{DESCRIPTION} is no description of a tokenizer ({error!r})") from error
    raise UserError(f"{DESCRIPTION}: unknown tokenizer {kind!r}; known are {', '.join(NAMES)}")


def load(directory: Any) -> Tokenizer:
    """The tokenizer that `save` wrote into a folder (any path object).

    Raises:
      UserError: where there is none.
    """
    paths = {name: directory / name for name in (DESCRIPTION, MODEL)}
    files = {name: path.read_bytes() for name, path in paths.items() if path.exists()}
    if DESCRIPTION not in files:
        raise UserError(f"{directory} holds no tokenizer: {DESCRIPTION} is missing")
    return from_files(files)


def load_model(path: str, boundary: bool) -> SentencePiece:
    """The sentencepiece model of a `.model` file.

    Raises:
      ConfigError: where the file is missing or is no such model.
    """
    try:
        return SentencePiece(Path(path).expanduser().read_bytes(), boundary)
    except OSError as error:
        raise ConfigError("data.tokenizer", f"{path!r} cannot be read: {error.strerror or error}") from error
    except UserError as error:
        raise ConfigError(
            "data.tokenizer", f"{path!r} {error}", "give a .model file written by sentencepiece"
        ) from error


def train_sentencepiece(texts: Sequence[str], vocab_size: int, boundary: bool) -> SentencePiece:
    """A byte-pair model (Sennrich et al. 2016) of these texts that gives every text back exactly.

    No normalisation, no space put in front, every space and line end kept; what is not among its pieces is spelt in
    bytes. The same texts give the same model. A small text may not have `vocab_size` pieces in it: there are then
    fewer.

    Args:
      texts: the sample to learn from.
      vocab_size: how many ids, bytes and boundary included; at least 300.
      boundary: whether there is an id for it.

    Raises:
      UserError: where there is nothing to learn from.
    """
    import sentencepiece

    model = _Writer()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sentences(texts, (vocab_size - 258) // 2),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            character_coverage=1.0,  # `_sentences` has left the rare ones out
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=8 * SENTENCE,  # bytes: none of ours is longer, for longer ones are skipped
            unk_id=0,
            eos_id=1 if boundary else -1,
            bos_id=-1,
            pad_id=-1,
            num_threads=2,  # stands in the model's bytes, so a fixed number
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UserError(f"no sentencepiece vocabulary of {vocab_size} can be learnt from this text: {error}") from error
    return SentencePiece(bytes(model.data), boundary)


class _Writer:
    """What the trainer writes the model into: it wants a file."""

    def __init__(self) -> None:
        self.data = b""

    def write(self, data: bytes) -> None:
        self.data += data


def _sentences(texts: Sequence[str], characters: int) -> Iterator[str]:
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
