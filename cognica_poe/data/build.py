"""Build a data folder: parquet shards of training and validation documents, and a manifest that accounts for them.

A mix is ``python-docs`` (embedded), ``frontier_v1`` or a mix file (Hub datasets), or a path of local files. Documents
are spooled to disk once and then parted, so that memory stays that of one shard whatever the size of the corpus.
"""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from cognica_poe.data.documents import Document
from cognica_poe.data.manifest import SPLITS, DataManifest, ShardRecord, SourceRecord, Totals
from cognica_poe.data.mixes import MIXES, PYTHON_DOCS, Mix, load_mix, require_pinned
from cognica_poe.data.shards import SourceContent, write_shards
from cognica_poe.data.sources import python_docs
from cognica_poe.data.sources.hub import read_source
from cognica_poe.data.sources.local import explicit_split, local_files, read_file
from cognica_poe.data.split import assign_splits
from cognica_poe.data.spool import Spool
from cognica_poe.errors import UserError
from cognica_poe.files import atomic_folder, require_apart, require_replaceable, require_space, write_json

Log = Callable[[str], None]


@dataclass
class _Input:
    """What a build reads: documents, each with the split that its file's name states, or None."""

    name: str
    mix: Mix | None
    """A mix of Hub datasets, or None."""
    documents: Iterator[tuple[Document, str | None]]
    dropped: Counter[str]
    """Documents left out, by reason; counted while ``documents`` is read."""


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
    say so keep their split (``explicit_split`` of ``data.sources.local``); test splits are left out. ``max_bytes``
    takes a sample of each source by hash; it is the size to read for Hub mixes and bounds the training part where file
    names split; a text that would go beyond by more than a tenth is left out. Exact duplicates, and training texts that
    repeat a validation document, are dropped and counted.
    Raises UserError for unusable input (see ``data.sources``), too little text, or an ``out`` that holds anything but
    data of ours, or lies in what is read.
    """
    out = Path(out)
    require_replaceable(out, "data")
    if not 0 <= val_fraction <= 0.5 or (max_bytes is not None and max_bytes <= 0):
        raise UserError(f"val_fraction {val_fraction} must be in [0, 0.5] and max_bytes {max_bytes} positive")
    if val_min_bytes < 1:
        raise UserError(f"val_min_bytes {val_min_bytes} must be at least 1")
    given = _open(str(mix_or_path), out, max_bytes, seed, log)
    with atomic_folder(out, "data") as folder:
        spool = Spool(folder / "spool.parquet", given.dropped)
        for document, split in given.documents:
            spool.add(document, split)
        spool.close()
        if not spool.bytes:
            raise UserError(f"{mix_or_path} holds no text at all; nothing was built")
        require_space(out, 2 * spool.bytes)
        try:
            split_of = assign_splits(
                spool.groups,
                spool.given,
                fraction=val_fraction,
                min_bytes=val_min_bytes,
                seed=seed,
                max_bytes=max_bytes if given.mix is None else None,  # of a Hub mix no more was read
            )
        except UserError as error:
            raise UserError(f"{mix_or_path}: {error}") from error
        shards, content = write_shards(spool, split_of, folder, seed)
        spool.file.unlink()
        manifest = DataManifest(
            mix=given.name,
            seed=seed,
            val_fraction=val_fraction,
            val_min_bytes=val_min_bytes,
            max_bytes=max_bytes,
            documents=sum(shard.documents for shard in shards),
            bytes=sum(shard.bytes for shard in shards),
            splits={split: _total(shards, split) for split in SPLITS},
            shards=shards,
            sources=_source_records(given, content),
            dropped=dict(sorted(spool.dropped.items())),
            versions={"python": platform.python_version()},
        )
        write_json(folder / "manifest.json", manifest.model_dump())
    for split in SPLITS:
        total = manifest.splits[split]
        log(f"data: {split}: {total.documents:,} documents, {total.bytes / 1e6:.2f} MB")
    return manifest


def mix_name(given: str) -> str | None:
    """What ``build`` calls the mix or path ``given`` in the manifest; None for a mix file that is gone since."""
    if given == PYTHON_DOCS or given in MIXES:
        return given
    if given.endswith(".json"):
        return load_mix(Path(given)).name if Path(given).is_file() else None
    return Path(given).name


def _open(given: str, out: Path, max_bytes: int | None, seed: int, log: Log) -> _Input:
    """Find what ``given`` names; complains before anything is written."""
    dropped: Counter[str] = Counter()
    if given == PYTHON_DOCS:
        log("data: collecting python-docs from this Python installation")
        return _Input(given, None, ((document, None) for document in python_docs.collect()), dropped)
    mix = MIXES.get(given)
    if mix is None and given.endswith(".json"):
        mix = load_mix(Path(given))
    if mix is not None:
        require_pinned(mix)
        if max_bytes is None:
            raise UserError(f"mix {mix.name} needs a size: pass --max-bytes, or --data.max-bytes with a recipe")
        return _Input(mix.name, mix, _hub_documents(mix, max_bytes, seed, dropped, log), dropped)
    path = Path(given)
    require_apart(out, path)
    return _Input(path.name, None, _local_documents(local_files(path), path, dropped, log), dropped)


def _hub_documents(
    mix: Mix, max_bytes: int, seed: int, dropped: Counter[str], log: Log
) -> Iterator[tuple[Document, None]]:
    for source in mix.sources:
        wanted = int(source.share * max_bytes)
        for document in read_source(source, wanted, seed, log, lambda reason: dropped.update([reason])):
            yield document, None


def _local_documents(
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


def _source_records(given: _Input, content: Mapping[str, SourceContent]) -> list[SourceRecord]:
    """What was asked for and what was reached, in the order of the mix."""
    total = sum(held.bytes.total() for held in content.values())
    described = {source.name: source for source in given.mix.sources} if given.mix else {}
    records = []
    for name in sorted(content, key=lambda name: list(described).index(name) if name in described else -1):
        held, wish = content[name], described.get(name)
        embedded = python_docs.LICENCES.get(name) if given.name == PYTHON_DOCS else None
        licence = wish.licence if wish else embedded
        records.append(
            SourceRecord(
                name=name,
                dataset=wish.dataset if wish else None,
                revision=wish.revision if wish else None,
                licence=licence or "not stated (local files)",
                languages=sorted(held.languages),
                share_wanted=wish.share if wish else None,
                share_reached=round(held.bytes.total() / total, 6),
                documents=held.documents.total(),
                bytes=held.bytes.total(),
                val_documents=held.documents["val"],
                val_bytes=held.bytes["val"],
            )
        )
    return records


def _total(shards: list[ShardRecord], split: str) -> Totals:
    return Totals(
        documents=sum(shard.documents for shard in shards if shard.split == split),
        bytes=sum(shard.bytes for shard in shards if shard.split == split),
    )
