import json

import pytest

from cognica_poe.data.manifest import read_documents
from cognica_poe.errors import UserError
from tests.data.corpora import origins, small, texts, write_parquet


def test_file_names_decide_the_split(tmp_path):
    for name, seed in (("web-train", 1), ("web-val", 2), ("books-train", 3)):
        write_parquet(tmp_path / "in" / f"{name}.parquet", [{"text": t} for t in texts(10, seed=seed)])
    (tmp_path / "in" / "README.md").write_text("not corpus")
    manifest = small(tmp_path / "in", tmp_path / "out")
    assert sorted(origins(tmp_path / "out", "val")) == [f"web-val.parquet#{i}" for i in range(10)]
    assert manifest.splits["train"].documents == 20
    assert {s.name for s in manifest.sources} == {"web", "books"}


@pytest.mark.parametrize(
    ("train", "val", "test"),
    [
        ("train-00000-of-00012", "validation-00000-of-00001", "test-00000-of-00001"),
        ("data/train-00001-of-00012-6ef3991c06080e14", "data/validation-00000-of-00001-0123456789abcdef", "data/test"),
        ("en/train/0000", "en/validation/0000", "en/test/0000"),
        ("x-train", "x-dev", "x_test.3"),
        ("train", "valid-0", "test-0"),
        ("train.00", "eval.00", "test.00"),
        ("train/a", "dev/a", "test/a"),
    ],
)
def test_splits_as_others_name_them(train, val, test, tmp_path):
    root = tmp_path / "in"
    for seed, name in enumerate((train, val, test)):
        write_parquet(root / f"{name}.parquet", [{"text": text} for text in texts(10, seed=seed)])
    lines = []
    manifest = small(root, tmp_path / "out", log=lines.append)
    for split, name in (("train", train), ("val", val)):
        assert sorted(origins(tmp_path / "out", split)) == [f"{name}.parquet#{i}" for i in range(10)]
    assert manifest.documents == 20 and manifest.dropped == {"test split": 10}
    assert "data: 1 files of a test split are left out" in lines
    (root / f"{val}.parquet").unlink()
    manifest = small(root, tmp_path / "cut")  # validation is cut from the training files
    assert manifest.documents == 10 and manifest.dropped == {"test split": 10}
    assert {o.split("#")[0] for split in ("train", "val") for o in origins(tmp_path / "cut", split)} == {
        f"{train}.parquet"
    }


def test_text_folders_named_as_splits_need_a_folder_train(tmp_path):
    root = tmp_path / "in"
    for number, text in enumerate(texts(30)):
        file = root / ("lib", "test", "dev")[number % 3] / f"{number}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    assert small(root, tmp_path / "code").documents == 30
    (root / "lib").rename(root / "train")
    manifest = small(root, tmp_path / "out")
    assert manifest.splits["train"].documents == manifest.splits["val"].documents == 10
    assert manifest.dropped == {"test split": 10}
    assert {o.split("/")[0] for o in origins(tmp_path / "out", "train")} == {"train"}


@pytest.mark.parametrize(
    "name",
    ["all", "contest", "test-a", "testament", "Test", "train-x-of-2", "latest", "devs", "0", "attesting"],
)
def test_other_names_are_parted_like_any(name, tmp_path):
    write_parquet(tmp_path / "in" / f"{name}.parquet", [{"text": text} for text in texts(20)])
    manifest = small(tmp_path / "in", tmp_path / "out")
    assert manifest.documents == 20 and manifest.dropped == {} and manifest.splits["val"].documents
    assert [source.name for source in manifest.sources] == [name]


def test_jsonl_files(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    lines = [json.dumps({"text": text, "language": "de", "extra": 1}) for text in texts(20)]
    (folder / "notes-train.jsonl").write_text("\n".join(lines[:15]) + "\n\n")
    (folder / "notes-val.jsonl").write_text("\n".join(lines[15:]) + "\n" + json.dumps("a bare string"))
    manifest = small(folder, tmp_path / "out")
    assert manifest.splits["val"].documents == 6 and manifest.splits["train"].documents == 15
    assert {d.language for d in read_documents(tmp_path / "out", "train")} == {"de"}
    assert {d.source for d in read_documents(tmp_path / "out", "val")} == {"notes"}


def test_text_files(tmp_path):
    folder = tmp_path / "in"
    for number, text in enumerate(texts(30)):
        file = folder / ("poems" if number % 2 else "prose") / f"{number}{('.txt', '.md', '.py')[number % 3]}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(text.replace("\n", "\r\n").encode("utf-8-sig" if number == 0 else "utf-8"))
    (folder / ".hidden.txt").write_text("hidden")
    manifest = small(folder, tmp_path / "out")
    assert manifest.documents == 30
    found = [d for split in ("train", "val") for d in read_documents(tmp_path / "out", split)]
    assert {d.source for d in found} == {"poems", "prose"}
    assert {d.language for d in found} == {"code", "und"}
    assert sorted(d.text for d in found) == sorted(texts(30))
    assert "prose/0.txt" in {d.origin for d in found}


def test_one_file_is_enough(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in texts(20)))
    assert small(tmp_path / "a.jsonl", tmp_path / "out").documents == 20


def bad_parquet(folder):
    (folder / "a.parquet").write_bytes(b"PAR1 this is not parquet PAR1")


def cut_parquet(folder):
    write_parquet(folder / "a.parquet", [{"text": t} for t in texts(50)])
    data = (folder / "a.parquet").read_bytes()
    (folder / "a.parquet").write_bytes(data[: len(data) // 2])


MISTAKES = {
    "is empty": lambda f: None,
    "no supported files": lambda f: (f / "a.doc").write_text("x"),
    r"a\.txt is a binary file": lambda f: (f / "a.txt").write_bytes(b"abc\0def"),
    r"a\.txt is not UTF-8 text \(byte 2\)": lambda f: (f / "a.txt").write_bytes(b"ab\xff\xfe"),
    r"a\.parquet has no column 'text' \(columns: body\)": lambda f: write_parquet(f / "a.parquet", [{"body": "x"}]),
    "holds int64, not strings": lambda f: write_parquet(f / "a.parquet", [{"text": 1}]),
    r"a\.parquet is not a readable parquet": bad_parquet,
    r"a\.parquet is not a readable": cut_parquet,
    r"a\.jsonl line 2 is not valid JSON": lambda f: (f / "a.jsonl").write_text('{"text": "x"}\n{"text": \n'),
    r"a\.jsonl line 1 has no string 'text'": lambda f: (f / "a.jsonl").write_text('{"body": "x"}\n'),
    "line 1 has no string": lambda f: (f / "a.jsonl").write_text('{"text": 7}\n'),
    "line 1 is not valid": lambda f: (f / "a.jsonl").write_bytes(b'{"text": "\xff"}\n'),
    "holds no text at all": lambda f: (f / "a.txt").write_text("  \n"),
    "too little text for a validation split": lambda f: (f / "a.txt").write_text("alone"),
    "holds validation files only": lambda f: write_parquet(f / "a-val.parquet", [{"text": "x"}]),
    "holds test files only": lambda f: write_parquet(f / "test-00000-of-00001.parquet", [{"text": "x"}]),
    "holds validation and test files only": lambda f: (
        write_parquet(f / "dev.parquet", [{"text": "x"}]),
        write_parquet(f / "test" / "a.parquet", [{"text": "y"}]),
    ),
}


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes_are_named_and_leave_nothing_behind(message, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    MISTAKES[message](folder)
    with pytest.raises(UserError, match=message) as caught:
        small(folder, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["in"]
