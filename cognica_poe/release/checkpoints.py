"""One line per released step: ``trajectory.jsonl``, and the same as a table for any program, ``trajectory.csv``.

Every revision holds the lines of all steps up to its own, ``main`` those of all.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Line = dict[str, Any]
TRAJECTORY, TABLE = "trajectory.jsonl", "trajectory.csv"


def line_of(
    record: Mapping[str, Any], about: Mapping[str, Any], weights_sha256: str, commit: str | None = None
) -> Line:
    """What is said of one step; None for what was not measured or is not known.

    ``record``: the step's analysis record. ``about``: its ``release.json``, with ``progress`` where a run wrote it.
    ``weights_sha256``: of ``model.safetensors``. ``commit``: of its revision, which that revision cannot know itself.
    """
    intervals, accuracy, gaps = (record.get(key) or {} for key in ("intervals", "accuracy", "gaps"))
    progress, drafts = about.get("progress") or {}, record.get("speculative") or {}
    gap = gaps["stage"][-1] if gaps.get("stage") else {}
    bpb = record["bpb"]
    return {
        "step": record["step"],
        "revision": f"step-{record['step']}",
        "commit": commit,
        "tokens_seen": record.get("tokens_seen"),
        "of_training": progress.get("of_training"),
        "epoch": progress.get("epoch"),
        "shard": progress.get("shard"),
        "lr_scale": progress.get("lr_scale"),
        "weights_sha256": weights_sha256,
        "parameters": record["model"].get("parameters"),
        "path": record.get("path"),
        "validation_bpb": progress.get("validation_bpb"),
        "bpb": bpb["full"],
        "bpb_interval": intervals.get("full"),
        "bpb_stage": bpb["stage"],
        "bpb_stage_interval": intervals.get("stage"),
        "bpb_prefix": bpb.get("prefix"),
        "bpb_prefix_interval": intervals.get("prefix"),
        "bpb_plain": bpb.get("plain"),
        "bpb_plain_interval": intervals.get("plain"),
        "accuracy": accuracy.get("full"),
        "accuracy_stage": accuracy.get("stage"),
        "crossover_gap": gap.get("value"),
        "crossover_gap_interval": [gap["low"], gap["high"]] if gap else None,
        "wand_bounds": record.get("wand_bounds"),
        "wand_exit_fraction": (record.get("wand") or {}).get("exit_fraction"),
        "acceptance": drafts.get("acceptance"),
        "acceptance_interval": [drafts["low"], drafts["high"]] if drafts.get("low") is not None else None,
        "drafts": drafts.get("proposed"),
        "routed": (record.get("routing") or {}).get("fraction"),
        "validation_sha256": (record.get("validation") or {}).get("sha256"),
    }


def as_jsonl(lines: Sequence[Line]) -> bytes:
    """``trajectory.jsonl``."""
    return "".join(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in lines).encode()


def as_csv(lines: Sequence[Line]) -> bytes:
    """``trajectory.csv``: a row per step, a column per figure. An interval is two columns, ``_low`` and ``_high``, a
    figure by stage one per stage (``bpb_stage0``); what is missing is empty. Figures are given in full."""
    flat = [dict(_flat(line)) for line in lines]
    names = list(dict.fromkeys(name for line in lines for name in line))
    columns = sorted({column for row in flat for column in row}, key=lambda column: _place(column, names))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([row.get(column, "") for column in columns] for row in flat)
    return out.getvalue().encode()


def _flat(line: Line) -> Iterator[tuple[str, str]]:
    for name, value in line.items():
        for column, part in _columns(name, value):
            yield column, "" if part is None else repr(part) if isinstance(part, float) else str(part)


def _columns(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    stem = name.removesuffix("_interval")
    if stem != name and not (value and isinstance(value[0], list)):
        low, high = value or (None, None)
        yield f"{stem}_low", low
        yield f"{stem}_high", high
    elif not isinstance(value, list):
        yield name, value
    else:
        for k, part in enumerate(value):
            yield from _columns(f"{stem}{k}_interval" if stem != name else f"{name}{k}", part)


def _place(column: str, names: Sequence[str]) -> tuple[int, int, int]:
    """Where a column stands: as its name in a line, by stage, a figure before its interval."""
    stem, end = column, 0
    for number, suffix in enumerate(("_low", "_high"), start=1):
        if column.endswith(suffix):
            stem, end = column.removesuffix(suffix), number
    name = stem.rstrip("0123456789") if stem not in names else stem
    return names.index(name), int(stem[len(name) :] or 0), end
