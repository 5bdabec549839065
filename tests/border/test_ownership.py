"""Only folders of ours are replaced, input and output lie apart, and no name out of a file leads elsewhere."""

import os

import pytest

from cognica_poe.errors import UserError
from cognica_poe.files import (
    KINDS,
    MANIFEST,
    atomic_folder,
    require_apart,
    require_replaceable,
    safe_name,
    write_manifest,
)
from tests.border.names import HOSTILE
from tests.test_files import names, refusal


def make(path, kind="release", names=("a", "sub/b")):
    with atomic_folder(path, kind) as folder:
        for name in names:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(name.encode())
    return path


def everything(folder):
    """Every path below ``folder`` with its bytes or where it points."""
    return {
        path.relative_to(folder).as_posix(): os.readlink(path)
        if path.is_symlink()
        else path.is_file() and path.read_bytes()
        for path in folder.rglob("*")
    }


def documents(path):
    path.mkdir()
    (path / "thesis.txt").write_text("years of work")


def model(path):
    documents(path)
    for name in ("tokenizer.json", "config.json", "manifest.json", "model.safetensors"):
        (path / name).write_text("{}")


def own_manifest(path):
    """A foreign folder that others made with `sha256sum * > MANIFEST.sha256`."""
    documents(path)
    write_manifest(path, "release")
    (path / MANIFEST).write_text((path / MANIFEST).read_text().split("\n", 1)[1])


def another_mark(path):
    documents(path)
    (path / MANIFEST).write_text(f"# cognica-poe thesis\n{'0' * 64}  thesis.txt\n")


FOREIGN = {
    "documents": documents,
    "a model": model,
    "a manifest without the mark": own_manifest,
    "a mark of another kind": lambda path: make(path, "data"),
    "an unknown mark": another_mark,
    "an added file": lambda path: (make(path) / "notes.txt").write_text("mine"),
    "an added folder": lambda path: (make(path) / "notes").mkdir(),
    "a file deeper down": lambda path: (make(path) / "sub" / "c").write_text("mine"),
    "a listed file gone": lambda path: (make(path) / "a").unlink(),
    "a listed file that is a link": lambda path: (
        (make(path) / "a").unlink(),
        (path / "a").symlink_to("sub/b"),
    ),
    "a manifest of half a line": lambda path: (make(path) / MANIFEST).write_text("# cognica-poe release\n12"),
    "a manifest that is not text": lambda path: (make(path) / MANIFEST).write_bytes(b"# cognica-poe release\n\xff"),
    "a folder within": lambda path: (path / "thesis").mkdir(parents=True),
    "a file": lambda path: path.write_text("years of work"),
    "a link to a folder": lambda path: (documents(path.parent / "real"), path.symlink_to("real")),
    "a link to a folder of ours": lambda path: (make(path.parent / "real"), path.symlink_to("real")),
    "a link to nothing": lambda path: path.symlink_to("nowhere"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_folder_that_we_did_not_make_is_never_replaced(tmp_path, name):
    out = tmp_path / "out"
    FOREIGN[name](out)
    before, worked = everything(tmp_path), []
    with pytest.raises(UserError) as caught, atomic_folder(out, "release"):
        worked.append("began")
    said = str(caught.value)
    if name.startswith(("a manifest of half", "a manifest that")):  # ours by its mark, and damaged
        assert said.startswith(f"{out / MANIFEST} is corrupt: ")
        assert said.endswith("; choose another --out, or remove the folder yourself")
    else:
        assert said == (
            f"{out} exists and is not a release folder made by cognica-poe: choose another --out, or remove it yourself"
        )
    assert not worked and everything(tmp_path) == before


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_of_ours_and_an_empty_one_are_replaced(tmp_path, kind):
    (tmp_path / "out").mkdir()
    make(tmp_path / "out", kind)
    make(tmp_path / "out", kind, ["new"])
    assert names(tmp_path / "out") == [MANIFEST, "new"]
    assert (tmp_path / "out" / MANIFEST).read_text().startswith(f"# cognica-poe {kind}\n")


def test_a_folder_that_comes_up_meanwhile_stays(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(UserError, match="is not a release folder"), atomic_folder(out, "release") as folder:
        (folder / "a").write_bytes(b"1")
        documents(out)
    assert everything(tmp_path) == {"out": False, "out/thesis.txt": b"years of work"}


def test_nothing_is_put_into_a_folder_of_ours(tmp_path, monkeypatch):
    make(tmp_path / "data", "data")
    (tmp_path / "link").symlink_to("data")
    monkeypatch.chdir(tmp_path)
    for out in ("data/x", "data/x/y", "link/x", "data/../data/x"):
        assert "lies inside" in refusal(require_replaceable, out, "data")
    (tmp_path / "data" / MANIFEST).write_text("# cognica-poe data\n")  # damaged, and ours all the same
    assert "lies inside" in refusal(require_replaceable, "data/x", "data")


def test_the_current_folder_is_not_replaced(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for out in (".", "../" + tmp_path.name, tmp_path):
        assert "the folder that you are in" in refusal(require_replaceable, out, "data")


def test_a_trusted_place_takes_a_damaged_folder(tmp_path):
    (make(tmp_path / "step-1", "checkpoint") / "a").unlink()
    with atomic_folder(tmp_path / "step-1", "checkpoint", trusted=True) as folder:
        (folder / "new").write_bytes(b"1")
    assert names(tmp_path / "step-1") == [MANIFEST, "new"]


def test_output_and_input_lie_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to("in")
    for out, source, words in (
        ("in", "in", "is what is read"),
        ("link", "in", "is what is read"),
        ("in/deep/out", "in", "lies inside"),
        ("link/out", "in", "lies inside"),
        ("out", ".", "lies inside"),
        ("in", "in/deep", "holds"),
        ("..", "in", "holds"),
    ):
        assert words in refusal(require_apart, out, source)
    require_apart("out", "in")
    require_apart("in/deep2", "in/deep")


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("name", HOSTILE, ids=lambda name: repr(name)[:20])
def test_hostile_names_are_refused(name, nested):
    message = refusal(lambda: safe_name(name, "shard", nested=nested))
    assert message.startswith("shard ") and len(message) < 200 and message.isprintable()


@pytest.mark.parametrize(
    "name", ["a", "model.safetensors", ".hidden", "a b", "-x", "…", "日本", "x" * 255, "a..b", "1.3b"]
)
def test_plain_names_pass(name):
    assert safe_name(name, "file") == name
    assert safe_name(f"sub/{name}", "file", nested=True) == f"sub/{name}"
    assert "cannot be used" in refusal(safe_name, f"sub/{name}", "file")
