"""Windows of documents: what the model reads at a time, and which of its tokens are scored there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_LOGITS_BYTES = 256 * 2**20  # of fp32 logits [rows, T, V] of all paths of one batch


@dataclass(frozen=True)
class Window:
    """Tokens ``[start, stop)`` of a document, fed after BOS; those from ``scored`` on are scored."""

    document: int
    start: int
    stop: int
    scored: int


def document_windows(document: int, tokens: int, window: int, stride: int) -> Iterator[Window]:
    """Windows of a document of ``tokens`` tokens; every token is scored in exactly one of them."""
    start = scored = 0
    while scored < tokens:
        stop = min(start + window, tokens)
        yield Window(document, start, stop, scored)
        start, scored = start + stride, stop


def batches(windows: Iterable[Window], most_rows: int, token_bytes: int) -> Iterator[list[Window]]:
    """Group windows of similar length, longest first, at most ``most_rows`` to a batch.

    ``token_bytes``: of fp32 logits per token, all paths together; a batch stays within 256 MiB of them, or is one row.
    """
    rows: list[Window] = []
    limit = 0
    for item in sorted(windows, key=lambda item: (item.start - item.stop, item.document, item.start)):
        if rows and len(rows) >= limit:
            yield rows
            rows = []
        if not rows:
            limit = max(1, min(most_rows, _LOGITS_BYTES // (token_bytes * (item.stop - item.start))))
        rows.append(item)
    if rows:
        yield rows


@dataclass(frozen=True)
class Batch:
    """Windows as the model reads them, and the n positions of them that are scored."""

    inputs: Tensor
    """int64 [B, T], padded on the right: later positions cannot reach earlier ones."""
    targets: Tensor
    """int64 [n]: the token that follows each scored position."""
    document: NDArray[np.int64]
    """[n]: which document the position belongs to."""
    place: Tensor
    """int64 [n]: the position in the flattened [B * T]."""


def lay_out_batch(rows: Sequence[Window], documents: Sequence[NDArray[np.int64]], bos: int) -> Batch:
    """One row per window: BOS, then its tokens except the last. ``documents``: token ids without BOS, int64 each."""
    length = max(item.stop - item.start for item in rows)
    inputs = np.full((len(rows), length), bos, dtype=np.int64)
    targets, owner, place = [], [], []
    for row, item in enumerate(rows):
        ids = documents[item.document][item.start : item.stop]
        inputs[row, 1 : len(ids)] = ids[:-1]
        first = item.scored - item.start
        targets.append(ids[first:])
        owner.append(np.full(len(ids) - first, item.document))
        place.append(row * length + np.arange(first, len(ids)))
    return Batch(
        torch.from_numpy(inputs),
        torch.from_numpy(np.concatenate(targets)),
        np.concatenate(owner),
        torch.from_numpy(np.concatenate(place)),
    )
