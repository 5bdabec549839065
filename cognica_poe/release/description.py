"""What ``release.json`` says of a step beside its record: data, training, parameters, where the run stood."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cognica_poe.data.manifest import load_manifest
from cognica_poe.recipe.fields import Recipe
from cognica_poe.release import history
from cognica_poe.training.journal import read_records


def describe_run(run: Path, recipe: Recipe, step: int, counted: Mapping[str, Any]) -> dict[str, Any]:
    """Data, training, parameters, where the run stood at ``step``, and its validations until then.

    ``counted``: ``{"total": n, "groups": {name: n}}`` of the recipe's parameters.
    """
    manifest = load_manifest(Path(run) / "data").model_dump(mode="json")
    rows = history.by_step(read_records(Path(run) / "metrics.jsonl"))
    rows = [row for row in rows if row["step"] <= step]
    training = recipe.training
    batch = training.batch_rows * recipe.model.max_position_embeddings
    found = {
        "data": {key: manifest[key] for key in ("mix", "sources")},
        "languages": sorted({name for source in manifest["sources"] for name in source.get("languages") or []}) or None,
        "progress": history.progress_at(rows, step, training.steps),
        "parameter_groups": counted["groups"],
        "training": {
            "recipe": recipe.name,
            "steps": training.steps,
            "batch_tokens": batch,
            "tokens": batch * training.steps,
            "tokens_per_parameter": batch * training.steps / counted["total"],
            "seed": training.seed,
            "settings": {**dataclasses.asdict(training), "case_aug_prob": recipe.data.case_aug_prob},
        },
    }
    measured = history.validations(rows)
    if measured:
        kept = ("step", "full", "stage", "prefix", "plain")
        found["validation_in_training"] = {
            **{key: measured[-1].get(key) for key in ("documents", "bytes", "sha256")},
            "share_of_time": history.share_of_time(rows),
            "rows": [{key: row.get(key) for key in kept} for row in measured],
            "minima": [list(item) for item in history.minima(measured)],
        }
    return found
