"""What is shown of a batch is what is in it."""

from __future__ import annotations

import re

import numpy as np
import pytest

from lm_jax.data.inspection import page, rows_of, summary, terminal
from lm_jax.data.packing import Batch, Plan, read_rows
from lm_jax.data.tokenizers import Bytes
from lm_jax.errors import UserError

TEXTS = ["one: caf\u00e9 \U0001f600", "two\x1b[2J <b>", "three " * 6]
TOKENIZER = Bytes(True)


class Texts:
    def __init__(self) -> None:
        ends = np.array([TOKENIZER.boundary], np.int32)
        self.documents = [np.concatenate([ends, TOKENIZER.encode(text), ends]) for text in TEXTS]

    def read(self, documents: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
        return np.concatenate([self.documents[d][a:b] for d, a, b in zip(documents, starts, stops, strict=True)])


def made() -> tuple[Batch, Plan]:
    store = Texts()
    lengths = np.array([len(d) for d in store.documents])
    plan = Plan(np.arange(3), lengths, length=40, seed=None, packing="best_fit")
    return read_rows(plan, store, range(plan.rows_per_epoch)), plan


def test_rows_are_decoded_in_whole_characters_with_their_places() -> None:
    batch, plan = made()
    rows = rows_of(batch, plan, range(plan.rows_per_epoch), TOKENIZER)
    shown = {segment.document: "".join(s.text for s in segment.spans) for row in rows for segment in row.segments}
    assert shown == {f"document {i}": text for i, text in enumerate(TEXTS)}
    assert [row.padding for row in rows] == [(batch["segment_ids"][b] < 0).sum() for b in range(len(rows))]
    (first,) = (segment for row in rows for segment in row.segments if segment.document == "document 0")
    smile = next(span for span in first.spans if span.text == "\U0001f600")
    assert len(smile.ids) == 4 and smile.position == 1 + len(TEXTS[0].encode()) - 4
    pairs = sum(len(text.encode()) + 1 for text in TEXTS)
    assert f"{3} segments" in summary(rows, 40) and f"counts {pairs / (40 * len(rows)):.1%}" in summary(rows, 40)


def test_text_cannot_steer_the_terminal_or_the_page() -> None:
    batch, plan = made()
    batch["loss_mask"][0, 2] = False
    rows = rows_of(batch, plan, range(plan.rows_per_epoch), TOKENIZER)
    plain, painted, html = terminal(rows, color=False), terminal(rows), page(rows, "a <title>", "about")
    assert "\x1b" not in plain and "two\\x1b[2J <b>" in plain
    assert "\x1b[2J" not in painted and "\x1b[2m\x1b[9m" in painted
    assert "<b>" not in html and "&lt;" in html and "a &lt;title&gt;" in html
    assert len(re.findall("class=off", html)) == 1
    assert 'title="id 240 159 152 128, position' in html


def test_a_batch_that_teaches_nothing_is_refused() -> None:
    batch, plan = made()
    rows = range(plan.rows_per_epoch)
    with pytest.raises(UserError, match="zero everywhere"):
        rows_of(batch | {"loss_mask": np.zeros_like(batch["loss_mask"])}, plan, rows, TOKENIZER)
    with pytest.raises(UserError, match=r"row \d+: the loss counts padding, at place \d+ first"):
        rows_of(batch | {"loss_mask": np.ones_like(batch["loss_mask"])}, plan, rows, TOKENIZER)
