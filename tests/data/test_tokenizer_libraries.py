"""Tokenizers of other libraries: ids are theirs, text comes back, and what is wrong with a file is named."""

from __future__ import annotations

import base64
import io
import json
import re
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm_jax.data import tokenizers
from lm_jax.data.tokenizers import HuggingFace, SentencePiece, Tiktoken, Tokenizer, model_file, open_path
from lm_jax.data.tokenizers import tiktoken as ours
from lm_jax.data.tokenizers.huggingface import ALPHABET
from lm_jax.data.tokenizers.train import END, Training, train
from lm_jax.errors import ConfigError, UserError
from tests.data.hostile import HOSTILE, nasty

STDLIB = Path(sysconfig.get_path("stdlib"))
REAL = [(STDLIB / name).read_text("utf-8") for name in ("ast.py", "typing.py", "json/decoder.py", "locale.py")]
REAL += [
    "今日は良い天気です。她说：“你好，世界！”\r\n　「林黛玉」——\n" * 20,
    "naïve café 🙂👩‍👩‍👧 \u202eשלום ١٢٣\n" * 20,
]


def ignore(count: int) -> None:
    del count


def learnt(**options: Any) -> Tokenizer:
    settings = {"kind": "byte_bpe", "vocab_size": 700} | options
    return train(REAL, Training(**settings), ignore)


def ranks_of(tokenizer: HuggingFace) -> bytes:
    """A byte-level vocabulary as tiktoken's file: its pieces in the order in which they were merged."""
    vocab = json.loads(tokenizer.content)["model"]["vocab"]
    pieces = [bytes(ALPHABET[c] for c in p) for p, _ in sorted(vocab.items(), key=lambda item: item[1]) if p != END]
    return ours.write_ranks({piece: n for n, piece in enumerate(pieces)})


@pytest.fixture(scope="module")
def byte_bpe() -> HuggingFace:
    made = learnt(special=("<|user|>",), whitespace_runs=8, split_digits=True, reserved=2)
    assert isinstance(made, HuggingFace)
    return made


@pytest.fixture(scope="module")
def encoding() -> Tiktoken:
    plain = learnt()
    assert isinstance(plain, HuggingFace)
    return Tiktoken(ranks_of(plain), "cl100k_base", {END: 800})


@pytest.fixture(scope="module")
def every_exact(byte_bpe: HuggingFace, encoding: Tiktoken) -> list[Tokenizer]:
    return [byte_bpe, encoding, learnt(kind="bpe", whitespace_runs=6), learnt(kind="unigram", split_digits=True)]


