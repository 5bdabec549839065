"""What a data folder says about itself, and how it is read back."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from cognica_poe.data.documents import Document
from cognica_poe.errors import UserError
from cognica_poe.files import read_json, safe_name

SPLITS = ("train", "val")
"""Names of the splits, as shards and manifest have them."""


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


class DataManifest(_Record):
    """``manifest.json`` of a data folder."""

    schema_version: int = 1
    mix: str
    seed: int
    val_fraction: float
    val_min_bytes: int
    max_bytes: int | None
    documents: int
    bytes: int
    splits: dict[str, Totals]
    shards: list[ShardRecord]
    sources: list[SourceRecord]
    dropped: dict[str, int]
    """Number of documents left out, by reason."""
    versions: dict[str, str]

    @property
    def sha256(self) -> str:
        """One digest of all shards in their order: the identity of the data."""
        return hashlib.sha256("".join(f"{s.split} {s.sha256}\n" for s in self.shards).encode()).hexdigest()

    def split_sha256(self, split: str) -> str:
        """Identity of one split."""
        return hashlib.sha256("".join(s.sha256 for s in self.shards if s.split == split).encode()).hexdigest()


def load_manifest(data_dir: Path) -> DataManifest:
    """Read ``data_dir/manifest.json``. Raises UserError if it is missing, not of this form, or has unsafe names."""
    file = Path(data_dir) / "manifest.json"
    try:
        manifest = DataManifest.model_validate(read_json(file, "data manifest"))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"data manifest {file} is not valid ({where}: {first['msg']}); build the data again") from error
    for shard in manifest.shards:
        safe_name(shard.file, f"data manifest {file}: shard")
    return manifest


def read_documents(data_dir: Path, split: str) -> Iterator[Document]:
    """Documents of ``train`` or ``val`` in the order of the shards. Raises UserError for a missing or corrupt shard."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if split not in SPLITS:
        raise UserError(f"unknown split {split!r}; choose one of {', '.join(SPLITS)}")
    for shard in load_manifest(data_dir).shards:
        if shard.split != split:
            continue
        file = Path(data_dir) / shard.file
        count = 0
        try:
            with pq.ParquetFile(file) as parquet:
                for batch in parquet.iter_batches(batch_size=256, columns=["text", "source", "language", "origin"]):
                    columns = [column.to_pylist() for column in batch.columns]
                    count += batch.num_rows
                    for row in zip(*columns, strict=True):
                        yield Document(*row)
        except FileNotFoundError as error:
            raise UserError(
                f"data shard {file} is missing though the manifest lists it; build the data again"
            ) from error
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"data shard {file} is corrupt ({_first_line(error)}); build the data again") from error
        if count != shard.documents:
            raise UserError(
                f"data shard {file} has {count} documents, the manifest says {shard.documents}; build it again"
            )


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
