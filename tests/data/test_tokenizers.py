"""Every tokenizer gives every text back, and none lets a text spell the boundary."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm_jax.data import tokenizers
from lm_jax.data.tokenizers import Bytes, Characters, SentencePiece, Tokenizer, train_sentencepiece
from lm_jax.errors import ConfigError, UserError
from tests.data.hostile import HOSTILE, nasty

SAMPLE = [
    "def f(x):\n    return x + 1\n\n\nclass A:\n\tdef g(self):\n        pass\r\n" * 30,
    "żółć 紅樓夢 e\u0301 ﬁ ① \u3000\n" * 20,
]


@pytest.fixture(scope="module")
def pieces() -> SentencePiece:
    return train_sentencepiece(SAMPLE, 400, True)


def given_model(**settings: object) -> bytes:
    """A .model as someone else might have trained it."""
    import sentencepiece

    model = io.BytesIO()
    base = {"vocab_size": 60, "minloglevel": 2, "hard_vocab_limit": False}
    lines = iter(["the cat sat on the mat", "a dog ran to the cat"] * 20)
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=lines, model_writer=model, **{**base, **settings})
    return model.getvalue()


def holds(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert ids.size == 0 or 0 <= ids.min() <= ids.max() < tokenizer.vocab_size
    assert tokenizer.boundary not in ids
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_comes_back(text: str, pieces: SentencePiece) -> None:
    holds(Bytes(), text)
    holds(pieces, text)
    holds(Characters(text or "a"), text)


@settings(deadline=None, max_examples=300)
@given(text=nasty)
def test_any_text_comes_back(text: str, pieces: SentencePiece) -> None:
    holds(Bytes(), text)
    holds(pieces, text)
    holds(Characters(text + "a"), text)


@settings(deadline=None, max_examples=50)
@given(texts=st.lists(nasty, max_size=6))
def test_a_batch_is_its_texts_one_by_one(texts: list[str], pieces: SentencePiece) -> None:
    done: list[int] = []
    batch = pieces.encode_batch(texts, done.append)
    assert [b.tolist() for b in batch] == [pieces.encode(t).tolist() for t in texts]
    assert sum(done) == sum(map(len, texts))


def test_indents_and_line_ends_are_pieces(pieces: SentencePiece) -> None:
    assert len(pieces.encode("        ")) == 1
    assert len(pieces.encode("\n    return")) <= 4


def test_sizes_and_boundaries() -> None:
    assert (Bytes().vocab_size, Bytes().boundary, Bytes(False).vocab_size, Bytes(False).boundary) == (
        257,
        256,
        256,
        None,
    )
    both = Characters("hello"), Characters("hello", False)
    assert [(t.vocab_size, t.boundary) for t in both] == [(5, 4), (4, None)]
    trained = train_sentencepiece(SAMPLE, 350, True), train_sentencepiece(SAMPLE, 350, False)
    assert [(t.vocab_size, t.boundary) for t in trained] == [(350, 1), (350, None)]


def test_boundaries_are_left_out_of_decoded_text_and_foreign_ids_refused(pieces: SentencePiece) -> None:
    for tokenizer in (Bytes(), Characters("abc"), pieces):
        ids = [tokenizer.boundary, *tokenizer.encode("ab").tolist(), tokenizer.boundary]
        assert tokenizer.decode(ids) == "ab"
        for wrong in (-1, tokenizer.vocab_size):
            with pytest.raises(ValueError, match="ids must be in"):
                tokenizer.decode([wrong])


def test_bytes_of_counts_the_text(pieces: SentencePiece) -> None:
    text = "def żółć(▁):\n\t紅 "
    for tokenizer in (Bytes(), Characters(text), pieces):
        assert sum(tokenizer.bytes_of(int(i)) for i in tokenizer.encode(text)) == len(text.encode())


def test_an_unknown_character_is_named() -> None:
    with pytest.raises(UserError, match=r"'ż' \(U\+017C\)"):
        Characters("abc").encode("abżc")
    with pytest.raises(UserError, match="U\\+10FFFF"):
        Characters("abc").encode("\U0010ffff")


def test_training_repeats_itself_and_small_texts_give_what_they_have() -> None:
    assert train_sentencepiece(SAMPLE, 400, True).model == train_sentencepiece(SAMPLE, 400, True).model
    small = train_sentencepiece(["ab ab"], 4096, True)
    assert 258 < small.vocab_size < 300
    holds(small, "ab ż")


def test_more_characters_than_ids() -> None:
    many = "".join(chr(0x4E00 + i) for i in range(3000))
    tokenizer = train_sentencepiece([many, "一二三" * 50], 300, True)
    assert tokenizer.vocab_size == 300
    holds(tokenizer, many)


def test_no_sentence_is_too_long_to_learn_from() -> None:
    """sentencepiece skips long lines without a word."""
    tokenizer = train_sentencepiece(["lorem ipsum " * 20_000], 300, True)
    assert len(tokenizer.encode("lorem ipsum")) <= 3


def test_nothing_to_learn_from_is_refused() -> None:
    for texts in ([], ["\t\t"]):
        with pytest.raises(UserError, match="no text to learn"):
            train_sentencepiece(texts, 400, True)


def test_a_given_model_that_normalises_shows(tmp_path: Path) -> None:
    path = tmp_path / "their.model"
    path.write_bytes(given_model())
    theirs = tokenizers.open_path(str(path), True)
    assert theirs.boundary == 2 and theirs.vocab_size == theirs.processor.vocab_size() and not theirs.exact
    assert theirs.decode(theirs.encode("the cat")) == "the cat"
    assert theirs.decode(theirs.encode("the  ①")) != "the  ①"
    long = "a " + "the cat " * 3000 + "sat"
    assert theirs.decode(theirs.encode(long)) == long  # a model that puts a space in front gets its text whole


def test_a_given_model_without_sentence_ends_gets_one_more_id() -> None:
    theirs = SentencePiece(given_model(bos_id=-1, eos_id=-1), True)
    assert theirs.boundary == theirs.processor.vocab_size() == theirs.vocab_size - 1
    assert theirs.decode([*theirs.encode("cat"), theirs.boundary]) == "cat"


@pytest.mark.parametrize("content", [b"", b"junk", b"\x0a\xff\xff\xff"])
def test_what_is_no_model_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.model").write_bytes(content)
    with pytest.raises(ConfigError, match=r"data\.tokenizer.*x\.model"):
        tokenizers.open_path(str(tmp_path / "x.model"), True)
    with pytest.raises(ConfigError, match="cannot be read"):
        tokenizers.open_path(str(tmp_path / "missing.model"), True)


def test_saved_and_loaded(tmp_path: Path, pieces: SentencePiece) -> None:
    kinds = [Bytes(), Bytes(False), Characters("a\u0301\n "), Characters("ab", False), pieces]
    for n, tokenizer in enumerate(kinds):
        folder = tmp_path / str(n)
        folder.mkdir()
        tokenizer.save(folder)
        again = tokenizers.load(folder)
        assert again.fingerprint == tokenizer.fingerprint and type(again) is type(tokenizer)
        assert (again.vocab_size, again.boundary) == (tokenizer.vocab_size, tokenizer.boundary)
        assert again.encode("a").tolist() == tokenizer.encode("a").tolist()
    assert len({t.fingerprint for t in kinds}) == len(kinds)


def test_damaged_descriptions_are_refused(tmp_path: Path, pieces: SentencePiece) -> None:
    with pytest.raises(UserError, match="holds no tokenizer"):
        tokenizers.load(tmp_path)
    for text in ("", "[]", "{}", '{"format": 1, "kind": "magic", "boundary": true}', '{"format": 2}', '{"format": 1}'):
        with pytest.raises(UserError):
            tokenizers.from_files({"tokenizer.json": text.encode()})
    with pytest.raises(UserError):
        tokenizers.from_files(
            {"tokenizer.json": json.dumps({"format": 1, "kind": "characters", "boundary": 1}).encode()}
        )
    files = pieces.files()
    files["tokenizer.model"] = files["tokenizer.model"][:-1]
    with pytest.raises(UserError, match="damaged"):
        tokenizers.from_files(files)
