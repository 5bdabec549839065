"""What the results say, by a rule that was fixed before them.

The gate comes first: backprop through all layers must beat backprop through stage 0's alone by 5 %, or no arm has a gap
to close. Then every arm is compared with C1 on the same documents and seeds. Intervals are 95 %, from a hierarchical
bootstrap: seeds, then documents (prompts for acceptance).

* success: the upper bound of the pool's gap is below 1 %, acceptance is at least 0.95 of that of T1 (lower bound), and
  the pool is no worse than its best stage (lower bound of the difference not above 0);
* progress: the depth yield exceeds that of T1 by 0.15;
* null: the gap's interval lies within 0.3 % of 0: no effect seen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.gap.arms import ARMS
from cognica_poe.analysis.gap import compute_factor, depth_yield
from cognica_poe.errors import UserError
from cognica_poe.files import read_json, write_json

RESAMPLES = 4000
GATE, SUCCESS, ACCEPTANCE, PROGRESS, NULL = 0.05, 0.01, 0.95, 0.15, 0.003

Result = dict[str, Any]


def load_results(folder: Path) -> list[Result]:
    """Every result of a folder. Raises UserError when there is none."""
    found = [read_json(file, "result") for file in sorted(Path(folder).glob("*-s*.json"))]
    if not found:
        raise UserError(f"{folder} holds no results; make some with `python -m benchmarks.gap train`")
    return found


def bpb(result: Result, path: str | None = None) -> float:
    """Bits per byte over all documents, by :func:`answer` when no path is named."""
    return float(np.sum(result["nats"][path or answer(result)]) / np.log(2) / np.sum(result["bytes"]))


def answer(result: Result) -> str:
    """The path that an arm answers with: the pool, and of C1, whose early exits teach nothing, the deepest stage.

    Its pool is far worse (5 to 7 % at 5M tokens): taken as the control, it would let every arm pass.
    """
    return f"stage{last_stage(result)}" if result["arm"] == "C1" else "full"


def last_stage(result: Result) -> int:
    """The deepest stage."""
    return sum(name.startswith("stage") for name in result["nats"]) - 1


def best_stage(result: Result) -> str:
    """The stage with the fewest bits per byte."""
    stages = [name for name in result["nats"] if name.startswith("stage")]
    return min(stages, key=lambda name: bpb(result, name))


def choose_rates(results: Sequence[Result], tokens: int) -> dict[str, float]:
    """Factor of the learning rates by arm: the best of those tried at ``tokens`` tokens."""
    best: dict[str, Result] = {}
    for result in results:
        arm = result["arm"]
        if result["tokens"] == tokens and (arm not in best or bpb(result) < bpb(best[arm])):
            best[arm] = result
    return {arm: result["rate"] for arm, result in best.items()}


@dataclass(frozen=True)
class Draws:
    """Resampled seeds and units: ``seeds`` [R, S] indices, ``counts`` [R, S, U] how often a unit was drawn."""

    seeds: NDArray[np.int64]
    counts: NDArray[np.int64]

    @classmethod
    def make(cls, seeds: int, units: int) -> Draws:
        """Seeds with replacement, and for each drawn seed its units with replacement."""
        generator = np.random.default_rng(0)
        chances = np.full(units, 1.0 / units)
        drawn = generator.integers(seeds, size=(RESAMPLES, seeds))
        return cls(drawn, generator.multinomial(units, chances, size=(RESAMPLES, seeds)))

    def totals(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Resampled totals [R] of ``values`` [S, U]."""
        return np.einsum("rsu,rsu->r", self.counts, values[self.seeds])

    def interval(
        self, statistic: Callable[..., NDArray[np.float64] | float], *columns: NDArray[np.float64]
    ) -> dict[str, float]:
        """Value and interval of a function of totals of columns [S, U]."""
        samples = statistic(*(self.totals(column) for column in columns))
        low, high = np.quantile(samples, [0.025, 0.975])
        return {
            "value": float(statistic(*(column.sum() for column in columns))),
            "low": float(low),
            "high": float(high),
        }


def _stack(results: Sequence[Result], column: Callable[[Result], Any]) -> NDArray[np.float64]:
    return np.array([column(result) for result in results], dtype=np.float64)


