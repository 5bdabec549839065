import random
import re
import time
import zlib

import numpy as np
import pytest

from cognica_poe.data.cleaning import minhash, words
from cognica_poe.data.cleaning.minhash import BANDS, ROWS, band_keys
from cognica_poe.data.sources import python_docs


def slow_keys(text):
    """Band keys of a text in ASCII, number by number."""
    factors, summands, rows = (constants.reshape(-1).tolist() for constants in minhash._constants())
    found = [zlib.crc32(word.encode()) for word in re.findall("[a-z0-9]+", text.lower())]
    size, shingles = min(5, len(found)), []
    for start in range(len(found) - size + 1):
        total = 0
        for word in found[start : start + size]:
            total = (total * words._BASE + word) % 2**64
        shingles.append((total * int(words._MIX) % 2**64) >> 32)
    least = [min((f * s + c) % 2**32 for s in shingles) for f, c in zip(factors, summands, strict=True)]
    keys = []
    for band in range(BANDS):
        key = sum(a * b for a, b in zip(least[band * ROWS : (band + 1) * ROWS], rows, strict=True)) % 2**64
        keys.append(key ^ (key >> 31))
    return keys


def made_up_words(rng, count):
    return ["".join(rng.choices("abcdefghij", k=rng.randint(2, 6))) for _ in range(count)]


def test_keys_are_those_of_the_slow_way():
    rng = random.Random(0)
    texts = [" ".join(made_up_words(rng, count)) for count in (1, 3, 5, 6, 40, 1500)]
    assert band_keys(texts).tolist() == [slow_keys(text) for text in texts]


def test_keys_are_the_same_for_ever():
    """A data folder's identity hangs on them: Philox and crc32 are fixed by their definitions."""
    keys = band_keys(["The quick brown fox jumps over the lazy dog.", "다람쥐 헌 쳇바퀴에 타고파"])
    assert keys.shape == (2, 14) and keys.dtype == np.uint64
    assert [hex(int(key)) for key in keys[:, 0]] == ["0x168adf1f8405e807", "0x19d577a3b7f7eff8"]


def test_case_space_and_punctuation_do_not_count():
    one, other, marks, others = band_keys(["Hello, big world! It is.", "hello big\nWORLD it   is", "?!", "!!"])
    assert (one == other).all() and (marks != others).all()
    assert band_keys([]).shape == (0, 14)


@pytest.mark.parametrize(("every", "low", "high"), [(0, 1.0, 1.0), (40, 0.75, 0.95), (8, 0.0, 0.06)])
def test_near_copies_meet_as_theory_says(every, low, high):
    """A word of every 40 replaced leaves a Jaccard similarity of 0.78 (theory: 87 %), of every 8 one of 0.23."""
    rng, met = random.Random(3), 0
    for _ in range(200):
        original = made_up_words(rng, 400)
        copy = [f"new{i}" if every and i % every == every - 1 else word for i, word in enumerate(original)]
        one, other = band_keys([" ".join(original), " ".join(copy)])
        met += bool((one == other).any())
    assert low <= met / 200 <= high


@pytest.mark.slow
def test_a_core_reads_10_megabytes_a_second(capsys):
    texts = [document.text for document in python_docs.collect()]
    size, begin = sum(len(text.encode()) for text in texts) / 1e6, time.process_time()
    band_keys(texts)
    rate = size / (time.process_time() - begin)
    with capsys.disabled():
        print(f"\nband keys: {size:.1f} MB at {rate:.1f} MB/s")
    assert rate >= 10
