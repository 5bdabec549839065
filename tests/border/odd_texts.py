"""Text and tables in every shape but that of a corpus."""

import os
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.border.odd_files import OddFile, Spoil


def odd_lines() -> Iterator[OddFile]:
    """Text in every shape but that of a corpus."""
    build = "data build {base}/odd.%s --out {new} --val-min-bytes 1000"
    good = b'{"text": "' + b"word " * 400 + b'"}\n'
    rows: dict[str, bytes] = {
        "empty": b"",
        "blank lines": b"\n\n \n",
        "half a line": good + b'{"text": "x',
        "a broken line": good + b"{text: x}\n" + good,
        "no text": good + b'{"txt": "x"}\n',
        "a number as text": good + b'{"text": 3}\n',
        "a list as text": good + b'{"text": ["x"]}\n',
        "an object as text": good + b'{"text": {"a": "x"}}\n',
        "a number": good + b"7\n",
        "null": b"null\n",
        "a list": b'["x"]\n',
        "all texts null": b'{"text": null}\n' * 3,
        "all texts blank": b'{"text": " "}\n' * 3,
        "all texts with NUL": b'{"text": "\\u0000x"}\n' * 3,
        "all texts lone surrogates": b'{"text": "\\ud800x"}\n' * 3,
        "deep lists": good + b"[" * 100_000 + b"\n",
        "deep objects": good + b'{"text": "x", "a": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_001 + b"\n",
        "a huge integer": good + b'{"text": "x", "n": ' + b"9" * 5000 + b"}\n",
        "a huge source": good + b'{"text": "x", "source": ' + b"9" * 5000 + b"}\n",
        "a key twice": good + b'{"text": "x", "text": "y"}\n',
        "not UTF-8": good + b'{"text": "caf\xe9"}\n',
        "UTF-16": good.decode().encode("utf-16"),
        "UTF-32": good.decode().encode("utf-32"),
        "NUL bytes": good + b"\0\0\n",
        "gzip": b"\x1f\x8b\x08\0" + bytes(100),
        "an array over lines": b'[\n{"text": "x"},\n{"text": "y"}\n]\n',
        "csv": b"text,source\nhello,web\n",
        "numbers where words are due": good
        + b'{"text": "x", "source": 3, "language": 1.5, "origin": true, "group": []}\n',
        "an object as source": good + b'{"text": "x", "source": {"a": 1}}\n',
        "one short text": b'{"text": "x"}\n',
    }
    for name, data in rows.items():
        yield OddFile(f"jsonl: {name}", "odd.jsonl", lambda file, data=data: file.write_bytes(data), build % "jsonl")
    texts: dict[str, bytes] = {
        "empty": b"",
        "blank": b" \n\n\t",
        "binary": bytes(range(256)),
        "UTF-16": "some text".encode("utf-16"),
        "latin-1": "café".encode("latin-1"),
        "half a character": "é".encode()[:1],
        "one byte order mark": b"\xef\xbb\xbf",
        "only NUL": b"\0" * 100,
    }
    for ending in ("txt", "md", "py"):
        for name, data in texts.items():
            yield OddFile(
                f"{ending}: {name}", f"odd.{ending}", lambda file, data=data: file.write_bytes(data), build % ending
            )
    for ending in ("csv", "gz", "json", "docx", "jsonl.gz", "parquet.crc", "bin", ""):
        yield OddFile(
            f"a file .{ending}", f"odd.{ending}", lambda file: file.write_bytes(b"text\nhello\n"), build % ending
        )
    yield OddFile("a pipe", "odd.txt", os.mkfifo, build % "txt")
    yield OddFile("a link to nothing", "odd.txt", lambda file: file.symlink_to("nowhere"), build % "txt")


def _table(**columns: Any) -> Spoil:
    return lambda file: pq.write_table(pa.table(columns), file)


def odd_tables() -> Iterator[OddFile]:
    """Parquet of other columns, types and bytes."""
    words = ["word " * 300, "other " * 300]
    tables: dict[str, Spoil] = {
        "no text": _table(words=words),
        "no columns": lambda file: pq.write_table(pa.table({}), file),
        "no rows": _table(text=pa.array([], pa.string())),
        "text of numbers": _table(text=[1, 2]),
        "text of bytes": _table(text=[b"x", b"y"]),
        "text of lists": _table(text=[["x"], ["y"]]),
        "text of objects": _table(text=[{"a": "x"}]),
        "text of nulls": _table(text=pa.nulls(3)),
        "text of null strings": _table(text=pa.array([None, None], pa.string())),
        "text of booleans": _table(text=[True]),
        "text of dates": _table(text=pa.array([0], pa.date32())),
        "text of categories": _table(text=pa.array(words).dictionary_encode()),
        "blank texts": _table(text=["", " "]),
        "texts with NUL": _table(text=["\0a", "b\0"]),
        "text not UTF-8": _table(text=pa.array([b"caf\xe9", b"\xff"]).view(pa.string())),
        "source of numbers": _table(text=words, source=[1, 2]),
        "source of lists": _table(text=words, source=[["x"], []]),
        "language of numbers": _table(text=words, language=[1.5, 2.5]),
        "origin of objects": _table(text=words, origin=[{"a": 1}, None]),
        "group of bytes": _table(text=words, group=[b"x", b"\xff"]),
        "source of booleans": _table(text=words, source=[True, False]),
        "text twice": lambda file: pq.write_table(
            pa.Table.from_arrays([pa.array(words), pa.array([1, 2])], ["text", "text"]), file
        ),
        "empty": lambda file: file.write_bytes(b""),
        "magic alone": lambda file: file.write_bytes(b"PAR1PAR1"),
        "noise": lambda file: file.write_bytes(b"PAR1" + bytes(range(256)) * 9 + b"PAR1"),
        "jsonl": lambda file: file.write_bytes(b'{"text": "x"}\n'),
        "half": lambda file: (_table(text=words)(file), file.write_bytes(file.read_bytes()[:200])),
        "a tail of zeros": lambda file: (_table(text=words)(file), file.write_bytes(file.read_bytes()[:-8] + bytes(8))),
        "a spoilt page": lambda file: (
            _table(text=words)(file),
            file.write_bytes(file.read_bytes()[:4] + b"\xff" * 60 + file.read_bytes()[64:]),
        ),
    }
    for name, spoil in tables.items():
        for line in (
            "data build {base}/odd.parquet --out {new} --val-min-bytes 100",
            "calibrate {release} --text {base}/odd.parquet --tokens 600",
        ):
            yield OddFile(f"parquet: {name}: {line.split()[0]}", "odd.parquet", spoil, line)
