"""The gap to ordinary backprop in words and as a section of the card: compute factor and depth yield, by intervals."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from cognica_poe.analysis.gap import GapToControl
from cognica_poe.release.card.readings import UNCLEAR
from cognica_poe.release.text import MISSING, count, markdown_table, markdown_text, number, signed


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
