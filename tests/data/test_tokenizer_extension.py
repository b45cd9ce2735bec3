"""A vocabulary that takes a further script keeps all it had: ids, and how Latin text is spelt."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm_jax.data.tokenizers import Bytes, HuggingFace, SentencePiece, Tiktoken, Tokenizer, model_file
from lm_jax.data.tokenizers import extend as module
from lm_jax.data.tokenizers.extend import SCRIPTS, Extended, begins_in_scripts, extend
from lm_jax.data.tokenizers.report import coverage, measure, table
from lm_jax.errors import UserError
from tests.data.hostile import HOSTILE, nasty
from tests.data.test_tokenizer_libraries import REAL, ignore, learnt, ranks_of

WORDS = ["天地", "玄黄", "宇宙", "洪荒", "日月", "盈昃", "辰宿", "列张", "寒来", "暑往", "秋收", "冬藏"]
WORDS += ["русский", "язык", "ελληνικά", "한국어", "ひらがな", "カタカナ"]
KINDS = ["byte_bpe", "tiktoken", "bpe", "unigram"]


def chinese(seed: int, words: int) -> str:
    random = np.random.default_rng(seed)
    return "".join(
        str(w) + "，。\n "[i] for w, i in zip(random.choice(WORDS, words), random.integers(0, 4, words), strict=True)
    )


@pytest.fixture(scope="module")
def pairs() -> dict[str, tuple[Tokenizer, Extended]]:
    plain = learnt()
    assert isinstance(plain, HuggingFace)
    old: dict[str, Tokenizer] = {kind: learnt(kind=kind, whitespace_runs=5) for kind in ("byte_bpe", "bpe", "unigram")}
    old["tiktoken"] = Tiktoken(ranks_of(plain), "o200k_base", {"<|endoftext|>": 900})
    texts = [chinese(seed, 400) for seed in range(8)]
    return {kind: (old[kind], extend(old[kind], texts, 120, ignore)) for kind in KINDS}


def without_scripts(text: str) -> str:
    return "".join(c for c in text if not any(a <= ord(c) <= b for a, b in SCRIPTS))


@pytest.mark.parametrize("kind", KINDS)
def test_unseen_text_needs_at_most_half_the_tokens(kind: str, pairs: dict[str, tuple[Tokenizer, Extended]]) -> None:
    old, new = pairs[kind]
    unseen = chinese(100, 500)
    before, after = old.encode(unseen), new.tokenizer.encode(unseen)
    assert 2 * len(after) <= len(before) and new.tokenizer.decode(after) == unseen
    assert coverage(new.tokenizer, [unseen]) > coverage(old, [unseen])


@pytest.mark.parametrize("kind", KINDS)
def test_latin_text_is_spelt_as_it_was(kind: str, pairs: dict[str, tuple[Tokenizer, Extended]]) -> None:
    old, new = pairs[kind]
    for text in map(without_scripts, [*REAL, *HOSTILE]):
        assert new.tokenizer.encode(text).tolist() == old.encode(text).tolist()


near = st.text(
    st.one_of(st.sampled_from("“”—…‘\u2000\u200d\ufe0f👩é\u0301 ñß→\u02ff￾"), st.characters(exclude_categories=["Cs"]))
)


@settings(deadline=None, max_examples=200)
@given(text=near)
def test_any_text_without_the_scripts_is_spelt_as_it_was(
    text: str, pairs: dict[str, tuple[Tokenizer, Extended]]
) -> None:
    for old, new in pairs.values():
        kept = without_scripts(text)
        assert new.tokenizer.encode(kept).tolist() == old.encode(kept).tolist()


@settings(deadline=None, max_examples=100)
@given(text=st.one_of(nasty, st.text("天地玄黄宇，。\n 宙язык一x", max_size=30)))
def test_any_text_comes_back(text: str, pairs: dict[str, tuple[Tokenizer, Extended]]) -> None:
    for _, new in pairs.values():
        assert new.tokenizer.decode(new.tokenizer.encode(text)) == text


@pytest.mark.parametrize("kind", KINDS)
def test_old_ids_keep_their_meaning_and_new_ones_say_what_spelt_them(
    kind: str, pairs: dict[str, tuple[Tokenizer, Extended]]
) -> None:
    old, new = pairs[kind]
    made, first = new.tokenizer, old.vocab_size
    assert made.vocab_size == first + len(new.spelt) and 60 < len(new.spelt) <= 120
    assert made.boundary == old.boundary and made.special == old.special and made.exact == old.exact
    for i in set(range(first)) - set(old.special.values()):
        assert made.decode([i]) == old.decode([i])
    for i, spelt in enumerate(new.spelt, start=first):
        assert all(0 <= part < first for part in spelt) and len(spelt) > 1
        assert made.decode([i]) == old.decode(spelt) and made.bytes_of(i) == sum(map(old.bytes_of, spelt))
    used = np.unique(made.encode(chinese(100, 2000)))
    assert (used >= first).sum() > 15


def test_an_extension_repeats_itself_and_can_be_extended(pairs: dict[str, tuple[Tokenizer, Extended]]) -> None:
    for old, new in pairs.values():
        texts = [chinese(seed, 400) for seed in range(8)]
        assert extend(old, texts, 120, ignore).tokenizer.files() == new.tokenizer.files()
        again = extend(new.tokenizer, ["ไทยภาษา ภาษา " * 50], 12, ignore)
        assert again.tokenizer.vocab_size > new.tokenizer.vocab_size
        text = chinese(3, 100)
        assert again.tokenizer.encode(text).tolist() == new.tokenizer.encode(text).tolist()


def test_a_piece_begins_with_what_only_these_scripts_have() -> None:
    """Its first two bytes tell whether a character is in `SCRIPTS`: for both ends of every block of 64."""
    for code in (c for c in range(0x110000) if c % 64 in (0, 63) and not 0xD800 <= c < 0xE000):
        inside = any(a <= code <= b for a, b in SCRIPTS)
        assert begins_in_scripts(chr(code).encode()[:2]) == inside, hex(code)
    for piece in (b"", b"a", b"\xe4", b"\x80\x9c", b" \xe4\xb8"):
        assert not begins_in_scripts(piece)


def test_merges_follow_the_counts() -> None:
    pieces = {0: b"\xe4\xb8", 1: b"\x80", 2: b"\xe4\xb9", 3: b"x"}
    words = {(0, 1, 0, 1): 5, (2, 1): 7, (3, 1): 50, (0, 1, 2, 1): 1}
    merges = module.learn_merges(words, pieces, 10, 8, ignore)
    assert merges == [(0, 1), (2, 1), (10, 10)]  # 11 times, 8 times, 5 times; (10, 11) once is too rare, x no script


def test_what_cannot_be_extended_is_named(pairs: dict[str, tuple[Tokenizer, Extended]]) -> None:
    text = [chinese(0, 50)]
    old = pairs["byte_bpe"][0]
    with pytest.raises(UserError, match="no character of a script other than Latin"):
        extend(old, ["only English — “quoted”"], 50, ignore)
    for other in (Bytes(), learnt(kind="wordpiece", vocab_size=900)):
        with pytest.raises(UserError, match=f"one of kind {other.kind!r} cannot be extended"):
            extend(other, text, 50, ignore)
    tiktoken = pairs["tiktoken"][0]
    assert isinstance(tiktoken, Tiktoken)
    with pytest.raises(UserError, match="boundary is no token of its own"):
        extend(Tiktoken(tiktoken.ranks, "gpt2", {}), text, 50, ignore)


def test_a_report_has_the_numbers(pairs: dict[str, tuple[Tokenizer, Extended]]) -> None:
    row = measure("bytes", Bytes(), "x", ["ab 天地", "cd"])
    assert (row.tokens, row.bytes_per_token, row.characters_per_token, row.vocab_size) == (11, 1.0, 7 / 11, 257)
    assert row.fertility == 11 / 4 and row.unchanged  # ab, 天, 地, cd
    assert row.coverage == 4 / 6  # a, b, c, d of them and two characters in bytes
    assert table([row]).splitlines()[1].split()[:4] == ["bytes", "x", "257", "11"]
    lossy = measure("w", learnt(kind="wordpiece", vocab_size=900), "x", ["a  b"])
    assert not lossy.unchanged and "alters text" in table([lossy])


def test_the_penalty_of_the_unknown_stays_in_a_unigram_model(pairs: dict[str, tuple[Tokenizer, Extended]]) -> None:
    """The library takes it from the lowest score of all pieces."""
    lowest = []
    for tokenizer in (pairs["unigram"][0], pairs["unigram"][1].tokenizer):
        assert isinstance(tokenizer, SentencePiece)
        lowest.append(min(p.score for p in model_file.pieces(tokenizer.model) if p.type == model_file.NORMAL))
    assert lowest[0] == lowest[1]