class Comparison:
    """Arms trained on ``tokens`` tokens, compared on the seeds that they share with C1."""

    def __init__(self, results: Sequence[Result], tokens: int) -> None:
        self.tokens = tokens
        chosen: dict[tuple[str, int], Result] = {}
        for result in results:  # of several rates the best; for C1 too, so that nobody is favoured
            key = (result["arm"], result["seed"])
            if result["tokens"] == tokens and (key not in chosen or bpb(result) < bpb(chosen[key])):
                chosen[key] = result
        self.by_arm = {arm: {s: r for (a, s), r in chosen.items() if a == arm} for arm in ARMS}

    def pairs(self, arm: str, other: str) -> tuple[list[Result], list[Result]]:
        """Results of two arms, seed by seed."""
        seeds = sorted(self.by_arm[arm].keys() & self.by_arm[other].keys())
        return [self.by_arm[arm][s] for s in seeds], [self.by_arm[other][s] for s in seeds]

    def gap(self, arm: str, other: str, path: str | None = None) -> dict[str, float] | None:
        """(BPB of ``arm`` - BPB of ``other``) / BPB of ``other``, paired by document and seed.

        A ``path`` is one of ``arm``.
        """
        mine, theirs = self.pairs(arm, other)
        if not mine:
            return None
        draws = Draws.make(len(mine), len(mine[0]["bytes"]))
        own = _stack(mine, lambda r: r["nats"][path or answer(r)])
        return draws.interval(lambda a, b: a / b - 1.0, own, _stack(theirs, lambda r: r["nats"][answer(r)]))

    def pool_minus_best(self, arm: str) -> dict[str, float] | None:
        """BPB of the pool minus BPB of the arm's best stage."""
        results = list(self.by_arm[arm].values())
        if not results or "stage1" not in results[0]["nats"]:
            return None
        draws = Draws.make(len(results), len(results[0]["bytes"]))
        pool, best = (_stack(results, lambda r: r["nats"]["full"]), _stack(results, lambda r: r["nats"][best_stage(r)]))
        return draws.interval(
            lambda a, b, n: (a - b) / n / np.log(2), pool, best, _stack(results, lambda r: r["bytes"])
        )

    def acceptance(self, arm: str, other: str) -> tuple[float, dict[str, float]] | None:
        """Accepted / proposed of an arm, and its ratio to that of another."""
        mine, theirs = self.pairs(arm, other)
        if not mine or not sum(mine[0]["proposed"]) or not sum(theirs[0]["proposed"]):
            return None
        draws = Draws.make(len(mine), len(mine[0]["proposed"]))
        columns = [_stack(part, lambda r, k=key: r[k]) for part in (mine, theirs) for key in ("accepted", "proposed")]
        value = float(columns[0].sum() / columns[1].sum())
        return value, draws.interval(lambda a, p, b, q: (a / p) / (b / q), *columns)

    def depth_yield(self, arm: str) -> float | None:
        """R: which part of what backprop gains by depth the arm gains."""
        mine, control = self.pairs(arm, "C1")
        shallow = self.by_arm["C2"].values()
        if not mine or not shallow:
            return None
        return depth_yield(*(float(np.mean([bpb(r) for r in part])) for part in (shallow, control, mine)))

    def gate(self) -> dict[str, Any] | None:
        """Stage 0's depth against all of it, both by backprop (C2 against C0)."""
        found = self.gap("C2", "C0")
        if found is None:
            return None
        shallow, full = self.pairs("C2", "C0")
        return {
            "shallow_bpb": float(np.mean([bpb(r) for r in shallow])),
            "full_bpb": float(np.mean([bpb(r) for r in full])),
            "relative": found["value"],
            "low": found["low"],
            "high": found["high"],
            "passed": found["low"] >= GATE,
        }

    def row(self, arm: str) -> dict[str, Any] | None:
        """What is said of an arm; None without results."""
        results = list(self.by_arm[arm].values())
        gap = self.gap(arm, "C1")
        if gap is None:
            return None
        accepted, best = self.acceptance(arm, "T1"), self.pool_minus_best(arm)
        row = {
            "name": arm,
            "about": ARMS[arm].about,
            "tokens": self.tokens,
            "seeds": len(results),
            "bpb": float(np.mean([bpb(r) for r in results])),
            "pool_gap": gap["value"],
            "low": gap["low"],
            "high": gap["high"],
            "stage0_bpb": float(np.mean([bpb(r, "stage0") for r in results])),
            "stage0_gap_to_C2": self.gap(arm, "C2", "stage0"),
            "depth_yield": self.depth_yield(arm),
            "compute_factor": compute_factor(gap["value"], results[0]["parameters"], results[0]["tokens"]),
            "agreement": None if results[0]["agreement"] is None else float(np.mean([r["agreement"] for r in results])),
            "acceptance": accepted and accepted[0],
            "acceptance_ratio": accepted and accepted[1],
            "peak_bytes": results[0]["peak_bytes"],
            "operations": results[0]["operations"],
            "pool_minus_best": best,
        }
        return {**row, "verdict": self.verdict(arm, row)}

    def verdict(self, arm: str, row: dict[str, Any]) -> str:
        """By the rule of this module."""
        if arm in ("C0", "C1", "C2"):
            return "control"
        ratio, best, yields = row["acceptance_ratio"], row["pool_minus_best"], self.depth_yield("T1")
        fast = ratio is not None and ratio["low"] >= ACCEPTANCE
        if row["high"] < SUCCESS and fast and best is not None and best["low"] <= 0.0:
            return "success"
        if max(abs(row["low"]), abs(row["high"])) < NULL:
            return "no effect seen"
        if arm != "T1" and yields is not None and row["depth_yield"] - yields > PROGRESS:
            return "progress"
        return "behind" if row["low"] > 0.0 else "undecided"


def summarise(results: Path, tokens: int) -> dict[str, Any]:
    """Gate and arms at a budget."""
    comparison = Comparison(load_results(results), tokens)
    rows = [row for arm in ARMS if (row := comparison.row(arm)) is not None]
    return {"tokens": tokens, "gate": comparison.gate(), "arms": rows}


def write_summary(results: Path, tokens: int, out: Path) -> dict[str, Any]:
    """``summarise``, kept as JSON."""
    found = summarise(results, tokens)
    write_json(out, found)
    return found
