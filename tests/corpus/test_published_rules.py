"""Gopher's and C4's rules give datatrove's verdicts where both follow the paper, and the paper's where they part."""

from __future__ import annotations

import collections
import random
import re
import time
from pathlib import Path

import pytest
from datatrove.data import Document
from datatrove.pipeline.filters import C4QualityFilter, GopherQualityFilter, GopherRepetitionFilter
from datatrove.utils.word_tokenizers import WordTokenizer

from lm_jax.corpus import gopher, web
from lm_jax.corpus import words as W
from lm_jax.corpus.config import CleaningConfig
from lm_jax.data.sources import EMBEDDED, find_files
from tests.corpus.texts import prose

C = CleaningConfig()


class BySpace(WordTokenizer):
    """Words as the papers have them, in the place of spaCy's; sentences by their marks."""

    def word_tokenize(self, text: str) -> list[str]:
        return text.split()

    def sent_tokenize(self, text: str) -> list[str]:
        return [text[a:b] for a, b in self.span_tokenize(text)]

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        ends = [m.end() for m in re.finditer(r"[.!?]+[\"'”’)\]]*(?=\s|$)", text)] or [len(text)]
        return list(zip([0, *ends[:-1]], ends, strict=True))


def texts() -> list[str]:
    """Programs, their comments, prose, and prose with trouble in it."""
    found = [Path(p).read_text("utf-8", errors="ignore") for p in find_files(EMBEDDED).paths[::6]]
    found += ["\n".join(re.findall(r"#\s+(.{20,})", text)) for text in found]
    found = [text[:20_000] for text in found if text.strip()]
    base = [prose(seed, 12) for seed in range(30)]
    line = "this line stands here more than once, and it is long.\n"
    spoilt = [f"{text}\n{line * n}" for n, text in enumerate(base)]
    spoilt += [text.replace(" the ", "... ") for text in base] + [text.replace(" ", " #") for text in base]
    spoilt += ["\n".join(f"-{s}" for s in text.split(". ")) for text in base]
    spoilt += [re.sub(r"\b\w*[aeiou]{1}\b", "12", text) for text in base]
    return found + base + spoilt


def verdict(result: bool | tuple[bool, str]) -> str:
    return result[1] if isinstance(result, tuple) else ""


def test_the_quality_filter_drops_what_datatrove_s_drops() -> None:
    theirs = GopherQualityFilter(language=BySpace("words"))
    seen = collections.Counter[str]()
    for text in texts():
        ours, other = gopher.quality(text, C), verdict(theirs.filter(Document(text=text, id="")))
        if "bullet" in ours or re.search(r"^\s*[*‣▪–]", text, re.MULTILINE):
            continue  # more marks are bullets here
        punctuation = sum(not re.search(r"\w", w) for w in text.split())
        if punctuation:  # datatrove leaves words without a letter or digit out of the count and the mean
            continue
        seen[other] += 1
        assert bool(ours) == bool(other), (ours, other, text[:200])
    assert len(seen) >= 4 and seen[""] > 20, seen  # of each there was something to agree on


def test_the_repetition_filter_drops_what_datatrove_s_drops() -> None:
    theirs = GopherRepetitionFilter(language=BySpace("words"))
    agreed = collections.Counter[bool]()
    for text in texts():
        ours, other = gopher.repetition(text), verdict(theirs.filter(Document(text=text, id="")))
        if not other and ours.startswith("duplicate runs"):
            continue  # words in the overlap of two runs: see the next test
        agreed[bool(ours)] += 1
        assert bool(ours) == bool(other), (ours, other)
    assert agreed[True] > 20 and agreed[False] > 20, agreed


@pytest.mark.parametrize("n", [5, 7, 10])
def test_duplicate_runs_are_those_of_a_plain_count(n: int) -> None:
    for seed in range(12):
        text = prose(seed, 9)
        text = f"{text} {text[: 60 * seed]} {text[200:420]}"
        words = text.split()
        found = W.by_space(text)
        seen: set[tuple[str, ...]] = set()
        covered: set[int] = set()
        for i in range(len(words) - n + 1):
            gram = tuple(words[i : i + n])
            if gram in seen:
                covered |= set(range(i, i + n))
            seen.add(gram)
        lengths = found.ends - found.starts
        assert gopher.duplicate_ngrams(found.hashes, lengths, n) == sum(len(words[i]) for i in covered)


@pytest.mark.parametrize("n", [2, 3, 4])
def test_the_most_frequent_run_is_that_of_a_plain_count(n: int) -> None:
    for seed in range(12):
        text = prose(seed, 30)
        words = text.split()
        counts = collections.Counter(" ".join(words[i : i + n]) for i in range(len(words) - n + 1))
        gram, count = counts.most_common(1)[0]
        found = W.by_space(text)
        assert gopher.top_ngram(found.hashes, found.ends - found.starts, n) == len(gram) * count


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("word " * 49, "fewer than 50 words"),
        ("the and to of " * 30_000, "more than 100000 words"),
        ("a b c d " * 20, "words too short in the mean"),
        ("incomprehensibilities " * 60, "words too long in the mean"),
        ("the word #tag and that " * 15, "too many hash signs"),
        ("the words and that... " * 15, "too many ellipses"),
        ("\n".join("- the item and that" for _ in range(20)), "too many lines begin with a bullet"),
        (
            "\n".join("the words that go and go on with be and to of the last…" for _ in range(20)),
            "too many lines end with an ellipsis",
        ),
        ("the and that have 1234 5678 " * 12, "fewer than 80% of words have a letter"),
        ("unlike common english prose " * 15, "fewer than 2 English stop words"),
    ],
)
def test_each_limit_of_the_quality_filter_drops(text: str, reason: str) -> None:
    assert gopher.quality(text, C) == reason


