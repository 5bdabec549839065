"""A gap between two trainings as compute, and what depth yields; with paired intervals where records keep sums.

Chinchilla's fit (Hoffmann et al. 2022, arXiv 2203.15556, approach 3) gives the loss of ordinary backprop at N
parameters and D tokens, ``L = E + A / N^a + B / D^b`` in nats per token of their data. A relative gap says how much
smaller, in parameters and tokens alike, the backprop model would be that is as far behind: ``m`` times less compute.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cognica_poe.analysis.bootstrap import Bootstrap
from cognica_poe.analysis.student import tail_of
from cognica_poe.analysis.sums import Sums
from cognica_poe.errors import UserError

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


@dataclass(frozen=True)
class Measured:
    """A figure with its 95 % paired interval; None where it does not exist."""

    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class GapToControl:
    """A pool against ordinary backprop of the same shape, on the same documents."""

    control: str
    """Name of the control run."""
    steps: tuple[int, int]
    """Of pool and control."""
    tokens: tuple[int, int]
    relative: Measured
    """Bits per byte of the pool over those of the control, minus 1."""
    factor: Measured
    """The gap as compute: how many times less of it the control would need to be as far behind."""
    shallow: str | None = None
    """Name of the run of stage 0's layers alone, by backprop."""
    depth_yield: Measured | None = None
    """R: which part of what depth gives backprop the pool finds too."""


Side = tuple[Mapping[str, Any], Sums]
"""A record in its JSON layout, and the sums beside it."""


def gap_to_control(pool: Side, control: Side, shallow: Side | None = None, *, seed: int = 0) -> GapToControl:
    """The gap of ``pool`` to ``control``, of the same shape, and R where ``shallow`` has stage 0's layers alone.

    Raises UserError where they were not measured on one slice, or shapes and objectives do not make a comparison.
    """
    sides = [pool, control, *([shallow] if shallow else [])]
    _require_comparable(*(record for record, _ in sides))
    documents = [sums.documents for _, sums in sides]
    columns = [documents[0].bytes, *(part.nats["full"] for part in documents)]
    bootstrap = Bootstrap(len(columns[0]), units=pool[1].units, seed=seed)
    totals = bootstrap.totals(np.stack(columns, axis=1))
    whole = np.array([[float(column.sum()) for column in columns]])
    tail = tail_of(round(bootstrap.effective(columns[0])), 0.95)
    size, tokens = control[0]["model"]["parameters"], control[0]["tokens_seen"]

    def measured(of: Callable[[NDArray[np.float64]], NDArray[np.float64]]) -> Measured:
        low, high = np.quantile(of(totals), [tail, 1.0 - tail])
        return Measured(float(of(whole)[0]), float(low), float(high))

    relative = measured(lambda sums: sums[:, 1] / sums[:, 2] - 1.0)
    factor = Measured(*(_factor(gap, size, tokens) for gap in (relative.value, relative.low, relative.high)))
    found = None
    if shallow is not None and whole[0, 3] > whole[0, 2]:
        found = measured(lambda sums: (sums[:, 3] - sums[:, 1]) / (sums[:, 3] - sums[:, 2]))
    names = [record["model"]["name"] for record, _ in sides]
    steps, seen = ((pool[0][key], control[0][key]) for key in ("step", "tokens_seen"))
    return GapToControl(names[1], steps, seen, relative, factor, names[2] if shallow else None, found)


def _factor(gap: float | None, parameters: int, tokens: int) -> float | None:
    try:
        return None if gap is None or not tokens else compute_factor(gap, parameters, tokens)
    except ValueError:
        return None


def _require_comparable(
    pool: Mapping[str, Any], control: Mapping[str, Any], shallow: Mapping[str, Any] | None = None
) -> None:
    layers = pool["model"]["stage_layers"]
    if pool.get("path") != "pool" or len(layers) < 2:
        raise UserError(f"{pool['model']['name']} has no stages: a gap is that of a pool to its control")
    for record, wanted, what in ((control, sum(layers), "control"), (shallow, layers[0], "shallow")):
        if record is None:
            continue
        name = record["model"]["name"]
        if record.get("path") != "plain":
            raise UserError(f"{name} is no {what} run: it was not trained by ordinary backprop (poe_mode none)")
        if sum(record["model"]["stage_layers"]) != wanted:
            found = sum(record["model"]["stage_layers"])
            raise UserError(f"{name} has {found} layers, the {what} run of this pool has {wanted}")
        if record["validation"]["sha256"] != pool["validation"]["sha256"]:
            raise UserError(f"{name} was measured on another slice than {pool['model']['name']}: use the same data")
