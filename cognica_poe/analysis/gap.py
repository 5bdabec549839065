"""A gap between two trainings as compute, and what depth yields.

Chinchilla's fit (Hoffmann et al. 2022, arXiv 2203.15556, approach 3) gives the loss of ordinary backprop at N
parameters and D tokens, ``L = E + A / N^a + B / D^b`` in nats per token of their data. A relative gap says how much
smaller, in parameters and tokens alike, the backprop model would be that is as far behind: ``m`` times less compute.
"""

from __future__ import annotations

import math

E, A, B, ALPHA, BETA = 1.69, 406.4, 410.7, 0.34, 0.28
LARGEST = 1e6


def loss(parameters: float, tokens: float) -> float:
    """The fit, in nats per token."""
    return E + A * math.pow(parameters, -ALPHA) + B * math.pow(tokens, -BETA)


def compute_factor(gap: float, parameters: int, tokens: int) -> float:
    """How many times less compute backprop needs to be ``gap`` (0.01: 1 %) behind its own loss at this size.

    Compute is ``6 N D``, shrunk by the square root in each. Below 1 for a negative gap. Raises ValueError for a gap
    that no model of this family has.
    """

    def behind(factor: float) -> float:
        return loss(parameters / math.sqrt(factor), tokens / math.sqrt(factor)) / loss(parameters, tokens) - 1.0

    low, high = 1.0 / LARGEST, LARGEST
    if not behind(low) < gap < behind(high):
        raise ValueError(f"a gap of {gap:g} is beyond a factor of {LARGEST:g} in compute")
    while high / low > 1.0 + 1e-9:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if behind(middle) < gap else (low, middle)
    return math.sqrt(low * high)


def depth_yield(shallow: float, deep: float, found: float) -> float:
    """R: which part of what backprop gains from stage 0's depth to the full one is found too; all in one unit.

    Raises ValueError where depth gains nothing.
    """
    if shallow <= deep:
        raise ValueError(f"depth gains nothing: {deep:g} at full depth, {shallow:g} at that of the first stage")
    return (shallow - found) / (shallow - deep)
