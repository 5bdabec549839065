"""What the journals of a run say of its course: where a step stood, validation in training, what the plots mark."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]


def by_step(metrics: Iterable[Row]) -> list[dict[str, Any]]:
    """One row per step, in order: lines of one step (of training, of validation, of a repeated step) put together, a
    later line before an earlier one."""
    rows: dict[int, dict[str, Any]] = {}
    for line in metrics:
        if isinstance(line.get("step"), int):
            rows.setdefault(line["step"], {}).update(line)
    return [rows[step] for step in sorted(rows)]


def progress_at(metrics: Sequence[Row], step: int, steps: int) -> dict[str, Any]:
    """Where a run of ``steps`` steps stood at ``step``; None for what its journal does not say."""
    row = next((row for row in metrics if row["step"] == step), {})
    measured = row.get("validation") or {}
    return {
        "of_training": step / steps,
        "epoch": row.get("epoch"),
        "shard": row.get("shard"),
        "lr_scale": row.get("lr_scale"),
        "validation_bpb": measured.get("full"),
    }


def validations(metrics: Sequence[Row]) -> list[dict[str, Any]]:
    """The validations in training, in order: ``step`` and bits per byte by path, as ``metrics.jsonl`` has them."""
    return [{"step": row["step"], **row["validation"]} for row in metrics if isinstance(row.get("validation"), Mapping)]


def minima(found: Sequence[Row]) -> list[tuple[int, float]]:
    """Step and value of every validation below all before it on the same slice."""
    lowest: dict[Any, float] = {}
    new = []
    for row in found:
        value, slice_of = row.get("full"), row.get("sha256")
        if isinstance(value, float) and math.isfinite(value) and value < lowest.get(slice_of, math.inf):
            lowest[slice_of] = value
            new.append((row["step"], value))
    return new


def share_of_time(metrics: Sequence[Row]) -> float | None:
    """Which part of the time of training and validation together validation took; None where nothing was counted."""
    spent = sum(row["validation"].get("seconds", 0.0) for row in metrics if isinstance(row.get("validation"), Mapping))
    trained = 0.0
    for before, row in itertools.pairwise([{"tokens": 0, "step": 0}, *metrics]):
        rate, tokens = row.get("tokens_per_second"), row.get("tokens")
        if rate and tokens and before.get("tokens") is not None:
            trained += (tokens - before["tokens"]) / rate
    return spent / (spent + trained) if spent and trained else None


@dataclass(frozen=True)
class Mark:
    """Something that happened at a step: ``kind`` is ``epoch``, ``resume``, ``roll back`` or ``recipe``."""

    step: int
    kind: str
    text: str


def marks(metrics: Sequence[Row], events: Sequence[Row]) -> list[Mark]:
    """Borders of epochs, resumes and restarts, roll-backs, changes of the recipe; by step, in words."""
    found = []
    for before, row in itertools.pairwise(metrics):
        first, second = before.get("epoch"), row.get("epoch")
        if isinstance(first, int) and isinstance(second, int) and second > first:
            found.append(Mark(before["step"], "epoch", f"epoch {second} begins"))
    for event in events:
        step = event.get("step")
        if not isinstance(step, int):
            continue
        if event.get("event") == "resume":
            restarts = event.get("restarts") or 0
            found.append(Mark(step, "resume", f"restart {restarts}" if restarts else "resumed"))
        elif event.get("event") == "roll back":
            to = event.get("to")
            found.append(Mark(step, "roll back", f"rolled back to step {to}" if to is not None else "rolled back"))
        elif event.get("event") == "recipe changed":
            changed = ", ".join(map(str, event.get("changes") or []))
            found.append(Mark(step, "recipe", f"recipe changed: {changed}" if changed else "recipe changed"))
    return sorted(found, key=lambda mark: (mark.step, mark.kind, mark.text))
