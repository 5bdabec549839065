"""A section of card and report that is a table over steps: its cells are our own words and numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cognica_poe.release.card.readings import Record
from cognica_poe.release.text import MISSING, count, markdown_table, markdown_text
from cognica_poe.release.trajectory import Row, Trajectory

Cells = Callable[[Row, Record], list[str]]


@dataclass(frozen=True)
class Section:
    """A table over steps; cells and texts are our own words and numbers, plain text without markup."""

    title: str
    text: str
    header: list[str]
    rows: list[list[str]]
    note: str = ""
    """How its changes were labelled; empty where it has none."""
    first_is_words: bool = False
    """The first column holds words, no steps: it begins at the left."""
    foreign: bool = False
    """Cells hold text that is not our own: it is escaped where it is shown."""

    def markdown(self) -> str:
        """The section of a card."""
        align = ("l" if self.first_is_words else "r") + "r" * (len(self.header) - 1)
        rows = [[markdown_text(cell) for cell in row] for row in self.rows] if self.foreign else self.rows
        table = markdown_table(self.header, rows, align)
        return "\n\n".join(part for part in (f"## {self.title}", self.text, table, self.note) if part)


def over_steps(
    title: str, text: str, header: list[str], trajectory: Trajectory, cells: Cells, changes: str = ""
) -> Section:
    """A section: ``cells`` after the step of every row, a note and dashes where there is no record, and how the
    changes of table ``changes`` were labelled."""
    rows = []
    for row in trajectory.rows:
        if row.record is None:
            rows.append([count(row.step), row.note, *[MISSING] * (len(header) - 1)])
        else:
            rows.append([count(row.step), *cells(row, row.record)])
    note = trajectory.note(changes) if changes and len(trajectory.rows) > 1 else ""
    return Section(title, text, ["step", *header], rows, note)
