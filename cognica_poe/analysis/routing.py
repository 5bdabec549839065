"""Routing: which share of positions stage 0 could answer alone, as a curve over the regressions that are allowed.

The card's probe routes by position, reads the stage-0 margin and caps regressions. Here: positions are sorted by the
stage-0 top1 - top2 margin; the largest set of most confident positions is routed in which at most ``cap`` of the routed
positions regress (the full pool's top-1 is the target, stage 0's is not). The projected speed-up
``1 / (1 - (1 - stage0_cost) * fraction)`` is the card's formula ``1 / (1 - 0.49 f)`` with the cost of stage 0 counted
from parameters instead of fixed at 0.51. It is a projection for one token at a time, not a measurement.

A cap can be read in more than one way. Regressions may be counted per *routed* position or per position of *all*; and
they may be positions *lost* (the full pool right, stage 0 wrong) or the *net* loss, less the positions that only stage
0 has right. The curve has every cap in every reading, with an interval over documents, and what thresholds that were
chosen on four fifths of the documents do on the other fifth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cognica_poe.analysis.bits_per_byte import Positions
from cognica_poe.analysis.bootstrap import Bootstrap
from cognica_poe.analysis.sums import BINS, EDGES

if TYPE_CHECKING:
    from cognica_poe.modeling.configuration_cognica_poe import CognicaPoEConfig

CAP = 0.02
CAPS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05)
READINGS = (("lost", "routed"), ("lost", "all"), ("net", "routed"), ("net", "all"))
"""What a cap counts, and per which positions; the first is the reading of ``route``."""
RELEASED_COST = 0.51
"""Cost of stage 0 that the released model's speed-ups were projected with."""
_FOLDS = 5


@dataclass(frozen=True)
class RoutingResult:
    """One point of the routing curve; ``threshold`` is the smallest routed margin, ``None`` if nothing is routed."""

    cap: float
    fraction: float
    regression_rate: float
    threshold: float | None
    stage0_cost: float
    projected_speedup: float
    positions: int


@dataclass(frozen=True)
class RoutingPoint:
    """Largest share of positions, from the widest margin on, within ``cap`` of the regressions that are ``counted``
    per positions ``of`` a kind; ``low``, ``high``: 95 % interval, ``None`` for a single document.

    tested_fraction and tested_rate: what thresholds of other documents route, and how much that costs.
    """

    cap: float
    counted: str
    of: str
    fraction: float
    low: float | None
    high: float | None
    threshold: float | None
    tested_fraction: float | None
    tested_rate: float | None


def stage0_cost(config: CognicaPoEConfig) -> float:
    """Multiply-adds of stage 0 with its head relative to those of the full model with all heads, in (0, 1].

    Counts the matrices that a token passes through: attention projections, MLP, one head per stage (folded).
    """
    query, key = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    layer = config.hidden_size * (2 * query + 2 * key + 2 * config.intermediate_size)
    head = config.hidden_size * config.vocab_size
    stages = config.poe_stage_layers
    return (stages[0] * layer + head) / (sum(stages) * layer + len(stages) * head)


def route(positions: Positions, cost: float, *, cap: float = CAP) -> RoutingResult:
    """Largest routable share at a regression rate of at most ``cap``.

    Args:
        positions: with at least one margin row (two stages or more).
        cost: of a routed position relative to an unrouted one, in (0, 1].
        cap: regressions per routed position.

    Raises:
        ValueError: a model of one stage, or no position.
    """
    if not positions.margin.size:
        raise ValueError("routing needs two stages or more, and positions")
    lost, everywhere = _events(positions, "lost"), np.ones(len(positions.document), dtype=bool)
    threshold = _threshold(positions.margin[0], lost, cap, "routed")
    routed = positions.margin[0] >= threshold if threshold is not None else ~everywhere
    count, fraction = int(routed.sum()), float(routed.mean())
    return RoutingResult(
        cap=cap,
        fraction=fraction,
        regression_rate=float(lost[routed].sum() / count) if count else 0.0,
        threshold=threshold,
        stage0_cost=cost,
        projected_speedup=1.0 / (1.0 - (1.0 - cost) * fraction),
        positions=len(routed),
    )


