"""Build a data folder: parquet shards of training and validation documents, and a manifest that accounts for them.

A mix is ``python-docs`` (embedded), ``frontier_v1`` or a mix file (Hub datasets), or a path of local files. Documents
are spooled to disk once and then parted, so that memory stays that of one shard whatever the size of the corpus.
"""

from __future__ import annotations

import math
import platform
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from cognica_poe.data.documents import Document, text_digest, text_problem, unit_hash
from cognica_poe.data.manifest import (
    SPLITS,
    DataManifest,
    ShardRecord,
    SourceRecord,
    Totals,
    load_manifest,
    read_documents,
)
from cognica_poe.data.sources import python_docs
from cognica_poe.data.sources.hub import FRONTIER_V1, Mix, Source, load_mix, read_source, require_pinned, save_mix
from cognica_poe.data.sources.local import explicit_split, local_files, read_file
from cognica_poe.data.split import NearDuplicates, choose_groups, choose_validation
from cognica_poe.errors import UserError
from cognica_poe.files import atomic_folder, require_apart, require_replaceable, require_space, sha256_file, write_json

__all__ = ["MIXES", "DataManifest", "Mix", "Source", "build", "load_manifest", "load_mix", "read_documents", "save_mix"]

PYTHON_DOCS = "python-docs"
MIXES: dict[str, Mix | None] = {PYTHON_DOCS: None, FRONTIER_V1.name: FRONTIER_V1}
"""Mixes by name; ``python-docs`` has no Hub sources."""
_COLUMNS = ("text", "source", "language", "origin")
_SHARD_BYTES = 256_000_000
_FLUSH_BYTES = 8_000_000
Log = Callable[[str], None]


def build(
    mix_or_path: str | Path,
    out: Path,
    *,
    val_fraction: float = 0.02,
    val_min_bytes: int = 200_000,
    seed: int = 0,
    max_bytes: int | None = None,
    log: Log = lambda line: None,
) -> DataManifest:
    """Build ``out`` from a mix name, a mix file (.json) or local files, and return its manifest.

    Whole documents (groups) are held out by a hash of (seed, group), the same part of every source. Files whose names
    say so keep their split (``data.local.explicit_split``); test splits are left out. ``max_bytes`` takes a sample of
    each source by hash; it is the size to read for Hub mixes and bounds the training part where file names split.
    Exact duplicates, and training texts that repeat a validation document, are dropped and counted.
    Raises UserError for unusable input (see ``data.local``), too little text, or an ``out`` that holds anything but
    data of ours, or lies in what is read.
    """
    out = Path(out)
    require_replaceable(out, "data")
    if not 0 <= val_fraction < 0.5 or (max_bytes is not None and max_bytes <= 0):
        raise UserError(f"val_fraction {val_fraction} must be in [0, 0.5) and max_bytes {max_bytes} positive")
    if val_min_bytes < 1:
        raise UserError(f"val_min_bytes {val_min_bytes} must be at least 1")
    name, mix, rows, dropped = _open(str(mix_or_path), out, max_bytes, seed, log)
    with atomic_folder(out, "data") as folder:
        spool = _Spool(folder / "spool.parquet", dropped)
        for document, split in rows:
            spool.add(document, split)
        spool.close()
        if not spool.bytes:
            raise UserError(f"{mix_or_path} holds no text at all; nothing was built")
        require_space(out, 2 * spool.bytes)
        side = _assign(spool, mix, val_fraction, val_min_bytes, seed, max_bytes)
        shards, sizes = _write_shards(spool, side, folder, seed)
        spool.file.unlink()
        manifest = _manifest(name, mix, shards, sizes, spool.dropped, (seed, val_fraction, val_min_bytes, max_bytes))
        write_json(folder / "manifest.json", manifest.model_dump())
    for split in SPLITS:
        total = manifest.splits[split]
        log(f"data: {split}: {total.documents:,} documents, {total.bytes / 1e6:.2f} MB")
    return manifest


def _open(given: str, out: Path, max_bytes: int | None, seed: int, log: Log):
    """(name, Hub mix or None, iterator of (document, split or None), drop counter)."""
    dropped: Counter[str] = Counter()
    if given == PYTHON_DOCS:
        log("data: collecting python-docs from this Python installation")
        return given, None, ((document, None) for document in python_docs.collect()), dropped
    mix = MIXES.get(given)
    if mix is None and given.endswith(".json"):
        mix = load_mix(Path(given))
    if mix is not None:
        require_pinned(mix)
        if max_bytes is None:
            raise UserError(f"mix {mix.name} needs max_bytes: the size of text to read from the Hub")
        return mix.name, mix, _hub_rows(mix, max_bytes, seed, log), dropped
    path = Path(given)
    require_apart(out, path)
    files = local_files(path)  # complains before anything is written
    return path.name, None, _local_rows(files, path, dropped, log), dropped


