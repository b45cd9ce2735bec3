"""Bin packing: pieces of documents into rows, in the order of their sizes, the largest first.

Which bin each place of that order goes to depends on the sizes alone. So it is found once, whatever the order of the
documents: in each epoch other pieces of the same sizes take the places.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


def best_fit(sizes: np.ndarray, capacity: int) -> np.ndarray:
    """The bin of each piece: the fullest one that has room, else a new one (best-fit decreasing).

    Ding et al. 2024 (arXiv:2404.10830) pack so. A bin's room is a whole number up to `capacity`, so the rooms that are
    to be had are bits of one integer: the smallest that suffices is its lowest bit from the size on.

    Args:
      sizes: `[n]`, in decreasing order, 1 .. capacity.
      capacity: of a bin.

    Returns:
      `[n]` int64, bins counted from 0 in the order in which they are opened.
    """
    rooms: list[list[int]] = [[] for _ in range(capacity + 1)]  # the bins with so much room
    there, opened, found = 0, 0, []
    for size in sizes.tolist():
        fitting = there >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            at = rooms[room].pop()
            if not rooms[room]:
                there ^= 1 << room
        else:
            room, at = capacity, opened
            opened += 1
        if room > size:
            rooms[room - size].append(at)
            there |= 1 << room - size
        found.append(at)
    return np.array(found, np.int64)


def first_fit(sizes: np.ndarray, capacity: int) -> np.ndarray:
    """The bin of each piece: the first one that has room, else a new one (first-fit decreasing).

    Args and returns: as of `best_fit`. The first bin with room is found in a tree of the most room below each node.
    """
    leaves = 1 << max(1, len(sizes) - 1).bit_length()
    most = [capacity] * (2 * leaves)  # node i has children 2i and 2i + 1; a bin that is not opened has all its room
    found = []
    for size in sizes.tolist():
        node = 1
        while node < leaves:
            node *= 2
            node += most[node] < size
        found.append(node - leaves)
        most[node] -= size
        node //= 2
        while node:
            larger = max(most[2 * node], most[2 * node + 1])
            if most[node] == larger:
                break
            most[node] = larger
            node //= 2
    return np.array(found, np.int64)


FITS: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {"best_fit": best_fit, "first_fit": first_fit}