def test_words_with_commas_are_words_as_in_the_paper() -> None:
    """spaCy would make each comma a word of its own, and less than 80% of them would have a letter."""
    text = "The list, that I have, has apples, pears, plums, figs, and nuts, with more, to come, of course. " * 4
    assert gopher.quality(text, C) == ""


# ------------------------------------------------------------------------------------------------------------------ C4


def c4(text: str) -> tuple[str, str]:
    return web.c4(text, C, collections.Counter())


def test_c4_keeps_the_lines_that_datatrove_s_keeps() -> None:
    theirs = C4QualityFilter(language=BySpace("sentences"), min_words_per_line=5, min_num_sentences=3)
    kept = dropped = 0
    for text in texts():
        text = "\n".join(line for line in text.split("\n") if not line.rstrip().endswith("'"))
        document = Document(text=text, id="")
        other = verdict(theirs.filter(document))
        ours, reason = c4(text)
        assert bool(reason) == bool(other), (reason, other)
        if not other:
            assert ours == document.text
        kept, dropped = kept + (not other), dropped + bool(other)
    assert kept > 20 and dropped > 20


@pytest.mark.parametrize(
    ("line", "stays"),
    [
        ("This is a line with five words.", True),
        ('He said "yes, this is a line."', True),
        ("This line just goes on and on...", False),
        ("A line without an end mark at all", False),
        ("Only four words here.", False),
        ("Please enable Javascript to see this page.", False),
        ("By this you accept our privacy policy, all of it.", False),
        ("A word like " + "x" * 1001 + " is a mistake of course.", False),
        ("It's the dog of the girls who said 'stay here now'", False),
    ],
)
def test_c4_keeps_sentences(line: str, stays: bool) -> None:
    others = "\n".join(f"Number {i} is a sentence that is kept." for i in range(4))
    text, reason = c4(f"{line}\n{others}")
    assert not reason and text == (f"{line}\n{others}" if stays else others)


@pytest.mark.parametrize("words", ["Lorem ipsum dolor sit amet, and so on.", "if (x) { return the value of it."])
def test_c4_drops_pages_by_what_they_hold(words: str) -> None:
    others = "\n".join(f"Number {i} is a sentence that is kept." for i in range(4))
    assert c4(others)[1] == "" and c4(f"{others}\n{words}")[1]


def test_c4_takes_citations_out_and_counts_sentences() -> None:
    assert c4("The cat sat on it.[12] The dog did not.[citation needed]\nAnd the bird flew away then.")[0] == (
        "The cat sat on it. The dog did not.\nAnd the bird flew away then."
    )
    assert c4("Only two sentences are here. This is the second.")[1] == "fewer than 3 sentences"


def test_the_limits_are_those_of_the_paper_as_datatrove_has_them() -> None:
    """Table A1 and the numbers of appendix A1.1, copied by other people."""
    theirs = GopherRepetitionFilter()
    assert (theirs.dup_line_frac, theirs.dup_para_frac) == (gopher.LINES, gopher.PARAGRAPHS)
    assert (theirs.dup_line_char_frac, theirs.dup_para_char_frac) == (
        gopher.LINE_CHARACTERS,
        gopher.PARAGRAPH_CHARACTERS,
    )
    assert (theirs.top_n_grams, theirs.dup_n_grams) == (gopher.TOP_NGRAMS, gopher.DUPLICATE_NGRAMS)
    quality = GopherQualityFilter()
    assert quality.stop_words == gopher.STOP_WORDS
    limits = {
        "min_words": quality.min_doc_words,
        "max_words": quality.max_doc_words,
        "min_word_length": quality.min_avg_word_length,
        "max_word_length": quality.max_avg_word_length,
        "max_symbols": quality.max_symbol_word_ratio,
        "max_bullet_lines": quality.max_bullet_lines_ratio,
        "max_ellipsis_lines": quality.max_ellipsis_lines_ratio,
        "min_alphabetic_words": quality.max_non_alpha_words_ratio,
        "min_stop_words": quality.min_stop_words,
    }
    assert limits == {name: getattr(C, name) for name in limits}


def test_runs_of_marks_are_counted_in_linear_time() -> None:
    plain = re.compile(r"[.!?]+[\"'”’)\]]*(?=\s|$)")
    rng = random.Random(0)
    for _ in range(2000):
        text = "".join(rng.choices("ab .!?\"')]", k=30))
        assert web._SENTENCE_END.findall(text) == plain.findall(text)
    start = time.monotonic()
    web.c4(("." * 998 + "x ") * 400 + ".", C, collections.Counter())
    assert time.monotonic() - start < 1


def test_line_feeds_around_a_text_are_no_lines() -> None:
    assert gopher.repetition(f"\n{prose(3, 3).replace(chr(10), ' ')}\n") == ""
