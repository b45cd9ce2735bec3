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
from matplotlib.patches import Patch, Rectangle  # noqa: E402

from lm_jax.data.packing import Plan  # noqa: E402
from lm_jax.data.quota import Quota, Stage  # noqa: E402
from lm_jax.kernels.flash_attention.mask import AttentionMask, LocalGlobal  # noqa: E402
from lm_jax.kernels.flash_attention.ring import parts_of, ring_order  # noqa: E402
from lm_jax.kernels.flash_attention.schedule import tile_kinds  # noqa: E402
from lm_jax.sharding import AXES, MeshConfig, partition  # noqa: E402

FOLDER = Path(__file__).parent / "pictures"
LENGTH, TILE = 8192, 512
COLOURS = {"not computed": "#eef1f4", "computed and masked": "#f0a202", "computed without a mask": "#2a6f97"}
EMPTY, STATE, ACTIVATIONS = "#eef1f4", "#2a6f97", "#f0a202"
DEVICES = ("#2a6f97", "#b7770d", "#4f7a35", "#bc4b51")  # white text can be read on each


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


def parallelism_holds() -> None:
    """What each of four devices holds between and within steps, a panel a layout, asked of the table of layouts."""
    layouts = {
        "data=4": MeshConfig(data=4),
        "fsdp=4, zero=1": MeshConfig(data=1, fsdp=4, zero=1),
        "fsdp=4, zero=2": MeshConfig(data=1, fsdp=4, zero=2),
        "fsdp=4, zero=3": MeshConfig(data=1, fsdp=4),
        "tensor=4": MeshConfig(data=1, tensor=4),
        "tensor=4, split_residual": MeshConfig(data=1, tensor=4, split_residual=True),
        "sequence=4": MeshConfig(data=1, sequence=4),
    }
    figure, axes = plt.subplots(2, 4, figsize=(12, 5.6), layout="constrained")
    figure.get_layout_engine().set(wspace=0.06, hspace=0.06)
    for ax, (name, config) in zip(axes.flat, layouts.items(), strict=False):
        rows = _split(config)
        for y, is_split in enumerate(rows.values()):
            colour = STATE if y < 3 else ACTIVATIONS
            for device in range(4):
                left, width = device + 0.08, 0.84
                ax.add_patch(Rectangle((left, y + 0.16), width, 0.68, color=EMPTY if is_split else colour, linewidth=0))
                if is_split:
                    quarter = left + device * width / 4
                    ax.add_patch(Rectangle((quarter, y + 0.16), width / 4, 0.68, color=colour, linewidth=0))
        ax.set_title(name, fontsize=11)
        ax.set(xlim=(0, 4), ylim=(len(rows), 0))
        ax.set_xticks(np.arange(4) + 0.5, [f"device {i}" for i in range(4)], fontsize=8)
        ax.set_yticks(np.arange(len(rows)) + 0.5, list(rows) if ax in axes[:, 0] else [], fontsize=10)
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
    handles = [
        Patch(color=STATE, label="of the model, held here"),
        Patch(color=ACTIVATIONS, label="of the batch, held here"),
        Patch(color=EMPTY, label="held elsewhere"),
    ]
    axes.flat[-1].axis("off")
    axes.flat[-1].legend(handles=handles, loc="center", frameon=False, fontsize=10)
    save(figure, "parallelism_holds")


def _split(config: MeshConfig) -> dict[str, bool]:
    """Whether the devices of a mesh have a part each of these, or all of it."""
    weight = "embed", "feed_forward"
    specs = {
        "weights": partition(*weight, drop=config.weights_drop),
        "gradients": partition(*weight, drop=() if config.zero == 2 else config.weights_drop),
        "optimizer": partition(*weight),
        "tokens": partition("batch", "length"),
        "residual stream": partition("batch", config.layout.residual, "features"),
        "heads, features": partition("batch", "length", "feed_forward"),
    }
    large = {axis for axis in AXES if getattr(config, axis) > 1}
    axes = {name: {a for e in spec if e for a in (e if isinstance(e, tuple) else (e,))} for name, spec in specs.items()}
    return {name: bool(its & large) for name, its in axes.items()}


