"""Files appear whole or not at all; damage, missing space and malformed JSON are named in one line."""

import errno
import os
import shutil
import stat
import subprocess
import sys

import pytest

from cognica_poe import files
from cognica_poe.errors import UserError
from cognica_poe.files import (
    MANIFEST,
    Manifest,
    atomic_folder,
    disk_errors,
    read_json,
    require_space,
    sha256_file,
    verify_manifest,
    write_bytes,
    write_json,
    write_manifest,
)
from cognica_poe.leftovers import sweep
from tests.border.names import HOSTILE


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def refusal(function, *arguments) -> str:
    with pytest.raises(UserError) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def fail_with(number):
    def fail(*arguments, **options):
        raise OSError(number, os.strerror(number))

    return fail


def test_write_bytes_makes_parents_and_replaces(tmp_path):
    path = tmp_path / "a" / "b" / "file"
    write_bytes(path, b"old")
    write_bytes(path, b"new")
    assert path.read_bytes() == b"new" and names(path.parent) == ["file"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, call):
    path = tmp_path / "file"
    write_bytes(path, b"old")
    monkeypatch.setattr(files.os, call, fail_with(errno.ENOSPC))
    assert "no space left" in refusal(write_bytes, path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old" and names(tmp_path) == ["file"]


def test_an_interrupt_during_a_write_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_bytes(tmp_path / "file", b"new")
    assert names(tmp_path) == []


def test_a_folder_appears_whole_with_its_manifest(tmp_path):
    target = tmp_path / "step-1"
    with atomic_folder(target, "release") as folder:
        (folder / "sub").mkdir()
        (folder / "a").write_bytes(b"1")
        (folder / "sub" / "b").write_bytes(b"2")
        assert not target.exists()
    assert names(tmp_path) == ["step-1"] and names(target) == [MANIFEST, "a", "sub"]
    assert stat.S_IMODE(target.stat().st_mode) == 0o755
    verify_manifest(target)


def test_a_folder_is_replaced_whole(tmp_path):
    target = tmp_path / "step-1"
    for name in ("old", "new"):
        with atomic_folder(target, "release") as folder:
            (folder / name).write_bytes(b"x")
    assert names(tmp_path) == ["step-1"] and names(target) == [MANIFEST, "new"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failed_folder_leaves_the_old_one_and_nothing_else(tmp_path, error):
    target = tmp_path / "step-1"
    with atomic_folder(target, "release") as folder:
        (folder / "old").write_bytes(b"x")
    with pytest.raises(error), atomic_folder(target, "release") as folder:
        (folder / "new").write_bytes(b"x")
        raise error
    assert names(tmp_path) == ["step-1"] and names(target) == [MANIFEST, "old"]
    verify_manifest(target)


def test_a_manifest_that_the_block_wrote_is_kept(tmp_path):
    known = Manifest("checkpoint", {"a": "0" * 64})
    with atomic_folder(tmp_path / "step-1", "checkpoint") as folder:
        (folder / "a").write_bytes(b"1")
        (folder / MANIFEST).write_bytes(known.data())
    assert Manifest.read(tmp_path / "step-1") == known


def test_a_killed_process_leaves_no_folder_under_the_final_name(tmp_path):
    code = (
        "import os, pathlib, sys; from cognica_poe.files import atomic_folder\n"
        "with atomic_folder(pathlib.Path(sys.argv[1]), 'release') as folder:\n"
        "    (folder / 'a').write_bytes(b'1'); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path / "step-1")]).returncode == 9
    assert len(names(tmp_path)) == 1 and not (tmp_path / "step-1").exists()
    (tmp_path / "kept").write_bytes(b"1")
    sweep(tmp_path)
    assert names(tmp_path) == ["kept"]
    sweep(tmp_path / "nowhere")


@pytest.fixture
def sealed(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / name).write_bytes(name.encode() * 100)
    write_manifest(tmp_path, "release")
    verify_manifest(tmp_path)
    return tmp_path


@pytest.mark.parametrize("offset", [0, 50, 99])
def test_one_flipped_bit_is_found_and_named(sealed, offset):
    data = bytearray((sealed / "b").read_bytes())
    data[offset] ^= 1
    (sealed / "b").write_bytes(bytes(data))
    message = refusal(verify_manifest, sealed)
    assert f"{sealed / 'b'} is corrupt" in message


def test_a_cut_off_file_is_named(sealed):
    (sealed / "c").write_bytes(b"c" * 99)
    assert f"{sealed / 'c'} is corrupt" in refusal(verify_manifest, sealed)


def test_a_missing_file_is_named(sealed):
    (sealed / "a").unlink()
    assert f"{sealed / 'a'} is missing" in refusal(verify_manifest, sealed)


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="no sha256sum here")
def test_sha256sum_reads_the_manifest(sealed):
    check = ["sha256sum", "--quiet", "--strict", "-c", MANIFEST]
    done = subprocess.run(check, cwd=sealed, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (sealed / MANIFEST).read_text().split("\n")[:2] == [
        "# cognica-poe release",
        f"{sha256_file(sealed / 'a')}  a",
    ]
    (sealed / "a").write_bytes(b"x")
    assert subprocess.run(check, cwd=sealed, capture_output=True).returncode == 1


def test_a_manifest_without_the_mark_is_read(sealed):
    marked = Manifest.read(sealed)
    (sealed / MANIFEST).write_bytes(Manifest(None, marked.digests).data())
    assert Manifest.read(sealed) == Manifest(None, marked.digests) and marked.kind == "release"
    verify_manifest(sealed)


def test_one_flipped_bit_of_the_manifest_is_found(sealed):
    whole = (sealed / MANIFEST).read_bytes()
    for offset in range(len(whole)):
        for bit in (1, 2, 32):
            data = bytearray(whole)
            data[offset] ^= bit
            (sealed / MANIFEST).write_bytes(bytes(data))
            refusal(verify_manifest, sealed)


@pytest.mark.parametrize("name", [name for name in HOSTILE if isinstance(name, str) and name.isprintable()])
def test_a_manifest_with_hostile_names_is_refused(sealed, name):
    (sealed / MANIFEST).write_text(f"# cognica-poe release\n{'0' * 64}  {name}\n")
    assert str(sealed / MANIFEST) in refusal(verify_manifest, sealed)
    if name:
        assert "cannot be used" in refusal(Manifest("release", {name: "0" * 64}).data)


@pytest.mark.parametrize("text", ["", "\n", "# cognica-poe release\n", "# cognica-poe cake\n", "# note\n", "rubbish"])
def test_a_manifest_of_no_file_or_with_other_lines_is_refused(sealed, text):
    (sealed / MANIFEST).write_text(text)
    assert f"{sealed / MANIFEST} is corrupt" in refusal(verify_manifest, sealed)


def test_require_space(tmp_path):
    require_space(tmp_path / "not" / "there" / "yet", 1)
    message = refusal(require_space, tmp_path / "x", 10**18)
    assert "1000000000000 MB needed" in message and str(tmp_path / "x") in message


@pytest.mark.parametrize("value", [{"a": [1, 2.5, None, "ü"]}, [], "text"])
def test_json_round_trip(tmp_path, value):
    write_json(tmp_path / "file.json", value)
    assert read_json(tmp_path / "file.json") == value


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_json_holds_numbers_only(tmp_path, value):
    with pytest.raises(ValueError):
        write_json(tmp_path / "file.json", {"loss": value})
    assert names(tmp_path) == []


def test_unreadable_json_is_named(tmp_path):
    path = tmp_path / "file.json"
    assert refusal(read_json, path, "recipe") == f"recipe not found: {path}"
    for content in (b"", b'{"a": 1', b"\xff\xfe\x00"):
        path.write_bytes(content)
        assert f"recipe {path} is not valid JSON" in refusal(read_json, path, "recipe")
    assert f"record {tmp_path} is not valid JSON" in refusal(read_json, tmp_path, "record")


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (errno.ENOSPC, "no space left while writing out"),
        (errno.EDQUOT, "no space left while writing out"),
        (errno.EACCES, "cannot write out: Permission denied"),
        (errno.EROFS, "cannot write out: Read-only file system"),
    ],
)
def test_refusals_of_the_disk_become_one_line(number, expected):
    with pytest.raises(UserError, match=expected), disk_errors("out"):
        fail_with(number)()


def test_other_errors_pass_through():
    with pytest.raises(OSError) as caught, disk_errors("out"):
        fail_with(errno.EIO)()
    assert caught.value.errno == errno.EIO and not isinstance(caught.value, UserError)
