"""Lay the eleven slots of a sample corpus out as a mirror of the datasets of ``frontier_v1``, in their own formats.

    python -m benchmarks.mirror SAMPLE MIRROR
    HF_ENDPOINT=file:MIRROR cognica-poe data mix pin frontier_v1 --tokens 8000000 --out mix.json
    HF_ENDPOINT=file:MIRROR cognica-poe data build mix.json --out data

SAMPLE holds ``SLOT-train.parquet`` with the columns text, language and origin. The commits are made up.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cognica_poe.data.mixes import FRONTIER_V1, Source

SLOTS = dict(
    zip(
        (source.name for source in FRONTIER_V1.sources),
        ("fineweb_edu", "dclm", "stack_v2", "wikipedia", "culturax", "proofpile2", "openwebmath", "gutenberg", "pg19",
         "ultrachat", "openhermes"),
        strict=True,
    )
)  # fmt: skip
NAMES = {  # data files of a source: part of several, and their number
    "fineweb-edu": ("data/CC-MAIN-2013-20/train-{:05d}-of-00004.parquet", 4),
    "dclm-baseline": ("global-shard_01_of_10/local-shard_0_of_10/shard_{:08d}_processed.jsonl.zst", 5),
    "stack-v2": ("data/train-{:05d}-of-00003.parquet", 3),
    "wikipedia": ("20231101.en/train-{:05d}-of-00002.parquet", 2),
    "culturax": ("{config}/{config}_part_{:05d}.parquet", 1),
    "proof-pile-2": ("{config}/train/part_{:04d}.jsonl.zst", 1),
    "open-web-math": ("data/train-{:05d}-of-00002-5a023365406cb4b3.parquet", 2),
    "gutenberg": ("data/train-{:05d}-of-00002-5f59a7dc1cf61fee.parquet", 2),
    "pg19": ("data/train-{:05d}-of-00002-c9d3bb66c1cd7fd1.parquet", 2),
    "ultrachat": ("train_{}.jsonl", 2),
    "openhermes-2.5": ("openhermes2_5.json", 1),
}


def turns(text: str) -> list[str]:
    """What speakers say in a dialogue of ``User:`` and ``Assistant:`` lines."""
    return [part.strip() for part in text.replace("\nAssistant: ", "\nUser: ").split("\nUser: ")]


def row(source: Source, text: str, origin: str) -> dict[str, Any]:
    """A row of a dataset as it is laid out."""
    identity = {source.id_column: origin} if source.id_column else {}
    if source.name == "ultrachat":
        return {**identity, "data": turns(text.removeprefix("User: "))}
    if source.name == "openhermes-2.5":
        said = turns(text.removeprefix("User: "))
        return {
            **identity,
            "conversations": [{"from": ("human", "gpt")[i % 2], "value": v} for i, v in enumerate(said)],
        }
    return {**identity, source.text_column: text}


def write(rows: list[dict[str, Any]], file: Path) -> None:
    """Write rows in the format that the file's name ends in."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), file, compression="zstd", row_group_size=500)
    elif file.suffix == ".json":
        file.write_text(json.dumps(rows, ensure_ascii=False))
    else:
        data = b"".join(json.dumps(each, ensure_ascii=False).encode() + b"\n" for each in rows)
        file.write_bytes(pa.compress(data, "zstd", asbytes=True) if file.suffix == ".zst" else data)


def lay_out(sample: Path, mirror: Path) -> None:
    """Write every source's files below ``mirror``."""
    for source in FRONTIER_V1.sources:
        pattern, count = NAMES[source.name]
        commit = hashlib.sha1(source.dataset.encode()).hexdigest()
        rows: dict[str, list[dict[str, Any]]] = defaultdict(list)
        table = pq.read_table(sample / f"{SLOTS[source.name]}-train.parquet", columns=["text", "language", "origin"])
        for number, found in enumerate(table.to_pylist()):
            by_language = len(source.languages) > 1
            config = found["language"] if by_language else source.configs[number % len(source.configs)]
            path = pattern.format(number % count, config=config)
            rows[path].append(row(source, found["text"], found["origin"]))
        for path, part in rows.items():
            write(part, mirror / "datasets" / source.dataset / "resolve" / commit / path)
        print(f"{source.name}: {len(table):,} documents in {len(rows)} files", file=sys.stderr)


if __name__ == "__main__":
    lay_out(Path(sys.argv[1]), Path(sys.argv[2]))
