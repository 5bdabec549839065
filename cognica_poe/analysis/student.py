"""Student's t, as far as intervals and p-values need it, and how many documents unequal ones count for."""

from __future__ import annotations

import functools
import math

import numpy as np
from numpy.typing import ArrayLike

FLOOR = 1e-300
"""The smallest p-value that is reported."""
_NORMAL = 2000  # degrees of freedom from which the normal distribution serves


def effective_documents(weights: ArrayLike) -> float:
    """How many equal documents weigh as much as these: ``(sum w)^2 / sum w^2`` (Kish 1965), at least 1."""
    sizes = np.asarray(weights, dtype=np.float64)
    squares = float((sizes**2).sum())
    return max(1.0, float(sizes.sum()) ** 2 / squares) if squares else 1.0


def student(t: float, freedom: float) -> float:
    """Two-sided tail probability of Student's t, whole degrees of freedom (rounded down, at least 1), by Abramowitz and
    Stegun 26.7.3 and 26.7.4; the normal distribution's for many."""
    n = max(1, math.floor(freedom))
    if n > _NORMAL:
        return max(FLOOR, math.erfc(t / math.sqrt(2)))
    angle = math.atan2(t, math.sqrt(n))
    square = math.cos(angle) ** 2
    odd = n % 2
    total, term = 0.0, math.cos(angle) if odd else 1.0
    for k in range(2 + odd, n + 1, 2):
        total += term
        term *= square * (k - 1) / k
    inside = 2.0 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total
    return min(1.0, max(FLOOR, 1.0 - inside))


@functools.lru_cache(maxsize=4096)
def tail_of(documents: int, confidence: float) -> float:
    """Tail of the expanded percentile interval (Hesterberg 2015, arXiv 1411.5279) for so many effective documents.

    Percentiles of a bootstrap are those of a normal distribution whose variance lacks the factor n / (n - 1); the tail
    is chosen such that they reach as far as Student's t with n - 1 degrees of freedom.
    """
    n = max(2, documents)
    low, high = 0.0, 1e4
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if student(middle, n - 1) > 1.0 - confidence else (low, middle)
    return math.erfc(low * math.sqrt(n / (n - 1) / 2)) / 2
