"""An upper limit of a share that was counted in clusters: how often something happens, when documents count it.

Korn and Graubard (1998, Survey Methodology 24): the exact limit of Clopper and Pearson, for as many trials as the
clustered ones are worth. It stays above zero where nothing was counted, as a bootstrap does not.
"""

from __future__ import annotations

import functools
import math

import numpy as np
from numpy.typing import NDArray

from cognica_poe.analysis.student import effective_documents, student

_STEPS = 60  # halvings of an interval of length 1


def upper_limit(events: NDArray[np.float64], trials: NDArray[np.float64], confidence: float = 0.95) -> float:
    """One-sided limit of ``sum(events) / sum(trials)``; both [clusters], of which at least two hold trials.

    Raises ValueError for fewer clusters: one says nothing of how they differ.
    """
    share, worth = _evidence(events, trials, confidence)
    low, high = share, 1.0
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if _reaches(share, worth, middle, confidence) else (middle, high)
    return high


def is_below(
    events: NDArray[np.float64], trials: NDArray[np.float64], allowed: float, confidence: float = 0.95
) -> bool:
    """Whether ``upper_limit`` is at most ``allowed``, without looking for it."""
    share, worth = _evidence(events, trials, confidence)
    return share < allowed and _reaches(share, worth, allowed, confidence)


def _evidence(events: NDArray[np.float64], trials: NDArray[np.float64], confidence: float) -> tuple[float, float]:
    """The share, and how many independent trials it is worth."""
    events, trials = events[trials > 0], trials[trials > 0]
    clusters, total = len(trials), float(trials.sum())
    if clusters < 2:
        raise ValueError(f"a limit needs 2 clusters or more, got {clusters}")
    # Few or unequal clusters leave the design effect itself uncertain.
    freedom = max(1, round(effective_documents(trials)) - 1)
    few = _quantile(math.inf, confidence) / _quantile(freedom, confidence)
    return float(events.sum()) / total, total / design_effect(events, trials) * few**2


def _reaches(share: float, worth: float, limit: float, confidence: float) -> bool:
    return share >= 1.0 or incomplete_beta(limit, share * worth + 1.0, worth * (1.0 - share)) >= confidence


def design_effect(events: NDArray[np.float64], trials: NDArray[np.float64]) -> float:
    """Variance of a clustered share over that of as many independent trials (Kish 1965); at least 1."""
    total, share = trials.sum(), events.sum() / trials.sum()
    if not 0.0 < share < 1.0:
        return 1.0
    left_out = (events - share * trials) / (total - trials)  # what the share gains from a cluster: a jackknife
    clustered = (left_out**2).sum()
    return max(1.0, float(clustered / (share * (1.0 - share) / total)))


@functools.lru_cache(maxsize=4096)
def _quantile(freedom: float, confidence: float) -> float:
    """Student's t that is exceeded with probability ``1 - confidence``; infinite degrees are a normal distribution."""
    freedom = min(freedom, 1e9)
    low, high = 0.0, 1e4
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if student(middle, freedom) / 2 > 1.0 - confidence else (low, middle)
    return low


def incomplete_beta(x: float, a: float, b: float) -> float:
    """Regularised ``I_x(a, b)``, by the continued fraction DLMF 8.17.22 (Lentz's method); x in [0, 1], a, b > 0."""
    if x <= 0.0 or x >= 1.0:
        return float(x >= 1.0)
    if x > (a + 1.0) / (a + b + 2.0):  # the fraction converges fast on the other side
        return 1.0 - incomplete_beta(1.0 - x, b, a)
    front = a * math.log(x) + b * math.log1p(-x) - _log_beta(a, b)
    c, d = 1.0, 1.0 / _not_zero(1.0 - (a + b) * x / (a + 1.0))
    value = d
    for m in range(1, 100_000):
        odd = m * (b - m) * x / ((a + 2 * m - 1.0) * (a + 2 * m))
        even = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1.0))
        before = value
        for part in (odd, even):
            c, d = _not_zero(1.0 + part / c), 1.0 / _not_zero(1.0 + part * d)
            value *= c * d
        if abs(value - before) <= 1e-14 * abs(value):
            break
    return math.exp(front) * value / a


def _not_zero(value: float) -> float:
    return value or 1e-300


def _log_beta(a: float, b: float) -> float:
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
