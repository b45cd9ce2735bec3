"""MinHash signatures beside datasketch's, shingling included: `python -m benchmarks.minhash`.

Both make 128 permutations of the word 5-grams of the same documents: the paragraphs of the text that is named
(`--source=FILES`), else prose made on the spot. datasketch is handed what it works on fastest: all shingles of a
document in one call, and its own vectorised hashing. The two take turns, and medians are compared. Then recall and
precision on planted near-duplicates.
"""

from __future__ import annotations

import os
import re
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import datasketch
import numpy as np

from lm_jax.corpus import duplicates, minhash
from lm_jax.corpus import words as W
from lm_jax.corpus.stages import BATCH
from tests.corpus.texts import edited, prose

DOCUMENTS, SHINGLE, ROUNDS = 600, 5, 5
THRESHOLD = 0.8


def ours(texts: list[str]) -> np.ndarray:
    """Signatures and bands, as the stage `sign` makes them."""
    found = []
    for start in range(0, len(texts), BATCH):
        words, offsets = W.normalised_batch(texts[start : start + BATCH])
        found.append(minhash.signatures_batch(*minhash.shingles_batch(words.hashes, offsets, SHINGLE)))
    signatures = np.concatenate(found)
    minhash.bands(signatures, THRESHOLD)
    return signatures


def theirs(texts: list[str]) -> list[datasketch.MinHash]:
    """Signatures alone: datasketch's bands are made by its index."""
    found = []
    for text in texts:
        words = re.findall(r"\w+", text.lower())
        shingles = {" ".join(words[i : i + SHINGLE]).encode() for i in range(len(words) - SHINGLE + 1)}
        sketch = datasketch.MinHash(minhash.PERMUTATIONS)
        sketch.update_batch(list(shingles))
        found.append(sketch)
    return found


def texts_of(arguments: list[str]) -> list[str]:
    """Documents of some 3 kB."""
    if not arguments:
        return [prose(seed, 36) for seed in range(DOCUMENTS)]
    text = "\n".join(Path(name).read_text("utf-8") for name in arguments)
    return [text[i : i + 3000] for i in range(0, min(len(text), 3000 * DOCUMENTS), 3000)]


def main() -> None:
    arguments = [a.partition("=")[2] for a in sys.argv[1:] if a.startswith("--source=")]
    texts = texts_of(arguments)
    size = sum(len(text.encode()) for text in texts) / 1e6
    libraries = ", ".join(f"{name} {version(name)}" for name in ("datasketch", "rensa", "numpy"))
    print(f"{len(texts)} documents, {size:.2f} MB, one process, {os.cpu_count()} cores; {libraries}")
    ours(texts[:20])
    theirs(texts[:20])
    times: dict[Callable, list[float]] = {ours: [], theirs: []}
    for _ in range(ROUNDS):
        for function, seconds in times.items():
            start = time.process_time()
            function(texts)
            seconds.append(time.process_time() - start)
    a, b = (statistics.median(times[f]) for f in (ours, theirs))
    ratios = sorted(y / x for x, y in zip(times[ours], times[theirs], strict=True))
    print(
        f"ours {size / a:.2f} MB/s, datasketch {size / b:.3f} MB/s: {b / a:.1f} times as fast "
        f"(rounds {ratios[0]:.1f} to {ratios[-1]:.1f})"
    )
    recall()


def recall() -> None:
    """What is found of planted pairs, by their true similarity."""
    pairs = []
    for seed in range(4000):
        text = prose(seed, 24)
        pairs.append((text, edited(text, 1 + seed % 40, seed)))
    truth = np.array([_jaccard(a, b) for a, b in pairs])
    both = [[a for a, _ in pairs], [b for _, b in pairs]]
    signatures = [ours(texts) for texts in both]
    digests = [np.arange(2 * len(pairs), dtype=np.uint64).reshape(-1, 2) + np.uint64(i << 40) for i in range(2)]
    bands = [minhash.bands(s, THRESHOLD) for s in signatures]
    found = duplicates.find(digests, bands, signatures, exact=False, near=True, threshold=THRESHOLD)
    hit = found.status[len(pairs) :] == duplicates.NEAR
    print("| Jaccard similarity | pairs | removed |\n| --- | ---: | ---: |")
    for low in (0.4, 0.5, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9):
        high = low + (0.1 if low < 0.6 or low == 0.9 else 0.05)
        inside = (truth >= low) & (truth < high)
        print(f"| {low:.2f} to {high:.2f} | {inside.sum()} | {hit[inside].mean():.1%} |")
    above = truth >= THRESHOLD
    print(f"recall at {THRESHOLD} or above {hit[above].mean():.4f}; precision {above[hit].mean():.3f} on these pairs; "
          f"among those below 0.6, {int(hit[truth < 0.6].sum())} removed")  # fmt: skip
    print(f"originals removed: {int((found.status[: len(pairs)] != duplicates.KEPT).sum())}")


def _jaccard(a: str, b: str) -> float:
    x, y = (set(minhash.shingles(W.normalised(t).hashes, SHINGLE).tolist()) for t in (a, b))
    return len(x & y) / len(x | y)


if __name__ == "__main__":
    main()
