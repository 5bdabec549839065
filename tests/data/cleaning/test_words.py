import random
import unicodedata

import numpy as np
import pytest

from cognica_poe.data.cleaning import words
from cognica_poe.data.cleaning.words import HashIndex, letters, runs, word_hashes
from tests.data.corpora import made_up_text

SAME = {
    "case": ("Straße, ÉTÉ and Ünique İ", "STRASSE, été AND ÜNIQUE İ"),
    "spaces": ("one  two\n\nthree", "one two three"),
    "normal form": ("café in 日本 が", unicodedata.normalize("NFD", "café in 日本 が")),
    "punctuation": ("it's, well-known!", "its wellknown"),
    "width": ("\uff21\uff22\uff23 1\uff123", "abc123"),
}


@pytest.mark.parametrize("kind", SAME)
def test_letters_are_what_a_copy_cannot_change(kind):
    one, other = SAME[kind]
    assert letters(one).tobytes() == letters(other).tobytes() != b""


def test_letters_of_odd_texts():
    assert letters("").size == letters("!?\n --").size == letters("\u0301\u200d").size == 0
    assert letters("שָׁלוֹם مرحبا").tobytes().decode() == "שלוםمرحبا"
    assert letters("<|bos|>").tobytes() == b"bos"


def test_word_hashes():
    assert word_hashes("Two words.").tolist() == word_hashes("two, WORDS").tolist()
    assert len(word_hashes("日本語の text")) == 5  # a character is a word where no spaces part them
    assert len(word_hashes("한국어 문장")) == 2
    assert word_hashes("—").size == 0


def test_a_text_in_pieces_is_the_same(monkeypatch):
    rng = random.Random(0)
    texts = [made_up_text(rng, 300) for _ in range(20)] + ["x" * 500, " " * 500, "a " * 300]
    whole = [(letters(text).tobytes(), word_hashes(text).tolist()) for text in texts]
    monkeypatch.setattr(words, "_PIECE", 37)
    assert [(letters(text).tobytes(), word_hashes(text).tolist()) for text in texts] == whole


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 13, 24])
def test_runs_are_a_polynomial_of_their_members(size):
    values = np.random.default_rng(0).integers(0, 2**32, 40, dtype=np.uint64)
    expected = []
    for start in range(len(values) - size + 1):
        total = 0
        for value in values[start : start + size].tolist():
            total = (total * words._BASE + value) % 2**64
        expected.append(total * int(words._MIX) % 2**64)
    assert runs(values, size).tolist() == expected
    assert runs(values[: size - 1], size).size == 0


def test_hash_index_agrees_with_a_dictionary():
    rng = np.random.default_rng(1)
    pool = rng.integers(0, 2**64, 500, dtype=np.uint64)
    values, owners = rng.choice(pool[:300], 900), rng.integers(0, 50, 900)
    index = HashIndex(values, owners)
    asked = rng.choice(pool, 400)
    positions, first = index.find(asked)
    known = set(values.tolist())
    assert positions.tolist() == [i for i, value in enumerate(asked.tolist()) if value in known]
    found, which = index.owners_of(first)
    got = sorted(zip(which.tolist(), found.tolist(), strict=True))
    assert got == sorted(
        (i, owner)
        for i, position in enumerate(positions)
        for value, owner in zip(values.tolist(), owners.tolist(), strict=True)
        if value == asked[position]
    )
    assert HashIndex(values[:0], owners[:0]).find(asked)[0].size == 0
