"""Each rule keeps, changes and drops what it says, and counts it."""

from __future__ import annotations

import time
import unicodedata
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm_jax.corpus.config import CleaningConfig
from lm_jax.corpus.rules import IPV4, IPV6, MAIL, PHONE, RULES, UNKNOWN, Document, Dropped, identify
from lm_jax.errors import ConfigError
from tests.corpus.texts import prose

C = CleaningConfig()


def apply(rule: str, text: str, c: CleaningConfig = C, markup: bool = False) -> tuple[str | Dropped, dict[str, int]]:
    document = Document(text, "here", markup)
    found = RULES[rule](document, c)
    return found, {name: n for name, n in document.pieces.items() if n}


@pytest.mark.parametrize("rule", RULES)
def test_prose_goes_through_every_rule_unchanged(rule: str) -> None:
    text = "\n".join(line for line in prose(3, 40).split("\n") if line)
    assert apply(rule, text) == (text, {})


# ------------------------------------------------------------------------------------------------------------- unicode


@pytest.mark.parametrize(
    ("text", "after"),
    [
        ("cafe\u0301", "café"),
        ("a\r\nb\rc", "a\nb\nc"),
        ("\ufeffstart", "start"),
        ("a\x00b\x07c\x1bd", "abcd"),
        ("tab\tstays", "tab\tstays"),
        ("one\u2028two\u2029three", "one\ntwo\n\nthree"),
        ("\x85next line", "\nnext line"),
        ("가", "가"),
        ("page\x0cFirst\x0bsecond\x1cthird", "page\nFirst\nsecond\nthird"),
    ],
)
def test_unicode_is_put_in_order(text: str, after: str) -> None:
    assert apply("unicode", text)[0] == after


@given(st.text(st.characters(exclude_categories=("Cs",)), max_size=120))
@settings(max_examples=150, deadline=None)
def test_unicode_gives_what_it_would_leave_alone(text: str) -> None:
    found = apply("unicode", text, CleaningConfig(max_replaced=1.0))[0]
    if isinstance(found, Dropped):
        assert not "".join(c for c in text if unicodedata.category(c) not in ("Cc", "Cn") and c != "\ufeff").strip()
    else:
        assert apply("unicode", found)[0] == found and unicodedata.is_normalized("NFC", found)
        assert not any(unicodedata.category(c) == "Cc" and c not in "\n\t" for c in found)


def test_what_decoding_has_spoilt_is_dropped() -> None:
    assert apply("unicode", "a" * 98 + "\ufffd\ufffd")[0] == Dropped("spoilt by decoding (U+FFFD)")
    assert apply("unicode", "a" * 99 + "\ufffd")[0] == "a" * 99 + "\ufffd"
    assert isinstance(apply("unicode", " \n\t")[0], Dropped)


def test_endless_combining_marks_are_dropped_before_they_are_put_in_order() -> None:
    start = time.monotonic()
    found = apply("unicode", "a" + "\u0300\u0316" * 100_000)[0]
    assert found == Dropped("more than 100 combining marks in a row") and time.monotonic() - start < 2
    assert isinstance(apply("unicode", "a" + "\u0300\u0316" * 50)[0], str)


# ------------------------------------------------------------------------------------------------------------ language

SENTENCES = {
    "en": "The committee met on Tuesday afternoon to discuss the budget for the coming year.",
    "de": "Der Ausschuss traf sich am Dienstagnachmittag, um über den Haushalt des kommenden Jahres zu beraten.",
    "fr": "Le comité s'est réuni mardi après-midi pour examiner le budget de l'année à venir.",
    "es": "El comité se reunió el martes por la tarde para discutir el presupuesto del próximo año.",
    "zh": "委员会星期二下午开会讨论了明年的预算问题。",
    "ru": "Комитет собрался во вторник днём, чтобы обсудить бюджет на следующий год.",
    "ja": "委員会は火曜日の午後に来年度の予算について話し合いました。",
}


@pytest.mark.parametrize("language", SENTENCES)
def test_languages_are_told_apart(language: str) -> None:
    assert identify(SENTENCES[language])[0] == language
    c = CleaningConfig(languages=("en",))
    found = apply("language", SENTENCES[language], c)[0]
    assert found == (SENTENCES["en"] if language == "en" else Dropped(f"language: {language}"))
    assert apply("language", SENTENCES[language])[0] == SENTENCES[language]


def test_what_is_no_language_is_not_guessed() -> None:
    assert identify("1234 -- 5678 !!!") == (UNKNOWN, 0.0)
    assert identify("") == (UNKNOWN, 0.0)


def test_a_long_text_is_judged_by_more_than_its_start() -> None:
    assert identify(SENTENCES["de"] + " " + (SENTENCES["en"] + "\n") * 200)[0] == "en"


# ------------------------------------------------------------------------------------------------ repetition and lines


def test_repeated_lines_and_paragraphs_go_but_short_ones_stay() -> None:
    long, short = "a line that is long enough to be counted here", "* * *"
    text = "\n".join([long, short, "between", long, short])
    assert apply("repeated_lines", text) == ("\n".join([long, short, "between", short]), {"repeated lines removed": 1})
    text = "\n\n".join([long, short, long, short, f"  {long}"])
    assert apply("repeated_paragraphs", text) == ("\n\n".join([long, short, short]), {"repeated paragraphs removed": 2})


# ------------------------------------------------------------------------------------------------------- personal data


