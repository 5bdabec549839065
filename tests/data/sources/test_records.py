import dataclasses
import fnmatch
import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cognica_poe.data.mixes import FRONTIER_V1, PinnedFile
from cognica_poe.data.sources import records
from cognica_poe.data.sources.records import as_text, read_pinned
from cognica_poe.errors import UserError
from tests.data.corpora import PIN, jsonl_bytes, parquet_bytes

LAYOUTS = {  # name: file, a row of it, its text, what stands behind the row's number
    "fineweb-edu": (
        "data/CC-MAIN-2013-20/train-00000-of-00014.parquet",
        {"text": "one", "id": "<urn:1>", "url": "http://a", "language": "en", "score": 3.1},
        "one",
        " http://a",
    ),
    "dclm-baseline": (
        "global-shard_01_of_10/local-shard_0_of_10/shard_00000000_processed.jsonl.zst",
        {"text": "two", "url": "http://b", "metadata": {"WARC-Type": "response"}},
        "two",
        " http://b",
    ),
    "stack-v2": (
        "data/train-00000-of-00880.parquet",
        {"code": "x = 1\n", "repo_name": "me/it", "path": "x.py", "language": "Python", "license": "mit", "size": 6},
        "x = 1\n",
        " me/it",
    ),
    "wikipedia": (
        "20231101.en/train-00000-of-00041.parquet",
        {"id": "1", "url": "http://c", "title": "T", "text": "three"},
        "three",
        " http://c",
    ),
    "culturax": (
        "ko/ko_part_00000.parquet",
        {"text": "넷", "timestamp": "2019", "url": "http://d", "source": "mC4"},
        "넷",
        " http://d",
    ),
    "proof-pile-2": (
        "arxiv/train/arXiv_000.jsonl.zst",
        {"text": "theorem", "meta": {"path": "a"}},
        "theorem",
        "",
    ),
    "open-web-math": (
        "data/train-00000-of-00114-5a023365406cb4b3.parquet",
        {"url": "http://e", "text": "$x$", "date": "2020", "metadata": "{}"},
        "$x$",
        " http://e",
    ),
    "gutenberg": (
        "data/train-00000-of-00037-5f59a7dc1cf61fee.parquet",
        {"TEXT": "Chapter", "SOURCE": "https://g/1", "METADATA": "{}"},
        "Chapter",
        " https://g/1",
    ),
    "pg19": (
        "data/train-00000-of-00023-c9d3bb66c1cd7fd1.parquet",
        {"short_book_title": "B", "publication_date": 1900, "url": "http://f", "text": "Book"},
        "Book",
        " http://f",
    ),
    "ultrachat": (
        "train_0.jsonl",
        {"id": "7", "data": ["Hi", "Hello", "Bye", "So long"]},
        "User: Hi\n\nAssistant: Hello\n\nUser: Bye\n\nAssistant: So long",
        " 7",
    ),
    "openhermes-2.5": (
        "openhermes2_5.json",
        {
            "conversations": [
                {"from": "system", "value": "Be kind."},
                {"from": "human", "value": "Hi"},
                {"from": "gpt", "value": "Hello"},
            ],
            "source": "glaive",
        },
        "System: Be kind.\n\nUser: Hi\n\nAssistant: Hello",
        " glaive",
    ),
}
SOURCES = {source.name: source for source in FRONTIER_V1.sources}


def encoded(path, rows):
    if path.endswith(".parquet"):
        return parquet_bytes(rows)
    if path.endswith(".json"):
        return json.dumps(rows, indent=1).encode()
    return jsonl_bytes(rows, "zstd" if path.endswith(".zst") else None)


def read(source, path, data, tmp_path, dropped=None):
    file = tmp_path / path.replace("/", "-")
    file.write_bytes(data)
    pinned = PinnedFile(path, len(data), "0" * 64, source.configs[0])
    return list(read_pinned(source, pinned, file, (dropped if dropped is not None else []).append))


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_source_of_the_mix_is_read_as_it_is_laid_out(name, tmp_path):
    path, row, text, identity = LAYOUTS[name]
    source = dataclasses.replace(SOURCES[name], revision=PIN)
    assert any(fnmatch.fnmatchcase(path, source.files.replace("{config}", config)) for config in source.configs)
    documents = read(source, path, encoded(path, [row, row]), tmp_path)
    where = f"{source.dataset}@{PIN}:{path}"
    assert [document.text for document in documents] == [text, text]
    assert [document.origin for document in documents] == [f"{where}#0{identity}", f"{where}#1{identity}"]
    assert {(document.source, document.language) for document in documents} == {(name, source.languages[0])}


def test_the_layouts_are_those_of_all_sources():
    assert set(LAYOUTS) == set(SOURCES) and len(SOURCES) == 11


