"""A small corpus of made-up words in several scripts, built and tokenized once."""

import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cognica_poe.data.build import build
from cognica_poe.data.tokenizer import train_tokenizer

SYLLABLES = (
    "ba",
    "ko",
    "mi",
    "ra",
    "té",
    "lu",
    "shi",
    "on",
    "per",
    "zu",
    "日",
    "本",
    "한국",
    "ña",
    "wo",
    "42",
    "7",
    "_x",
)


def made_up_text(rng: random.Random, words: int) -> str:
    """Words of few syllables, so that merges and repetitions exist; lines of unequal length."""
    parts = []
    for _ in range(words):
        parts.append("".join(rng.choice(SYLLABLES) for _ in range(rng.randint(1, 3))))
        parts.append(rng.choice([" ", " ", " ", ", ", ".\n", "\n    "]))
    return "".join(parts).strip() + "\n"


def write_parquet(file, rows):
    names = list(rows[0])
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({name: [row[name] for row in rows] for name in names}), file)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """Folder of one parquet file: 120 documents of 5 to 900 words in two sources."""
    rng = random.Random(0)
    rows = [
        {
            "text": made_up_text(rng, rng.choice([5, 20, 60, 200, 900])),
            "source": rng.choice(["tales", "notes"]),
            "language": "en",
            "origin": f"shelf/{number}.txt",
        }
        for number in range(120)
    ]
    folder = tmp_path_factory.mktemp("corpus")
    write_parquet(folder / "all.parquet", rows)
    return folder


@pytest.fixture(scope="session")
def data_dir(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("built") / "data"
    build(corpus, out, val_fraction=0.1, val_min_bytes=2000, seed=3)
    return out


@pytest.fixture(scope="session")
def tokenizer(corpus, tmp_path_factory):
    texts = pq.read_table(corpus / "all.parquet")["text"].to_pylist()
    return train_tokenizer(texts, 500, tmp_path_factory.mktemp("tokenizer") / "tokenizer")
