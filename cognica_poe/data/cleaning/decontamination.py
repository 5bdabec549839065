"""Evaluation texts in training documents: a document that holds a run of their words is dropped."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import numpy as np

from cognica_poe.data.cleaning.words import HashIndex, runs, word_hashes

FEWEST_WORDS = 8
"""Evaluation texts with fewer words are too common to be searched for."""


class EvaluationIndex:
    """Knows the runs of ``words`` words of evaluation texts, 16 bytes each."""

    def __init__(self, texts: Iterable[str], words: int = 13) -> None:
        """Index ``texts``; one of fewer than ``words`` words, and at least eight, is a run of all that it has.

        Thirteen is the length that GPT-3 was decontaminated with (Brown et al. 2020, appendix C).
        """
        by_length: dict[int, list[np.ndarray]] = defaultdict(list)
        for text in texts:
            hashes = word_hashes(text)
            if len(hashes) >= min(FEWEST_WORDS, words):
                length = min(words, len(hashes))
                by_length[length].append(runs(hashes, length))
        self._by_length = {}
        for length, found in sorted(by_length.items()):
            values = np.unique(np.concatenate(found))
            self._by_length[length] = HashIndex(values, np.zeros(len(values), np.int64))

    def __contains__(self, text: str) -> bool:
        """Whether ``text`` holds a run of an evaluation text; case, punctuation and white space do not count."""
        hashes = word_hashes(text)
        return any(len(index.find(runs(hashes, length))[0]) for length, index in self._by_length.items())
