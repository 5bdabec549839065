"""Documents from the user's own files: parquet, jsonl, or whole text files."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from cognica_poe.data.documents import Document
from cognica_poe.data.sources.records import NOT_UTF8, column_values
from cognica_poe.errors import UserError
from cognica_poe.files import parse_json

ROW_FILES = (".parquet", ".jsonl")
"""Endings of files that hold a document per row."""
PROSE_FILES = (".txt", ".md")
"""Endings of files of prose."""
TEXT_FILES = (*PROSE_FILES, ".py")
"""Endings of files that are a document each."""
_COLUMNS = ("text", "source", "language", "origin", "group")
_SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test"} | dict.fromkeys(
    ("val", "validation", "valid", "dev", "eval"), "val"
)
_SPLIT_NAME = re.compile(  # x-val, train_3, and as the Hub names its files: test-00000-of-00001[-0123456789abcdef]
    rf"(?:^|[-_.])({'|'.join(_SPLITS)})(?:[-_.]\d+(?:-of-\d+(?:-[0-9a-f]{{16}})?)?)?$"
)
_ENDING = re.compile(r"(\.(parquet|jsonl|json|txt|md|zst|gz))+$", re.I)
UNKNOWN_LANGUAGE = "und"
"""ISO 639-2: undetermined."""


def local_files(path: Path) -> list[Path]:
    """Supported files of a folder (or the one file given), validation files first.

    Text files beside files of rows are readmes and licences, not corpus: they are left out.
    Raises UserError if the path is missing or holds nothing that can be read.
    """
    if not path.exists():
        raise UserError(f"no mix and no file or folder is called {path}; name a mix, or a path that exists")
    if path.is_file():
        if path.suffix.lower() not in ROW_FILES + TEXT_FILES:
            raise UserError(f"cannot read {path}: supported are {', '.join(ROW_FILES + TEXT_FILES)}")
        return [path]
    visible = [
        file
        for file in sorted(path.rglob("*"))
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(path).parts)
    ]
    if not visible:
        raise UserError(f"folder {path} is empty; put {', '.join(ROW_FILES + TEXT_FILES)} files into it")
    for kinds in (ROW_FILES, TEXT_FILES):
        files = [file for file in visible if file.suffix.lower() in kinds]
        if files:
            return sorted(files, key=lambda file: (explicit_split(file, path) != "val", file))
    raise UserError(f"folder {path} holds no supported files; supported are {', '.join(ROW_FILES + TEXT_FILES)}")


def named_split(path: str) -> str | None:
    """``train``, ``val`` or ``test`` where the name of a file of rows says so, else its nearest folder so named.

    Names end in the split, a shard number may follow: ``x-val.parquet``, ``test-00000-of-00001.parquet``; ``dev``,
    ``valid``, ``eval`` and ``validation`` are ``val`` too; a folder may read ``split=test``. Else None.
    """
    *folders, name = path.split("/")
    found = _SPLIT_NAME.search(_ENDING.sub("", name))
    if found:
        return _SPLITS[found[1]]
    return next((_SPLITS[each] for each in (f.removeprefix("split=") for f in folders[::-1]) if each in _SPLITS), None)


def explicit_split(file: Path, root: Path) -> str | None:
    """What :func:`named_split` says of a file below ``root``; None for text files that only look like one.

    Text files are told apart by folders where ``root`` has a folder ``train``, and ``.txt`` and ``.md`` files by their
    names where one beside them is named ``train``: a folder ``test``, or a ``test.py``, is code like any other.
    """
    path = file.relative_to(root).as_posix() if root.is_dir() else file.name
    if file.suffix.lower() in ROW_FILES:
        return named_split(path)
    top = path.split("/")[0]
    if "/" in path and top in _SPLITS and (root / "train").is_dir():
        return _SPLITS[top]
    if file.suffix.lower() in PROSE_FILES and _has_training_text(file.parent, file.parent.stat().st_mtime_ns):
        return named_split(file.name)
    return None


@lru_cache(maxsize=64)
def _has_training_text(folder: Path, changed_ns: int) -> bool:
    """Whether the name of a text file in ``folder``, as it was at that time, says that it is a training split."""
    return any(
        file.suffix.lower() in PROSE_FILES and named_split(file.name) == "train" for file in folder.glob("*train*")
    )


def read_file(
    file: Path,
    root: Path,
    dropped: Callable[[str, str], None],
    groups: tuple[int, int] | None = None,
    first_row: int = 0,
) -> Iterator[Document]:
    """Documents of one file; ``dropped(reason, source)`` counts rows without text, and with text that is no UTF-8.

    Of a parquet file ``groups`` names the first row group to read and the one to stop before; ``first_row`` is the
    number of the first row there.

    Raises UserError naming the file, and where there are any the line or column, for what cannot be read.
    """
    name = file.relative_to(root).as_posix() if root.is_dir() else file.name
    source = _SPLIT_NAME.sub("", file.stem) or (root.name if root.is_dir() else file.stem)
    kind = file.suffix.lower()
    if kind in TEXT_FILES:
        yield Document(_read_text(file), _text_source(file, root), "code" if kind == ".py" else UNKNOWN_LANGUAGE, name)
        return
    rows = _parquet_rows(file, groups) if kind == ".parquet" else _jsonl_rows(file)
    for number, row in enumerate(rows, first_row):
        row = {name: value for name, value in row.items() if value is not NOT_UTF8 or name == "text"}
        if row["text"] is None or row["text"] is NOT_UTF8:
            dropped("empty" if row["text"] is None else "not utf-8", row.get("source") or source)
            continue
        yield Document(
            row["text"],
            row.get("source") or source,
            row.get("language") or UNKNOWN_LANGUAGE,
            row.get("origin") or f"{name}#{number}",
            row.get("group") or "",
        )


def _text_source(file: Path, root: Path) -> str:
    parts = file.relative_to(root).parts if root.is_dir() else ()
    return parts[0] if len(parts) > 1 else (root.name if root.is_dir() else file.stem)


def _read_text(file: Path) -> str:
    data = file.read_bytes()
    if b"\0" in data:
        raise UserError(f"{file} is a binary file, not text (it has NUL bytes); remove it or convert it to UTF-8 text")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text (byte {error.start}); convert it or remove it") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _parquet_rows(file: Path, groups: tuple[int, int] | None) -> Iterator[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as parquet:
            schema = parquet.schema_arrow
            if "text" not in schema.names:
                raise UserError(f"{file} has no column 'text' (columns: {', '.join(schema.names)}); rename the column")
            known = [name for name in _COLUMNS if name in schema.names]
            for name in known:
                if schema.names.count(name) > 1:
                    raise UserError(f"{file} has several columns {name!r}; rename all but one")
                kind, missing = schema.field(name).type, name != "text"
                strings = pa.types.is_string(kind) or pa.types.is_large_string(kind)
                if not (strings or (missing and pa.types.is_null(kind))):
                    raise UserError(f"column {name!r} of {file} holds {kind}, not strings; convert it")
            chosen = range(*groups) if groups else range(parquet.num_row_groups)
            for batch in parquet.iter_batches(batch_size=256, columns=known, row_groups=chosen):
                read = {name: column_values(batch.column(name)) for name in known}
                yield from ({name: read[name][row] for name in known} for row in range(batch.num_rows))
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(f"{file} is not a readable parquet file ({reason}); restore it or remove it") from error


def _jsonl_rows(file: Path) -> Iterator[dict[str, Any]]:
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = parse_json(line)
            except ValueError as error:
                raise UserError(f"{file} line {number} is not valid JSON ({error}); correct or remove it") from error
            row = {"text": row} if isinstance(row, str) else row
            if not isinstance(row, dict) or "text" not in row or not isinstance(row["text"], str | None):
                raise UserError(f"{file} line {number} has no string 'text'; each line is an object such as "
                                '{"text": "..."}')  # fmt: skip
            for name in _COLUMNS:
                if not isinstance(row.get(name), str | None):
                    raise UserError(f"{file} line {number}: {name} is no string; put it in quotes or leave it out")
            yield {name: value for name, value in row.items() if name in _COLUMNS}