def test_conversations_become_text():
    assert as_text("plain") == "plain" and as_text(None) == "" and as_text([]) == ""
    assert as_text(["Hi", " Hello "]) == "User: Hi\n\nAssistant: Hello"
    assert as_text([{"role": "user", "content": "Hi"}]) == "User: Hi"
    for wrong, kind in (
        (7, "a number"),
        ({"a": 1}, "an object"),
        ([["a"]], "a turn that is a list"),
        (True, "a truth"),
    ):
        with pytest.raises(ValueError, match=kind):
            as_text(wrong)


WEB = SOURCES["fineweb-edu"]
HERMES = SOURCES["openhermes-2.5"]
CHATS = SOURCES["ultrachat"]


@pytest.mark.parametrize(
    ("source", "path", "data", "message"),
    [
        (WEB, "a.parquet", parquet_bytes([{"body": "x", "url": "u"}]), r"has no column 'text' \(columns: body, url\)"),
        (WEB, "a.parquet", parquet_bytes([{"text": "x"}]), r"has no column 'url'"),
        (WEB, "a.parquet", parquet_bytes([{"text": 7, "url": "u"}]), "'text' of .* row 0 holds a number, not text"),
        (WEB, "a.parquet", parquet_bytes([{"text": "x" * 900, "url": "u"}])[:-60], "cannot be read"),
        (WEB, "a.parquet", b"", "cannot be read"),
        (CHATS, "a.jsonl", b'{"data": ["a"]}\n{"text": "b"}\n', "row 1 has no 'data'"),
        (CHATS, "a.jsonl", b'{"data": ["a"]}\n{"data": ["b"\n', "behind record 0 is not valid JSON"),
        (CHATS, "a.jsonl", b'{"data": ["a"]}\n[1]\n', "record 1 is a list, not an object"),
        (CHATS, "a.jsonl", b'{"data": [1, 2]}\n', "holds a turn that is a number"),
        (CHATS, "a.jsonl.zst", b"no zstd at all", "cannot be read"),
        (CHATS, "a.jsonl.zst", jsonl_bytes([{"data": ["a"] * 999}], "zstd")[:-9], "cannot be read|not valid JSON"),
        (CHATS, "a.jsonl.gz", gzip.compress(b'{"data": ["a"]}\n')[:-12], "cannot be read|not valid JSON"),
        (HERMES, "a.json", b'{"conversations": []}', r"does not begin with \["),
        (HERMES, "a.json", b'[{"conversations": []}, {"conv', "not valid JSON"),
        (HERMES, "a.json", b'[{"conversations": []}', r"ends before its \]"),
        (HERMES, "a.json", b"[1, 2]", "record 0 is a number"),
    ],
)
def test_what_is_no_such_file_is_said_in_one_line(source, path, data, message, tmp_path):
    with pytest.raises(UserError, match=message) as refused:
        read(source, path, data, tmp_path)
    assert "\n" not in str(refused.value) and path in str(refused.value)


def test_texts_that_are_no_utf8_are_dropped_and_counted(tmp_path):
    bad = pa.array([b"good", b"\xff\xfe", None], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": bad, "url": pa.array(["a", "b", "c"])}), tmp_path / "bad.parquet")
    dropped = []
    documents = read(WEB, "a.parquet", (tmp_path / "bad.parquet").read_bytes(), tmp_path, dropped)
    assert [document.text for document in documents] == ["good"] and dropped == ["not utf-8", "empty"]
    dropped = []
    documents = read(CHATS, "a.jsonl", b'{"data": ["a"]}\n{"data": ["\xff"]}\n\n{"data": ["b"]}', tmp_path, dropped)
    assert len(documents) == 2 and dropped == ["not utf-8"]
    assert [document.origin.rpartition("#")[2] for document in documents] == ["0", "2"]


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
def test_files_are_read_in_chunks_of_any_size(chunk, tmp_path, monkeypatch):
    monkeypatch.setattr(records, "_CHUNK", chunk)
    rows = [
        {"conversations": [{"from": "human", "value": f"é日]}}{i},\n" * (i % 5 + 1)}], "source": "s"} for i in range(9)
    ]
    expected = [as_text(row["conversations"]) for row in rows]
    for path, data in (
        ("a.json", json.dumps(rows, ensure_ascii=False, indent=2).encode()),
        ("b.json", b"\xef\xbb\xbf [" + b",\n".join(json.dumps(row).encode() for row in rows) + b" ] \n"),
        ("a.jsonl", jsonl_bytes(rows)),
        ("a.jsonl.gz", gzip.compress(jsonl_bytes(rows))),
        ("a.jsonl.zst", jsonl_bytes(rows, "zstd")),
    ):
        assert [document.text for document in read(HERMES, path, data, tmp_path)] == expected, path
    assert read(HERMES, "empty.json", b" [ ] ", tmp_path) == read(HERMES, "empty.jsonl", b"", tmp_path) == []
