"""What training text is too close to validation."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable

_LONG_LINE = 40  # characters; shorter lines are common to unrelated texts
_FEWEST_LINES = 3
_OVERLAP = 0.5


class NearDuplicates:
    """Finds texts that repeat a validation document: half of either's long lines are shared.

    Memory is that of the validation split alone, so training text of any size can be streamed past it.
    """

    def __init__(self, validation: Iterable[str]) -> None:
        """Index the long lines of the ``validation`` texts."""
        self._documents: list[int] = []
        self._where: dict[str, list[int]] = defaultdict(list)
        for number, text in enumerate(validation):
            lines = _long_lines(text)
            self._documents.append(len(lines))
            for line in lines:
                self._where[line].append(number)

    def __contains__(self, text: str) -> bool:
        lines = _long_lines(text)
        shared = [line for line in lines if line in self._where]
        if len(shared) < _FEWEST_LINES:
            return False
        if len(shared) >= _OVERLAP * len(lines):
            return True
        hits = Counter(number for line in shared for number in self._where[line])
        return any(
            count >= _FEWEST_LINES and count >= _OVERLAP * self._documents[number] for number, count in hits.items()
        )


def _long_lines(text: str) -> set[str]:
    return {stripped for line in text.split("\n") if len(stripped := line.strip()) >= _LONG_LINE}
