"""MinHash signatures in bands: texts that share most of their five-word runs share a band's key.

14 bands of 8 rows: two texts with Jaccard similarity J of their runs meet in a band with probability
1 - (1 - J^8)^14, 0.05 at J = 0.5, 0.56 at 0.7, 0.92 at 0.8 (Broder 1997; Leskovec et al., Mining of
Massive Datasets, section 3.4).
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

import numpy as np

from cognica_poe.data.cleaning.words import code_points, runs, word_hashes

BANDS, ROWS, WORDS = 14, 8, 5
_SEED = 20251125
_BLOCK = 1024  # runs at a time: 112 x 1024 products stay in the processor's cache


@lru_cache(maxsize=1)
def _constants() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Factors and summands of the permutations, uint32 [112, 1], and odd factors of the rows of a band, uint64 [8]."""
    draw = np.random.Generator(np.random.Philox(_SEED)).integers
    factors = draw(2**32, size=(BANDS * ROWS, 1), dtype=np.uint32) | np.uint32(1)
    summands = draw(2**32, size=(BANDS * ROWS, 1), dtype=np.uint32)
    return factors, summands, draw(2**64 - 1, size=ROWS, dtype=np.uint64) | np.uint64(1)


def band_keys(texts: Iterable[str]) -> np.ndarray:
    """uint64 [texts, 14]: the keys of every text, the same for the same words on any machine.

    Case, punctuation and white space do not count. A text of fewer than five words is one run of them all.
    """
    found = [_keys(text) for text in texts]
    return np.stack(found) if found else np.zeros((0, BANDS), np.uint64)


def _keys(text: str) -> np.ndarray:
    factors, summands, rows = _constants()
    words = word_hashes(text)
    if not len(words):
        words = code_points(text)  # nothing but marks: compare them
    mixed = runs(words, min(WORDS, max(1, len(words))))
    shingles = (mixed >> np.uint64(32)).astype(np.uint32)
    least = np.full(BANDS * ROWS, 2**32 - 1, np.uint32)
    for start in range(0, len(shingles), _BLOCK):
        permuted = shingles[start : start + _BLOCK] * factors
        permuted += summands
        np.minimum(least, permuted.min(axis=1), out=least)
    keys = (least.reshape(BANDS, ROWS).astype(np.uint64) * rows).sum(axis=1, dtype=np.uint64)
    folded: np.ndarray = keys ^ (keys >> np.uint64(31))
    return folded
