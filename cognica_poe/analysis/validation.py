"""The validation slice: the text that every measurement of a run stands on, the xz baseline included.

One slice per run, chosen by content alone: measurements of different checkpoints and methods stand for the same bytes.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from cognica_poe.data.documents import Document
from cognica_poe.errors import UserError

_FEWEST_UNITS = 8


@dataclass(frozen=True)
class ValidationSlice:
    """The texts that a run is measured on. ``unit`` is "piece" where documents had to be cut for the bootstrap."""

    texts: list[str]
    sha256: str
    bytes: int
    unit: str
    sampled: bool
    owners: tuple[int, ...] = field(default=(), compare=False)
    """Of every text the file that it belongs to, where several texts are of one file; else empty."""

    @property
    def units(self) -> NDArray[np.int64]:
        """[texts] what the bootstrap draws: equal numbers are drawn together."""
        return np.array(self.owners or range(len(self.texts)), dtype=np.int64)


def file_of(document: Document) -> str:
    """The file that a document was cut from: its origin up to ``#`` where a name follows, not the number of a row."""
    path, _, part = document.origin.partition("#")
    return path if part and not part.isdigit() else document.origin


def document_slice(documents: Iterable[Document], max_bytes: int | None = None) -> ValidationSlice:
    """``validation_slice`` of the documents' texts, with what belongs together.

    Texts of one file are one draw of the bootstrap, as long as there are 8 files or more; else every text is.
    """
    return _slice(((document.text, file_of(document)) for document in documents), max_bytes)


def validation_slice(texts: Iterable[str], max_bytes: int | None = None) -> ValidationSlice:
    """Choose what to measure on; the same texts and limit give the same slice.

    All documents, if they fit in ``max_bytes``. Otherwise documents in the order of their sha256 (a sample of all
    sources, whatever their order), each cut to 1/32 of the limit (at least 2 KiB) so that no document dominates. A
    slice of fewer than 8 documents is cut at line ends into pieces of about a sixteenth, for the sake of intervals.

    Raises:
        UserError: no document.
    """
    return _slice(((text, "") for text in texts), max_bytes)


def _slice(texts: Iterable[tuple[str, str]], max_bytes: int | None) -> ValidationSlice:
    """As ``validation_slice``, of texts with the names of their files."""
    found, sampled = _choose(texts, max_bytes)
    chosen = [text for text, _ in found]
    if not chosen:
        raise UserError("the validation split holds no document: build the data with a larger validation share")
    unit = "document"
    if len(chosen) < _FEWEST_UNITS:
        size = max(1, sum(map(len, chosen)) // (2 * _FEWEST_UNITS))
        pieces = [piece for text in chosen for piece in _pieces(text, size)]
        if len(pieces) > len(chosen):
            chosen, unit = pieces, "piece"
    if len(chosen) < 2:
        raise UserError("the validation split holds a single short document: build the data with more validation text")
    digest = hashlib.sha256()
    total = 0
    for text in chosen:
        data = text.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
        total += len(data)
    owners = _owners([file for _, file in found]) if unit == "document" else ()
    return ValidationSlice(chosen, digest.hexdigest(), total, unit, sampled, owners)


def _owners(files: list[str]) -> tuple[int, ...]:
    """Number of every text's file; none where no file has two texts, or too few files are left to draw from."""
    numbers = {file: number for number, file in enumerate(dict.fromkeys(files))}
    return tuple(numbers[file] for file in files) if _FEWEST_UNITS <= len(numbers) < len(files) else ()


def _choose(texts: Iterable[tuple[str, str]], max_bytes: int | None) -> tuple[list[tuple[str, str]], bool]:
    """Texts in their own order if all fit in ``max_bytes``, else a sample in hash order, and whether it is a sample."""
    everything: list[tuple[str, str]] = []
    sample: list[tuple[int, int, bytes, str]] = []  # heap of (-hash, index, text cut, file): the largest hash on top
    cap = max(2048, (max_bytes or 0) // 32)
    total = kept = 0
    for index, (text, file) in enumerate(pair for pair in texts if pair[0]):
        data = text.encode()
        total += len(data)
        if max_bytes is None:
            everything.append((text, file))
            continue
        if total <= max_bytes:
            everything.append((text, file))
        else:
            everything.clear()
        key = int.from_bytes(hashlib.sha256(data).digest())
        heapq.heappush(sample, (-key, index, data[:cap], file))
        kept += min(len(data), cap)
        while kept - len(sample[0][2]) >= max_bytes:  # enough without the largest hash
            kept -= len(heapq.heappop(sample)[2])
    if max_bytes is None or total <= max_bytes:
        return everything, False
    chosen, left = [], max_bytes
    for _, _, data, file in sorted(sample, reverse=True):
        text = data[:left].decode(errors="ignore")  # a cut may fall inside a character
        left -= min(len(data), left)
        if text:
            chosen.append((text, file))
    return chosen, True


def _pieces(text: str, size: int) -> list[str]:
    """Consecutive pieces of at least ``size`` characters, cut at line ends, or anywhere in lines beyond twice that."""
    pieces, current = [], ""
    for line in text.splitlines(keepends=True):
        for start in range(0, len(line), 2 * size):
            current += line[start : start + 2 * size]
            if len(current) >= size:
                pieces.append(current)
                current = ""
    return [*pieces, current] if current else pieces