def parallelism_ring() -> None:
    """Who computes which pairs of chunks when, and how much, in the order of the ring and in the plain one."""
    n, chunk = 4, 64
    length = 2 * n * chunk
    orders = {"zig-zag": ring_order(length, n), "contiguous": np.arange(length)}
    figure, axes = plt.subplots(2, 2, figsize=(9, 7.8), layout="constrained", width_ratios=(1, 1.15))
    for (pairs, bars), (name, order) in zip(axes, orders.items(), strict=True):
        places = order.reshape(n, -1)
        work = np.array([[_open(places[d], places[(d - s) % n]).sum() for s in range(n)] for d in range(n)]) / chunk**2
        if name == "zig-zag":  # the code computes these and no more
            assert np.allclose(work, [[_computed(d, s, n, 2 * chunk) for s in range(n)] for d in range(n)], atol=0.02)
        owner = np.argsort(order)[::chunk] // (2 * chunk)  # of each chunk, in the order of the text
        for q in range(2 * n):
            for k in range(q + 1):
                device, step = owner[q], (owner[q] - owner[k]) % n
                pairs.add_patch(Rectangle((k, q), 1, 1, facecolor=DEVICES[device], edgecolor="white", linewidth=1.5))
                pairs.text(k + 0.5, q + 0.53, str(step), ha="center", va="center", fontsize=10, color="white")
        pairs.set(xlim=(0, 2 * n), ylim=(2 * n, 0), aspect="equal", facecolor=EMPTY)
        pairs.set_xticks(np.arange(2 * n) + 0.5, [str(i) for i in range(2 * n)], fontsize=9)
        pairs.set_yticks(np.arange(2 * n) + 0.5, [str(i) for i in range(2 * n)], fontsize=9)
        pairs.set_xlabel("chunk of keys", fontsize=9)
        pairs.set_ylabel("chunk of queries", fontsize=9)
        pairs.set_title(f"{name}: the step in which a pair is computed", fontsize=10)
        _steps(bars, work)
        took, needed = work.max(0).sum(), work.sum() / n
        bars.set_title(f"{needed:.0f} pairs a device on average, {took:.0f} until the last one is done", fontsize=10)
    handles = [Patch(color=colour, label=f"device {d}") for d, colour in enumerate(DEVICES)]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    save(figure, "parallelism_ring")


def _steps(ax: plt.Axes, work: np.ndarray) -> None:
    """The devices' work side by side, a step as long as its longest."""
    starts = np.concatenate([[0], np.cumsum(work.max(0))])
    for device, row in enumerate(work):
        for step, amount in enumerate(row):
            if amount:
                left = (starts[step], device + 0.15)
                ax.add_patch(Rectangle(left, amount, 0.7, facecolor=DEVICES[device], edgecolor="white", linewidth=1.5))
                middle = starts[step] + amount / 2
                ax.text(middle, device + 0.52, f"{amount:.0f}", ha="center", va="center", fontsize=10, color="white")
    for x in starts:
        ax.axvline(x, color="#9aa5b1", linewidth=0.8, linestyle=":", zorder=0)
    ax.set(xlim=(0, 14.2), ylim=(len(work), 0))
    ax.set_xticks(starts[:-1] + np.diff(starts) / 2, [f"step {s}" for s in range(work.shape[1])], fontsize=9)
    ax.set_yticks(np.arange(len(work)) + 0.5, [f"device {d}" for d in range(len(work))], fontsize=9)
    ax.set_xlabel("time, in pairs of chunks", fontsize=9)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)


