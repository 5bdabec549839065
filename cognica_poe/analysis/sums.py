"""What a record keeps beside it: sums per document and per prompt, from which changes to another record are computed.

Two records of one slice are compared by resampling the same documents in both. For ratios (bits per byte, accuracy,
acceptance) sums per document or prompt are all that this takes. For a quantile (WAND bounds) and for routing it is
counts per document in bins of two per cent of the value, which stand for the positions closely enough for an interval.
"""

from __future__ import annotations

import io
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cognica_poe.analysis.bits_per_byte import DocumentSums, Positions
from cognica_poe.errors import UserError

EDGES = np.exp(np.arange(np.log(0.01), np.log(100.0), np.log(1.02)))
"""Inner edges of the bins, nats; the first and the last bin are open."""
BINS = len(EDGES) + 1


@dataclass
class PositionCounts:
    """Positions per document and bin, int32: ``range`` [K-1, documents, BINS] of ``Positions.range``, ``margin`` and
    ``regressions`` [documents, BINS] by the margin of stage 0, all positions and those that lose a right token.

    Documents behind the last one with positions of its own have no row.
    """

    range: NDArray[np.int32]
    margin: NDArray[np.int32]
    regressions: NDArray[np.int32]


@dataclass
class Sums:
    """Sums of one record; ``drafts`` [2, prompts] int64 are proposed and accepted tokens by prompt."""

    documents: DocumentSums
    positions: PositionCounts | None = None
    drafts: NDArray[np.int64] | None = None
    units: NDArray[np.int64] | None = None
    """[documents] which documents are of one file, where some are: the bootstrap draws them together."""


def count_positions(positions: Positions) -> PositionCounts | None:
    """Counts of ``positions``; None for a single stage."""
    if not positions.margin.size:
        return None
    documents = int(positions.document.max()) + 1

    def counts(values: NDArray[Any], chosen: NDArray[np.bool_] | None = None) -> NDArray[np.int32]:
        place = positions.document * BINS + np.searchsorted(EDGES, values, side="right")
        flat = np.bincount(place if chosen is None else place[chosen], minlength=documents * BINS)
        return flat.reshape(documents, BINS).astype(np.int32)

    lost = positions.full_correct & ~positions.stage0_correct
    return PositionCounts(
        np.stack([counts(row) for row in positions.range]),
        counts(positions.margin[0]),
        counts(positions.margin[0], lost),
    )


def pack(sums: Sums) -> bytes:
    """An npz file; the same sums give the same bytes."""
    documents = sums.documents
    arrays: dict[str, NDArray[Any]] = {"bytes": documents.bytes, "targets": documents.targets}
    for kind, values in (("nats", documents.nats), ("correct", documents.correct)):
        arrays |= {f"{kind}.{name}": array for name, array in values.items()}
    if sums.positions is not None:
        arrays |= {f"positions.{name}": array for name, array in vars(sums.positions).items()}
    if sums.drafts is not None:
        arrays["drafts"] = sums.drafts
    if sums.units is not None:
        arrays["units"] = sums.units
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


def unpack(source: Path | bytes, where: str, remedy: str) -> Sums:
    """What ``pack`` wrote. Raises UserError naming ``where`` and ``remedy``."""
    try:
        with np.load(io.BytesIO(source) if isinstance(source, bytes) else source, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
        documents = DocumentSums(arrays.pop("bytes"), arrays.pop("targets"), {}, {})
        drafts, units = (arrays.pop(name, None) for name in ("drafts", "units"))
        counts: dict[str, NDArray[Any]] = {}
        for name, array in arrays.items():
            kind, _, column = name.partition(".")
            {"nats": documents.nats, "correct": documents.correct, "positions": counts}[kind][column] = array
        return Sums(documents, PositionCounts(**counts) if counts else None, drafts, units)
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"per-document sums {where} cannot be read; {remedy}") from error
