"""The rows of a training run: step ``s`` reads the same global rows on any number of processes."""

from __future__ import annotations

import contextlib
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from cognica_poe.data.manifest import load_manifest, read_documents
from cognica_poe.data.rows import packing
from cognica_poe.data.rows.ahead import Packer
from cognica_poe.data.rows.packing import CASES
from cognica_poe.data.rows.sequence import RowSettings, pack_shard
from cognica_poe.data.rows.store import (
    SUFFIXES,
    PackedRows,
    RowFile,
    RowIndex,
    drop_rows,
    file_of,
    load_facts,
    load_index,
)
from cognica_poe.data.tokenizer import load_tokenizer
from cognica_poe.errors import UserError


@dataclass(frozen=True)
class RowDocument:
    """A piece of a document in a row that a step read."""

    row: int
    """Row within the step's batch."""
    epoch: int
    shard: int
    """Number of the shard within the split."""
    source: str
    origin: str
    start: int
    """First token of the piece within the document."""
    tokens: int
    case: str
    """``as is``, ``lower`` or ``upper``."""


@dataclass(frozen=True)
class Reading:
    """What reading the rows of a step came to."""

    epoch: int
    """Of the last row of the step."""
    shard: int
    """Number of its shard within the split."""
    seconds: float
    """That the step waited for its rows."""


@dataclass(frozen=True)
class Stretch:
    """A shard where a run reads it."""

    at: int
    """Shards that the run read before."""
    epoch: int
    shard: int
    begins: int
    """First row of the run that is one of its rows."""
    order: np.ndarray
    """int64 [rows]: its packed rows in the order in which they are read."""


