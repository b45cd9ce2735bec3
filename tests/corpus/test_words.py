"""Words as arrays are the words that Python finds, and equal hashes are equal words."""

from __future__ import annotations

import random
import re
import sys
import time
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm_jax.corpus import words as W

TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=200)


def cut(text: str, found: W.Words) -> list[str]:
    return [text[s:e] for s, e in zip(found.starts, found.ends, strict=True)]


@given(TEXT)
@settings(max_examples=150, deadline=None)
def test_words_by_space_are_those_of_split(text: str) -> None:
    assert cut(text, W.by_space(text)) == text.split()


@given(TEXT)
@settings(max_examples=150, deadline=None)
def test_equal_words_have_equal_hashes_and_others_have_not(text: str) -> None:
    doubled = f"{text} {text}"
    found = W.by_space(doubled)
    of: dict[str, int] = {}
    for word, value in zip(cut(doubled, found), found.hashes.tolist(), strict=True):
        assert of.setdefault(word, value) == value
    assert len(set(of.values())) == len(of)


def test_normalised_words_are_runs_of_letters_and_digits_in_lower_case() -> None:
    text = "It's  Done: 3.14,\n\nÉté-TIME_x"
    assert cut(text.lower(), W.normalised(text)) == re.findall(r"[^\W_]+", text.lower())


def test_scripts_without_spaces_have_a_word_a_character() -> None:
    text = "Tokyo東京 2020年、ไทยok"
    assert cut(text.lower(), W.normalised(text)) == ["tokyo", "東", "京", "2020", "年", "ไ", "ท", "ย", "ok"]


def test_layout_case_and_punctuation_do_not_count() -> None:
    a, b = W.normalised("The cat, (sat) on:\nthe MAT!"), W.normalised("the cat sat on the mat")
    assert a.hashes.tolist() == b.hashes.tolist()


@pytest.mark.parametrize("block", [3, 7, 64])
def test_blocks_change_nothing(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(0)
    text = "".join(rng.choice("abcde 東\n") for _ in range(500)).replace("a", " ")
    whole = W.normalised(text), W.by_space(text)
    monkeypatch.setattr(W, "BLOCK", block)
    W._powers.cache_clear()
    try:
        parts = W.normalised(text), W.by_space(text)
        longest = max(len(w) for w in text.split())
    finally:
        monkeypatch.undo()
        W._powers.cache_clear()
    if block > longest:  # a word that is longer than a block is cut
        assert all((x == y).all() for a, b in zip(whole, parts, strict=True) for x, y in zip(a, b, strict=True))
    else:
        assert "".join(cut(text, parts[1])) == "".join(text.split())


def test_ngrams_are_equal_where_the_words_are() -> None:
    found = W.normalised("a b c d a b c e")
    grams = W.ngrams(found.hashes, 3)
    assert len(grams) == 6 and grams[0] == grams[4] and len(set(grams.tolist())) == 5
    assert len(W.ngrams(found.hashes, 8)) == 1 and len(W.ngrams(found.hashes, 9)) == 0
    assert W.ngrams(found.hashes[[0, 1, 2]], 3)[0] != W.ngrams(found.hashes[[1, 0, 2]], 3)[0]


def test_hashes_of_many_words_do_not_collide() -> None:
    text = " ".join(map(str, range(200_000)))
    assert len(np.unique(W.by_space(text).hashes)) == 200_000


@given(st.lists(TEXT, max_size=6))
@settings(max_examples=100, deadline=None)
def test_a_batch_has_the_words_of_each_text(texts: list[str]) -> None:
    found, offsets = W.normalised_batch(texts)
    assert len(offsets) == len(texts) + 1
    for number, text in enumerate(texts):
        part, alone = slice(offsets[number], offsets[number + 1]), W.normalised(text)
        for a, b in zip(found, alone, strict=True):
            assert a[part].tolist() == b.tolist()


def test_no_character_of_a_word_is_out_of_sight() -> None:
    beyond = map(chr, range(W._ASSIGNED, sys.maxunicode + 1))
    assert not any(c.isalnum() or c.isspace() for c in beyond)


def test_the_form_of_unicode_and_what_nobody_sees_do_not_count() -> None:
    text = "Señor Müller à la carte"
    unseen = "Se\u00adñor M\u200büller\u200d à \u2060la ca\ufeffrte"
    wanted = W.normalised(text).hashes.tolist()
    for other in (unicodedata.normalize("NFD", text), unseen, unicodedata.normalize("NFD", unseen)):
        assert W.normalised(other).hashes.tolist() == wanted
        assert W.normalised_batch([other, text])[0].hashes.tolist() == wanted * 2


def test_combining_marks_are_parts_of_words() -> None:
    hindi = "यह हिन्दी में लिखा हुआ एक छोटा सा वाक्य है जी"
    assert cut(hindi, W.normalised(hindi)) == hindi.split()
    assert len(W.normalised("தமிழ் மொழி, বাংলা ভাষা").hashes) == 4
    assert len(W.normalised("\u2764\ufe0f \u2764\ufe0f").hashes) == 0  # a heart and how it is drawn


def test_endless_marks_take_no_endless_time() -> None:
    start = time.monotonic()
    assert len(W.normalised("a" + "\u0300\u0316" * 100_000).hashes) == 1
    assert time.monotonic() - start < 2
