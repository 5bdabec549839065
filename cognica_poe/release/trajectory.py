"""The rows of a trajectory table: every step, its record where there is one, and the changes since the record before.

Cumulative changes, all since one step, are a second set of rows. All are computed here, when a table is made, from what
each record keeps: the order in which steps were measured does not matter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cognica_poe.analysis.changes import Change, StepChanges, changes, figures_of
from cognica_poe.analysis.sums import Sums
from cognica_poe.errors import UserError
from cognica_poe.release.text import MISSING, count, signed

NO_RECORD = "no record"


@dataclass(frozen=True)
class Row:
    """One step; ``note`` says why it has no record."""

    step: int
    record: Mapping[str, Any] | None
    changes: StepChanges
    note: str = ""

    def change(self, name: str, scale: float = 1.0, digits: int = 4) -> str:
        """``-0.0917 signal`` or a dash."""
        found = self.changes.figures.get(name)
        return MISSING if found is None else f"{signed(scale * found.value, digits)} {label(found)}"

    @property
    def since(self) -> str:
        """The step that changes are taken against, or why there are none."""
        if self.changes.base is None:
            return MISSING
        return count(self.changes.base) + (f" ({self.changes.reason})" if self.changes.reason else "")


def label(change: Change) -> str:
    """``signal`` or ``noise``."""
    return "signal" if change.signal else "noise"


@dataclass(frozen=True)
class Trajectory:
    """``rows`` by step; ``comparisons``: how many changes each table holds, for which its labels are corrected."""

    rows: list[Row]
    comparisons: Mapping[str, int]
    since: Trajectory | None = None
    """The same records, all against one of them."""

    @classmethod
    def of(
        cls,
        records: Sequence[Mapping[str, Any]],
        sums: Mapping[int, Sums],
        missing: Mapping[int, str] | None = None,
        base: int | None = None,
    ) -> Trajectory:
        """Of records in any order, one per step.

        ``missing``: released steps without one, and why. ``base``: the step that cumulative changes start from, the
        first record's when omitted. Raises UserError when it has no record.
        """
        steps = sorted(record["step"] for record in records)
        if base is not None and base not in steps:
            raise UserError(f"step {base} has no record: changes can be taken since {', '.join(map(str, steps))}")
        figures = figures_of(records, sums)
        found, comparisons = changes(records, sums, figures=figures)
        cumulative = None
        if len(steps) > 2 or base is not None:  # of two records the only change is the cumulative one
            whole, number = changes(records, sums, base=steps[0] if base is None else base, figures=figures)
            rows = [Row(record["step"], record, whole[record["step"]]) for record in records if record["step"] in whole]
            cumulative = cls(sorted(rows, key=lambda row: row.step), number)
        rows = [Row(record["step"], record, found[record["step"]]) for record in records]
        known = {row.step for row in rows}
        rows += [
            Row(step, None, StepChanges(), note or NO_RECORD)
            for step, note in (missing or {}).items()
            if step not in known
        ]
        return cls(sorted(rows, key=lambda row: row.step), comparisons, cumulative)

    @property
    def records(self) -> list[Mapping[str, Any]]:
        """The records, by step."""
        return [row.record for row in self.rows if row.record is not None]

    def note(self, table: str) -> str:
        """How the labels of a table were made."""
        number = self.comparisons.get(table, 0)
        if not number:
            return "No change can be computed: it takes two records of one validation slice with their sums."
        return (
            "A change is against the record before it, the step named under 'since', over the same documents (for "
            "acceptance: prompts). It is a signal if its 95 % interval excludes zero and its p-value holds Holm's "
            f"correction for the {count(number)} changes of this table; else it is noise."
        )
