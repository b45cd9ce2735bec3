"""Stages as they hang together, on a corpus of a few documents."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lm_jax.corpus import folders, inputs, stages
from lm_jax.corpus.config import LinesConfig, PrepareConfig, RawConfig, TokensConfig
from lm_jax.corpus.ledger import Ledger
from lm_jax.data import tokenizers
from lm_jax.errors import UserError
from tests.corpus.texts import prose, write_jsonl


def prepare(folder: Path, texts: list[str], **changes: Any) -> folders.Plan:
    write_jsonl(folder / "a.jsonl", texts)
    sections = {"raw": RawConfig(sources=str(folder / "a.jsonl")), "tokens": TokensConfig(tokenizer="bytes"), **changes}
    c = PrepareConfig(**sections)
    found, ignored = inputs.find(c.raw.names)
    plan = folders.Plan(folder / "out", c, found, inputs.parts(found, c.work.part_bytes), ignored)
    folders.write_plan(plan)
    for stage in stages.stages_of(plan):
        for task in range(stages.tasks_of(plan, stage)):
            stages.run_task(plan.out, stage, task)
    return plan


def test_a_document_that_is_mirrored_keeps_its_lines(tmp_path: Path) -> None:
    notice = "All rights are reserved by nobody."
    texts = [prose(0, 9)] * 6 + [f"{prose(n, 9)}\n{notice}" for n in range(1, 6)]
    plan = prepare(tmp_path, texts, lines=LinesConfig(max_documents=4))
    steps = Ledger.from_json(json.loads((plan.out / "report.json").read_text())["ledger"]).steps
    assert steps["shared_lines"].documents_out == 11 and steps["exact_duplicates"].documents_out == 6
    assert steps["shared_lines"].pieces == {"lines that others share": 5}


def test_what_a_tokenizer_alters_is_refused_by_this_program_s_own_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Deaf(tokenizers.Bytes):
        exact = False

        def encode(self, text: str) -> np.ndarray:
            return super().encode(text.lower())

    monkeypatch.setattr(stages, "_load_tokenizer", lambda folder: Deaf(True))
    with pytest.raises(UserError, match=r'set\ntokens\.altered_documents="accept"'):
        prepare(tmp_path, [prose(n, 6) for n in range(4)])
