"""The table that the TPU kernels take masks by distance from, against the distances themselves."""

from __future__ import annotations

import numpy as np
import pytest

from lm_jax.kernels.flash_attention.mask import AttentionMask, LocalGlobal
from lm_jax.kernels.flash_attention.pallas_tpu_mask import LANES, band_of, parts_of

ROWS = 256


@pytest.mark.parametrize("keys_down", [True, False])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 5, 128, 300, 383, 384, 1000, 5000])
def test_a_chunk_at_any_distance_sees_what_the_mask_says(window: int | None, causal: bool, keys_down: bool) -> None:
    if window is None and not causal:
        return
    mask = AttentionMask(causal=causal, window=window)
    band = band_of(parts_of(mask, padded=False), ROWS, keys_down)
    assert band is not None
    table = np.asarray(band.table())
    ends = {0, *([] if window is None else [window, -window])}
    for offset in sorted({end + near for end in ends for near in range(-ROWS - 300, ROWS + 301, 7)}):
        between = offset + np.arange(ROWS)[:, None] - np.arange(LANES)  # row - lane
        ahead = between if keys_down else -between  # how far a key stands ahead of its query
        want = np.ones_like(ahead, bool) if window is None else abs(ahead) < window
        if causal:
            want &= ahead <= 0
        at = int(band.at(offset))
        assert 0 <= at <= len(table) - ROWS
        got = table[at : at + ROWS]
        np.testing.assert_array_equal(got, np.where(want, np.inf, -np.inf), err_msg=str(offset))


def test_a_wide_band_has_no_long_table() -> None:
    for keys_down in (True, False):
        band = band_of(parts_of(AttentionMask(window=10**6), padded=False), ROWS, keys_down)
        assert band is not None and len(band.table()) < 5 * ROWS


@pytest.mark.parametrize(
    "mask",
    [
        AttentionMask(causal=False),
        AttentionMask(prefix_length=7),
        AttentionMask(pattern=LocalGlobal(block=128, local=2)),
    ],
)
def test_other_masks_have_none(mask: AttentionMask) -> None:
    assert band_of(parts_of(mask, padded=False), ROWS, keys_down=True) is None