@pytest.mark.parametrize(
    ("text", "after"),
    [
        ("write to ada.l+x@mail.corp.co.uk today", f"write to {MAIL} today"),
        ("(ada@corp.org)", f"({MAIL})"),
        ("ada@corp", "ada@corp"),
        ("@decorator and a @ b", "@decorator and a @ b"),
        ("git@@x.com", "git@@x.com"),
        ("server 8.8.8.8, and", f"server {IPV4}, and"),
        ("8.8.8.8.", f"{IPV4}."),
        ("private 10.0.0.1, 192.168.1.1, 127.0.0.1", "private 10.0.0.1, 192.168.1.1, 127.0.0.1"),
        ("version 1.2.3.4.5 and 300.1.1.1", "version 1.2.3.4.5 and 300.1.1.1"),
        ("at 2606:4700:4700::1111.", f"at {IPV6}."),
        ("x[1::2], std::vector, 12:34:56", "x[1::2], std::vector, 12:34:56"),
        ("::1 and fe80::1", "::1 and fe80::1"),
        ("call +44 20 7946 0958 now", f"call {PHONE} now"),
        ("(415) 867-5309 or 415-867-5309", f"{PHONE} or {PHONE}"),
        ("1-800-867-5309", PHONE),
        ("+49 (30) 901820-12", "+49 (30) 901820-12"),
        ("2012-10-2020, 1,234,567, 3.14159265", "2012-10-2020, 1,234,567, 3.14159265"),
        ("ISBN 978-0-13-110362-7, 555-0123", "ISBN 978-0-13-110362-7, 555-0123"),
        ("邮箱joe@x.com请写，地址8.8.8.8在", f"邮箱{MAIL}请写，地址{IPV4}在"),
        ("地址2606:4700:4700::1111在，電話+81 3 1234 5678です", f"地址{IPV6}在，電話{PHONE}です"),
        ("josé@x.com, info@müller.de", f"{MAIL}, {MAIL}"),
        ("at ::ffff:8.8.8.8, not ::ffff:10.0.0.1", f"at {IPV6}, not ::ffff:10.0.0.1"),
        ("?name=joe@x.com&y=1 foo/joe@x.com", f"?name={MAIL}&y=1 foo/{MAIL}"),
        ("git@github.com:foo/bar, git@a.host.org:x.git", "git@github.com:foo/bar, git@a.host.org:x.git"),
        ("ssh://git@github.com/foo", "ssh://git@github.com/foo"),
        ("joe@x.com: hello", f"{MAIL}: hello"),
        ("dead::beef and add::face", "dead::beef and add::face"),
        ("version 1.2.3.4, v1.2.3.4, v. 1.2.3.4", "version 1.2.3.4, v1.2.3.4, v. 1.2.3.4"),
        ("Section 4.3.2.1 and § 4.3.2.1", "Section 4.3.2.1 and § 4.3.2.1"),
    ],
)
def test_personal_data_is_replaced_and_nothing_else(text: str, after: str) -> None:
    found, pieces = apply("personal_data", text)
    assert found == after or (text.startswith("+49") and found in (after, PHONE))
    assert bool(pieces) == (found != text)


def test_each_kind_of_personal_data_can_be_left() -> None:
    text = "ada@corp.org 8.8.8.8 415-867-5309"
    assert apply("personal_data", text, CleaningConfig(mail=False, ip=False, phone=False))[0] == text
    assert apply("personal_data", text, CleaningConfig(ip=False))[0] == f"{MAIL} 8.8.8.8 {PHONE}"


@given(st.text(st.sampled_from("ab1.@:+-() 9"), max_size=60))
@settings(max_examples=200, deadline=None)
def test_what_stands_in_is_left_alone_the_second_time(text: str) -> None:
    once = apply("personal_data", text)[0]
    assert isinstance(once, str)
    for substitute in (MAIL, IPV4, IPV6):
        assert apply("personal_data", f"x {substitute} y")[0] == f"x {substitute} y"


# ---------------------------------------------------------------------------------------------------------------- HTML


def test_the_main_text_of_a_page_is_kept_without_its_menus() -> None:
    paragraphs = [p.replace("\n", " ") for p in prose(4, 15).split("\n\n")]
    body = "".join(f"<p>{p}</p>" for p in paragraphs)
    page = (
        "<html><head><title>T</title><script>var tracker = 1;</script></head><body><nav><ul><li><a href='/'>Home</a>"
        f"</li><li><a href='/c'>Contact</a></li></ul></nav><article>{body}</article>"
        "<footer><a href='/privacy'>Privacy</a></footer></body></html>"
    )
    found = apply("html", page, markup=True)[0]
    assert isinstance(found, str) and all(p in found for p in paragraphs)
    assert not any(word in found for word in ("tracker", "Contact", "Privacy", "<p>"))
    assert apply("html", page)[0] == page  # a text file that is about HTML


@pytest.mark.parametrize("page", ["", "<html></html>", "<<<>>>", "\x00"])
def test_a_page_without_text_is_dropped(page: str) -> None:
    assert isinstance(apply("html", page, markup=True)[0], Dropped)


# -------------------------------------------------------------------------------------------------------------- limits


@pytest.mark.parametrize(
    "limits",
    [
        {"max_words": -1},
        {"min_word_length": -0.5},
        {"max_word_length": float("nan")},
        {"max_symbols": -0.1},
        {"c4_word_characters": -1},
        {"min_words": 60, "max_words": 50},
        {"min_word_length": 5.0, "max_word_length": 4.0},
    ],
)
def test_limits_that_keep_nothing_are_refused(limits: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"cleaning.{next(iter(limits))}"):
        CleaningConfig(**limits)
