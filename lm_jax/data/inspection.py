"""What a step trains on, for a person to look at: rows decoded, their documents told apart, positions, loss mask."""

from __future__ import annotations

import html
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from lm_jax.data.packing import Batch, Rows
from lm_jax.data.tokenizers import Tokenizer
from lm_jax.errors import UserError

_CHARACTER = 8  # tokens at most that one character is spelt by
_ANSI = ("\033[36m", "\033[33m", "\033[35m", "\033[32m")
_MASKED, _PLAIN = "\033[2m\033[9m", "\033[0m"
_PASTEL = ("#d6eaf8", "#fdebd0", "#e8daef", "#d5f5e3")


class Span(NamedTuple):
    """Tokens that are decoded together: one, or those that spell one character.

    Attributes:
      text: what they say.
      ids: the tokens.
      position: of the first in its document.
      counted: whether the loss counts predicting what follows each of them.
    """

    text: str
    ids: tuple[int, ...]
    position: int
    counted: bool


class Segment(NamedTuple):
    """A document's part of a row: what it is called, where in the document it starts, its spans."""

    document: str
    start: int
    spans: list[Span]


class Row(NamedTuple):
    """A row `n` of a plan: its segments, and how many places are padding."""

    number: int
    segments: list[Segment]
    padding: int


def rows_of(batch: Batch, plan: Rows, numbers: range, tokenizer: Tokenizer, prompts: bool = False) -> list[Row]:
    """A batch decoded.

    Args:
      batch: rows `[B, T]` as `read_rows` makes them.
      plan: whose rows they are.
      numbers: which, `[B]`.
      tokenizer: of the tokens.
      prompts: whether the documents begin with prompts, which the loss is not to count.

    Raises:
      UserError: where the loss counts nothing at all, or padding, or every prompt: such a batch teaches nothing, or
        what it should not.
    """
    mask, padding = batch["loss_mask"], batch["segment_ids"] < 0
    if not mask.any():
        raise UserError("the loss mask is zero everywhere: nothing in this batch would be learnt")
    if (mask & padding).any():
        b, t = np.argwhere(mask & padding)[0]
        raise UserError(f"row {numbers[b]}: the loss counts padding, at place {t} first")
    if prompts and (mask | padding).all():
        raise UserError("the loss counts every token, although data.prompt_field is set: the prompts are empty")
    found = []
    for b, number in enumerate(numbers):
        segments = []
        pieces = plan.pieces(np.array([number]))
        for segment, (document, start) in enumerate(
            zip(pieces.documents.tolist(), pieces.starts.tolist(), strict=True)
        ):
            here = batch["segment_ids"][b] == segment
            ids, positions, counted = (batch[name][b][here] for name in ("tokens", "positions", "loss_mask"))
            spans = list(_spans(ids, positions, counted, tokenizer))
            segments.append(Segment(plan.name_of(document), start, spans))
        found.append(Row(number, segments, int(padding[b].sum())))
    return found


def _spans(ids: np.ndarray, positions: np.ndarray, counted: np.ndarray, tokenizer: Tokenizer) -> Iterator[Span]:
    at = 0

    def text_of(size: int) -> str:
        """Behind what stands before it: at a text's beginning some tokenizers leave out a space."""
        begin = max(0, at - _CHARACTER)
        before = tokenizer.decode(ids[begin:at])
        return tokenizer.decode(ids[begin : at + size])[len(before) :]

    while at < len(ids):
        for size in range(1, _CHARACTER + 1):
            text = text_of(size)
            if "\ufffd" not in text or at + size >= len(ids):
                break
        else:
            size, text = 1, text_of(1)
        yield Span(text, tuple(ids[at : at + size].tolist()), int(positions[at]), bool(counted[at]))
        at += size


def summary(rows: list[Row], length: int) -> str:
    """Rows, segments, padding and counted places, in one line."""
    spans = [span for row in rows for segment in row.segments for span in segment.spans]
    counted = sum(len(span.ids) for span in spans if span.counted)
    places = len(rows) * length
    segments = sum(len(row.segments) for row in rows)
    padding = sum(row.padding for row in rows)
    return (
        f"{len(rows)} rows of {length:,}: {segments:,} segments, {padding / places:.1%} padding, the loss counts"
        f" {counted / places:.1%}"
    )


def terminal(rows: list[Row], color: bool = True) -> str:
    """The rows as text: a colour a segment, what the loss does not count struck through."""
    lines = []
    for row in rows:
        lines.append(f"row {row.number}" + (f", {row.padding} places of padding" if row.padding else ""))
        for i, segment in enumerate(row.segments):
            lines.append(f"  segment {i}: {_origin(segment)}")
            text = "".join(_painted(span, _ANSI[i % len(_ANSI)], color) for span in segment.spans)
            lines.append(text + (_PLAIN if color else ""))
    return "\n".join(lines)


def _origin(segment: Segment) -> str:
    tokens = sum(len(span.ids) for span in segment.spans)
    first = segment.spans[0].position if segment.spans else 0
    return (
        f"{segment.document}, its tokens {segment.start:,} to {segment.start + tokens - 1:,},"
        f" at positions {first:,} to {first + tokens - 1:,}"
    )


def _painted(span: Span, paint: str, color: bool) -> str:
    # What a document says must not steer a terminal.
    text = "".join(c if c in "\n\t" or c.isprintable() else c.encode("unicode_escape").decode() for c in span.text)
    if not color:
        return text
    return (paint if span.counted else _PLAIN + _MASKED) + text + (_PLAIN if not span.counted else "")


def page(rows: list[Row], title: str, about: str) -> str:
    """The rows as one HTML page that opens from disk; the pointer over a token shows its id and position."""
    body = []
    for row in rows:
        body.append(f"<h2>row {row.number}</h2>")
        for i, segment in enumerate(row.segments):
            spans = "".join(_marked(span) for span in segment.spans)
            body.append(f"<p class=about>segment {i}: {_origin(segment)}</p>")
            body.append(f'<pre style="background:{_PASTEL[i % len(_PASTEL)]}">{spans}</pre>')
        if row.padding:
            body.append(f"<p class=about>{row.padding} places of padding</p>")
    style = (
        "body{font-family:sans-serif;max-width:70em;margin:2em auto}pre{white-space:pre-wrap;padding:.6em;margin:0}"
        ".about{color:#555;margin:.8em 0 .2em}.off{color:#999;text-decoration:line-through}span:hover{background:#fff}"
    )
    return (
        f"<!doctype html><meta charset=utf-8><title>{html.escape(title)}</title><style>{style}</style>"
        f"<h1>{html.escape(title)}</h1><p>{html.escape(about)}</p>" + "\n".join(body)
    )


def _marked(span: Span) -> str:
    ids = " ".join(map(str, span.ids))
    off = "" if span.counted else " class=off"
    return f'<span title="id {ids}, position {span.position}"{off}>{html.escape(span.text)}</span>'
