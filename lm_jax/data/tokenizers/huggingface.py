"""Tokenizers of Hugging Face's `tokenizers` library: any `tokenizer.json`.

What is written in a file but would make ids depend on more than the text is switched off: truncation, padding, dropout
of merges, and special tokens that text spells.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np

from lm_jax.data.cache import digest
from lm_jax.data.tokenizers.tokenizer import DESCRIPTION, Tokenizer, describe, ignore, refuse_surrogates
from lm_jax.errors import UserError

JSON = "huggingface.json"

# Names under which vocabularies keep the token that ends a document, else the one that begins it; the first that is
# there is taken.
ENDS = (
    *("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "<|end▁of▁sentence|>"),
    *("<|begin_of_text|>", "<s>", "<bos>", "<|bos|>", "[BOS]", "[SEP]"),
)


def library() -> ModuleType:
    """The library, or a UserError that says how to get it."""
    try:
        import tokenizers
    except ImportError as error:
        raise UserError(
            "needs the package tokenizers, which is not installed\npip install 'lm_jax[tokenizers]'"
        ) from error
    return tokenizers


def byte_alphabet() -> dict[str, int]:
    """Byte-level BPE's characters (Radford et al. 2019): printable Latin-1 for itself, others from U+0100 on."""
    plain = [b for b in range(256) if chr(b).isprintable() and chr(b) != " " and b != 0xAD]
    rest = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + n): b for n, b in enumerate(rest)}


ALPHABET = byte_alphabet()


class HuggingFace(Tokenizer):
    """A tokenizer of the `tokenizers` library.

    The boundary is its special token of a name in `ENDS`, else one more id after its last. Byte-level BPE without a
    normalizer gives every text back by construction; of others `caveat` says why it may not.
    """

    kind = "huggingface"

    def __init__(self, content: bytes, boundary: bool = True) -> None:
        """Args: a `tokenizer.json`, and whether there is a boundary.

        Raises:
          UserError: where it is none, or the library is not installed.
        """
        tokenizers = library()
        try:
            values = json.loads(content)
            values |= {"truncation": None, "padding": None}
            if values["model"].get("dropout"):
                values["model"]["dropout"] = None
            self.library = tokenizers.Tokenizer.from_str(json.dumps(values))
            self.library.encode_special_tokens = True  # a text that spells <|endoftext|> is not the end of a text
            added = {token["content"]: token for token in values.get("added_tokens", [])}
        except Exception as error:  # the library raises a plain Exception for everything
            raise UserError(f"is no tokenizer.json, or is damaged: {' '.join(str(error).split())[:160]}") from error
        for name, token in added.items():
            found = self.library.token_to_id(name)
            if found != token["id"]:
                raise UserError(
                    f"gives {name!r} the id {token['id']}, which the library reads as {found}\n"
                    "ids of added tokens must follow those of the vocabulary without a gap, or stand in it too"
                )
        self.content = content
        vocab = self.library.get_vocab(with_added_tokens=True)
        if not vocab:
            raise UserError("is a tokenizer.json without a single token")
        size = max(vocab.values()) + 1
        self.special = {name: token["id"] for name, token in added.items() if token["special"]}
        ends = [self.special[name] for name in ENDS if name in self.special]
        self.boundary = (ends[0] if ends else size) if boundary else None
        self.vocab_size = size + (boundary and not ends)
        self.names_boundary = bool(ends)
        self.caveat = _caveat(values)
        self.exact = not self.caveat
        # By id, what it stands for; ids that nothing has show as U+FFFD. None where a token alone does not tell.
        self._bytes = _byte_table(vocab, set(added), self.vocab_size) if self.exact else None

    def encode(self, text: str) -> np.ndarray:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str], advance: Callable[[int], None] = ignore) -> list[np.ndarray]:
        for text in texts:
            refuse_surrogates(text)
        encodings = self.library.encode_batch_fast(list(texts), add_special_tokens=False)
        out = [np.array(encoding.ids, np.int32) for encoding in encodings]
        advance(sum(map(len, texts)))
        return out

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        known = self._text_ids(ids).tolist()
        if self._bytes is None:
            return self.library.decode(known, skip_special_tokens=False)
        return b"".join([self._bytes[i] for i in known]).decode("utf-8", errors="replace")

    def bytes_of(self, token: int) -> int:
        return len(self.decode([token]).encode("utf-8")) if self._bytes is None else len(self._bytes[token])

    def bytes_for(self, token: int) -> bytes:
        """The bytes that an id of an exact tokenizer stands for."""
        if self._bytes is None:
            raise ValueError("the pieces of this tokenizer are no bytes")
        return self._bytes[token]

    def files(self) -> dict[str, bytes]:
        description = describe(kind=self.kind, boundary=self.boundary is not None, model=digest(self.content))
        return {DESCRIPTION: description, JSON: self.content}


def _byte_table(vocab: Mapping[str, int], added: set[str], size: int) -> list[bytes]:
    table = ["\ufffd".encode()] * size
    for name, i in vocab.items():
        spelt = name not in added and all(c in ALPHABET for c in name)
        table[i] = bytes(ALPHABET[c] for c in name) if spelt else name.encode("utf-8")
    return table


def _caveat(values: Mapping[str, Any]) -> str:
    """Why a tokenizer may alter a text; empty where it cannot: byte-level BPE that cuts text and takes nothing out."""
    model, cuts = values["model"], _parts(values.get("pre_tokenizer"), "pretokenizers")
    if values.get("normalizer") is not None:
        return f"its normalizer ({values['normalizer']['type']}) changes text"
    if model.get("type", "BPE") != "BPE" or [d["type"] for d in _parts(values.get("decoder"), "decoders")] != [
        "ByteLevel"
    ]:
        return f"its model ({model.get('type', 'of an old form')}) is not byte-level BPE"
    if not all(c in model["vocab"] for c in ALPHABET):
        return "its vocabulary lacks some of the 256 bytes"
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        return "its pieces carry marks of words"
    if not cuts or cuts[-1]["type"] != "ByteLevel":
        return "its text is not turned into bytes last"
    for cut in cuts:
        if cut.get("add_prefix_space"):
            return "it puts a space in front"
        if cut["type"] not in ("ByteLevel", "Split", "Digits") or cut.get("behavior") == "Removed":
            return f"its pre-tokenizer ({cut['type']}) may take characters out"
    for token in values.get("added_tokens", []):
        if token.get("lstrip") or token.get("rstrip"):
            return f"its token {token['content']!r} takes the spaces beside it"
    return ""


def _parts(stage: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    if stage is None:
        return []
    return [part for inner in stage[key] for part in _parts(inner, key)] if stage["type"] == "Sequence" else [stage]
