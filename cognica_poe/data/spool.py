"""The spool of a build: every usable document on disk once, before its side of the split is known."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from cognica_poe.data.documents import Document, text_digest, text_problem

COLUMNS = ("text", "source", "language", "origin")
"""Columns of a shard, all strings, in the order of ``Document``; the spool adds the group."""
_FLUSH_BYTES = 8_000_000


class DocumentWriter:
    """A parquet file that is filled document by document; ``documents`` and ``bytes`` of text count what went in."""

    def __init__(self, file: Path, columns: tuple[str, ...] = COLUMNS) -> None:
        """Begin ``file`` with string columns named like fields of ``Document``."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._schema = pa.schema([(name, pa.string()) for name in columns])
        self._parquet = pq.ParquetWriter(file, self._schema, compression="zstd")
        self._rows: list[Document] = []
        self._waiting_bytes = 0
        self.documents = self.bytes = 0

    def add(self, document: Document, size: int) -> None:
        """Append a document whose text has ``size`` bytes of UTF-8; memory holds at most 8 MB of text."""
        self._rows.append(document)
        self._waiting_bytes += size
        self.documents += 1
        self.bytes += size
        if self._waiting_bytes >= _FLUSH_BYTES:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa

        if self._rows:
            columns = [[getattr(row, name) for row in self._rows] for name in self._schema.names]
            self._parquet.write_table(pa.table(columns, schema=self._schema))
        self._rows, self._waiting_bytes = [], 0

    def close(self) -> None:
        """Write what waits in memory, and the footer without which the file cannot be read."""
        self._flush()
        self._parquet.close()


class Spool:
    """All usable documents on disk, and in memory what the split needs: bytes by group and source.

    ``groups`` maps a group to its bytes by source, ``given`` a group to the split that its file's name states.
    ``dropped`` counts the documents left out, by reason.
    """

    def __init__(self, file: Path, dropped: Counter[str]) -> None:
        """Begin the spool ``file`` (parquet); ``dropped`` is counted on."""
        self.file, self.dropped = file, dropped
        self.groups: dict[str, Counter[str]] = defaultdict(Counter)
        self.given: dict[str, str] = {}
        self.bytes = 0
        self._seen: set[bytes] = set()
        self._writer = DocumentWriter(file, (*COLUMNS, "group"))

    def add(self, document: Document, split: str | None) -> None:
        """Take a document in unless its text is unusable or here already. ``split``: what its file's name says."""
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
        """End writing; only then ``documents`` can be read."""
        self._writer.close()

    def documents(self) -> Iterator[Document]:
        """All documents in the order they came, each with its group named."""
        import pyarrow.parquet as pq

        with pq.ParquetFile(self.file) as parquet:
            for batch in parquet.iter_batches(batch_size=256):
                for row in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                    yield Document(*row)
