"""Files of documents between the stages: parquet that is written and read in batches of a few megabytes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING

from cognica_poe.data.documents import Document

if TYPE_CHECKING:
    import pyarrow as pa

COLUMNS = ("text", "source", "language", "origin")
"""Columns of a shard, all strings, in the order of ``Document``."""
ROW_GROUP = 1024
"""Documents of a row group of a shard."""
_FLUSH_BYTES = 8_000_000


def schema() -> pa.Schema:
    """The columns of documents, all strings."""
    import pyarrow as pa

    return pa.schema([(name, pa.string()) for name in COLUMNS])


class DocumentWriter:
    """A parquet file that is filled document by document; memory holds at most 8 MB of text."""

    def __init__(self, file: IO[bytes]) -> None:
        """Begin ``file``."""
        import pyarrow.parquet as pq

        self._parquet = pq.ParquetWriter(file, schema(), compression="zstd")
        self._rows: list[Document] = []
        self._waiting_bytes = 0

    def add(self, document: Document, size: int) -> None:
        """Append a document whose text has ``size`` bytes of UTF-8."""
        self._rows.append(document)
        self._waiting_bytes += size
        if self._waiting_bytes >= _FLUSH_BYTES:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa

        if self._rows:
            columns = [[getattr(row, name) for row in self._rows] for name in COLUMNS]
            self._parquet.write_table(pa.table(columns, schema=schema()))
        self._rows, self._waiting_bytes = [], 0

    def __enter__(self) -> DocumentWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *about: object) -> None:
        """Write what waits in memory, and the footer without which the file cannot be read."""
        if kind is None:
            self._flush()
        self._parquet.close()


def read_batches(file: Path) -> Iterator[pa.RecordBatch]:
    """Documents of a file of ours, at most 256 at a time, in their order."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(file) as parquet:
        yield from parquet.iter_batches(batch_size=256, columns=list(COLUMNS))
