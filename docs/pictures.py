"""Draws the pictures of the documentation: `python -m docs.pictures`."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import matplotlib
import numpy as np

matplotlib.use("Agg")
matplotlib.rcParams |= {"svg.hashsalt": "lm_jax", "svg.fonttype": "none"}  # small, and the same file every time
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.colors import ListedColormap  # noqa: E402
from matplotlib.patches import Patch  # noqa: E402

from lm_jax.kernels.flash_attention.mask import AttentionMask, LocalGlobal  # noqa: E402
from lm_jax.kernels.flash_attention.schedule import tile_kinds  # noqa: E402

FOLDER = Path(__file__).parent / "pictures"
LENGTH, TILE = 8192, 512
COLOURS = {"not computed": "#eef1f4", "computed and masked": "#f0a202", "computed without a mask": "#2a6f97"}


def attention_schedule() -> None:
    """Which tiles of a row of 8192 tokens are computed, for six masks."""
    ids = jnp.asarray(np.searchsorted([1500, 2700, 5200, 6100, 7700], np.arange(LENGTH), side="right")[None])
    masks = {
        "causal": AttentionMask(),
        "window of 2048": AttentionMask(window=2048),
        "six packed documents": AttentionMask(q_segment_ids=ids, kv_segment_ids=ids),
        "prefix of 3000": AttentionMask(prefix_length=3000),
        "local and global": AttentionMask(causal=False, pattern=LocalGlobal(block=512, local=2, global_blocks=1)),
        "no mask": AttentionMask(causal=False),
    }
    figure, axes = plt.subplots(2, 3, figsize=(9, 6.6), layout="constrained")
    for ax, (name, mask) in zip(axes.flat, masks.items(), strict=True):
        kinds = np.asarray(tile_kinds(mask, LENGTH, LENGTH, TILE, TILE))[0]
        ax.imshow(kinds, cmap=ListedColormap(list(COLOURS.values())), vmin=0, vmax=2)
        ax.set_title(f"{name}: {np.mean(kinds > 0):.0%} of the tiles", fontsize=10)
        ax.set_xticks(np.arange(len(kinds) + 1) - 0.5, [], minor=False)
        ax.set_yticks(np.arange(len(kinds) + 1) - 0.5, [], minor=False)
        ax.grid(color="white", linewidth=0.8)
        ax.tick_params(length=0)
        ax.set_xlabel("keys", fontsize=9)
        ax.set_ylabel("queries", fontsize=9)
    handles = [Patch(color=colour, label=name) for name, colour in COLOURS.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    save(figure, "attention_schedule")


def save(figure: plt.Figure, name: str) -> None:
    FOLDER.mkdir(exist_ok=True)
    figure.savefig(FOLDER / f"{name}.svg", metadata={"Date": None, "Creator": "lm_jax"})
    plt.close(figure)


if __name__ == "__main__":
    attention_schedule()
