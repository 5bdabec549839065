"""The rows of a training run: step ``s`` reads the same global rows on any number of processes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from filelock import FileLock

from cognica_poe.data.manifest import load_manifest, read_documents
from cognica_poe.data.rows import packing
from cognica_poe.data.rows.packing import CASES
from cognica_poe.data.rows.store import PackedRows, RowFile, RowIndex, load_facts, load_index
from cognica_poe.data.tokenizer import load_tokenizer
from cognica_poe.errors import UserError


@dataclass(frozen=True)
class RowDocument:
    """A piece of a document in a row that a step read."""

    row: int
    """Row within the step's batch."""
    epoch: int
    source: str
    origin: str
    start: int
    """First token of the piece within the document."""
    tokens: int
    case: str
    """``as is``, ``lower`` or ``upper``."""


class Rows:
    """Packed rows of one split, epoch after epoch without end.

    Training rows come in an order shuffled by (seed, epoch), validation rows as packed. Epochs are packed when first
    needed; processes on one machine (or on a shared file system with locks) pack once and share the files.
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
        log: Callable[[str], None] = lambda line: None,
    ) -> None:
        """``row_len`` is the context length + 1: inputs are ``row[:-1]``, targets ``row[1:]``."""
        self.data_dir, self.rows_dir, self.split = Path(data_dir), Path(rows_dir), split
        self.seed, self.row_len, self.log = seed, row_len, log
        self.case_aug_prob = case_aug_prob if split == "train" else 0.0
        self.tokenizer = load_tokenizer(tokenizer_path)
        self.manifest = load_manifest(data_dir)
        if split not in self.manifest.splits:
            raise UserError(f"unknown split {split!r}; choose one of {', '.join(self.manifest.splits)}")
        self._facts: list[PackedRows] = []
        self._open: dict[int, tuple[RowFile, np.ndarray]] = {}

    @property
    def fingerprint(self) -> str:
        """Identity of the whole sequence of rows, all epochs: equal fingerprints read equal batches."""
        return self._fingerprint(None)

    def facts(self, epoch: int) -> PackedRows:
        """Facts of an epoch; packs it, and those before it, where that has not been done."""
        while len(self._facts) <= epoch:
            number = len(self._facts)
            known = load_facts(self.rows_dir, self.split, number, self._fingerprint(number), self.log)
            self._facts.append(known or self._pack(number))
        return self._facts[epoch]

    def rows_per_epoch(self, epoch: int) -> int:
        """Rows of an epoch (case augmentation makes it vary a little)."""
        return self.facts(epoch).rows

    def locate(self, position: int) -> tuple[int, int]:
        """(epoch, place within it) of the ``position``-th row of the run."""
        epoch = 0
        while position >= (rows := self.rows_per_epoch(epoch)):
            position -= rows
            epoch += 1
        return epoch, position

    def batch(self, step: int, rows_per_step: int) -> np.ndarray:
        """int64 [rows_per_step, row_len]: the rows of optimiser step ``step`` (from 0), across epoch borders.

        Raises UserError where a row is not what was packed.
        """
        batch = np.empty((rows_per_step, self.row_len), dtype=np.int64)
        for i, (epoch, row) in enumerate(self._step_rows(step, rows_per_step)):
            batch[i] = self._epoch(epoch)[0][row]
        return batch

    def documents(self, step: int, rows_per_step: int) -> list[RowDocument]:
        """What the rows of a step hold, in their order."""
        found: list[RowDocument] = []
        indices: dict[int, RowIndex] = {}
        for i, (epoch, row) in enumerate(self._step_rows(step, rows_per_step)):
            self._epoch(epoch)
            if epoch not in indices:
                indices[epoch] = load_index(self.rows_dir, self.facts(epoch))
            index = indices[epoch]
            for fragment in range(index.first[row], index.first[row + 1]):
                number = int(index.document[fragment])
                source, origin = self._origins[number]
                piece = int(index.start[fragment]), int(index.length[fragment])
                found.append(RowDocument(i, epoch, source, origin, *piece, CASES[index.case[number]]))
        return found

    @cached_property
    def _origins(self) -> list[tuple[str, str]]:
        return [(document.source, document.origin) for document in read_documents(self.data_dir, self.split)]

    def _step_rows(self, step: int, rows_per_step: int) -> list[tuple[int, int]]:
        """(epoch, packed row) for every row of a step."""
        if step < 0 or rows_per_step < 1:
            raise UserError(f"step {step} must not be negative and rows_per_step {rows_per_step} must be positive")
        epoch, place = self.locate(step * rows_per_step)
        found: list[tuple[int, int]] = []
        while len(found) < rows_per_step:
            if place == self.rows_per_epoch(epoch):
                epoch, place = epoch + 1, 0
            found.append((epoch, int(self._epoch(epoch)[1][place])))
            place += 1
        return found

    def _epoch(self, epoch: int) -> tuple[RowFile, np.ndarray]:
        """(rows, order int64 [rows])."""
        if epoch not in self._open:
            facts = self._pack(epoch)
            rows = RowFile(self.rows_dir, facts)
            order = np.arange(facts.rows)
            if self.split == "train":
                order = np.argsort(packing.random_bits(facts.rows, self.seed, epoch, "rows"), kind="stable")
            self._open = {k: v for k, v in self._open.items() if k >= epoch - 1}  # a step spans few epochs
            self._open[epoch] = rows, order
        return self._open[epoch]

    def _pack(self, epoch: int) -> PackedRows:
        self.rows_dir.mkdir(parents=True, exist_ok=True)
        with FileLock(self.rows_dir / f".{self.split}-{epoch}.lock"):
            return packing.pack(
                self.data_dir,
                self.tokenizer,
                self.rows_dir,
                split=self.split,
                epoch=epoch,
                seed=self.seed,
                row_len=self.row_len,
                case_aug_prob=self.case_aug_prob,
                log=self.log,
            )

    def _fingerprint(self, epoch: int | None) -> str:
        return packing.fingerprint_of(
            self.manifest,
            self.tokenizer,
            split=self.split,
            epoch=epoch,
            seed=self.seed,
            row_len=self.row_len,
            case_aug=self.case_aug_prob,
        )
