"""A small corpus, built and tokenized once."""

import random

import pyarrow.parquet as pq
import pytest

from cognica_poe.data.build import build
from cognica_poe.data.tokenizer import train_tokenizer
from tests.data.corpora import made_up_text, write_parquet


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
