"""What a dead process left half-written goes, what a living one writes stays, and nothing else is touched."""

import os
import shutil
import signal
import subprocess
import sys

import pytest

from cognica_poe import interrupts, leftovers
from cognica_poe.errors import UserError
from cognica_poe.files import atomic_folder, write_bytes
from cognica_poe.leftovers import PREFIX, drop_owned, is_being_written, partial_file, scratch_folder, sweep
from tests.border.test_ownership import everything

CODE = """
import os, pathlib, signal, sys, time
from cognica_poe import files, leftovers
place, how = pathlib.Path(sys.argv[1]), sys.argv[2]
def stop(*arguments):
    print("there", flush=True)
    time.sleep(60)
if how == "folder":
    with files.atomic_folder(place / "out", "release") as folder:
        (folder / "a").write_bytes(b"half")
        stop()
elif how == "between":
    os_replace = os.replace
    def replace(source, target):
        if pathlib.Path(target) == place / "out":
            stop()  # the old one is out of the way, the new one not in place
        os_replace(source, target)
    leftovers.os.replace = replace
    with files.atomic_folder(place / "out", "release") as folder:
        (folder / "a").write_bytes(b"new")
elif how == "file":
    with leftovers.partial_file(place) as (file, partial):
        file.write(b"half")
        file.flush()
        stop()
elif how == "scratch":
    with leftovers.scratch_folder() as folder:
        (folder / "a").write_bytes(b"half")
        stop()
"""


@pytest.fixture
def writer(tmp_path):
    """Starts a process that stands in the middle of writing."""
    started = []

    def start(how):
        environment = {**os.environ, "TMPDIR": str(tmp_path)}
        command = [sys.executable, "-c", CODE, str(tmp_path), how]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        started.append(process)
        assert process.stdout.readline() == "there\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def kill(process):
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.mark.parametrize("how", ["folder", "file", "scratch"])
def test_leftovers_go_with_their_owner_and_not_before(writer, tmp_path, how):
    process, before = writer(how), None
    for _ in range(2):
        sweep(tmp_path)
        assert before in (None, everything(tmp_path)) and everything(tmp_path)
        before = everything(tmp_path)
    kill(process)
    sweep(tmp_path, tmp_path / "nowhere")
    assert everything(tmp_path) == {}


def test_what_was_to_be_replaced_is_put_back(writer, tmp_path):
    with atomic_folder(tmp_path / "out", "release") as folder:
        (folder / "a").write_bytes(b"old")
    before = everything(tmp_path)
    process = writer("between")
    sweep(tmp_path)
    assert not (tmp_path / "out").exists(), "its owner is about to put it there"
    kill(process)
    sweep(tmp_path)
    assert everything(tmp_path) == before


def test_one_process_at_a_time_makes_a_folder(writer, tmp_path):
    process = writer("folder")
    assert is_being_written(tmp_path / "out") and not is_being_written(tmp_path / "other")
    with pytest.raises(UserError) as caught, atomic_folder(tmp_path / "out", "release"):
        raise AssertionError("two at once")
    assert f"out is being written by process {process.pid} on " in str(caught.value)
    with atomic_folder(tmp_path / "other", "release") as folder:
        (folder / "a").write_bytes(b"1")
    kill(process)
    assert not is_being_written(tmp_path / "out")
    with atomic_folder(tmp_path / "out", "release") as folder:
        assert list(folder.iterdir()) == []
        (folder / "b").write_bytes(b"1")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "out"]


def foreign_folder(place):
    (place / f"{PREFIX}thesis").mkdir()
    (place / f"{PREFIX}thesis" / "chapter").write_text("years of work")


def link(place):
    (place / "real").mkdir()
    for name in ("owner", "chapter"):
        (place / "real" / name).write_text("years of work")
    (place / f"{PREFIX}link").symlink_to("real")


def other_names(place):
    for name in (".partial-download", ".replaced-mine", "partial", ".lock"):
        (place / name).write_text("mine")
    (place / ".partial-folder").mkdir()


@pytest.mark.parametrize("make", [foreign_folder, link, other_names])
def test_what_is_not_ours_stays(tmp_path, make):
    make(tmp_path)
    before = everything(tmp_path)
    sweep(tmp_path)
    write_bytes(tmp_path / "file", b"1")
    (tmp_path / "file").unlink()
    assert everything(tmp_path) == before


def test_without_locks_of_the_file_system_leftovers_are_kept(tmp_path, monkeypatch):
    def refuse(descriptor, operation):
        raise OSError(95, "Operation not supported")

    (tmp_path / f"{PREFIX}left").write_text("half")
    monkeypatch.setattr(leftovers.fcntl, "flock", refuse)
    sweep(tmp_path)
    write_bytes(tmp_path / "file", b"1")
    with atomic_folder(tmp_path / "out", "release") as folder:
        (folder / "a").write_bytes(b"1")
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{PREFIX}left", "file", "out"]


def test_a_process_that_ends_at_once_drops_its_own(tmp_path):
    (tmp_path / f"{PREFIX}left").write_text("of another process")
    with partial_file(tmp_path) as (file, partial):
        file.write(b"half")
        drop_owned()
        assert not partial.exists()
    assert [path.name for path in tmp_path.iterdir()] == [f"{PREFIX}left"]


def test_a_scratch_folder_is_private_and_goes(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with scratch_folder() as first, scratch_folder() as second:
        assert first != second and list(first.iterdir()) == []
        assert first.stat().st_mode & 0o077 == 0
        shutil.rmtree(second)
    assert list(tmp_path.iterdir()) == []


def test_a_long_name_fits(tmp_path):
    with atomic_folder(tmp_path / ("x" * 255), "release") as folder:
        (folder / "a").write_bytes(b"1")
    assert [len(path.name) for path in tmp_path.iterdir()] == [255]


@pytest.mark.parametrize("how", ["file", "folder"])
def test_a_signal_at_the_moment_of_making_leaves_nothing(tmp_path, monkeypatch, how):
    """Between a file's making and the note that it is ours no interruption comes through."""
    mkstemp, sign = leftovers.tempfile.mkstemp, leftovers.sign

    def made(**where):
        found = mkstemp(**where)
        signal.raise_signal(signal.SIGTERM)
        return found

    def signed(descriptor):
        sign(descriptor)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(leftovers.tempfile, "mkstemp", made)
    monkeypatch.setattr(leftovers, "sign", signed)
    monkeypatch.setattr(interrupts._state, "number", None)
    before = signal.signal(signal.SIGTERM, interrupts._on_signal)
    making = partial_file(tmp_path) if how == "file" else leftovers.partial_folder(tmp_path / "out")
    try:
        with pytest.raises(interrupts.Interrupted), making:
            pytest.fail("the block ran")
    finally:
        signal.signal(signal.SIGTERM, before)
        interrupts._state.number = None
    assert len(list(tmp_path.iterdir())) == 1
    drop_owned()  # as every command does that a signal ends
    assert not list(tmp_path.iterdir())
