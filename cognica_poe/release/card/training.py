"""How a released model was trained: settings, stage layout, parameters by group, bits per byte in training."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

from cognica_poe.release.card.readings import Record
from cognica_poe.release.card.tables import is_pool
from cognica_poe.release.text import count, interval, markdown_code, markdown_table, markdown_text, number, percent

_MOST_ROWS = 24
_NAMES = {
    "trunk": "trunk: attention and MLP",
    "wte": "token embeddings",
    "value_embeds": "value embeddings",
    "lm_head": "shared head",
    "lm_head_stages": "stage heads",
    "lm_head_exits": "exit heads",
    "ve_gates": "gates of the value embeddings",
    "scalars": "scalars",
}

_COLUMNS: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("revision", "revision", markdown_text),
    ("training", "of_training", percent),
    ("tokens", "tokens_seen", count),
    ("epoch", "epoch", count),
    ("shard", "shard", count),
    ("learning rate x", "lr_scale", lambda value: number(value, 2)),
    ("bits per byte", "bpb", number),
    ("95 % interval", "bpb_interval", interval),
    ("in training", "validation_bpb", number),
    ("acceptance", "acceptance", percent),
    ("commit", "commit", lambda value: str(value or "")[:12]),
)
"""Of the table of checkpoints: name, key of a line, how it is shown."""


def checkpoints(release: Mapping[str, Any]) -> str:
    """Section of the card: every released step with its revision and where training stood; empty without lines."""
    lines = release.get("trajectory") or []
    if not lines:
        return ""
    known = [column for column in _COLUMNS if any(line.get(column[1]) is not None for line in lines)]
    rows = [[show(line.get(key)) for _, key, show in known] for line in lines]
    text = "One revision per step; the same figures and more are in `trajectory.csv` and `trajectory.jsonl`."
    align = "".join("l" if key in ("revision", "commit") else "r" for _, key, _ in known)
    return f"## Checkpoints\n\n{text}\n\n" + markdown_table([name for name, _, _ in known], rows, align)


def training_table(release: Mapping[str, Any]) -> str:
    """Section of the card: what decided the training; empty where the release does not say."""
    training = release.get("training") or {}
    if not training:
        return ""
    rows = [(name, markdown_code(value)) for name, value in training_rows(training)]
    return "## Training\n\n" + markdown_table(("setting", "value"), rows, "ll")


def training_rows(training: Mapping[str, Any]) -> list[tuple[str, str]]:
    """``(setting, value)`` of the settings that a reader looks for, then those beyond them; plain text."""
    first = {
        "optimizer": "Muon for block matrices, AdamW for the rest",
        "batch tokens": count(training.get("batch_tokens")),
        "steps": count(training.get("steps")),
        "tokens": count(training.get("tokens")),
        "tokens per parameter": number(training.get("tokens_per_parameter"), 2),
        "seed": str(training.get("seed")),
    }
    settings = training.get("settings") or {}
    return [*first.items(), *((name, _shown(value)) for name, value in flat(settings) if name not in ("steps", "seed"))]


def flat(value: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested settings as dotted names; what is not set is left out."""
    found: list[tuple[str, Any]] = []
    for key, item in value.items():
        if isinstance(item, Mapping):
            found += flat(item, f"{prefix}{key}.")
        elif item is not None and item != [] and item != ():
            found.append((f"{prefix}{key}", item))
    return found


def _shown(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def stage_rows(record: Record) -> list[tuple[int, int, int, float, float]]:
    """``(stage, first layer, last layer, share of the layers, share up to here)``."""
    layers = record["model"].get("stage_layers") or []
    ends = list(itertools.accumulate(layers))
    return [(k, end - size, end - 1, size / ends[-1], end / ends[-1])
            for k, (size, end) in enumerate(zip(layers, ends, strict=True))]  # fmt: skip


def stage_layout(record: Record) -> str:
    """Section of the card: which layers a stage has; empty for a model of one path."""
    if not is_pool(record) or len(record["model"].get("stage_layers") or []) < 2:
        return ""
    rows = [(str(k), f"{first} to {last}", str(last - first + 1), percent(share), percent(up_to))
            for k, first, last, share, up_to in stage_rows(record)]  # fmt: skip
    header = ("stage", "layers", "number", "share of the trunk", "up to here")
    return "## Stage layout\n\nLayers are counted from 0.\n\n" + markdown_table(header, rows)


def parameter_groups(release: Mapping[str, Any]) -> str:
    """Section of the card: where the parameters are; empty where the release does not say."""
    groups = release.get("parameter_groups") or {}
    total = sum(groups.values())
    if not total:
        return ""
    rows = [(markdown_text(_NAMES.get(name, name)), count(size), percent(size / total, 2))
            for name, size in sorted(groups.items(), key=lambda item: -item[1]) if size]  # fmt: skip
    return "## Parameters\n\n" + markdown_table(("group", "parameters", "share"), [*rows, ("total", count(total), "")])


def loss_history(release: Mapping[str, Any]) -> str:
    """Section of the card: bits per byte measured in training; empty where nothing was."""
    held = release.get("validation_in_training") or {}
    rows = held.get("rows") or []
    if not rows:
        return ""
    low = {step for step, _ in held.get("minima") or []}
    every = -(-len(rows) // _MOST_ROWS)
    shown = [row for i, row in enumerate(rows) if i % every == 0 or row is rows[-1]]
    stages = max(len(row.get("stage") or []) for row in rows)
    header = ["step", "full", *(f"stage {k}" for k in range(stages if stages > 1 else 0)), "plain path", "new minimum"]
    table = []
    for row in shown:
        by_stage = [number(value) for value in row.get("stage") or []] if stages > 1 else []
        is_low = "yes" if row["step"] in low else ""
        table.append([count(row["step"]), number(row.get("full")), *by_stage, number(row.get("plain")), is_low])
    text = history_text(held)
    chain = ", ".join(f"s{step} = {number(value)}" for step, value in held.get("minima") or [])
    left = "" if len(shown) == len(rows) else f"\n\n{count(len(shown))} of {count(len(rows))} validations are shown."
    said = f"{text}\n\nNew minima of the trained path: {chain}.{left}"
    return f"## Validation in training\n\n{said}\n\n" + markdown_table(header, table)


def history_text(held: Mapping[str, Any]) -> str:
    """What was measured on, how often, and what it cost; plain text."""
    spent = held.get("share_of_time")
    cost = "" if spent is None else f" It took {percent(spent, 2)} of the training's time."
    return (
        f"Bits per byte on one fixed slice of held-out text ({count(held.get('documents'))} pieces, "
        f"{count(held.get('bytes'))} bytes), measured while training, without intervals; the tables of released steps "
        f"stand on their own slice.{cost}"
    )
