"""Packed rows on disk: their files, what the sidecar says of them, and reading that notices a changed byte.

Per split, epoch and shard: ``rows-<split>-epoch<e>-shard<s>.bin`` (uint16 [rows, row_len]), ``.sums`` (of each row the
first 8 bytes of its sha256), ``.npz`` (row-to-document index) and ``.json`` (facts, what the rows were made from, the
sha256 of sums and index; sealed, and written last: without it the others do not count). So a row is compared whenever
it is read, at the cost of one digest, and no reader has to go through rows that it does not need.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cognica_poe.errors import UserError
from cognica_poe.files import put_file, sha256_file
from cognica_poe.leftovers import partial_file
from cognica_poe.seals import read_sealed, require_sha256, write_sealed

SUFFIXES = (".bin", ".sums", ".npz")
"""Of the files that the sidecar ``.json`` vouches for."""
_SUM_BYTES = 8


@dataclass(frozen=True)
class PackedRows:
    """Facts about one shard packed for one epoch."""

    fingerprint: str
    split: str
    epoch: int
    shard: int
    """Number of the shard within the split, in the order of the data folder."""
    rows: int
    row_len: int
    documents: int
    document_tokens: int
    """Tokens of all documents, BOS not counted."""
    kept_fraction: float
    """Part of ``document_tokens`` that is in the rows."""
    fragments: int
    """Pieces of documents in the rows."""
    needless_cuts: int
    """Documents that would fit a row and were cut all the same."""
    lowered: int
    uppered: int
    data: str
    """sha256 of the shard that they were made from."""
    tokenizer: str
    """sha256 of its tokenizer.json."""
    seed: int
    case_aug_prob: float
    sums_sha256: str = ""
    """Of the file of the rows' digests."""
    index_sha256: str = ""
    """Of the file of the index."""
    lasting: bool = False
    """Packed to be kept: a run that has read them leaves them."""


@dataclass(frozen=True)
class RowIndex:
    """Which tokens of which documents a row holds; fragments are in row order."""

    first: np.ndarray
    """int64 [rows + 1]: fragments of row r are ``first[r]:first[r + 1]``."""
    document: np.ndarray
    """int64 [fragments]: number of the document within the shard."""
    start: np.ndarray
    """int64 [fragments]: first token within the document."""
    length: np.ndarray
    """int64 [fragments]: tokens, without the BOS in front."""
    case: np.ndarray
    """uint8 [documents]: how its letters were changed."""


class RowFile:
    """The rows of a shard for one epoch; each is compared with its digest when it is read."""

    def __init__(self, out_dir: Path, facts: PackedRows) -> None:
        """Map the rows. Raises UserError if the digests are not those that the sidecar vouches for."""
        self.file = file_of(out_dir, facts, ".bin")
        sums = file_of(out_dir, facts, ".sums")
        require_sha256(sums, facts.sums_sha256, "packed rows", _remedy(sums))
        self._rows: NDArray[np.uint16] = np.empty((0, facts.row_len), np.uint16)
        self._sums: NDArray[np.uint8] = np.empty((0, _SUM_BYTES), np.uint8)
        if facts.rows:  # an empty file cannot be mapped
            self._rows = np.memmap(self.file, dtype=np.uint16, mode="r", shape=(facts.rows, facts.row_len))
            self._sums = np.memmap(sums, dtype=np.uint8, mode="r", shape=(facts.rows, _SUM_BYTES))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> NDArray[np.uint16]:
        """uint16 [row_len]: a copy of the row. Raises UserError where it is not what was written."""
        values = np.array(self._rows[row])
        found, expected = row_sum(values), self._sums[row].tobytes()
        if found != expected:
            raise UserError(
                f"packed rows {self.file} are corrupt: row {row} has sha256 {found.hex()[:12]}, expected "
                f"{expected.hex()[:12]}; {_remedy(self.file)}"
            )
        return values


def row_sum(values: NDArray[np.uint16]) -> bytes:
    """First 8 bytes of the sha256 of a row's bytes."""
    return hashlib.sha256(values.data).digest()[:_SUM_BYTES]


def row_file(out_dir: Path, split: str, epoch: int, suffix: str, shard: int = 0) -> Path:
    """Path of one of the four files of a shard and epoch."""
    return Path(out_dir) / f"rows-{split}-epoch{epoch}-shard{shard}{suffix}"


