"""Made-up text in several scripts, and data folders built from it."""

import io
import json
import random
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq

from cognica_poe.data.build import build
from cognica_poe.data.manifest import read_documents
from cognica_poe.data.mixes import Mix, Source

PIN = "0123456789abcdef" * 2 + "01234567"

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


def texts(count, words=40, seed=0):
    """Texts of ``words`` words."""
    rng = random.Random(seed)
    return [made_up_text(rng, words) for _ in range(count)]


def small(source, out, **changes):
    """A data folder of little text."""
    return build(source, out, **{"val_fraction": 0.1, "val_min_bytes": 100, **changes})


def origins(folder, split):
    """Origins of a split's documents in the order of the shards."""
    return [document.origin for document in read_documents(folder, split)]


def pair_of_sources(**changes):
    """A mix of two sources without pinned files; ``changes`` go to the first."""
    web = Source("web", "org/web", 0.75, "MIT", revision=PIN, files="data/*.parquet", id_column="id")
    chats = Source("chats", "org/chats", 0.25, "CC0-1.0", revision=PIN, text_column="data")
    return Mix("pair", (replace(web, **changes), chats))


def parquet_bytes(rows):
    """A parquet file of rows as bytes."""
    file = io.BytesIO()
    pq.write_table(pa.table({name: [row[name] for row in rows] for name in rows[0]}), file)
    return file.getvalue()


def jsonl_bytes(rows, compression=None):
    """Rows as JSON lines, plain, zstd or gzip."""
    data = b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)
    return pa.compress(data, codec=compression, asbytes=True) if compression else data


def pair_of_datasets(count=300):
    """Files of the datasets of :func:`pair_of_sources`: three of web text, with other splits beside, two of chats."""
    web = {f"data/train-{i:05d}-of-00003.parquet": parquet_bytes(
        [{"id": f"id{i}-{j}", "text": text} for j, text in enumerate(texts(count // 3, 30, seed=i))]
    ) for i in range(3)}  # fmt: skip
    web["data/test-00000-of-00001.parquet"] = parquet_bytes([{"id": "t", "text": "a test"}])
    web["data/validation-00000-of-00001.parquet"] = parquet_bytes([{"id": "v", "text": "a validation"}])
    web["README.md"] = b"# Web"
    chats = {f"train_{i}.jsonl": jsonl_bytes(
        [{"id": str(j), "data": [text, "Indeed."]} for j, text in enumerate(texts(count // 2, 30, seed=10 + i))]
    ) for i in range(2)}  # fmt: skip
    return {"org/web": web, "org/chats": chats}


def write_mirror(folder, datasets, commit=PIN):
    """Lay datasets out as the Hub does, below ``folder``."""
    for dataset, files in datasets.items():
        for path, data in files.items():
            file = folder / "datasets" / dataset / "resolve" / commit / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
    return folder
