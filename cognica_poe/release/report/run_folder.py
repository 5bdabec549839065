"""A finished or running run as the report reads it: records, metrics, events, data manifest, published revisions."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from cognica_poe.analysis.record import read_sums
from cognica_poe.analysis.sums import Sums
from cognica_poe.data.manifest import load_manifest
from cognica_poe.errors import UserError
from cognica_poe.files import MANIFEST
from cognica_poe.recipe.stored import recipe_from_dict
from cognica_poe.release import history
from cognica_poe.release.publish.hub_folder import HubFolder
from cognica_poe.release.trajectory import NO_RECORD, Trajectory
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
    """One row per optimiser step; of a step that was run twice (a resume) the last one."""
    events: list[dict[str, Any]]
    data: dict[str, Any]
    """The data manifest, or empty."""
    sums: dict[int, Sums] = field(default_factory=dict)
    """What lies beside the records, by step."""
    missing: dict[int, str] = field(default_factory=dict)
    """Steps that were to be released, were trained and have no record, and why."""
    revisions: dict[str, dict[str, str]] = field(default_factory=dict)
    """Published to the local Hub folder: ``{repo id: {ref: commit}}``."""

    since: int | None = None
    """Step that cumulative changes start from; the first record's when omitted."""

    @property
    def latest(self) -> dict[str, Any]:
        """The record of the highest step."""
        return self.records[-1]

    @cached_property
    def trajectory(self) -> Trajectory:
        """The records with the changes between them. Raises UserError where ``since`` has no record."""
        return Trajectory.of(self.records, self.sums, self.missing, self.since)

    @cached_property
    def marks(self) -> list[history.Mark]:
        """What happened at which step."""
        return history.marks(self.metrics, self.events)

    @cached_property
    def validations(self) -> list[dict[str, Any]]:
        """Validations in training, in order."""
        return history.validations(self.metrics)


def read_run(path: Path, since: int | None = None) -> RunFolder:
    """Read a run folder; ``since``: of ``RunFolder``.

    Raises UserError: missing, without an analysis record, a file malformed or changed.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"run folder not found: {path}; pass the folder that `cognica-poe run --out` made")
    files = sorted((path / "analysis").glob("step-*.json"))
    records = [_read_record(file) for file in files]
    if not records:
        raise UserError(f"{path / 'analysis'} holds no step-N.json: run `cognica-poe analyze {path}` first")
    recipe, manifest = path / "recipe.json", path / "data" / "manifest.json"
    described = read_sealed(recipe, "recipe", "undo the change") if recipe.is_file() else {}
    metrics = read_records(path / "metrics.jsonl")
    events = read_records(path / "events.jsonl")
    found = {r["step"]: read_sums(file, r.get("documents_sha256")) for r, file in zip(records, files, strict=True)}
    rows = history.by_step(metrics)
    return RunFolder(
        path=path,
        name=str(described.get("name") or path.resolve().name),
        recipe=described,
        records=sorted(records, key=lambda record: record["step"]),
        metrics=rows,
        events=events,
        sums={step: sums for step, sums in found.items() if sums is not None},
        missing=_missing(described, max([*(row["step"] for row in rows), *found]), events, found),
        data=load_manifest(manifest.parent).model_dump(mode="json") if manifest.is_file() else {},
        revisions=_published(path / "release" / "hub"),
        since=since,
    )


def _read_record(file: Path) -> dict[str, Any]:
    record = read_sealed(file, "analysis record", "restore it or make it again with `cognica-poe analyze`")
    bpb = record.get("bpb") if isinstance(record, Mapping) else None
    if not isinstance(bpb, Mapping) or not isinstance(bpb.get("stage"), list) or "step" not in record:
        raise UserError(f"analysis record {file} has no step or bits per byte by stage; make it again with `analyze`")
    if _STEP.fullmatch(file.stem) is None or int(file.stem.removeprefix("step-")) != record["step"]:
        raise UserError(f"analysis record {file} is of step {record['step']}; its name must say so")
    return record


def _missing(
    recipe: Mapping[str, Any], reached: int, events: Sequence[Mapping[str, Any]], found: Collection[int]
) -> dict[int, str]:
    """Steps of the release schedule up to ``reached`` without a record, and why."""
    if not {"training", "release"} <= recipe.keys():
        return {}
    left_out = {event.get("step") for event in events if event.get("event") == "release left out"}
    steps = (step for step in recipe_from_dict(dict(recipe), "recipe.json").released_steps() if step <= reached)
    return {step: "left out" if step in left_out else NO_RECORD for step in steps if step not in found}


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
