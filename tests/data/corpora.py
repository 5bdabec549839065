"""Made-up text in several scripts, and data folders built from it."""

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
    """A mix of two pinned sources; ``changes`` go to the first."""
    web = Source("web", "org/web", 0.75, "MIT", revision=PIN, id_column="id")
    chats = Source("chats", "org/chats", 0.25, "CC0-1.0", revision=PIN, text_column="data")
    return Mix("pair", (replace(web, **changes), chats))
