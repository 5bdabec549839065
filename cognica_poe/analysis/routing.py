"""Routing: which share of positions stage 0 could answer alone.

The card's probe routes by position, reads the stage-0 margin and caps regressions. Here: positions are sorted by the
stage-0 top1 - top2 margin; the largest set of most confident positions is routed in which at most ``cap`` of the routed
positions regress (the full pool's top-1 is the target, stage 0's is not). The projected speed-up
``1 / (1 - (1 - stage0_cost) * fraction)`` is the card's formula ``1 / (1 - 0.49 f)`` with the cost of stage 0 counted
from parameters instead of fixed at 0.51. It is a projection for one token at a time, not a measurement.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cognica_poe.analysis.bits_per_byte import Positions

if TYPE_CHECKING:
    from cognica_poe.modeling.configuration_cognica_poe import CognicaPoEConfig

CAP = 0.02


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
    order = np.argsort(-positions.margin[0], kind="stable")
    margins = positions.margin[0][order]
    rates = np.cumsum((positions.full_correct & ~positions.stage0_correct)[order]) / np.arange(1, len(order) + 1)
    # A threshold cannot split equal margins: a set may end only where the next margin is smaller.
    complete = np.append(margins[1:] < margins[:-1], True)
    allowed = np.flatnonzero((rates <= cap) & complete)
    count = int(allowed[-1]) + 1 if len(allowed) else 0
    fraction = count / len(order)
    return RoutingResult(
        cap=cap,
        fraction=fraction,
        regression_rate=float(rates[count - 1]) if count else 0.0,
        threshold=float(margins[count - 1]) if count else None,
        stage0_cost=cost,
        projected_speedup=1.0 / (1.0 - (1.0 - cost) * fraction),
        positions=len(order),
    )
