"""Paired bootstrap over documents: the uncertainty of every number of a record.

A number such as bits per byte is a ratio of sums over documents. Documents, not tokens, are the independent draws of a
validation slice (tokens of one document are correlated), so documents are resampled with replacement; where several
were cut from one file, the file is the draw. One set of
resampling weights serves all numbers of a record and its predecessor, which makes every comparison paired: two
checkpoints or two paths see the same resampled documents (Efron and Tibshirani 1993, chapters 8 and 13). Plain
percentiles of few or unequal documents cover too little: they are expanded as far as the effective number of documents
asks for (``student.tail_of``).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cognica_poe.analysis.student import effective_documents, tail_of

_BLOCK_BYTES = 64 * 2**20  # resampling weights are drawn in blocks of at most this size


@dataclass(frozen=True)
class Interval:
    """A point estimate and its percentile interval, in the unit of the statistic."""

    value: float
    low: float
    high: float

    @property
    def signal(self) -> bool:
        """True if the interval excludes zero, that is, if the value is more than noise."""
        return self.low > 0.0 or self.high < 0.0

    def bounds(self) -> list[float]:
        """``[low, high]``, as stored in records."""
        return [self.low, self.high]


class Bootstrap:
    """Resampling weights for ``documents`` documents, drawn once from ``seed``.

    Args:
        documents: number of documents, at least 2 (a single document carries no information about its own spread).
        units: [documents] which documents belong together, by any number; they are drawn together, and there are at
            least 2 of them. Each document by itself when ``None``.
        resamples: number of bootstrap replicates.
        confidence: coverage of the expanded percentile intervals.
        seed: of the NumPy generator; the same seed and counts give the same intervals.

    Raises:
        ValueError: fewer than 2 documents or units, or a confidence outside (0, 1).
    """

    def __init__(
        self,
        documents: int,
        *,
        units: NDArray[np.int64] | None = None,
        resamples: int = 2000,
        confidence: float = 0.95,
        seed: int = 0,
    ) -> None:
        self.rank = np.arange(documents) if units is None else np.unique(units, return_inverse=True)[1]
        self.drawn = int(self.rank.max()) + 1 if documents else 0
        if self.drawn < 2 or len(self.rank) != documents:
            raise ValueError(f"a bootstrap needs at least 2 documents, got {documents} in {self.drawn} units")
        if not 0.0 < confidence < 1.0 or resamples < 1:
            raise ValueError(f"confidence {confidence} must be in (0, 1) and resamples {resamples} positive")
        self.documents, self.resamples, self.confidence, self.seed = documents, resamples, confidence, seed

    def totals(self, sums: ArrayLike) -> NDArray[np.float64]:
        """Totals of the resampled units: ``sums`` [documents, M] -> fp64 [resamples, M]."""
        sums = np.asarray(sums, dtype=np.float64)
        if sums.ndim != 2 or len(sums) != self.documents:
            raise ValueError(f"sums must be [{self.documents}, M], got {sums.shape}")
        generator = np.random.default_rng(self.seed)
        sums = self._by_unit(sums)
        chances = np.full(self.drawn, 1.0 / self.drawn)
        block = max(1, _BLOCK_BYTES // (8 * self.drawn))
        out = np.empty((self.resamples, sums.shape[1]))
        for start in range(0, self.resamples, block):
            rows = min(block, self.resamples - start)
            # How often each document was drawn: the sufficient statistic of a resample for any sum.
            counts = generator.multinomial(self.drawn, chances, size=rows)
            out[start : start + rows] = counts @ sums
        return out

    def effective(self, weights: ArrayLike) -> float:
        """How many equal units weigh as much as the documents' ``weights`` [documents]."""
        return effective_documents(self._by_unit(np.asarray(weights, dtype=np.float64)[:, None])[:, 0])

    def _by_unit(self, sums: NDArray[np.float64]) -> NDArray[np.float64]:
        if self.drawn == self.documents:
            return sums
        found = np.zeros((self.drawn, sums.shape[1]))
        np.add.at(found, self.rank, sums)
        return found

    def ratio(self, numerator: ArrayLike, denominator: ArrayLike, scale: float = 1.0) -> Interval:
        """Interval of ``scale * sum(numerator) / sum(denominator)``; both are per-document sums [documents]."""
        return self.ratios(np.asarray(numerator, dtype=np.float64)[None], denominator, scale)[0]

    def ratios(self, numerators: ArrayLike, denominator: ArrayLike, scale: float = 1.0) -> list[Interval]:
        """Intervals of M ratios over one denominator: numerators [M, documents], denominator [documents]."""
        numerators = np.asarray(numerators, dtype=np.float64)
        denominator = np.asarray(denominator, dtype=np.float64)
        totals = self.totals(np.concatenate([numerators, denominator[None]]).T)
        with np.errstate(divide="ignore", invalid="ignore"):
            values = scale * numerators.sum(-1) / denominator.sum()
            samples = scale * totals[:, :-1] / totals[:, -1:]
        tail = self.tail(denominator)
        return [self._interval(value, column, tail) for value, column in zip(values, samples.T, strict=True)]

    def differences(
        self, numerator: ArrayLike, others: ArrayLike, denominator: ArrayLike, scale: float = 1.0
    ) -> list[Interval]:
        """Paired intervals of ``scale * (numerator - other) / denominator`` as sums over documents, one per row of
        ``others`` [M, documents]; numerator, denominator [documents]."""
        gaps = np.asarray(numerator, dtype=np.float64) - np.asarray(others, dtype=np.float64)
        return self.ratios(gaps.reshape(-1, self.documents), denominator, scale)

    def difference(
        self,
        numerator: ArrayLike,
        denominator: ArrayLike,
        other_numerator: ArrayLike,
        other_denominator: ArrayLike,
        scale: float = 1.0,
    ) -> Interval:
        """Paired interval of ``scale * (ratio - other ratio)``; all four are per-document sums [documents]."""
        columns = np.stack(
            [
                np.asarray(column, dtype=np.float64)
                for column in (numerator, denominator, other_numerator, other_denominator)
            ]
        )
        sums, totals = columns.sum(-1), self.totals(columns.T)
        value = scale * (sums[0] / sums[1] - sums[2] / sums[3])
        with np.errstate(divide="ignore", invalid="ignore"):
            samples = scale * (totals[:, 0] / totals[:, 1] - totals[:, 2] / totals[:, 3])
        return self._interval(value, samples, max(self.tail(columns[1]), self.tail(columns[3])))

    def tail(self, denominator: ArrayLike) -> float:
        """Tail probability, at each end, of an expanded percentile interval of a ratio over ``denominator``."""
        return tail_of(round(self.effective(denominator)), self.confidence)

    def _interval(self, value: float, samples: NDArray[np.float64], tail: float) -> Interval:
        samples = samples[np.isfinite(samples)]  # a resample may hold only documents without any trial (0 / 0)
        if not len(samples):
            raise ValueError("the denominator is zero in every resample")
        low, high = np.quantile(samples, [tail, 1.0 - tail])
        return Interval(float(value), float(low), float(high))
