"""Which row of the table a call gets."""

from __future__ import annotations

import dataclasses

import pytest

from lm_jax.kernels.flash_attention import block_sizes


def test_a_chip_gets_its_own_row_without_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_sizes.logging, "warning", lambda *a: pytest.fail("it warned"))
    block_sizes.row.cache_clear()
    for r in block_sizes.TABLE:
        assert block_sizes.row(r.chip, r.head_dim, r.dtype) is r
    assert block_sizes.row("TPU v6 lite", 64, "bfloat16").head_dim == 128, "the narrowest that is wide enough"
    assert block_sizes.row("TPU v6 lite", 192, "bfloat16").head_dim == 256


def test_another_chip_is_warned_of_once_and_told_whose_row_it_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(block_sizes.logging, "warning", lambda text, *a: said.append(text % a))
    block_sizes.row.cache_clear()
    for _ in range(2):
        found = block_sizes.row("TPU v9", 128, "bfloat16")
    assert found.chip.startswith("TPU")
    assert len(said) == 1
    assert said[0].startswith(
        f"Attention has no tuned block sizes for TPU v9: it uses those of {found.chip}, head dim 128"
    )


def test_every_row_is_of_whole_chunks_and_says_what_chose_it() -> None:
    for r in block_sizes.TABLE:
        assert r.measured
        for blocks in (r.forward, r.backward):
            b = dataclasses.asdict(blocks)
            assert b["q"] % b["q_chunk"] == b["kv"] % b["kv_chunk"] == b["q_chunk"] % 128 == b["kv_chunk"] % 128 == 0