def _open(queries: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Which of these positions see which under a causal mask."""
    return np.asarray(AttentionMask().by_position(queries[:, None], keys[None]))


def _computed(device: int, step: int, n: int, size: int) -> float:
    """The work of a step of the ring in pairs of chunks, as `parts_of` plans it; `size` positions a device."""
    parts = parts_of(AttentionMask(), size, n, device, step, False)
    areas = (p.queries.size * p.keys.size * (0.5 if p.causal else 1) for p in parts)
    return sum(areas) / (size // 2) ** 2


def save(figure: plt.Figure, name: str) -> None:
    FOLDER.mkdir(exist_ok=True)
    figure.savefig(FOLDER / f"{name}.svg", metadata={"Date": None, "Creator": "lm_jax"})
    plt.close(figure)


def packing() -> None:
    """The first rows of the same documents under three packings, a colour a document, asked of the plans."""
    rng = np.random.default_rng(3)
    lengths, T = np.maximum(2, np.exp(rng.normal(np.log(200), 0.9, 60)).astype(int)), 512
    ways = {
        "split": {},
        "best_fit": {"packing": "best_fit"},
        "best_fit, truncated": {"packing": "best_fit", "truncate": True},
    }
    figure, axes = plt.subplots(1, 3, figsize=(10, 4), layout="constrained")
    hues = plt.colormaps["tab20"](rng.permutation(60) % 20)
    for ax, (name, way) in zip(axes, ways.items(), strict=True):
        plan = Plan(np.arange(60), lengths, length=T, seed=0, **way)
        for n in range(14):
            at, pieces = 0, plan.pieces(np.array([n]))
            for document, start, stop in zip(pieces.documents, pieces.starts, pieces.stops, strict=True):
                hatch = "///" if start > 0 or stop < lengths[document] - 1 else None  # cut
                ax.add_patch(Rectangle((at, n + 0.1), stop - start, 0.8, facecolor=hues[document], hatch=hatch))
                at += stop - start
            ax.add_patch(Rectangle((at, n + 0.1), T - at, 0.8, facecolor=EMPTY))
        full = plan.pairs / (plan.rows_per_epoch * T)
        out = f", {plan.left_out / (plan.pairs + plan.left_out):.0%} left out" if plan.left_out else ""
        ax.set(xlim=(0, T), ylim=(14, 0), xlabel="place in the row")
        ax.set_title(f"{name}: {full:.1%} full{out}", fontsize=9)
        ax.set_yticks([])
    axes[0].set_ylabel("rows")
    save(figure, "packing")


def mixture() -> None:
    """Whose each of the first rows is, and how far each source ever is from its due, over a change of weights."""
    names, colours, change, rows = ("web 0.6", "code 0.3, then 0.1", "books 0.1, then 0.3"), DEVICES, 100, 200
    order = Quota([Stage(0, (6, 3, 1)), Stage(change, (6, 1, 3))])
    turns = np.array([order.turn(n)[0] for n in range(rows)])
    figure, (first, last, below) = plt.subplots(
        3, 1, figsize=(9, 4.4), layout="constrained", height_ratios=(1, 1, 5), sharex=False
    )
    for ax, start in ((first, 0), (last, rows - 80)):
        for n in range(start, start + 80):
            ax.add_patch(Rectangle((n, 0), 0.9, 1, color=colours[turns[n]], linewidth=0))
        ax.set(xlim=(start, start + 80), ylim=(0, 1), yticks=[])
    first.set_title("whose row it is: the first 80 rows, and the last", fontsize=10)
    places = np.arange(1, rows + 1)
    due = np.array([[float(d) for d in order.due(n)] for n in places])
    for i, name in enumerate(names):
        below.plot(places, np.cumsum(turns == i) - due[:, i], color=colours[i], label=name, linewidth=0.9)
    for bound in (-1, 1):
        below.axhline(bound, color="#777777", linewidth=0.8, linestyle="--")
    below.axvline(change, color="#777777", linewidth=0.8)
    below.set(xlim=(0, rows), ylim=(-1.15, 1.15), xlabel="rows", ylabel="rows had - rows due")
    below.legend(loc="upper left", ncols=3, fontsize=9, frameon=False, bbox_to_anchor=(0, 0.97))
    save(figure, "mixture")


if __name__ == "__main__":
    packing()
    mixture()
    attention_schedule()
    parallelism_holds()
    parallelism_ring()
