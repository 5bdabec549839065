"""Texts as numbers: their words and letters without case and spaces, runs of them hashed, the same on every machine."""

from __future__ import annotations

import re
import unicodedata
import zlib
from collections.abc import Iterator
from functools import lru_cache

import numpy as np

_PIECE = 1_000_000  # characters at a time, so that a text of any length takes little memory beside itself
_SPACE = re.compile(r"\s")
_KANA_AND_HAN = "\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_WORD = re.compile(rf"[{_KANA_AND_HAN}]|[^\W_{_KANA_AND_HAN}]+")  # these scripts put no spaces between words
_NO_ASCII_LETTERS = bytes(code for code in range(128) if not chr(code).isalnum())
_BASE = 0x9E3779B97F4A7C15
_MIX = np.uint64(0xD6E8FEB86659FD93)
LETTER, MARK, SPACE, SYMBOL = 1, 2, 4, 8
"""Kinds of characters: letters and digits; marks that combine with them; white space; everything else."""


@lru_cache(maxsize=1)
def kinds() -> np.ndarray:
    """uint8 [0x110000]: kind of every code point."""
    by_category = {"L": LETTER, "N": LETTER, "M": MARK, "Z": SPACE}
    table = np.array([by_category.get(unicodedata.category(chr(code))[0], SYMBOL) for code in range(0x110000)])
    table[[ord(character) for character in "\t\n\v\f\r"]] = SPACE
    return table.astype(np.uint8)


def code_points(text: str) -> np.ndarray:
    """uint32 [characters]."""
    return np.frombuffer(text.encode("utf-32-le"), np.uint32)


def _pieces(text: str) -> Iterator[str]:
    """``text`` in parts of about a million characters that end at white space, or where there is none any more."""
    done = 0
    while done < len(text):
        space = _SPACE.search(text, done + _PIECE) if done + _PIECE < len(text) else None
        end = space.end() if space else len(text)
        yield text[done:end]
        done = end


def letters(text: str) -> np.ndarray:
    """uint8 [n]: UTF-8 of the letters and digits of ``text``, without case, spaces and punctuation."""
    return np.concatenate([np.zeros(0, np.uint8), *map(_letters, _pieces(text))])


def _letters(text: str) -> np.ndarray:
    if text.isascii():
        return np.frombuffer(text.lower().encode().translate(None, _NO_ASCII_LETTERS), np.uint8)
    codes = code_points(unicodedata.normalize("NFKC", text).casefold())
    kept = codes[kinds()[codes] == LETTER].tobytes().decode("utf-32-le")
    return np.frombuffer(kept.encode(), np.uint8)


def word_hashes(text: str) -> np.ndarray:
    """uint32 [words]: crc32 of each word in lower case; punctuation is left out, a Chinese character is a word."""
    parts = [np.zeros(0, np.uint32)]
    for piece in _pieces(text):
        words = _WORD.findall((piece if piece.isascii() else unicodedata.normalize("NFKC", piece)).lower())
        parts.append(np.fromiter(map(zlib.crc32, map(str.encode, words)), np.uint32, len(words)))
    return np.concatenate(parts)


def runs(values: np.ndarray, size: int) -> np.ndarray:
    """uint64 [n - size + 1]: a hash of every ``size`` neighbours in ``values`` [n]; empty where there are fewer."""
    if len(values) < size:
        return np.zeros(0, np.uint64)
    block, width, power = values.astype(np.uint64), 1, _BASE  # hashes of ``width`` neighbours, doubled each time
    total, done = np.zeros(len(block) + 1, np.uint64), 0
    while done < size:
        if size & width:
            behind = block[done:]
            total = total[: len(behind)] * np.uint64(power) + behind
            done += width
        if done < size:
            block = block[:-width] * np.uint64(power) + block[width:]
            power, width = power * power % 2**64, 2 * width
    return total * _MIX


class HashIndex:
    """Which of many hashes belong to a fixed set of them; a value may belong to several owners."""

    def __init__(self, values: np.ndarray, owners: np.ndarray) -> None:
        """``values`` uint64 [n] with the number of the owner of each, int64 [n]."""
        order = np.lexsort((owners, values))
        self.values, self.owners = values[order], owners[order]
        bits = min(max(12, int(16 * len(values)).bit_length()), 27)  # at most 128 MB
        self._shift = np.uint64(64 - bits)
        self._maybe = np.zeros(1 << bits, bool)  # most hashes of a text are no members: one look tells
        self._maybe[self.values >> self._shift] = True

    def find(self, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of ``hashes`` uint64 [n] the positions that are members, and for each the first index into ``values``."""
        positions = np.flatnonzero(self._maybe[hashes >> self._shift])
        first = np.searchsorted(self.values, hashes[positions])
        found = np.zeros(len(first), bool)
        inside = first < len(self.values)
        found[inside] = self.values[first[inside]] == hashes[positions][inside]
        return positions[found], first[found]

    def owners_of(self, first: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """All owners of the members whose ``first`` indices are given, and which of ``first`` each belongs to."""
        count = np.searchsorted(self.values, self.values[first], "right") - first
        which = np.repeat(np.arange(len(first)), count)
        offset = np.arange(len(which)) - np.repeat(np.cumsum(count) - count, count)
        return self.owners[first[which] + offset], which
