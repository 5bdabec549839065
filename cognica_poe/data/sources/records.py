"""Documents of a dataset's files: parquet, JSON lines (plain, zstd, gzip) or one JSON array."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from cognica_poe.data.documents import Document
from cognica_poe.data.mixes import PinnedFile, Source
from cognica_poe.errors import UserError
from cognica_poe.files import parse_json

_SPEAKERS = {"human": "user", "gpt": "assistant"}
_CHUNK = 1 << 20
_BETWEEN = re.compile(r"[,\s]*")
_DEEPEST = 1 << 28  # characters of one record of an array; what is longer is no record
Drop = Callable[[str], None]


def read_pinned(
    source: Source, file: PinnedFile, path: Path, drop: Drop, groups: tuple[int, int] | None = None, first_row: int = 0
) -> Iterator[Document]:
    """Documents of ``file``, which lies at ``path``. ``drop(reason)`` counts rows that hold no text: ``empty``, and
    ``not utf-8``.

    Of a parquet file ``groups`` names the first row group to read and the one to stop before; ``first_row`` is the
    number of the first row there. A document's origin is ``dataset@commit:path#row``, and its id behind a space.
    Raises UserError for a file that is damaged, or whose columns are not the source's.
    """
    where, language = f"{source.dataset}@{source.revision}:{file.path}", source.language(file.config)
    columns = [source.text_column, *([source.id_column] if source.id_column else [])]
    parquet = file.path.endswith(".parquet")
    rows = _parquet_rows(path, columns, where, groups) if parquet else _json_rows(path, file.path, where)
    for number, row in enumerate(rows, first_row):
        if row is None:
            drop("not utf-8")
            continue
        if source.text_column not in row:
            raise UserError(f"{where} row {number} has no {source.text_column!r} (columns: {', '.join(row)[:80]})")
        try:
            text = as_text(row[source.text_column])
        except ValueError as error:
            problem = f"column {source.text_column!r} of {where} row {number} holds {error}, not text or turns"
            raise UserError(f"{problem}; set text_column in a mix file") from error
        if not text:
            drop("empty")
            continue
        part = str(row.get(source.id_column) or "") if source.id_column else ""
        origin = f"{where}#{number} {part[:400]}".rstrip()
        yield Document(text, source.name, language, origin if origin.isprintable() else f"{where}#{number}")


def as_text(value: Any) -> str:
    """A text as it is; a conversation (turns as strings or role/content objects) as ``Role: words`` blocks.

    No value is an empty text. Raises ValueError naming the type of anything else.
    """
    if value is None or isinstance(value, str):
        return value or ""
    if not isinstance(value, list):
        raise ValueError(_kind(value))
    blocks = []
    for number, turn in enumerate(value):
        role, words = ("user", "assistant")[number % 2], turn
        if isinstance(turn, dict):
            role = turn.get("role") or turn.get("from") or "user"
            words = turn.get("content") or turn.get("value") or ""
        if not isinstance(words, str) or not isinstance(role, str):
            raise ValueError(f"a turn that is {_kind(turn if not isinstance(turn, dict) else words)}")
        blocks.append(f"{_SPEAKERS.get(role, role).capitalize()}: {words.strip()}")
    return "\n\n".join(blocks)


def _kind(value: Any) -> str:
    names: dict[type, str] = {dict: "an object", list: "a list", bool: "a truth value", int: "a number"}
    return names.get(type(value), "a number" if isinstance(value, float) else type(value).__name__)


def _parquet_rows(
    path: Path, columns: list[str], where: str, groups: tuple[int, int] | None
) -> Iterator[dict[str, Any] | None]:
    """Rows with the wanted columns; None for a text that is no UTF-8, which parquet does not promise."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as parquet:
            names = parquet.schema_arrow.names
            if missing := [name for name in columns if name not in names]:
                raise UserError(f"{where} has no column {missing[0]!r} (columns: {', '.join(names)[:120]})")
            chosen = range(*groups) if groups else range(parquet.num_row_groups)
            for batch in parquet.iter_batches(batch_size=256, columns=sorted(set(columns)), row_groups=chosen):
                read = {name: column_values(batch.column(name)) for name in set(columns)}
                for number in range(batch.num_rows):
                    row = {name: values[number] for name, values in read.items()}
                    yield None if any(value is NOT_UTF8 for value in row.values()) else row
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = (str(error).splitlines() or [""])[0][:120]
        raise UserError(f"{where} cannot be read ({reason}); restore {path} or pin the mix again") from error


