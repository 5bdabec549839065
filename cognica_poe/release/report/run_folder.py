"""A finished or running run as the report reads it: records, metrics, events, data manifest, published revisions."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cognica_poe.data.manifest import load_manifest
from cognica_poe.errors import UserError
from cognica_poe.files import MANIFEST
from cognica_poe.release.publish.hub_folder import HubFolder
from cognica_poe.seals import read_sealed
from cognica_poe.training.journal import read_records

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
    revisions: dict[str, dict[str, str]] = field(default_factory=dict)
    """Published to the local Hub folder: ``{repo id: {ref: commit}}``."""

    @property
    def latest(self) -> dict[str, Any]:
        """The record of the highest step."""
        return self.records[-1]


def read_run(path: Path) -> RunFolder:
    """Read a run folder. Raises UserError: missing, without an analysis record, a file malformed or changed."""
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"run folder not found: {path}; pass the folder that `cognica-poe run --out` made")
    records = [_read_record(file) for file in sorted((path / "analysis").glob("step-*.json"))]
    if not records:
        raise UserError(f"{path / 'analysis'} holds no step-N.json: run `cognica-poe analyze {path}` first")
    recipe, manifest = path / "recipe.json", path / "data" / "manifest.json"
    described = read_sealed(recipe, "recipe", "undo the change") if recipe.is_file() else {}
    metrics = read_records(path / "metrics.jsonl")
    by_step = {line["step"]: line for line in metrics if isinstance(line.get("step"), int)}
    return RunFolder(
        path=path,
        name=str(described.get("name") or path.resolve().name),
        recipe=described,
        records=sorted(records, key=lambda record: record["step"]),
        metrics=[by_step[step] for step in sorted(by_step)],
        events=read_records(path / "events.jsonl"),
        data=load_manifest(manifest.parent).model_dump(mode="json") if manifest.is_file() else {},
        revisions=_published(path / "release" / "hub"),
    )


def _read_record(file: Path) -> dict[str, Any]:
    record = read_sealed(file, "analysis record", "restore it or make it again with `cognica-poe analyze`")
    bpb = record.get("bpb") if isinstance(record, Mapping) else None
    if not isinstance(bpb, Mapping) or not isinstance(bpb.get("stage"), list) or "step" not in record:
        raise UserError(f"analysis record {file} has no step or bits per byte by stage; make it again with `analyze`")
    if _STEP.fullmatch(file.stem) is None or int(file.stem.removeprefix("step-")) != record["step"]:
        raise UserError(f"analysis record {file} is of step {record['step']}; its name must say so")
    return record


def _published(hub: Path) -> dict[str, dict[str, str]]:
    """Raises UserError for a reference that names no sound revision."""
    found: dict[str, dict[str, str]] = {}
    for folder in sorted(hub.glob("models--*")):
        repository = HubFolder(hub, folder.name.removeprefix("models--").replace("--", "/"))
        if refs := repository.refs():
            for commit in refs.values():
                repository.read(commit, MANIFEST)
            found[repository.repo_id] = refs
    return found
