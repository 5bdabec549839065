"""Validation text in training documents: whole, one paragraph of it, or with a word, the case or the spaces changed.

Texts are compared by their letters alone, 24 bytes at a time. A training document is dropped if half of it stands in
validation documents, if it holds half of one of their paragraphs (of at least 100 letters) in one place, or 300 letters
of them in a row; a changed word in between does not end a place or a row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

import numpy as np

from cognica_poe.data.cleaning.words import HashIndex, letters, runs

_RUN = 24  # bytes of letters compared at once: five English words, eight Chinese characters
_STRIDE = 4  # of a validation text every fourth run is kept: what shares 27 bytes is seen
_PARAGRAPH = 100  # letters; fewer are a title, a sentence, or what unrelated texts share
_LONG = 300
_GAP = 48  # bytes of letters between two runs of one place: a word, and the runs that it spoils
_WINDOW = 1 << 20


class ValidationIndex:
    """Knows the validation texts by their hashes, 16 bytes for 4 letters, and finds them in other texts."""

    def __init__(self, texts: Iterable[str]) -> None:
        """Index the validation ``texts``."""
        values, owners = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)]
        sizes: list[int] = []
        self._short: set[bytes] = set()
        for text in texts:
            whole = letters(text)
            if len(whole) < 2 * _RUN:
                self._short.add(hashlib.sha256(whole.tobytes()).digest() if len(whole) else _marks(text))
            for unit, is_paragraph in _units(text, whole):
                found = np.unique(runs(unit, _RUN)[:: min(max(len(unit) // _RUN, 1), _STRIDE)])
                values.append(found)
                owners.append(np.full(len(found), len(sizes)))
                sizes.append(len(found) if is_paragraph else 2**62)
        self._index = HashIndex(np.concatenate(values), np.concatenate(owners))
        self._sizes = np.array(sizes, np.int64)

    def __contains__(self, text: str) -> bool:
        """Whether ``text`` must not be trained on."""
        whole = letters(text)
        if len(whole) < 2 * _RUN:
            digest = hashlib.sha256(whole.tobytes()).digest() if len(whole) else _marks(text)
            if digest in self._short:
                return True
        positions, first = self._matches(whole)
        if not len(positions):
            return False
        if 2 * _covered(positions) >= len(whole) and self._is_half(whole, positions, first):
            return True
        place = np.concatenate([[0], np.cumsum(np.diff(positions) > _RUN + _GAP)])
        # What one place repeats counts once: programs repeat a phrase with other words in between.
        (place, first), at = np.unique(np.stack([place, first]), axis=1, return_index=True)
        return self._holds_paragraph(place, first) or self._holds_long_run(place, positions[at])

    def _matches(self, whole: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where runs of ``whole`` are runs of validation texts, and which; in the order of the text."""
        positions, first = [], []
        for start in range(0, max(len(whole) - _RUN + 1, 0), _WINDOW):
            at, index = self._index.find(runs(whole[start : start + _WINDOW + _RUN - 1], _RUN))
            positions.append(at + start)
            first.append(index)
        nothing = np.zeros(0, np.int64)
        return np.concatenate([nothing, *positions]), np.concatenate([nothing, *first])

    @staticmethod
    def _is_half(whole: np.ndarray, positions: np.ndarray, first: np.ndarray) -> bool:
        """Whether half of a text is found, where what it repeats counts once: lines of one form are no copies."""
        _, at = np.unique(first, return_index=True)
        different = len(np.unique(runs(whole, _RUN))) + _RUN - 1
        return 2 * _covered(np.sort(positions[at])) >= min(different, len(whole))

    def _holds_paragraph(self, place: np.ndarray, first: np.ndarray) -> bool:
        """Whether one place holds half of the runs of one paragraph."""
        owners, which = self._index.owners_of(first)
        pairs, count = np.unique(np.stack([place[which], owners]), axis=1, return_counts=True)
        return bool((2 * count >= self._sizes[pairs[1]]).any())

    def _holds_long_run(self, place: np.ndarray, positions: np.ndarray) -> bool:
        order = np.argsort(positions)
        place, positions = place[order], positions[order]
        borders = np.flatnonzero(np.diff(place)) + 1
        return any(_covered(part) >= _LONG for part in np.split(positions, borders))


def _covered(positions: np.ndarray) -> int:
    """Letters within the runs that begin at ``positions``, in order."""
    return int(_RUN + np.minimum(np.diff(positions), _RUN).sum())


def _units(text: str, whole: np.ndarray) -> Iterator[tuple[np.ndarray, bool]]:
    """Letters to index, each with whether they are a paragraph: the whole text, and its paragraphs."""
    yield whole, False
    lines: list[np.ndarray] = []
    size = 0
    for line in (*text.split("\n"), ""):
        found = letters(line)
        if len(found) >= _PARAGRAPH or not line.strip():  # a line of its own, or the end of lines cut to one width
            if size >= _PARAGRAPH:
                yield np.concatenate(lines), True
            lines, size = [], 0
            if len(found) >= _PARAGRAPH:
                yield found, True
        else:
            lines.append(found)
            size += len(found)


def _marks(text: str) -> bytes:
    """Digest of a text without a single letter."""
    return hashlib.sha256("".join(text.split()).encode()).digest()