def _hub_rows(mix: Mix, max_bytes: int, seed: int, log: Log) -> Iterator[tuple[Document, None]]:
    for source in mix.sources:
        for document in read_source(source, int(source.share * max_bytes), seed, log):
            yield document, None


def _local_rows(
    files: list[Path], root: Path, dropped: Counter[str], log: Log
) -> Iterator[tuple[Document, str | None]]:
    splits = [explicit_split(file, root) for file in files]
    given = "val" in splits  # without a validation file, files named train are parted like any other
    if set(splits) <= {"val", "test"}:
        kinds = " and ".join(name for split, name in (("val", "validation"), ("test", "test")) if split in splits)
        raise UserError(f"{root} holds {kinds} files only; add training files")
    tests = splits.count("test")
    log(f"data: reading {len(files) - tests} local files")
    if tests:
        log(f"data: {tests} files of a test split are left out")
    for file, split in zip(files, splits, strict=True):
        if split == "test":  # to be measured on later: never trained on, and no validation while training either
            dropped["test split"] += sum(1 for _ in read_file(file, root, lambda _: dropped.update(["test split"])))
            continue
        for document in read_file(file, root, lambda reason: dropped.update([reason])):
            yield document, (split or "train") if given else None


class _Spool:
    """All usable documents on disk, and in memory what the split needs: bytes by group and source."""

    def __init__(self, file: Path, dropped: Counter[str]) -> None:
        self.file, self.dropped = file, dropped
        self.groups: dict[str, Counter[str]] = defaultdict(Counter)
        self.given: dict[str, str] = {}
        self.bytes = 0
        self._seen: set[bytes] = set()
        self._writer = _Writer(file, (*_COLUMNS, "group"))

    def add(self, document: Document, split: str | None) -> None:
        if problem := text_problem(document.text):
            self.dropped[problem] += 1
            return
        digest = text_digest(document.text)
        if digest in self._seen:
            self.dropped["duplicate"] += 1
            return
        self._seen.add(digest)
        key = document.group_key
        if split is not None:
            key = f"{split}\x1f{key}"  # the same origin may stand in both files
            self.given[key] = split
        size = len(document.text.encode())
        self.groups[key][document.source] += size
        self.bytes += size
        self._writer.add(replace(document, group=key), size)

    def close(self) -> None:
        self._writer.close()

    def documents(self) -> Iterator[Document]:
        import pyarrow.parquet as pq

        with pq.ParquetFile(self.file) as parquet:
            for batch in parquet.iter_batches(batch_size=256):
                for row in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                    yield Document(*row)


class _Writer:
    """A parquet file that is filled document by document."""

    def __init__(self, file: Path, columns: tuple[str, ...] = _COLUMNS) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._schema = pa.schema([(name, pa.string()) for name in columns])
        self._parquet = pq.ParquetWriter(file, self._schema, compression="zstd")
        self._rows: list[Document] = []
        self._pending = 0
        self.documents = self.bytes = 0

    def add(self, document: Document, size: int) -> None:
        self._rows.append(document)
        self._pending += size
        self.documents += 1
        self.bytes += size
        if self._pending >= _FLUSH_BYTES:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa

        if self._rows:
            columns = [[getattr(row, name) for row in self._rows] for name in self._schema.names]
            self._parquet.write_table(pa.table(columns, schema=self._schema))
        self._rows, self._pending = [], 0

    def close(self) -> None:
        self._flush()
        self._parquet.close()


def _assign(
    spool: _Spool, mix: Mix | None, fraction: float, min_bytes: int, seed: int, max_bytes: int | None
) -> dict[str, str]:
    """Group to its split; groups beyond ``max_bytes`` are absent."""
    given = set(spool.given.values())
    pool = {key: sizes for key, sizes in spool.groups.items() if spool.given.get(key) != "val"}
    if max_bytes is not None and mix is None:
        by_source: Counter[str] = Counter()
        for sizes in pool.values():
            by_source.update(sizes)
        if by_source.total() > max_bytes:
            wanted = {name: max_bytes / 1.1 * size / by_source.total() for name, size in by_source.items()}
            kept = choose_groups(pool, wanted, seed, "sample")
            pool = {key: pool[key] for key in kept}
    if given:
        if not pool or "val" not in given:
            raise UserError("too little text: the training or the validation files hold no text of their own")
        return {key: "val" for key, split in spool.given.items() if split == "val"} | dict.fromkeys(pool, "train")
    held = choose_validation(pool, fraction, min_bytes, seed)
    return {key: "val" if key in held else "train" for key in pool}


