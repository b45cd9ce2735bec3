"""Texts that tokenizers stumble over."""

from __future__ import annotations

from hypothesis import strategies as st

HOSTILE = [
    *("", " ", "  ", "\n", "\r\n", "\t\t x", "    a\n\n        b", " lead", "trail ", "\ufeffbom", "\u200b", "\u2028"),
    *("<s>", "</s>", "<unk>", "<pad>", "<0x41>", "<0xE2>", "<|endoftext|>", "a</s>b", "\0", "\0x\0", "\x1f", "\x7f"),
    *("▁", "▁▁", " ▁ ", "▁a▁", "▅", "⁇", " ⁇ ", "\ufffd", "\U0010ffff", "\ud7ff\ue000", "e\u0301é", "ﬁ①\u3000", "한글"),
    "👩‍👩‍👧‍👦" * 3,
    "▁" * 5000 + "x" * 5000 + "\n" * 5000,
    "no line end " * 2000,
]

nasty = st.text(
    st.one_of(st.sampled_from("▁▅ \t\n\r\0<>s/0xE2a"), st.characters(exclude_categories=["Cs"])), max_size=60
)
