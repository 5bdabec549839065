"""Validation while training: when it is due, how much text it takes, what it writes, new minima.

The slice and the steps follow from the recipe and the data alone, so that a resumed run and any number of ranks
validate alike; training reads nothing of it and is the same bit for bit with and without.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from cognica_poe.recipe.fields import Recipe
from cognica_poe.training.journal import Journal, read_lines
from cognica_poe.training.parallel.ranks import Ranks
from cognica_poe.training.replica import Replica

MOST_OF_TIME = 0.02
"""Share of the time of training that validation may take unless a recipe says otherwise."""
WORK = 2.0
"""What measuring a token is taken to cost against training on it: one forward pass against three, but in fp32 and of
every path, where training multiplies in bf16 (measured on two cores: 1.6 to 2.4; both in fp32: 0.6)."""
FEWEST = 4
"""Validations of a run that the slice is sized for."""
_BYTES_OF_A_TOKEN, _LEAST_BYTES = 3, 4096


class Slice(Protocol):
    """What is measured (``analysis.in_training.FixedSlice``)."""

    tokens: int
    facts: dict[str, Any]

    def share(self, model: Any, rank: int, world: int) -> Any:
        """This rank's part."""

    def figures(self, shares: Sequence[Any]) -> dict[str, Any]:
        """Bits per byte by path from all parts."""


def slice_bytes(recipe: Recipe) -> int | None:
    """How much held-out text is measured: what the recipe says, else as much as its releases, as far as ``FEWEST``
    validations of it fit into their share of the time. None: all of it."""
    training, limit = recipe.training, recipe.release.val_max_bytes
    if training.eval_max_bytes is not None:
        return training.eval_max_bytes
    tokens = MOST_OF_TIME * _batch_tokens(recipe) * training.steps / (WORK * FEWEST)
    fitting = max(_LEAST_BYTES, int(_BYTES_OF_A_TOKEN * tokens))
    return fitting if limit is None else min(limit, fitting)


def steps_between(recipe: Recipe, tokens: int) -> int:
    """Steps between validations of ``tokens`` tokens; 0: none.

    What the recipe says, else the fewest that keep to the share of time, such that released steps are among them. None
    are made where one alone would take more than the run's share, or ranks hold stages and no rank the model.
    """
    training, every = recipe.training, recipe.release.every
    if training.ranks.parallel == "stages":
        return 0
    if training.eval_every is not None:
        return training.eval_every
    fewest = math.ceil(WORK * tokens / (MOST_OF_TIME * _batch_tokens(recipe)))
    if fewest > training.steps:
        return 0
    parts = [size for size in range(fewest, every + 1) if every % size == 0]
    return parts[0] if parts else every * -(-fewest // every)


def _batch_tokens(recipe: Recipe) -> int:
    return recipe.training.batch_rows * recipe.model.max_position_embeddings


@dataclass
class Validation:
    """The validations of one run: ``part`` is measured every ``every`` steps and after the last one; 0: never."""

    part: Slice | None
    every: int
    last: int

    @classmethod
    def of(cls, recipe: Recipe, part: Slice) -> Validation:
        """For a recipe."""
        return cls(part, steps_between(recipe, part.tokens), recipe.training.steps)

    def begin(self, run: Path, metrics: Journal, events: Journal, ranks: Ranks, log: Callable[[str], None]) -> None:
        """Take up what ``metrics.jsonl`` holds already."""
        if not self.every:
            return
        self.metrics, self.events, self.ranks, self.log = metrics, events, ranks, log
        self.file = Path(run) / "metrics.jsonl"
        self.look()

    def look(self) -> None:
        """Learn which steps are measured and which value is the lowest; after a roll-back again."""
        if not self.every:
            return
        found = self.ranks.on_first(self._read)
        self.done, self.lowest = {step for step, _ in found}, min((v for _, v in found), default=math.inf)

    def _read(self) -> list[tuple[int, float]]:
        assert self.part is not None
        sha256 = self.part.facts["sha256"]
        rows = (line.record for line in read_lines(self.file) if line.record and "validation" in line.record)
        measured = [(row["step"], row["validation"]) for row in rows]
        return [(step, v["full"]) for step, v in measured if v["sha256"] == sha256 and v["full"] is not None]

    def is_due(self, step: int) -> bool:
        """Whether the run is to be measured after ``step`` steps and has not been."""
        return bool(self.every and step and (step % self.every == 0 or step == self.last) and step not in self.done)

    def measure_if_due(self, step: int, replica: Replica) -> None:
        """Measure, every rank its share, where that is due; the first rank writes ``metrics.jsonl``, and new minima as
        events."""
        if not self.is_due(step) or self.part is None:
            return
        part, ranks, began = self.part, self.ranks, time.perf_counter()
        with replica.as_released():
            shares = ranks.on_all(lambda: part.share(replica.model, ranks.rank, ranks.world))
        figures = _plain(part.figures(shares))
        seconds = time.perf_counter() - began
        self.done.add(step)
        self.metrics.write({"step": step, "validation": {**figures, **part.facts, "seconds": seconds}})
        full = figures["full"]
        if full is not None and full < self.lowest:
            before = None if math.isinf(self.lowest) else self.lowest
            self.events.write({"event": "new minimum", "step": step, "bpb": full, "before": before})
            self.lowest = full
        self.log(f"step {step}: {full if full is None else round(full, 4)} bits per byte on the validation slice")


NO_VALIDATION = Validation(None, 0, 0)
"""For a run that is not measured while it trains."""


def _plain(value: Any) -> Any:
    """Numbers as JSON has them: None for what is not finite."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value if math.isfinite(value) else None