def routing_curve(
    positions: Positions, units: NDArray[np.int64], caps: Sequence[float] = CAPS, *, seed: int = 0
) -> list[RoutingPoint]:
    """Every cap in every reading, caps ascending within a reading.

    ``positions``: as for ``route``; ``units`` [N]: what is resampled and parted, documents or the files they are of.
    """
    ranks = np.unique(units, return_inverse=True)[1]
    binned = _Binned(positions, ranks, seed) if ranks.max() else None
    found = []
    for counted, of in READINGS:
        events = _events(positions, counted)
        for cap in caps:
            threshold = _threshold(positions.margin[0], events, cap, of)
            fraction = float((positions.margin[0] >= threshold).mean()) if threshold is not None else 0.0
            low, high = binned.interval(fraction, counted, of, cap) if binned else (None, None)
            tested = _tested(positions.margin[0], events, ranks, cap, of) if binned else (None, None)
            found.append(RoutingPoint(cap, counted, of, fraction, low, high, threshold, *tested))
    return found


def _events(positions: Positions, counted: str) -> NDArray[np.int64]:
    """What each position [N] counts: 1 for one that is lost and, in the net reading, -1 for one that is won."""
    full, stage0 = positions.full_correct, positions.stage0_correct
    won = (stage0 & ~full) if counted == "net" else np.zeros_like(full)
    return (full & ~stage0).astype(np.int64) - won


def _threshold(margin: NDArray[np.float32], events: NDArray[np.int64], cap: float, of: str) -> float | None:
    """Smallest margin of the largest set within the cap; ``None`` if no set is."""
    order = np.argsort(-margin, kind="stable")
    sorted_, routed = margin[order], np.arange(1, len(order) + 1)
    rates = np.cumsum(events[order]) / (routed if of == "routed" else len(order))
    # A threshold cannot split equal margins: a set may end only where the next margin is smaller.
    complete = np.append(sorted_[1:] < sorted_[:-1], True)
    allowed = np.flatnonzero((rates <= cap) & complete)
    return float(sorted_[allowed[-1]]) if len(allowed) else None


def _tested(
    margin: NDArray[np.float32], events: NDArray[np.int64], ranks: NDArray[np.int64], cap: float, of: str
) -> tuple[float, float]:
    """Share routed, and regressions in the reading's own measure, by thresholds of the other folds."""
    routed = np.zeros(len(margin), dtype=bool)
    for fold in range(min(_FOLDS, int(ranks.max()) + 1)):
        mine = ranks % _FOLDS == fold
        threshold = _threshold(margin[~mine], events[~mine], cap, of)
        if threshold is not None:
            routed[mine] = margin[mine] >= threshold
    count = routed.sum() if of == "routed" else len(margin)
    return float(routed.mean()), float(events[routed].sum() / count) if count else 0.0


class _Binned:
    """Counts by unit and margin, resampled: close enough to the positions for an interval (``sums.EDGES``)."""

    def __init__(self, positions: Positions, ranks: NDArray[np.int64], seed: int) -> None:
        units = int(ranks.max()) + 1
        place = ranks * BINS + np.searchsorted(EDGES, positions.margin[0], side="right")
        columns = {
            "all": np.ones(len(ranks)),
            **{counted: _events(positions, counted).astype(np.float64) for counted in ("lost", "net")},
        }
        counts = np.stack(
            [np.bincount(place, weights=column, minlength=units * BINS) for column in columns.values()], axis=-1
        ).reshape(units, BINS, len(columns))
        resampled = Bootstrap(units, seed=seed).totals(counts.reshape(units, -1)).reshape(-1, BINS, len(columns))
        whole = counts.sum(0)[None]
        # From the widest margin on, with the counts of all documents in front.
        self.sums = np.concatenate([whole, resampled])[:, ::-1].cumsum(1)
        self.columns = list(columns)
        self.tail = Bootstrap(units, seed=seed).tail(counts[..., 0].sum(1))

    def interval(self, value: float, counted: str, of: str, cap: float) -> tuple[float, float]:
        routed, events = self.sums[..., 0], self.sums[..., self.columns.index(counted)]
        total = routed[:, -1:]
        allowed = events <= cap * (routed if of == "routed" else total)
        last = allowed.shape[1] - 1 - allowed[:, ::-1].argmax(1)
        share = np.where(allowed.any(1), routed[np.arange(len(routed)), last] / total[:, 0], 0.0)
        low, high = np.quantile(share[1:] + (value - share[0]), [self.tail, 1.0 - self.tail])
        return float(np.clip(low, 0.0, value)), float(np.clip(high, value, 1.0))
