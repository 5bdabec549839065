"""WAND early exit: calibration of its bounds, and the exit rate and agreement that they give.

Let c_k be the pooled log-probabilities of the stages 0..k. The bound of the transition k -> k+1 is the 99th
percentile, over validation positions, of ``range(c_{k+1} - c_k)`` (max - min over the vocabulary: a constant shift does
not matter). A token leaves after stage k if ``top1 - top2 of c_k > safety * sum_{j >= k} bound_j`` (model card,
"WAND"): were every remaining range within its bound, no other token could overtake the first. Each bound fails at about
1 % of the positions, hence agreement is measured, not assumed.

The bounds of a record come from all kept positions. Exit rate and agreement are cross-fitted: each half of the
documents is judged with bounds from the other half, so that no document vouches for itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cognica_poe.analysis.bits_per_byte import Positions, measure_paths
from cognica_poe.errors import UserError

if TYPE_CHECKING:
    from cognica_poe.data.tokenizer import Tokenizer
    from cognica_poe.modeling.modeling_cognica_poe import CognicaPoEForCausalLM

QUANTILE = 0.99
CALIBRATION_TOKENS = 131_072


@dataclass(frozen=True)
class WandResult:
    """Bounds [K-1] (nats) and what they give on held-out halves of ``positions`` teacher-forced positions.

    exit_fraction [K] sums to 1 (the last stage takes all that did not leave before); agreement is the share of
    positions whose top-1 token at the exit is that of the full pool.
    """

    bounds: list[float]
    safety: float
    positions: int
    exit_fraction: list[float]
    agreement: float


def bounds_of(ranges: NDArray[np.floating], quantile: float = QUANTILE) -> list[float]:
    """The ``quantile`` over positions of ``ranges`` [K-1, N], one bound per transition."""
    return [float(value) for value in np.quantile(np.asarray(ranges, dtype=np.float64), quantile, axis=-1)]


def exit_stages(margins: NDArray[np.floating], bounds: Sequence[float], safety: float) -> NDArray[np.int64]:
    """Stage [N] after which each position leaves: margins [K-1, N] of c_k against the bounds [K-1] still to come."""
    transitions, count = margins.shape
    remaining = safety * np.cumsum(np.asarray(bounds, dtype=np.float64)[::-1])[::-1]  # sum over j >= k
    leaves = np.concatenate([margins > remaining[:, None], np.ones((1, count), dtype=bool)])
    return leaves.argmax(0) if transitions else np.zeros(count, dtype=np.int64)


def cross_fit(positions: Positions, *, safety: float = 1.0, quantile: float = QUANTILE) -> WandResult:
    """Bounds from all positions; exit rate and agreement of every half under bounds of the other half.

    The halves are the documents of even and of odd rank.

    Raises:
        ValueError: fewer than 2 documents among the positions.
    """
    transitions, count = positions.margin.shape
    if transitions == 0:  # a single stage: nothing to leave early from
        return WandResult([], safety, count, [1.0], 1.0)
    ranks = np.unique(positions.document, return_inverse=True)[1]
    if ranks.max() < 1:
        raise ValueError("WAND calibration needs positions of at least 2 documents")
    exits = np.empty(count, dtype=np.int64)
    for half in (0, 1):
        mine = ranks % 2 == half
        exits[mine] = exit_stages(positions.margin[:, mine], bounds_of(positions.range[:, ~mine], quantile), safety)
    agrees = np.concatenate([positions.agrees, np.ones((1, count), dtype=bool)])
    return WandResult(
        bounds=bounds_of(positions.range, quantile),
        safety=safety,
        positions=count,
        exit_fraction=[float(share) for share in np.bincount(exits, minlength=transitions + 1) / count],
        agreement=float(agrees[exits, np.arange(count)].mean()),
    )


def calibrate(
    model: CognicaPoEForCausalLM,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    tokens: int = CALIBRATION_TOKENS,
    batch_rows: int = 16,
    safety: float = 1.0,
    log: Callable[[str], None] = lambda line: None,
) -> WandResult:
    """Bounds of ``model`` from the first documents of ``texts`` that hold at most ``tokens`` tokens (at least two).

    Raises:
        UserError: the model was trained on the plain path.
        ValueError: as ``measure_paths`` and ``cross_fit``.
    """
    if model.config.poe_mode == "none":
        raise UserError(
            "a model trained on the plain path (poe_mode none) has no stages to leave early from: "
            "calibrate one of poe_mode flat, hier or residual_logop"
        )
    chosen: list[str] = []
    letters = 0
    for text in texts:  # a token stands for at least one byte: no need to encode more than this
        if len(chosen) >= 2 and letters >= 16 * tokens:
            break
        chosen.append(text)
        letters += len(text)
    sizes = np.cumsum([len(ids) for ids in tokenizer.encode_batch(chosen)])
    kept = max(2, int(np.searchsorted(sizes, tokens, side="right")))
    evaluation = measure_paths(model, tokenizer, chosen[:kept], batch_rows=batch_rows, positions=tokens, log=log)
    return cross_fit(evaluation.positions, safety=safety)
