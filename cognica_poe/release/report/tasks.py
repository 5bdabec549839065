"""Tasks of lm-evaluation-harness in the report: what ``eval`` keeps beside the records that it belongs to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cognica_poe.release.report import page
from cognica_poe.release.text import MISSING, count, html_text, number
from cognica_poe.seals import read_sealed


def tasks_section(run: Path, records: Sequence[Mapping[str, Any]]) -> str:
    """A table of every metric by step, task and path, HTML; empty where nothing was evaluated.

    Results of weights that no record is of are left out. Raises UserError for a file that was changed.
    """
    steps = {record["model"].get("weights_sha256"): record["step"] for record in records}
    rows: list[tuple[int, list[str]]] = []
    for file in sorted((Path(run) / "analysis").glob("tasks-*.json")):
        found = read_sealed(file, "evaluation", "delete the file: evaluate again")
        step = steps.get(found.get("weights_sha256"))
        if step is not None:
            rows += [(step, cells) for item in found["evaluations"] for cells in _cells(item)]
    if not rows:
        return ""
    head = ("task", "path", "metric", "step", "value", "standard error", "samples", "shots", "harness")
    ordered = sorted(rows, key=lambda row: (row[1][:3], row[0]))
    table = [[*cells[:3], count(step), *cells[3:]] for step, cells in ordered]
    return page.table(head, table, "Tasks of lm-evaluation-harness", text_columns=3)


def _cells(item: Mapping[str, Any]) -> list[list[str]]:
    """One row per metric; a metric ``acc,none`` has its standard error under ``acc_stderr,none``."""
    metrics, found = item["metrics"], []
    for name, value in sorted(metrics.items()):
        kind, _, rule = name.partition(",")
        if kind.endswith("_stderr"):
            continue
        error = metrics.get(f"{kind}_stderr,{rule}")
        shown = kind if rule in ("", "none") else f"{kind} ({rule})"
        counts = [count(item[key]) if item.get(key) is not None else MISSING for key in ("samples", "shots")]
        names = [html_text(item["task"], 80), html_text(item["path"], 40), html_text(shown, 60)]
        found.append([*names, number(value), number(error), *counts, html_text(item.get("harness"), 20)])
    return found
