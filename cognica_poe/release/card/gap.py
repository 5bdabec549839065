"""The gap to ordinary backprop in words and as a section of the card: compute factor and depth yield, by intervals."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cognica_poe.analysis.gap import GapToControl, Side, gap_to_control
from cognica_poe.analysis.record import load_records
from cognica_poe.errors import UserError
from cognica_poe.release.card.readings import UNCLEAR
from cognica_poe.release.text import MISSING, count, markdown_table, markdown_text, number, signed


def gap_of_runs(run: Path, control: Path, shallow: Path | None = None, step: int | None = None) -> dict[str, Any]:
    """The gap of a run at ``step`` (its last measured one when omitted), as ``release.json`` keeps it.

    A control is taken at the same step where it has a record of it, else at its last. Raises UserError where a run has
    no record with sums, or is no control of this one.
    """
    pool = _side(run, step, exact=step is not None)
    at = pool[0]["step"]
    found = gap_to_control(pool, _side(control, at), _side(shallow, at) if shallow else None)
    return as_dict(found)


def _side(run: Path, step: int | None, exact: bool = False) -> Side:
    records = {record.step: record for record in load_records(Path(run) / "analysis")}
    if not records:
        raise UserError(f"{run} holds no analysis record: run `cognica-poe analyze {run}` first")
    if exact and step not in records:
        raise UserError(f"{run} has no record of step {step}: run `cognica-poe analyze {run} --step {step}` first")
    record = records[step if step in records else max(records)]
    if record.sums is None:
        raise UserError(f"{run} has no sums beside the record of step {record.step}: measure the step again")
    return record.model_dump(mode="json"), record.sums


def as_dict(gap: GapToControl) -> dict[str, Any]:
    """As ``release.json`` keeps it."""
    return dataclasses.asdict(gap)


def gap_rows(gap: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """``(figure, value, 95 % interval)``, plain text."""
    relative, factor, part = (gap.get(key) or {} for key in ("relative", "factor", "depth_yield"))
    rows = [
        ("gap in bits per byte", _share(relative.get("value")), _bounds(relative, _share)),
        ("the same as compute", _times(factor.get("value")), _bounds(factor, _times)),
    ]
    if part:
        rows.append(("depth yield R", number(part.get("value"), 3), _bounds(part, lambda value: number(value, 3))))
    return rows


def gap_reading(gap: Mapping[str, Any]) -> str:
    """What sign and interval of the gap say, and what the comparison is; plain text."""
    relative, factor = gap["relative"], gap["factor"]
    low, high = relative["low"], relative["high"]
    value = f"{_share(relative['value'])} {_bounds(relative, _share)}"
    if low <= 0.0 <= high:
        said = f"Against {gap['control']}: {UNCLEAR}, {value}"
    elif low > 0.0:
        said = (
            f"Behind {gap['control']} by {value}: at this size it would be as far behind with "
            f"{_times(factor['value'])} less compute"
        )
    else:
        said = f"Ahead of {gap['control']}, {value}"
    equal = gap["tokens"][0] == gap["tokens"][1]
    seen = (
        f"{count(gap['tokens'][0])} tokens each"
        if equal
        else f"{count(gap['tokens'][0])} against {count(gap['tokens'][1])} tokens, not equal"
    )
    return f"{said}; {seen}, one training each."


def gap_section(release: Mapping[str, Any]) -> str:
    """Section of the card; empty where no control run was given."""
    gap = release.get("gap")
    if not gap:
        return ""
    text = f"{markdown_text(gap_reading(gap), 600)} {GAP_TEXT}"
    if gap.get("shallow"):
        text += f" {yield_text(markdown_text(gap['shallow']))}"
    return f"## Gap to backprop\n\n{text}\n\n" + markdown_table(("figure", "value", "95 % interval"), gap_rows(gap))


GAP_TEXT = (
    "Paired over the same documents. As compute: Chinchilla's fit (Hoffmann et al. 2022) at the control's parameters "
    "and tokens, an extrapolation where these are few."
)


def yield_text(shallow: str) -> str:
    """What R is."""
    return f"R is the part of what depth gives backprop, from {shallow} to the control, that the pool finds too."


def _share(value: Any) -> str:
    return MISSING if value is None else f"{signed(100 * value, 2)} %"


def _times(value: Any) -> str:
    return MISSING if value is None else f"{number(value, 2)}x"


def _bounds(item: Mapping[str, Any], show: Any) -> str:
    low, high = item.get("low"), item.get("high")
    return MISSING if low is None or high is None else f"[{show(low)}, {show(high)}]"