def file_of(out_dir: Path, facts: PackedRows, suffix: str) -> Path:
    """Path of one of the files that ``facts`` are about."""
    return row_file(out_dir, facts.split, facts.epoch, suffix, facts.shard)


def load_facts(
    out_dir: Path, split: str, epoch: int, shard: int, fingerprint: str, log: Callable[[str], None] = lambda line: None
) -> PackedRows | None:
    """Facts of rows packed before; None, and a line of log, if those there are damaged or of other rows."""
    file = row_file(out_dir, split, epoch, ".json", shard)
    if not file.is_file():
        return None
    again = "they are packed again"
    try:
        facts = PackedRows(**read_sealed(file, "packed rows", again))
    except UserError as error:
        log(f"rows: {str(error).partition(';')[0]}; {again}")
        return None
    except TypeError:
        log(f"rows: packed rows {file} are of another version of this package; {again}")
        return None
    if facts.fingerprint != fingerprint:
        log(f"rows: packed rows {file} were made from other data, tokenizer or settings; {again}")
        return None
    return facts


def load_index(out_dir: Path, facts: PackedRows) -> RowIndex:
    """Row-to-document index of packed rows. Raises UserError if it is missing or not what was written."""
    file = file_of(out_dir, facts, ".npz")
    require_sha256(file, facts.index_sha256, "packed rows", _remedy(file))
    with np.load(file, allow_pickle=False) as arrays:
        return RowIndex(**{name: arrays[name] for name in RowIndex.__dataclass_fields__})


def are_complete(out_dir: Path, facts: PackedRows) -> bool:
    """Whether all files are there, of the right size. What they hold is compared when it is read."""
    bin_file, sums, index = (file_of(out_dir, facts, suffix) for suffix in SUFFIXES)
    if not (bin_file.is_file() and sums.is_file() and index.is_file()):
        return False
    return (bin_file.stat().st_size, sums.stat().st_size) == (2 * facts.rows * facts.row_len, _SUM_BYTES * facts.rows)


def verify_rows(out_dir: Path, facts: PackedRows) -> None:
    """Read everything once. Raises UserError for the first part that is not what was written."""
    load_index(out_dir, facts)
    rows = RowFile(out_dir, facts)
    for row in range(len(rows)):
        rows[row]


def drop_rows(out_dir: Path, facts: PackedRows) -> None:
    """Delete rows that are read no more; what tells of them stays: facts and index."""
    for suffix in (".bin", ".sums"):
        file_of(out_dir, facts, suffix).unlink(missing_ok=True)


def write_rows(
    out_dir: Path, split: str, epoch: int, shard: int, rows: Iterable[NDArray[np.uint16]], index: RowIndex
) -> None:
    """Write rows, their digests and the index under their final names; the sidecar is to follow."""
    with contextlib.ExitStack() as stack:
        partial = {suffix: stack.enter_context(partial_file(out_dir)) for suffix in SUFFIXES}
        (file, _), (sums, _), (numbers, _) = (partial[suffix] for suffix in (".bin", ".sums", ".npz"))
        for values in rows:
            file.write(values.tobytes())
            sums.write(row_sum(values))
        np.savez(numbers, **{name: getattr(index, name) for name in RowIndex.__dataclass_fields__})
        row_file(out_dir, split, epoch, ".json", shard).unlink(missing_ok=True)  # the old rows no longer count
        for suffix, (finished, path) in partial.items():
            put_file(finished, path, row_file(out_dir, split, epoch, suffix, shard))


def write_facts(out_dir: Path, facts: PackedRows) -> PackedRows:
    """Write the sidecar of rows that ``write_rows`` wrote; returns the facts with the digests of sums and index."""
    digests = {
        name: sha256_file(file_of(out_dir, facts, suffix))
        for name, suffix in (("sums_sha256", ".sums"), ("index_sha256", ".npz"))
    }
    facts = PackedRows(**{**asdict(facts), **digests})
    write_sealed(file_of(out_dir, facts, ".json"), asdict(facts))
    return facts


def _remedy(file: Path) -> str:
    return f"delete {file.name}: the rows are packed again at the next start"
