"""What a data folder says about itself, and how it is read back."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from cognica_poe.data.documents import Document
from cognica_poe.errors import UserError
from cognica_poe.files import MANIFEST, Manifest, read_json, safe_name
from cognica_poe.seals import require_sha256

SPLITS = ("train", "val")
"""Names of the splits, as shards and manifest have them."""
_REMEDY = "restore it or build the data again"


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Totals(_Record):
    """Documents and bytes of UTF-8 text."""

    documents: int
    bytes: int


class ShardRecord(Totals):
    """One parquet file of the folder."""

    file: str
    split: str
    sha256: str
    """Of the file."""


class SourceRecord(Totals):
    """One source: what was asked for and what was reached."""

    name: str
    dataset: str | None = None
    """Hub dataset id; None for local files and the embedded corpus."""
    revision: str | None = None
    """Pinned commit of the dataset."""
    licence: str
    languages: list[str]
    share_wanted: float | None = None
    """Of all bytes; None where the mix asks for no shares."""
    share_reached: float
    val_documents: int
    val_bytes: int


class StageRecord(_Record):
    """One stage of the build."""

    name: str
    version: int
    """Of its code."""
    tasks: int
    sha256: str
    """Of what the sidecars of its tasks say of code, inputs and outputs."""


class DataManifest(_Record):
    """``manifest.json`` of a data folder."""

    schema_version: Literal[1] = 1
    mix: str
    seed: int
    val_fraction: float
    val_min_bytes: int
    max_bytes: int | None
    shard_bytes: int = 256_000_000
    """UTF-8 text of a training shard, about."""
    cleaning: dict[str, bool | int | float | str | None] = {}
    """Which documents were dropped (``data.cleaning.rules``). Empty in manifests from before it could be said."""
    documents: int
    bytes: int
    read: int | None = None
    """Documents that the sources gave: those kept and those left out. None in manifests from before it was counted."""
    splits: dict[str, Totals]
    shards: list[ShardRecord]
    sources: list[SourceRecord]
    dropped: dict[str, int]
    """Number of documents left out, by reason."""
    dropped_by_source: dict[str, dict[str, int]] = {}
    """The same by source and reason."""
    stages: list[StageRecord] = []
    """Of the build, in their order."""
    versions: dict[str, str]

    @property
    def sha256(self) -> str:
        """One digest of all shards in their order: the identity of the data."""
        return hashlib.sha256("".join(f"{s.split} {s.sha256}\n" for s in self.shards).encode()).hexdigest()

    def shards_of(self, split: str) -> list[ShardRecord]:
        """The shards of a split in their order."""
        return [shard for shard in self.shards if shard.split == split]

    def split_sha256(self, split: str, shard: int | None = None) -> str:
        """Identity of one split, or of what one of its shards holds of it."""
        shards = self.shards_of(split)
        chosen = shards if shard is None else shards[shard : shard + 1]
        return hashlib.sha256("".join(s.sha256 for s in chosen).encode()).hexdigest()


def load_manifest(data_dir: Path) -> DataManifest:
    """Read ``data_dir/manifest.json``. The shards are compared when they are read.

    Raises UserError if it is missing, differs from the folder's ``MANIFEST.sha256``, is not of this form, or has
    unsafe names.
    """
    file = Path(data_dir) / "manifest.json"
    if not file.is_file():
        raise UserError(f"data manifest not found: {file}")
    listed = Manifest.read(data_dir, _REMEDY).digests
    require_sha256(file, listed.get(file.name, "of no listed file"), "data manifest", _REMEDY)
    try:
        manifest = DataManifest.model_validate(read_json(file, "data manifest"))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"data manifest {file} is not valid ({where}: {first['msg']}); {_REMEDY}") from error
    for shard in manifest.shards:
        safe_name(shard.file, f"data manifest {file}: shard")
        if listed.get(shard.file) != shard.sha256:
            raise UserError(f"{file.parent / MANIFEST} and {file.name} give {shard.file} another sha256; {_REMEDY}")
    for split in SPLITS:
        shards = [shard for shard in manifest.shards if shard.split == split]
        total = manifest.splits.get(split)
        for name in ("documents", "bytes"):
            counts = [getattr(shard, name) for shard in shards]
            if total is None or min(counts, default=0) < 0 or sum(counts) != getattr(total, name):
                raise UserError(f"data manifest {file}: the {name} of its {split} shards are not those said; {_REMEDY}")
    return manifest


def read_documents(data_dir: Path, split: str, shard: int | None = None) -> Iterator[Document]:
    """Documents of ``train`` or ``val`` in the order of the shards, or those of one shard, counted within the split.

    Each shard is compared with its sha256 once per process, all of them before the first document. Raises UserError for
    one that is missing or corrupt.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if split not in SPLITS:
        raise UserError(f"unknown split {split!r}; choose one of {', '.join(SPLITS)}")
    shards = load_manifest(data_dir).shards_of(split)
    shards = shards if shard is None else shards[shard : shard + 1]
    for record in shards:
        require_sha256(Path(data_dir) / record.file, record.sha256, "data shard", _REMEDY)
    for record in shards:
        file = Path(data_dir) / record.file
        count = 0
        try:
            with pq.ParquetFile(file) as parquet:
                for batch in parquet.iter_batches(batch_size=256, columns=["text", "source", "language", "origin"]):
                    columns = [column.to_pylist() for column in batch.columns]
                    count += batch.num_rows
                    for row in zip(*columns, strict=True):
                        yield Document(*row)
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"data shard {file} cannot be read ({_first_line(error)}); {_REMEDY}") from error
        if count != record.documents:
            raise UserError(f"data shard {file} has {count} documents, the manifest says {record.documents}; {_REMEDY}")


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