NOT_UTF8 = object()
"""Stands for a text that is no UTF-8."""


def column_values(column: Any) -> list[Any]:
    """Values of a parquet column as Python has them, ``NOT_UTF8`` for texts that are none."""
    import pyarrow as pa

    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        return list(column.to_pylist())
    binary = pa.large_binary() if pa.types.is_large_string(column.type) else pa.binary()
    return [_decoded(value) for value in column.cast(binary).to_pylist()]


def _decoded(value: bytes | None) -> Any:
    try:
        return None if value is None else value.decode()
    except UnicodeDecodeError:
        return NOT_UTF8


def _json_rows(path: Path, name: str, where: str) -> Iterator[dict[str, Any] | None]:
    import pyarrow as pa

    number = 0
    try:
        with pa.input_stream(str(path), compression=_compression(name)) as opened:
            records = _array(opened) if name.endswith(".json") else _lines(opened)
            for number, record in enumerate(records):
                if record is not None and not isinstance(record, dict):
                    raise UserError(f"{where} record {number} is {_kind(record)}, not an object of columns")
                yield record
    except (pa.ArrowException, OSError, EOFError) as error:
        reason = (str(error).splitlines() or [""])[0][:120]
        raise UserError(f"{where} cannot be read ({reason}); restore {path} or pin the mix again") from error
    except ValueError as error:
        raise UserError(f"{where} behind record {number} is not valid JSON ({str(error)[:120]})") from error


def _compression(name: str) -> str | None:
    return "zstd" if name.endswith(".zst") else "gzip" if name.endswith(".gz") else None


def _lines(opened: IO[bytes]) -> Iterator[Any]:
    """Records of JSON lines; None for a line that is no UTF-8."""
    parts: list[bytes] = []  # of a line that has not ended yet
    while data := opened.read(_CHUNK):
        first, *others = data.split(b"\n")
        parts.append(first)
        if others:
            *whole, last = others
            yield from (_record(line) for line in (b"".join(parts), *whole) if line.strip())
            parts = [last]
    if (line := b"".join(parts)).strip():
        yield _record(line)


def _record(line: bytes) -> Any:
    try:
        text = line.decode()
    except UnicodeDecodeError:
        return None
    return parse_json(text)


def _array(opened: IO[bytes]) -> Iterator[Any]:
    """Records of one JSON array, without holding it: a file of gigabytes is read a record at a time."""
    decoder, utf8 = json.JSONDecoder(), codecs.getincrementaldecoder("utf-8")()
    text, begun, wanted = "", False, 0  # with fewer characters another try at an unfinished record is in vain
    while True:
        data = opened.read(_CHUNK)
        text += utf8.decode(data, final=not data)
        if data and len(text) < wanted:
            continue
        if not begun and (text := text.lstrip("\ufeff \t\r\n"))[:1] != "[":
            if data and not text:
                continue
            raise ValueError("it does not begin with [")
        at, begun = 0 if begun else 1, True
        while (at := _BETWEEN.match(text, at).end()) < len(text) and text[at] != "]":  # type: ignore[union-attr]
            try:
                record, at = decoder.raw_decode(text, at)
            except ValueError:
                if not data or len(text) - at > _DEEPEST:
                    raise
                break
            yield record
        text = text[at:]
        wanted = 2 * len(text)
        if not data:
            break
    if text.strip() != "]":
        raise ValueError("it ends before its ]")
