"""Training reads a sample, in time and memory that any text keeps to."""

import random
import resource
import string
import subprocess
import sys
import time

import pytest

from cognica_poe.data import tokenizer as tokenizers_own
from cognica_poe.data.tokenizer import train_tokenizer
from tests.data.corpora import texts

KINDS = {
    "one letter": lambda n: "a" * n,
    "spaces": lambda n: " " * n,
    "line ends": lambda n: "\n" * n,
    "marks": lambda n: "-" * n,
    "ideographs": lambda n: "日" * (n // 3),
    "random letters": lambda n: "".join(random.Random(n).choices(string.ascii_lowercase, k=n)),
    "combining marks": lambda n: "e" + "\u0301" * (n // 2),
    "right to left": lambda n: "שלום " * (n // 9),
}


def capped(given, max_bytes):
    return list(tokenizers_own._capped(given, max_bytes))


def test_no_text_gives_more_than_its_part(monkeypatch):
    monkeypatch.setattr(tokenizers_own, "_LEAST_PART", 10)
    assert capped(["x" * 100, "y" * 30, "z" * 5], 400) == ["x" * 20, "y" * 20, "z" * 5]
    assert capped(["x" * 100, "y" * 100], 25) == ["x" * 10, "y" * 10]
    assert "".join(capped(["日" * 100] * 9, 100)) == "日日日" * 9
    assert sum(len(part.encode()) for part in capped(["word " * 100] * 99, 400)) == 400


def test_pieces_make_the_text(monkeypatch):
    monkeypatch.setattr(tokenizers_own, "_PIECE", 10)
    for text in ("", "short", "several words that are cut at spaces", "x" * 35, " " * 35, "exactly 10"):
        parts = list(tokenizers_own._pieces(text))
        assert "".join(parts) == text and all(len(part) <= 10 for part in parts)


@pytest.mark.parametrize("kind", KINDS)
def test_a_megabyte_of_one_kind_takes_seconds(kind, tmp_path):
    begin = time.process_time()
    train_tokenizer([*texts(40, 60), KINDS[kind](1_000_000)], 400, tmp_path / "t", max_bytes=3_000_000)
    assert time.process_time() - begin < 8


MEMORY = """
import resource, sys
from pathlib import Path
from cognica_poe.data.tokenizer import train_tokenizer
from tests.data.test_training_of_tokenizers import KINDS, texts
text = KINDS[sys.argv[1]](50_000_000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
train_tokenizer([text, *texts(40, 60)], 400, Path(sys.argv[2]) / "t", max_bytes=20_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["one letter", "spaces"])
def test_a_document_of_50_megabytes_takes_little_memory(kind, tmp_path, capsys):
    begin = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, kind, str(tmp_path)], capture_output=True, text=True, check=True
    )
    seconds = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - begin
    megabytes = int(done.stdout.split()[-1]) / 1024
    with capsys.disabled():
        print(f"\n50 MB of {kind}, training: {seconds:.1f} s of processor time, {megabytes:.0f} MB")
    assert megabytes < 400 and seconds < 30


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_encoding_is_linear_at_three_sizes(kind, tokenizer, capsys):
    times = []
    for length in (1_000_000, 2_000_000, 4_000_000):
        text = KINDS[kind](length)
        begin = time.process_time()
        (ids,) = tokenizer.encode_batch([text])
        times.append(time.process_time() - begin)
        assert tokenizer.decode(ids) == text
    with capsys.disabled():
        print(f"\nencoding {kind}, 1, 2 and 4 MB: {', '.join(f'{seconds:.2f}' for seconds in times)} s")
    assert times[2] < 3 * max(times[1], 0.05) and times[1] < 3 * max(times[0], 0.05)
