"""Early exit with a stated agreement with the full pool, beside WAND: a direct bound, and calibrated margins.

Let c_k be the pooled log-probabilities of the stages 0..k and c the full pool. WAND adds up bounds of the transitions
that remain; the *direct* bound of stage k is the 99th percentile of ``range(c - c_k)`` itself, which no sum of ranges
exceeds. A token leaves after stage k when ``top1 - top2 of c_k`` exceeds it.

Both bounds are cautious: a range that is wide enough to change the first token seldom does. What is asked for is an
agreement, say 99 %: margins ``f * bound_k`` with the smallest factor f that keeps it. Factors are tried from the
largest down, and one is kept while the upper limit (95 %, over documents, ``shares.upper_limit``) of the share of
tokens that differ from the full pool's is below what is allowed. Testing a fixed sequence of hypotheses up to the first
that is not rejected is learn-then-test (Angelopoulos et al. 2021, arXiv 2110.01052), the risk-controlling relative of
conformal prediction that CALM (Schuster et al. 2022, arXiv 2207.07061) calibrates its exits with: with 95 % confidence
over calibration texts, new text of the same kind agrees at least as often as stated. Nothing is assumed about margins.

What a record says of a rule is cross-fitted: every fifth of the documents is judged by margins of the other four.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cognica_poe.analysis.bits_per_byte import Positions
from cognica_poe.analysis.shares import is_below, upper_limit
from cognica_poe.analysis.wand import bounds_of

AGREEMENTS = (0.9, 0.99, 0.999)
"""Agreements that are calibrated for."""
CONFIDENCE = 0.95
_FACTORS = np.exp(np.arange(np.log(16.0), np.log(1e-4), -0.05))
_FOLDS = 5
_FEWEST = 4  # units


@dataclass(frozen=True)
class ExitRule:
    """Margins [K-1] (nats) above which a token leaves after stage k, and what they give on other documents.

    ``stated`` is the agreement that was asked for, ``None`` for the direct bound. exit_fraction [K], agreement and low,
    its one-sided 95 % lower limit, are of margins calibrated on other documents. All are ``None`` where the text is too
    little to show that agreement.
    """

    stated: float | None
    margins: list[float] | None
    exit_fraction: list[float] | None
    agreement: float | None
    low: float | None


def exit_rules(
    positions: Positions, units: NDArray[np.int64], agreements: Sequence[float] = AGREEMENTS
) -> list[ExitRule]:
    """The direct bound and one rule per agreement; none for a single stage or fewer than 4 units.

    ``units`` [N]: what the positions are counted by, documents or what several of them were cut from.
    """
    ranks = np.unique(units, return_inverse=True)[1]
    if not len(positions.margin) or ranks.max() + 1 < _FEWEST:
        return []
    folds = [ranks % _FOLDS == fold for fold in range(min(_FOLDS, ranks.max() + 1))]
    everything = np.ones(len(ranks), dtype=bool)
    margins = calibrated(positions, ranks, everything, agreements)
    others = [calibrated(positions, ranks, ~fold, agreements) for fold in folds]
    return [
        _tested(positions, ranks, stated, own, list(zip(folds, theirs, strict=True)))
        for stated, own, *theirs in zip((None, *agreements), margins, *others, strict=True)
    ]


def config_margins(rules: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Fields of the model's configuration that hold the margins of ``rules`` (JSON layout of ``ExitRule``)."""
    stated = {f"{r['stated']:g}": list(r["margins"]) for r in rules if r["stated"] is not None and r["margins"]}
    direct = [list(r["margins"]) for r in rules if r["stated"] is None and r["margins"]]
    fields: dict[str, Any] = {"poe_agreement_margins": stated} if stated else {}
    return fields | ({"poe_direct_p99_bounds": direct[0]} if direct else {})


def calibrated(
    positions: Positions, units: NDArray[np.int64], chosen: NDArray[np.bool_], agreements: Sequence[float]
) -> list[list[float] | None]:
    """Margins [K-1] of the direct bound, then of every agreement, from the ``chosen`` [N] positions."""
    bounds = np.array(bounds_of(positions.direct[:, chosen]))
    found: dict[float, list[float]] = {}
    open_ = set(agreements)
    for factor, events, trials in _differences(positions, units, chosen, bounds):
        open_ = {stated for stated in open_ if is_below(events, trials, 1.0 - stated, CONFIDENCE)}
        found |= {stated: [float(factor * bound) for bound in bounds] for stated in open_}
        if not open_:
            break
    return [bounds.tolist(), *(found.get(stated) for stated in agreements)]


def _differences(
    positions: Positions, units: NDArray[np.int64], chosen: NDArray[np.bool_], bounds: NDArray[np.float64]
) -> Iterator[tuple[float, NDArray[np.float64], NDArray[np.float64]]]:
    """Every factor, largest first, with the tokens that it changes and all tokens, [units]."""
    margin, agrees = positions.margin[:, chosen], positions.agrees[:, chosen]
    owner = np.unique(units[chosen], return_inverse=True)[1]
    trials = np.bincount(owner).astype(np.float64)
    for factor in _FACTORS:
        stages = leaving(margin, factor * bounds)
        events = np.bincount(owner, weights=~_agreeing(agrees, stages), minlength=len(trials)).astype(np.float64)
        yield float(factor), events, trials


def leaving(margins: NDArray[np.floating], thresholds: NDArray[np.float64] | Sequence[float]) -> NDArray[np.int64]:
    """Stage [N] after which each position leaves: the first whose margin [K-1, N] is above its threshold [K-1]."""
    above = margins > np.asarray(thresholds, dtype=np.float64)[:, None]
    stages: NDArray[np.int64] = np.concatenate([above, np.ones((1, margins.shape[1]), dtype=bool)]).argmax(0)
    return stages


def _agreeing(agrees: NDArray[np.bool_], stages: NDArray[np.int64]) -> NDArray[np.bool_]:
    whole = np.concatenate([agrees, np.ones((1, agrees.shape[1]), dtype=bool)])
    chosen: NDArray[np.bool_] = whole[stages, np.arange(len(stages))]
    return chosen


def _tested(
    positions: Positions,
    units: NDArray[np.int64],
    stated: float | None,
    margins: list[float] | None,
    tests: list[tuple[NDArray[np.bool_], list[float] | None]],
) -> ExitRule:
    """A rule, judged on each of the ``tests`` (which positions, margins from the others)."""
    stages = np.zeros(len(units), dtype=np.int64)
    for mine, theirs in tests:
        if theirs is None or margins is None:
            return ExitRule(stated, None, None, None, None)
        stages[mine] = leaving(positions.margin[:, mine], theirs)
    right = _agreeing(positions.agrees, stages)
    trials = np.bincount(units).astype(np.float64)
    low = 1.0 - upper_limit(np.bincount(units, weights=~right).astype(np.float64), trials, CONFIDENCE)
    shares = np.bincount(stages, minlength=len(positions.margin) + 1) / len(stages)
    return ExitRule(stated, margins, shares.tolist(), float(right.mean()), low)
