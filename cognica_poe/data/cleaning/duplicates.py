"""Which of equal or nearly equal documents stay: clusters over keys alone, without their texts."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np


def equal_pairs(keys: np.ndarray) -> np.ndarray:
    """int64 [m, 2]: pairs of positions in ``keys`` [n] that link all equal ones, each to the next in a stable sort.

    ``keys`` may be a column of band keys, or any array that numpy can sort.
    """
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    same = np.flatnonzero(ordered[1:] == ordered[:-1])
    return np.stack([order[same], order[same + 1]], axis=1)


def clusters(count: int, pairs: Iterable[np.ndarray]) -> np.ndarray:
    """int64 [count]: for each of ``count`` documents the least number in its cluster.

    ``pairs`` are arrays int64 [m, 2] as of :func:`equal_pairs`; what is linked by any chain is one cluster. Memory is
    that of the result, three times, and of one array of pairs.
    """
    label = np.arange(count)
    for links in pairs:
        left, right = links[:, 0], links[:, 1]
        while True:
            first, second = label[left], label[right]
            apart = first != second
            if not apart.any():
                break
            left, right = left[apart], right[apart]
            low, high = np.minimum(first, second)[apart], np.maximum(first, second)[apart]
            np.minimum.at(label, high, low)
            while True:  # every label points to a root again
                higher = label[label]
                if (higher == label).all():
                    break
                label = higher
    return label


def dropped(label: np.ndarray, rank: np.ndarray) -> np.ndarray:
    """bool [n]: documents that are not the one of least ``rank`` [n] in their cluster; ranks differ from each other."""
    order = np.lexsort((rank, label))
    first = np.ones(len(label), bool)
    first[1:] = label[order][1:] != label[order][:-1]
    gone = np.empty(len(label), bool)
    gone[order] = ~first
    return gone


def rank_of(*keys: np.ndarray) -> np.ndarray:
    """int64 [n]: place of each document in the order by ``keys``, the first of which weighs most.

    Whoever survives must not depend on who was read first: keys are the place of the source in the mix and a hash of
    the origin.
    """
    order = np.lexsort(keys[::-1])
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    return rank
