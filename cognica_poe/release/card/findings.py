"""What changed at each checkpoint, in words made from labelled changes alone; cumulative changes and milestones."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from cognica_poe.analysis.changes import Change
from cognica_poe.release.card.readings import Record
from cognica_poe.release.card.section import Section, over_steps
from cognica_poe.release.text import MISSING, count, interval, number, percent, signed
from cognica_poe.release.trajectory import Row, Trajectory

_MOST = 12  # milestones of a figure
_STEPS = (1.0, 0.5, 0.2, 0.1)


def name_of(figure: str) -> tuple[str, float, int, str]:
    """What a change is of: ``(words, factor, decimals, unit)``."""
    table, _, part = figure.partition(".")
    if table == "bpb":
        return "bits per byte", 1.0, 4, ""
    if table == "accuracy":
        of_stage = "" if part == "full" else f" of stage {part.removeprefix('stage')}"
        return f"accuracy{of_stage}", 100.0, 2, " points"
    if table == "bounds":
        return f"WAND bound {part} to {int(part) + 1}", 1.0, 4, " nats"
    if table == "acceptance":
        return "acceptance", 100.0, 2, " points"
    return ("routed share" if table == "routing" else figure.replace(".", " ")), 100.0, 2, " points"


def said(figure: str, change: Change) -> str:
    """``bits per byte -0.0917 [-0.1073, -0.0779]``."""
    words, factor, digits, unit = name_of(figure)
    low, high = factor * change.low, factor * change.high
    return f"{words} {signed(factor * change.value, digits)}{unit} [{signed(low, digits)}, {signed(high, digits)}]"


@dataclass(frozen=True)
class Finding:
    """One step: what is a signal since the step before, and what is noise; plain text."""

    step: int
    since: int
    signals: list[str]
    noise: list[str]

    @property
    def text(self) -> str:
        """One sentence or two."""
        seen = "; ".join(self.signals) if self.signals else "no change that is more than noise"
        rest = f" Noise: {', '.join(self.noise)}." if self.noise else ""
        return f"Step {count(self.step)}, since {count(self.since)}: {seen}.{rest}"


def findings(trajectory: Trajectory) -> list[Finding]:
    """Of every step whose changes could be computed."""
    found = []
    for row in trajectory.rows:
        figures = row.changes.figures
        if row.changes.base is None or not figures:
            continue
        signals = [said(name, change) for name, change in figures.items() if change.signal]
        noise = [name_of(name)[0] for name, change in figures.items() if not change.signal]
        found.append(Finding(row.step, row.changes.base, signals, noise))
    return found


def cumulative(trajectory: Trajectory) -> Section | None:
    """Changes since one step, on the trained path; None where there are none."""
    whole = trajectory.since
    if whole is None or not any(row.changes.figures for row in whole.rows):
        return None
    base = whole.rows[0]
    first = (base.record or {})["bpb"]["full"]

    def cells(row: Row, _: Record) -> list[str]:
        change = row.changes.figures.get("bpb.full")
        if change is None:
            return [row.changes.reason or MISSING, *[MISSING] * 3]
        bounds = interval((change.low, change.high))
        found = [row.change("bpb.full"), bounds, percent(change.value / first, 2)]
        return [*found, row.change("accuracy.full", 100.0, 2)]

    header = ["bits per byte", "95 % interval", "relative", "accuracy (points)"]
    text = f"Change since step {count(base.step)} on the trained path, over the same documents."
    rest = Trajectory(whole.rows[1:], whole.comparisons)
    return replace(over_steps("Cumulative change", text, header, rest, cells), note=cumulative_note(whole))


def cumulative_note(whole: Trajectory) -> str:
    """How the labels of cumulative changes were made."""
    names = (("bpb", "bits per byte"), ("accuracy", "accuracy"))
    parts = [f"{count(whole.comparisons[key])} changes of {name}" for key, name in names if whole.comparisons.get(key)]
    return (
        "A change is a signal if its paired 95 % interval excludes zero and its p-value holds Holm's correction for "
        f"the {' and the '.join(parts)} since that step, stages included; else it is noise."
    )


@dataclass(frozen=True)
class Milestone:
    """The first step at which a figure lies beyond a round value, and the first at which its whole interval does."""

    text: str
    step: int
    value: str
    sure: int | None

    @property
    def cells(self) -> list[str]:
        """Of the row of a table."""
        return [self.text, count(self.step), self.value, count(self.sure) if self.sure is not None else "not yet"]


def milestones(records: Sequence[Record]) -> list[Milestone]:
    """Of bits per byte (below) and accuracy (above) on the trained path, the hardest that each step is the first to
    pass; the first record passes none."""
    found = []
    bpb = [(r["step"], r["bpb"]["full"], ((r.get("intervals") or {}).get("full") or [None, None])[1]) for r in records]
    for level in _levels([value for _, value, _ in bpb]):
        found += _first(bpb, level, below=True, text=f"bits per byte below {level:g}", shown=lambda v: number(v))
    right = [_accuracy(record) for record in records if (record.get("accuracy") or {}).get("full") is not None]
    for level in reversed(_levels([value for _, value, _ in right])):
        text = f"accuracy above {100 * level:g} %"
        found += _first(right, level, below=False, text=text, shown=lambda v: percent(v, 2))
    hardest = {(item.text.partition(" ")[0], item.step): item for item in found}
    return list(hardest.values())


def _accuracy(record: Record) -> tuple[int, float, float | None]:
    low = ((record.get("accuracy_intervals") or {}).get("full") or [None, None])[0]
    return record["step"], record["accuracy"]["full"], low


def _levels(values: Sequence[float]) -> list[float]:
    """Round values between the lowest and the highest, from above; as fine as at most a dozen of them allow."""
    if len(values) < 2 or max(values) <= min(values):
        return []
    low, high = min(values), max(values)
    power = 10.0 ** math.ceil(math.log10(high - low))
    grains = [scale * part for scale in (power, power / 10) for part in _STEPS]
    fitting = [grain for grain in grains if (high - low) / grain <= _MOST]
    grain = min(fitting)
    first, last = math.ceil(low / grain + 1e-9), math.floor(high / grain - 1e-9)
    return [round(k * grain, 12) for k in range(last, first - 1, -1)]


def _first(
    values: Sequence[tuple[int, float, float | None]],
    level: float,
    below: bool,
    text: str,
    shown: Callable[[float], str],
) -> list[Milestone]:
    def beyond(value: float | None) -> bool:
        return value is not None and (value < level if below else value > level)

    passed = [(step, value) for step, value, _ in values if beyond(value)]
    if not passed or beyond(values[0][1]):
        return []
    sure = next((step for step, _, edge in values if beyond(edge)), None)
    return [Milestone(text, passed[0][0], shown(passed[0][1]), sure)]


def milestone_table(trajectory: Trajectory) -> Section | None:
    """Round values and where they were first passed; None where none was."""
    found = milestones(trajectory.records)
    if not found:
        return None
    text = (
        "The first measured step at which the trained path lies beyond a round value, and the first at which its whole "
        "95 % interval does."
    )
    header = ["milestone", "first at step", "value there", "by its interval"]
    return Section("Milestones", text, header, [item.cells for item in found], first_is_words=True)