class Rows:
    """Packed rows of one split, shard after shard and epoch after epoch without end.

    Epoch 0 has the shards in the order of the data folder, later epochs (with order ``shuffled`` that one, too) in one
    by (seed, epoch); training rows within a shard are shuffled by (seed, epoch, shard), validation rows come as packed.
    Shards are packed when first needed, or before that (``packed_ahead``); processes of one machine share the files.
    """

    def __init__(
        self,
        data_dir: Path,
        tokenizer_path: Path,
        rows_dir: Path,
        *,
        seed: int,
        row_len: int,
        case_aug_prob: float = 0.15,
        split: str = "train",
        order: str = "shards",
        log: Callable[[str], None] = lambda line: None,
    ) -> None:
        """The keywords are fields of ``RowSettings``. Raises UserError for parts that are damaged or unknown."""
        self.data_dir, self.rows_dir, self.log = Path(data_dir), Path(rows_dir), log
        self.tokenizer = load_tokenizer(tokenizer_path)
        self.manifest = load_manifest(data_dir)
        self.settings = RowSettings(seed, row_len, case_aug_prob, split, order)
        self.settings.require(self.manifest)
        self.shards = len(self.manifest.shards_of(split))
        # Shards of all epochs in the order of reading; a place in it is called ``at``.
        self._facts: list[PackedRows] = []
        self._ends: list[int] = []  # first row of the run behind each
        self._open: dict[int, tuple[RowFile, np.ndarray]] = {}
        self._origins = lru_cache(maxsize=2)(self._read_origins)
        self.reading = Reading(0, 0, 0.0)
        """Of the last ``batch``."""
        self._packer: Packer | None = None
        self._last = self._dropped = 0
        self._looked = -1  # the shard at which all that is needed ahead was found to be there

    @property
    def fingerprint(self) -> str:
        """Identity of the whole sequence of rows, all epochs: equal fingerprints read equal batches."""
        settings = self.settings
        return packing.sequence_fingerprint(
            self.manifest,
            self.tokenizer,
            split=settings.split,
            seed=settings.seed,
            row_len=settings.row_len,
            case_aug=settings.case_aug,
            order=settings.order,
        )

    # ---- where rows stand ------------------------------------------------------------------------------------------

    def facts(self, epoch: int, place: int = 0) -> PackedRows:
        """Facts of the ``place``-th shard of an epoch; packs it, and those before it, where that has not been done."""
        at = epoch * self.shards + place
        while len(self._facts) <= at:
            self._add_facts()
        return self._facts[at]

    def rows_per_epoch(self, epoch: int) -> int:
        """Rows of an epoch (case augmentation makes it vary a little)."""
        return sum(self.facts(epoch, place).rows for place in range(self.shards))

    def locate(self, position: int) -> tuple[int, int, int]:
        """(epoch, number of the shard, place within the shard) of the ``position``-th row of the run."""
        at, place = self._find(position)
        return *self._named(at), place

    def _find(self, position: int) -> tuple[int, int]:
        """(``at``, place within the shard) of a row of the run."""
        while not self._ends or self._ends[-1] <= position:
            counted = self._add_facts()
            if counted and self.shards > 1 and self._ends[-1] <= position:
                drop_rows(self.rows_dir, self._facts[-1])  # packed to be counted and no more
        at = bisect_right(self._ends, position)
        return at, position - (self._ends[at - 1] if at else 0)

    def _add_facts(self) -> bool:
        """Learn of the next shard; returns whether it had to be packed for that."""
        at = len(self._facts)
        epoch, shard = self._named(at)
        split, fingerprint = self.settings.split, self._fingerprint(at)
        known = load_facts(self.rows_dir, split, epoch, shard, fingerprint, self.log)
        self._facts.append(known or self._pack(at))
        self._ends.append((self._ends[-1] if self._ends else 0) + self._facts[-1].rows)
        if len(self._facts) % self.shards == 0 and not self._ends[-1]:
            tokens = sum(each.document_tokens for each in self._facts)
            raise packing.too_little(split, tokens, self.settings.row_len)
        return known is None

    def _named(self, at: int) -> tuple[int, int]:
        """(epoch, number of the shard)."""
        epoch, place = divmod(at, self.shards)
        return epoch, self.settings.shard_order(epoch, self.shards)[place]

    def _fingerprint(self, at: int) -> str:
        return self.settings.fingerprint(self.manifest, self.tokenizer, *self._named(at))

    # ---- reading ---------------------------------------------------------------------------------------------------

    def batch(self, step: int, rows_per_step: int) -> np.ndarray:
        """int64 [rows_per_step, row_len]: the rows of optimiser step ``step`` (from 0), across borders of epochs.

        Raises UserError where a row is not what was packed.
        """
        began, at = time.perf_counter(), 0
        batch = np.empty((rows_per_step, self.settings.row_len), dtype=np.int64)
        for i, (at, row) in enumerate(self._step_rows(step, rows_per_step)):
            batch[i] = self._opened(at)[0][row]
        self._look_ahead(at)
        self.reading = Reading(*self._named(at), time.perf_counter() - began)
        return batch

    def documents(self, step: int, rows_per_step: int) -> list[RowDocument]:
        """What the rows of a step hold, in their order; of the data only the shards of these rows are read."""
        found: list[RowDocument] = []
        indices: dict[int, RowIndex] = {}
        for i, (at, row) in enumerate(self._step_rows(step, rows_per_step)):
            epoch, shard = self._named(at)
            if at not in indices:
                indices[at] = self._index(at)
            index, origins = indices[at], self._origins(shard)
            for fragment in range(index.first[row], index.first[row + 1]):
                number = int(index.document[fragment])
                piece = int(index.start[fragment]), int(index.length[fragment])
                found.append(RowDocument(i, epoch, shard, *origins[number], *piece, CASES[index.case[number]]))
        return found

    def stretches(self, first: int, last: int) -> Iterator[Stretch]:
        """The shards that hold the rows of the run from ``first`` to before ``last``."""
        while first < last:
            at, place = self._find(first)
            yield Stretch(at, *self._named(at), first - place, self._order(at))
            first = self._ends[at]

    def index_of(self, stretch: Stretch) -> RowIndex:
        """Which documents its rows hold."""
        return self._index(stretch.at)

    def _index(self, at: int) -> RowIndex:
        """Which documents the rows of a shard hold; rows whose index is gone are packed again."""
        if not file_of(self.rows_dir, self._facts[at], SUFFIXES[-1]).is_file():
            self._pack(at)
        return load_index(self.rows_dir, self._facts[at])

    def _read_origins(self, shard: int) -> list[tuple[str, str]]:
        documents = read_documents(self.data_dir, self.settings.split, shard)
        return [(document.source, document.origin) for document in documents]

    def _step_rows(self, step: int, rows_per_step: int) -> list[tuple[int, int]]:
        """(``at``, packed row) for every row of a step."""
        if step < 0 or rows_per_step < 1:
            raise UserError(f"step {step} must not be negative and rows_per_step {rows_per_step} must be positive")
        found: list[tuple[int, int]] = []
        while len(found) < rows_per_step:
            at, place = self._find(step * rows_per_step + len(found))
            order = self._order(at)
            found.extend((at, int(row)) for row in order[place : place + rows_per_step - len(found)])
        return found

    def _order(self, at: int) -> np.ndarray:
        """int64 [rows]: the packed rows of a shard as they are read."""
        if at in self._open:
            return self._open[at][1]
        return self.settings.row_order(*self._named(at), self._facts[at].rows)

    def _opened(self, at: int) -> tuple[RowFile, np.ndarray]:
        """(rows, their order); packs the shard where that has not been done."""
        if at not in self._open:
            opened = RowFile(self.rows_dir, self._pack(at)), self._order(at)
            self._open = {k: v for k, v in self._open.items() if k >= at - 1}  # a step spans few shards
            self._open[at] = opened
        return self._open[at]

    def _pack(self, at: int) -> PackedRows:
        """Facts of a shard whose rows are there: it is packed unless that is done."""
        return pack_shard(self.data_dir, self.tokenizer, self.rows_dir, self.settings, *self._named(at), log=self.log)

    # ---- ahead of the run ------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def packed_ahead(self, last: int) -> Iterator[None]:
        """Within the block another process packs the next two shards that ``batch`` will need.

        None that begins at row ``last`` of the run or later; 0: another rank of this machine sees to it. Of several
        shards, the rows of those that were read are deleted once two more have been opened, unless packed to last.
        """
        if not last:
            yield
            return
        with Packer(self.data_dir, self.tokenizer.folder, self.rows_dir, self.settings, self.log) as packer:
            self._packer, self._last, self._dropped, self._looked = packer, last, 0, -1
            try:
                yield
            finally:
                self._packer = None

    def _look_ahead(self, at: int) -> None:
        if self._packer is None or at == self._looked:
            return
        for ahead in (at + 1, at + 2):
            if self._ends[ahead - 1] >= self._last:
                break
            if not self._packer.want(*self._named(ahead), self._fingerprint(ahead)):
                return
            if len(self._facts) == ahead:
                self._add_facts()
        self._looked = at
        if self.shards > 1 and self._dropped < at - 1:
            for passed in range(self._dropped, at - 1):
                if not self._facts[passed].lasting:
                    drop_rows(self.rows_dir, self._facts[passed])
                    self._packer.forget(*self._named(passed))
            self._dropped = at - 1
