"""The shards of a data folder: parquet files of documents in hash order, training and validation apart."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cognica_poe.data.documents import unit_hash
from cognica_poe.data.manifest import ShardRecord
from cognica_poe.data.split import NearDuplicates
from cognica_poe.data.spool import DocumentWriter, Spool
from cognica_poe.errors import UserError
from cognica_poe.files import sha256_file

_SHARD_BYTES = 256_000_000


@dataclass
class SourceContent:
    """What the shards hold of one source: documents and bytes of UTF-8 text by split, and its languages."""

    documents: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)
    languages: set[str] = field(default_factory=set)


def write_shards(
    spool: Spool, split_of: Mapping[str, str], folder: Path, seed: int
) -> tuple[list[ShardRecord], dict[str, SourceContent]]:
    """Part the spool into shards, each in hash order, so that a prefix of a shard is a sample of the whole.

    ``split_of`` maps a group to ``train`` or ``val``; documents of other groups, and training texts that repeat a
    validation document, are counted in ``spool.dropped``. Training text fills shards of about 256 MB, validation one.
    Returns the shards in the order of the manifest, and what they hold by source. Raises UserError if no training
    text is left.
    """
    near = NearDuplicates(document.text for document in spool.documents() if split_of.get(document.group) == "val")
    count = max(1, math.ceil(spool.bytes / _SHARD_BYTES))
    names = [f"train-{i:05d}" for i in range(count)] + ["val-00000"]
    buckets = {name: DocumentWriter(folder / f"{name}.bucket") for name in names}
    content: dict[str, SourceContent] = defaultdict(SourceContent)
    for document in spool.documents():
        split = split_of.get(document.group)
        if split is None:
            spool.dropped["over max_bytes"] += 1
        elif split == "train" and document.text in near:
            spool.dropped["near-duplicate of validation"] += 1
        else:
            size = len(document.text.encode())
            name = "val-00000"
            if split == "train":
                name = names[int(count * unit_hash(seed, "shard", document.origin))]
            buckets[name].add(document, size)
            held = content[document.source]
            held.documents[split] += 1
            held.bytes[split] += size
            held.languages.add(document.language)
    shards = []
    for name, bucket in buckets.items():
        bucket.close()
        file = folder / f"{name}.parquet"
        _sort_shard(folder / f"{name}.bucket", file, seed)
        shards.append(
            ShardRecord(
                file=file.name,
                split=name.split("-")[0],
                sha256=sha256_file(file),
                documents=bucket.documents,
                bytes=bucket.bytes,
            )
        )
    if not any(shard.bytes for shard in shards if shard.split == "train"):
        raise UserError("no training text is left beside the validation split; add text")
    return shards, content


def _sort_shard(bucket: Path, file: Path, seed: int) -> None:
    """Write the documents of ``bucket`` in hash order to ``file``, and remove ``bucket``."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    documents = pq.read_table(bucket)
    origins = documents.column("origin").to_pylist()
    order = sorted(range(len(origins)), key=lambda i: (unit_hash(seed, "order", origins[i]), origins[i], i))
    pq.write_table(documents.take(pa.array(order, pa.int64())), file, compression="zstd", row_group_size=1024)
    bucket.unlink()