def holds(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32 and (ids.size == 0 or 0 <= ids.min() <= ids.max() < tokenizer.vocab_size)
    assert not set(ids.tolist()) & {tokenizer.boundary, *tokenizer.special.values()}
    assert tokenizer.decode(ids) == text
    assert tokenizer.caveat == ""


@pytest.mark.parametrize("text", [*HOSTILE, END, "<|user|> <|reserved_0|></s>", *REAL])
def test_hostile_text_comes_back_and_spells_no_special_token(text: str, every_exact: list[Tokenizer]) -> None:
    for tokenizer in every_exact:
        holds(tokenizer, text)


@settings(deadline=None, max_examples=150)
@given(text=st.one_of(nasty, st.text("　，“”—林黛玉\u200d👩\ufe0f\u0301שא\x00\ufffd\r\n 09", max_size=40)))
def test_any_text_comes_back(text: str, every_exact: list[Tokenizer]) -> None:
    for tokenizer in every_exact:
        holds(tokenizer, text)


@pytest.mark.parametrize("text", ["a\ud800b", "\udfff"])
def test_half_a_surrogate_pair_is_refused(text: str, every_exact: list[Tokenizer]) -> None:
    for tokenizer in [*every_exact, tokenizers.Bytes(), tokenizers.Characters("fine")]:
        with pytest.raises(UserError, match=r"character \d is half of a surrogate pair \(U\+D"):
            tokenizer.encode_batch(["fine", text])


def test_ids_are_the_library_s_own(every_exact: list[Tokenizer]) -> None:
    byte_bpe, encoding, *pieces = every_exact
    texts = [*REAL, "".join(REAL) * 3]
    expected = [[e.ids for e in byte_bpe.library.encode_batch(texts, add_special_tokens=False)]]
    expected.append(encoding.library.encode_ordinary_batch(texts))
    expected += [tokenizer.processor.encode(texts) for tokenizer in pieces]
    for tokenizer, ids in zip(every_exact, expected, strict=True):
        assert [i.tolist() for i in tokenizer.encode_batch(texts)] == ids
        assert sum(tokenizer.bytes_of(i) for i in ids[4]) == len(texts[4].encode())


def test_long_texts_are_cut_only_where_no_piece_reaches_over(every_exact: list[Tokenizer]) -> None:
    """Cut after line ends or a number of characters, this text would give other ids."""
    bpe = every_exact[2]
    assert isinstance(bpe, SentencePiece) and bpe.exact_parts
    text = " return" * 3000
    assert len(list(bpe._parts(text))) > 3 and bpe.encode(text).tolist() == bpe.processor.encode(text)
    loose = SentencePiece(bpe.model)
    assert loose.encode(text).tolist() != bpe.processor.encode(text) and loose.decode(loose.encode(text)) == text


def test_special_ids_decode_to_their_names_and_unused_ones_to_a_mark(byte_bpe: HuggingFace, encoding: Tiktoken) -> None:
    assert byte_bpe.decode([byte_bpe.special["<|user|>"], byte_bpe.boundary, *byte_bpe.encode("x")]) == "<|user|>x"
    assert encoding.boundary == 800 and encoding.vocab_size == 801
    assert encoding.decode([750, *encoding.encode("x"), 800]) == "\ufffdx"
    for tokenizer in (byte_bpe, encoding):
        for wrong in (-1, tokenizer.vocab_size):
            with pytest.raises(ValueError, match=f"ids must be in 0 .. {tokenizer.vocab_size - 1}, not"):
                tokenizer.decode([wrong])


def test_truncation_padding_and_dropout_of_a_file_do_not_count(byte_bpe: HuggingFace) -> None:
    values = json.loads(byte_bpe.content)
    values["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    values["model"]["dropout"] = 0.5
    other = HuggingFace(json.dumps(values).encode())
    assert other.encode(REAL[0]).tolist() == byte_bpe.encode(REAL[0]).tolist()


def test_a_tokenizer_without_an_end_gets_one_more_id(byte_bpe: HuggingFace, encoding: Tiktoken) -> None:
    values = json.loads(byte_bpe.content)
    values["added_tokens"][0]["content"] = "<|other|>"
    values["model"]["vocab"]["<|other|>"] = values["model"]["vocab"].pop(END)
    other = HuggingFace(json.dumps(values).encode())
    assert other.boundary == byte_bpe.vocab_size == other.vocab_size - 1
    plain = Tiktoken(encoding.ranks, "gpt2", {})
    assert (
        plain.boundary == 700 - 1 == plain.vocab_size - 1
        and Tiktoken(encoding.ranks, "gpt2", {}, False).boundary is None
    )


def test_patterns_are_those_of_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the texts: theirs are written in another form that matches the same."""
    import regex
    import tiktoken_ext.openai_public as theirs

    def no_ranks(*args: object, **kwargs: object) -> dict[bytes, int]:
        del args, kwargs
        return {}

    monkeypatch.setattr(theirs, "load_tiktoken_bpe", no_ranks)
    for name in ("r50k_base", "p50k_base", "cl100k_base", "o200k_base"):
        known, expected = ours.ENCODINGS[name], getattr(theirs, name)()
        assert dict(known.special_tokens) == expected["special_tokens"]
        for text in [*REAL, *HOSTILE[:30], "it's WE'LL don't  12345\n\n\n  x\t\t\r\n /a//\n"]:
            assert regex.findall(known.pattern, text) == regex.findall(expected["pat_str"], text)


def wordpiece() -> HuggingFace:
    made = learnt(kind="wordpiece", vocab_size=900)
    assert isinstance(made, HuggingFace)
    return made


def lossy(change: Callable[[dict[str, Any]], object]) -> Callable[[HuggingFace], HuggingFace]:
    def make(tokenizer: HuggingFace) -> HuggingFace:
        values = json.loads(tokenizer.content)
        change(values)
        return HuggingFace(json.dumps(values).encode())

    return make


@pytest.mark.parametrize(
    ("make", "why", "text"),
    [
        (lambda _: wordpiece(), "WordPiece", "a  b"),
        (lossy(lambda v: v.update(normalizer={"type": "NFKC"})), "NFKC", "ﬁ"),
        (lossy(lambda v: v["pre_tokenizer"]["pretokenizers"][-1].update(add_prefix_space=True)), "in front", "x"),
        (lossy(lambda v: v["added_tokens"][-1].update(rstrip=True)), "takes the spaces", "a        \n b"),
    ],
)
def test_what_may_alter_a_text_says_so(
    make: Callable[[HuggingFace], HuggingFace], why: str, text: str, byte_bpe: HuggingFace
) -> None:
    made = make(byte_bpe)
    assert not made.exact and why in made.caveat
    assert made.decode(made.encode(text)) != text


@pytest.mark.parametrize("kind", ["byte_bpe", "wordpiece", "bpe", "unigram"])
def test_learning_repeats_itself(kind: str) -> None:
    once, again = (learnt(kind=kind, vocab_size=800) for _ in range(2))
    assert once.files() == again.files() and once.vocab_size == 800


@pytest.mark.parametrize("kind", ["byte_bpe", "bpe", "unigram"])
def test_what_was_asked_for_is_there(kind: str) -> None:
    made = learnt(kind=kind, special=("<|user|>",), split_digits=True, whitespace_runs=12, reserved=3)
    assert {"<|user|>", "<|reserved_0|>", "<|reserved_2|>"} < set(
        made.special
    ) and made.boundary in made.special.values()
    assert len(made.encode("2026")) == 4
    for n in range(2, 13):
        assert len(made.encode(" " * n)) == 1
    assert made.vocab_size == 700
    assert not set(made.encode("<|user|>").tolist()) & set(made.special.values())


def test_without_bytes_to_fall_back_on_a_rare_character_is_unknown() -> None:
    made = learnt(kind="bpe", byte_fallback=False)
    assert "no bytes to fall back on" in made.caveat
    assert made.decode(made.encode("return 黿")) != "return 黿"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "words"}, "--kind: 'words'"),
        ({"vocab_size": 256}, "--vocab_size: 256"),
        ({"special": ("a", "a")}, "--special: 'a'"),
        ({"whitespace_runs": 1}, "--whitespace_runs: 1"),
        ({"kind": "wordpiece", "whitespace_runs": 4}, "drops white space"),
        ({"reserved": -1}, "--reserved: -1"),
        ({"kind": "bpe", "special": ("</s>",)}, "is there already"),
    ],
)
def test_a_wish_that_cannot_be_had_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        learnt(**options)


def test_nothing_to_learn_from_is_refused() -> None:
    with pytest.raises(UserError, match="no text to learn"):
        train(["", ""], Training(kind="byte_bpe", vocab_size=700), ignore)


# ---------------------------------------------------------------------------------------------------------- their files


def test_every_form_of_a_tokenizer_is_opened(every_exact: list[Tokenizer], encoding: Tiktoken, tmp_path: Path) -> None:
    byte_bpe, _, bpe, _ = every_exact
    assert isinstance(byte_bpe, HuggingFace) and isinstance(bpe, SentencePiece)
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "tokenizer.json").write_bytes(byte_bpe.content)
    (tmp_path / "x.model").write_bytes(bpe.model)
    (tmp_path / "cl100k_base.tiktoken").write_bytes(encoding.ranks)
    (tmp_path / "mine.tiktoken").write_bytes(encoding.ranks)
    (tmp_path / "mine.json").write_text(json.dumps({"pattern": "cl100k_base", "special_tokens": {END: 800}}))
    forms = {"hf": byte_bpe, "hf/tokenizer.json": byte_bpe, "x.model": bpe, "mine.tiktoken": encoding}
    for n, tokenizer in enumerate(every_exact):
        (tmp_path / str(n)).mkdir()
        tokenizer.save(tmp_path / str(n))
        forms |= {f"{n}": tokenizer, f"{n}/tokenizer.json": tokenizer}
    for name, expected in forms.items():
        assert tokenizers.is_path(str(tmp_path / name))
        made = open_path(str(tmp_path / name), True)
        assert made.fingerprint == expected.fingerprint and made.boundary == expected.boundary
        assert made.encode(REAL[0]).tolist() == expected.encode(REAL[0]).tolist()
        assert open_path(str(tmp_path / name), False).boundary is None
    assert open_path(str(tmp_path / "cl100k_base.tiktoken"), True).boundary == 100257


BYTES = b"".join(b"%s %d\n" % (base64.b64encode(bytes([b])), b) for b in range(256))


@pytest.mark.parametrize(
    ("name", "files", "message"),
    [
        ("none.json", {}, "cannot be read"),
        ("t.json", {"t.json": b"{}"}, "holds no tokenizer"),
        ("folder", {"folder/x": b""}, "holds no tokenizer"),
        ("t.json", {"t.json": b'{"model": {"type": "BPE"}}'}, "is no tokenizer.json"),
        ("x.model", {"x.model": b"junk"}, "is no sentencepiece model"),
        ("x.tiktoken", {"x.tiktoken": BYTES}, "x.json is not beside it"),
        ("x.tiktoken", {"x.tiktoken": BYTES, "x.json": b"{}"}, "without pattern and special_tokens"),
        ("gpt2.tiktoken", {"gpt2.tiktoken": BYTES + b"what is this\n"}, "line 257 is not a piece"),
        ("gpt2.tiktoken", {"gpt2.tiktoken": BYTES[7:]}, r"no rank for the byte 0x00 \(1 of 256"),
        ("gpt2.tiktoken", {"gpt2.tiktoken": BYTES + b"QUE= 7\n"}, "two pieces the same rank"),
        (
            "x.tiktoken",
            {"x.tiktoken": BYTES, "x.json": b'{"pattern": "(", "special_tokens": {}}'},
            "regular expression",
        ),
        (
            "x.tiktoken",
            {"x.tiktoken": BYTES, "x.json": b'{"pattern": "gpt2", "special_tokens": {"<e>": 7}}'},
            "special token '<e>' at 7",
        ),
    ],
)
def test_a_file_that_is_no_tokenizer_is_named(name: str, files: dict[str, bytes], message: str, tmp_path: Path) -> None:
    for file, content in files.items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes(content)
    with pytest.raises(ConfigError, match=message) as error:
        open_path(str(tmp_path / name), True)
    assert error.value.key == "data.tokenizer" and name in str(error.value) and str(error.value).count("\n") <= 2


def test_ids_that_the_library_would_change_are_refused(byte_bpe: HuggingFace) -> None:
    values = json.loads(byte_bpe.content)
    values["added_tokens"][-1]["id"] += 50
    with pytest.raises(UserError, match="the library reads as"):
        HuggingFace(json.dumps(values).encode())


def test_a_damaged_copy_is_refused(every_exact: list[Tokenizer]) -> None:
    for tokenizer in every_exact:
        files = tokenizer.files()
        (other,) = (name for name in files if name != tokenizers.DESCRIPTION)
        with pytest.raises(UserError, match=f"{other} is damaged"):
            tokenizers.from_files(files | {other: files[other][:-1]})


def test_pieces_are_read_from_a_model_as_the_library_reads_them(every_exact: list[Tokenizer]) -> None:
    for tokenizer, kind in zip(every_exact[2:], (model_file.BPE, model_file.UNIGRAM), strict=True):
        assert isinstance(tokenizer, SentencePiece) and model_file.model_type(tokenizer.model) == kind
        theirs = tokenizer.processor
        found = [(p.text, p.score) for p in model_file.pieces(tokenizer.model)]
        assert found == [(theirs.id_to_piece(i), theirs.get_score(i)) for i in range(theirs.vocab_size())]


def test_a_model_that_puts_a_space_in_front_says_so() -> None:
    import sentencepiece

    model = io.BytesIO()
    lines = iter(["the cat sat on the mat"] * 20)
    options = {"vocab_size": 300, "minloglevel": 2, "hard_vocab_limit": False, "byte_fallback": True}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=lines, model_writer=model, **options)
    assert "space in front" in SentencePiece(model.getvalue()).caveat
