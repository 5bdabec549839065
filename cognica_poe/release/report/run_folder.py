"""A finished or running run as the report reads it: records, metrics, events, data manifest, published revisions."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cognica_poe.errors import UserError
from cognica_poe.files import read_json

_STEP = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class RunFolder:
    """What a run folder holds; lists are sorted by step."""

    path: Path
    name: str
    recipe: dict[str, Any]
    records: list[dict[str, Any]]
    """Analysis records, at least one."""
    metrics: list[dict[str, Any]]
    """One line per optimiser step; of a step that was run twice (a resume) the last one."""
    events: list[dict[str, Any]]
    data: dict[str, Any]
    """The data manifest, or empty."""
    unreadable_lines: int
    """Lines of metrics.jsonl and events.jsonl that are no JSON object (a crash can cut the last one)."""
    revisions: dict[str, dict[str, str]] = field(default_factory=dict)
    """Published to the local Hub folder: ``{repo id: {ref: commit}}``."""

    @property
    def latest(self) -> dict[str, Any]:
        """The record of the highest step."""
        return self.records[-1]


def read_run(path: Path) -> RunFolder:
    """Read a run folder. Raises UserError if it is missing, has no analysis record or holds a malformed one."""
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"run folder not found: {path}; pass the folder that `cognica-poe run --out` made")
    records = [_read_record(file) for file in sorted((path / "analysis").glob("step-*.json"))]
    if not records:
        raise UserError(f"{path / 'analysis'} holds no step-N.json: run `cognica-poe analyze {path}` first")
    recipe_file = path / "recipe.json"
    recipe = read_json(recipe_file, "recipe") if recipe_file.is_file() else {}
    manifest = path / "data" / "manifest.json"
    metrics, cut = _read_lines(path / "metrics.jsonl")
    events, cut_events = _read_lines(path / "events.jsonl")
    by_step = {line["step"]: line for line in metrics if isinstance(line.get("step"), int)}
    return RunFolder(
        path=path,
        name=str(recipe.get("name") or path.resolve().name),
        recipe=recipe,
        records=sorted(records, key=lambda record: record["step"]),
        metrics=[by_step[step] for step in sorted(by_step)],
        events=events,
        data=read_json(manifest, "data manifest") if manifest.is_file() else {},
        unreadable_lines=cut + cut_events,
        revisions=_published(path / "release" / "hub"),
    )


def _read_record(file: Path) -> dict[str, Any]:
    record = read_json(file, "analysis record")
    bpb = record.get("bpb") if isinstance(record, Mapping) else None
    if not isinstance(bpb, Mapping) or not isinstance(bpb.get("stage"), list) or "step" not in record:
        raise UserError(f"analysis record {file} has no step or bits per byte by stage; make it again with `analyze`")
    if _STEP.fullmatch(file.stem) is None or int(file.stem.removeprefix("step-")) != record["step"]:
        raise UserError(f"analysis record {file} is of step {record['step']}; its name must say so")
    return record


def _read_lines(file: Path) -> tuple[list[dict[str, Any]], int]:
    """JSON objects of a .jsonl file, and how many lines were not one."""
    if not file.is_file():
        return [], 0
    lines, bad = [], 0
    for text in file.read_text(encoding="utf-8", errors="replace").splitlines():
        if not text.strip():
            continue
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = None
        if isinstance(value, dict):
            lines.append(value)
        else:
            bad += 1
    return lines, bad


def _published(hub: Path) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    for folder in sorted(hub.glob("models--*")):
        refs = {file.name: file.read_text().strip() for file in sorted((folder / "refs").glob("*")) if file.is_file()}
        if refs:
            found[folder.name.removeprefix("models--").replace("--", "/")] = refs
    return found
