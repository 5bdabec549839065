"""Which pieces of which documents make up each row: best fit over all documents of an epoch."""

from __future__ import annotations

from bisect import bisect_right, insort

import numpy as np


def lay_out_rows(
    lengths: np.ndarray, row_len: int, order: np.ndarray | None = None, heads: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Decide what every row holds: (first [rows + 1], document, start, length [fragments]), all int64.

    ``lengths`` int64 [documents] in tokens without BOS; ``order`` the documents' order (default: as given); ``heads``
    bool [documents]: a long document's remainder is its head instead of its tail, so that cuts differ by epoch.
    O(n log row_len) for n documents.
    """
    room = row_len - 1  # tokens of a document in a row of its own
    waiting = _Waiting(row_len)
    rows: list[list[tuple[int, int, int]]] = []
    for number in range(len(lengths)) if order is None else order.tolist():
        count = int(lengths[number])
        begin, end = 0, count
        if count > room:
            rest = count % room
            # a head of room - 1 tokens would leave a gap of one behind an unfinished text
            at_head = heads is not None and bool(heads[number]) and rest != room - 1
            full = range(rest if at_head else 0, count - rest + (rest if at_head else 0), room)
            rows.extend([(number, at, room)] for at in full)
            begin, end = (0, rest) if at_head else (count - rest, count)
        if end > begin:
            waiting.add((number, begin, end - begin))

    def over(piece: tuple[int, int, int]) -> bool:
        return piece[1] + piece[2] == int(lengths[piece[0]])

    while (seed := waiting.take_next()) is not None:
        row, gap = [seed], row_len - 1 - seed[2]
        while gap > 1 and (piece := waiting.take_fit(gap) or waiting.cut(gap) or waiting.take_near(gap)) is not None:
            finished = [i for i, other in enumerate([*row, piece]) if over(other)] if piece[2] + 2 == gap else []
            if piece[2] + 2 == gap and not finished:  # it would leave a gap of one behind an unfinished text
                if gap == 3:
                    continue  # a single token, given up
                number, start, length = piece
                piece = number, start, length - 1
                waiting.add((number, start + length - 1, 1))
            row.append(piece)
            gap -= piece[2] + 1
            if gap == 1:
                row.append(row.pop(finished[-1]))
        if gap <= 1:
            rows.append(row)
    first = np.cumsum([0] + [len(row) for row in rows])
    flat = np.array([fragment for row in rows for fragment in row], dtype=np.int64).reshape(-1, 3)
    return first.astype(np.int64), flat[:, 0], flat[:, 1], flat[:, 2]


class _Waiting:
    """Fragments (document, start, length) not yet in a row: in their order, and by size (length + BOS)."""

    def __init__(self, row_len: int) -> None:
        self._items: list[tuple[int, int, int]] = []
        self._taken: list[bool] = []
        self._by_size: list[list[int]] = [[] for _ in range(row_len + 1)]
        self._counts = [0] * (row_len + 1)
        self._sizes: list[int] = []  # sizes that some fragment has, sorted
        self._next = 0

    def add(self, item: tuple[int, int, int]) -> None:
        size = item[2] + 1
        self._by_size[size].append(len(self._items))
        self._items.append(item)
        self._taken.append(False)
        self._counts[size] += 1
        if self._counts[size] == 1:
            insort(self._sizes, size)

    def take_next(self) -> tuple[int, int, int] | None:
        """The first in order."""
        while self._next < len(self._items) and self._taken[self._next]:
            self._next += 1
        return self._take(self._next) if self._next < len(self._items) else None

    def take_fit(self, gap: int) -> tuple[int, int, int] | None:
        """One that fills the gap, else the longest that leaves at least two places."""
        if self._counts[gap]:
            return self._take_size(gap)
        at = bisect_right(self._sizes, gap - 2)
        return self._take_size(self._sizes[at - 1]) if at else None

    def cut(self, gap: int) -> tuple[int, int, int] | None:
        """The start of the longest, just enough to fill the gap; the rest goes on waiting."""
        if not self._sizes or self._sizes[-1] <= gap:
            return None
        number, start, length = self._take_size(self._sizes[-1])
        self.add((number, start + gap - 1, length - (gap - 1)))
        return number, start, gap - 1

    def take_near(self, gap: int) -> tuple[int, int, int] | None:
        """One that leaves a single place: the last resort, when all that wait do."""
        return self._take_size(gap - 1) if gap > 2 and self._counts[gap - 1] else None

    def _take_size(self, size: int) -> tuple[int, int, int]:
        stack = self._by_size[size]
        while self._taken[stack[-1]]:
            stack.pop()
        return self._take(stack.pop())

    def _take(self, at: int) -> tuple[int, int, int]:
        self._taken[at] = True
        item = self._items[at]
        size = item[2] + 1
        self._counts[size] -= 1
        if not self._counts[size]:
            self._sizes.pop(bisect_right(self._sizes, size) - 1)
        return item
