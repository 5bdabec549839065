"""The .jsonl files of a run, ``metrics.jsonl`` and ``events.jsonl``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cognica_poe.files import write_bytes


class Journal:
    """One flushed line per record; lines of steps that will be repeated are dropped.

    Args:
        path: the file.
        writes: False on the ranks that leave it alone.
        keep_until: drop lines of later steps.
    """

    def __init__(self, path: Path, writes: bool, keep_until: int | None = None):
        self.path, self.writes = path, writes
        if keep_until is not None:
            self.drop_after(keep_until)
        elif writes and path.is_file() and path.stat().st_size and not path.read_bytes().endswith(b"\n"):
            with open(path, "ab") as file:  # a kill cut the last line off: the next one gets its own
                file.write(b"\n")

    def drop_after(self, step: int) -> None:
        """Drop the lines of later steps, and what is no line."""
        if not self.writes or not self.path.is_file():
            return
        kept = []
        for line in self.path.read_bytes().splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + b"\n")
            except (ValueError, KeyError, TypeError):
                continue  # the line that a kill cut off
        write_bytes(self.path, b"".join(kept))

    def write(self, record: dict[str, Any]) -> None:
        """Append a record."""
        if not self.writes:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
