"""The other direction: which steps of a run read a text, found one shard at a time."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cognica_poe.data.manifest import read_documents
from cognica_poe.data.rows.packing import CASES
from cognica_poe.data.rows.reader import RowDocument, Rows
from cognica_poe.errors import UserError


@dataclass(frozen=True)
class FoundDocument:
    """A piece of a document with the text, and the step that read it."""

    step: int
    piece: RowDocument

    def as_dict(self) -> dict[str, Any]:
        """All of it as one row of a table."""
        return {"step": self.step, **dataclasses.asdict(self.piece)}


def find_text(rows: Rows, pattern: str, rows_per_step: int, steps: Sequence[int]) -> Iterator[FoundDocument]:
    """Pieces of documents whose text the regular expression ``pattern`` matches, in the order of the shards read.

    ``steps`` ascending and without gaps: the steps to look at. Every shard is read once. Raises UserError for a pattern
    that is no regular expression.
    """
    try:
        wanted = re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise UserError(f"--text {pattern!r:.80} is no regular expression: {error}") from error
    matches: dict[int, dict[int, tuple[str, str]]] = {}
    first, last = steps[0] * rows_per_step, (steps[-1] + 1) * rows_per_step
    for stretch in rows.stretches(first, last):
        if stretch.shard not in matches:
            documents = enumerate(read_documents(rows.data_dir, rows.settings.split, stretch.shard))
            found = {number: (d.source, d.origin) for number, d in documents if wanted.search(d.text)}
            matches[stretch.shard] = found
        known = matches[stretch.shard]
        if not known:
            continue
        index = rows.index_of(stretch)
        fragments = np.flatnonzero(np.isin(index.document, list(known)))
        packed = np.searchsorted(index.first, fragments, side="right") - 1
        place_of = np.empty(len(stretch.order), dtype=np.int64)
        place_of[stretch.order] = np.arange(len(stretch.order))
        for place, fragment in sorted(zip(place_of[packed].tolist(), fragments.tolist(), strict=True)):
            position = stretch.begins + place
            if first <= position < last:
                number = int(index.document[fragment])
                where = position % rows_per_step, stretch.epoch, stretch.shard
                piece = int(index.start[fragment]), int(index.length[fragment])
                document = RowDocument(*where, *known[number], *piece, CASES[index.case[number]])
                yield FoundDocument(position // rows_per_step, document)