def _write_shards(
    spool: _Spool, side: dict[str, str], folder: Path, seed: int
) -> tuple[list[ShardRecord], dict[str, dict[str, Any]]]:
    """Part the spool into shards, each in hash order, so that a prefix of a shard is a sample of the whole."""
    near = NearDuplicates(document.text for document in spool.documents() if side.get(document.group) == "val")
    count = max(1, math.ceil(spool.bytes / _SHARD_BYTES))
    names = [f"train-{i:05d}" for i in range(count)] + ["val-00000"]
    buckets = {name: _Writer(folder / f"{name}.bucket") for name in names}
    sizes: dict[str, dict[str, Any]] = defaultdict(lambda: {"train": Counter(), "val": Counter(), "languages": set()})
    for document in spool.documents():
        split = side.get(document.group)
        if split is None:
            spool.dropped["over max_bytes"] += 1
        elif split == "train" and document.text in near:
            spool.dropped["near-duplicate of validation"] += 1
        else:
            size = len(document.text.encode())
            bucket = "val-00000"
            if split == "train":
                bucket = names[int(count * unit_hash(seed, "shard", document.origin))]
            buckets[bucket].add(document, size)
            sizes[document.source][split].update(documents=1, bytes=size)
            sizes[document.source]["languages"].add(document.language)
    shards = []
    for name, bucket in buckets.items():
        bucket.close()
        file = folder / f"{name}.parquet"
        _sort_shard(folder / f"{name}.bucket", file, seed)
        totals = {"documents": bucket.documents, "bytes": bucket.bytes}
        shards.append(ShardRecord(file=file.name, split=name.split("-")[0], sha256=sha256_file(file), **totals))
    if not any(shard.bytes for shard in shards if shard.split == "train"):
        raise UserError("no training text is left beside the validation split; add text")
    return shards, sizes


def _sort_shard(bucket: Path, file: Path, seed: int) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(bucket)
    origins = table.column("origin").to_pylist()
    order = sorted(range(len(origins)), key=lambda i: (unit_hash(seed, "order", origins[i]), origins[i], i))
    pq.write_table(table.take(pa.array(order, pa.int64())), file, compression="zstd", row_group_size=1024)
    bucket.unlink()


def _manifest(
    name: str,
    mix: Mix | None,
    shards: list[ShardRecord],
    sizes: dict[str, dict[str, Any]],
    dropped: Counter[str],
    settings: tuple[int, float, int, int | None],
) -> DataManifest:
    seed, val_fraction, val_min_bytes, max_bytes = settings
    total = sum(shard.bytes for shard in shards)
    described = {source.name: source for source in mix.sources} if mix else {}
    records = []
    for source in sorted(sizes, key=lambda s: list(described).index(s) if s in described else -1):
        train, val = sizes[source]["train"], sizes[source]["val"]
        wish = described.get(source)
        licence = wish.licence if wish else python_docs.LICENCES.get(source) if name == PYTHON_DOCS else None
        records.append(
            SourceRecord(
                name=source,
                dataset=wish.dataset if wish else None,
                revision=wish.revision if wish else None,
                licence=licence or "not stated (local files)",
                languages=sorted(sizes[source]["languages"]),
                share_wanted=wish.share if wish else None,
                share_reached=round((train["bytes"] + val["bytes"]) / total, 6),
                documents=train["documents"] + val["documents"],
                bytes=train["bytes"] + val["bytes"],
                val_documents=val["documents"],
                val_bytes=val["bytes"],
            )
        )
    by_split = {
        split: Totals(
            documents=sum(s.documents for s in shards if s.split == split),
            bytes=sum(s.bytes for s in shards if s.split == split),
        )
        for split in SPLITS
    }
    return DataManifest(
        mix=name,
        seed=seed,
        val_fraction=val_fraction,
        val_min_bytes=val_min_bytes,
        max_bytes=max_bytes,
        documents=sum(s.documents for s in shards),
        bytes=total,
        splits=by_split,
        shards=shards,
        sources=records,
        dropped=dict(sorted(dropped.items())),
        versions={"python": platform.python_version()},
    )
