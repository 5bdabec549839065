"""The .jsonl files of a run, ``metrics.jsonl`` and ``events.jsonl``: every line carries a checksum."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cognica_poe.errors import UserError
from cognica_poe.files import write_bytes
from cognica_poe.seals import open_line, sealed_line


@dataclass(frozen=True)
class Line:
    """One line of a journal."""

    number: int
    """From 1."""
    data: bytes
    """Without the line break."""
    record: dict[str, Any] | None
    """None when it is damaged."""
    damage: str = ""
    """How."""


def read_lines(path: Path) -> list[Line]:
    """Every line of a journal, without the one that a kill cut off at the end; an absent file has none."""
    if not path.is_file():
        return []
    *whole, last = path.read_bytes().split(b"\n")
    lines = [_line(number, data) for number, data in enumerate(whole, start=1) if data]
    for end in (last, last[:-1]):  # a kill may have cut it off, and its line break may have become another byte
        if end and (line := _line(len(whole) + 1, end)).record is not None:
            return [*lines, line]
    return lines


def _line(number: int, data: bytes) -> Line:
    try:
        return Line(number, data, open_line(data))
    except ValueError as error:
        return Line(number, data, None, str(error))


def read_records(path: Path) -> list[dict[str, Any]]:
    """Records of a journal; an absent file has none. Raises UserError naming the first damaged line."""
    lines = read_lines(path)
    for line in lines:
        if line.record is None:
            raise UserError(f"{path} line {line.number} is damaged: {line.damage}; restore the file or delete the line")
    return [line.record for line in lines if line.record is not None]


class Journal:
    """One flushed line per record; lines of steps that will be repeated, and damaged ones, are dropped.

    Args:
        path: the file.
        writes: False on the ranks that leave it alone.
        keep_until: drop lines of later steps.
        log: told of every damaged line.
    """

    def __init__(
        self,
        path: Path,
        writes: bool,
        keep_until: int | None = None,
        log: Callable[[str], None] = lambda line: None,
    ):
        self.path, self.writes, self.log = path, writes, log
        self.drop_after(keep_until)

    def drop_after(self, step: int | None) -> None:
        """Drop the lines of later steps, if one is given, and what is no line."""
        if not self.writes or not self.path.is_file():
            return
        kept = []
        for line in read_lines(self.path):
            if line.record is None:
                self.log(f"{self.path} line {line.number} is damaged and left out: {line.damage}")
            elif step is None or line.record.get("step", step + 1) <= step:
                kept.append(line.data + b"\n")
        if (data := b"".join(kept)) != self.path.read_bytes():
            write_bytes(self.path, data)

    def write(self, record: dict[str, Any]) -> None:
        """Append a record."""
        if not self.writes:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(sealed_line(record) + "\n")
