"""A folder has one process at a time, which is named; nothing of a lock is left."""

import os
import signal
import subprocess
import sys

import pytest

from cognica_poe.errors import UserError
from cognica_poe.leftovers import PREFIX
from cognica_poe.locks import LOCK, hold, hold_run_of, require_settled
from tests.processes import Command

CODE = """
import pathlib, sys, time
from cognica_poe.locks import hold
with hold(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds ``tmp_path / "run"``."""
    process = subprocess.Popen([sys.executable, "-c", CODE, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_the_second_one_is_told_who_has_it(holder, tmp_path):
    before = [(path, path.read_bytes()) for path in (tmp_path / "run").iterdir()]
    with pytest.raises(UserError) as caught, hold(tmp_path / "run"):
        raise AssertionError("two at once")
    assert f"run is in use by process {holder.pid} on {os.uname().nodename} since 20" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [(path, path.read_bytes()) for path in (tmp_path / "run").iterdir()] == before


def test_kill_frees_it(holder, tmp_path):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with hold(tmp_path / "run"):
        assert (tmp_path / "run" / LOCK).read_text().startswith(f"process {os.getpid()} on ")
    assert not (tmp_path / "run" / LOCK).exists()


def test_nothing_is_left_of_it(tmp_path):
    with hold(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b").is_dir()
    assert list(tmp_path.iterdir()) == []
    with hold(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "kept").write_text("1")
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["kept"]


def test_data_and_tokenizer_of_a_run_belong_to_whoever_holds_it(holder, tmp_path):
    for part in ("data", "tokenizer", "rows"):
        with pytest.raises(UserError, match="is in use by process"), hold_run_of(tmp_path / "run" / part):
            raise AssertionError("written while the run trains")
    with hold_run_of(tmp_path / "elsewhere" / "data"):
        assert not (tmp_path / "elsewhere").exists()


def test_a_run_does_not_start_while_its_data_are_made(tmp_path):
    require_settled(tmp_path / "data", tmp_path / "tokenizer")
    code = "from cognica_poe.leftovers import partial_folder; import pathlib, sys, time\n"
    code += "with partial_folder(pathlib.Path(sys.argv[1])): print('made', flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "data")], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "made\n"
    with pytest.raises(UserError, match=r"another process is making .*data: wait"):
        require_settled(tmp_path / "data", tmp_path / "tokenizer")
    process.kill()
    process.communicate()
    require_settled(tmp_path / "data", tmp_path / "tokenizer")
    assert (tmp_path / f"{PREFIX}data").is_dir()


@pytest.mark.parametrize("words", [("run", "tiny", "--out"), ("train", "tiny", "--resume", "--out")])
def test_run_and_train_refuse_a_folder_in_use(holder, tmp_path, words):
    command = Command([*words, tmp_path / "run"], tmp_path / "command")
    assert command.wait() == 2
    (line,) = command.lines
    assert line.startswith(f"cognica-poe: {tmp_path / 'run'} is in use by process {holder.pid} on ")
    assert [path.name for path in (tmp_path / "run").iterdir()] == [LOCK]


def test_a_refused_recipe_leaves_no_lock(tmp_path):
    command = Command(
        ["train", "tiny", "--out", tmp_path / "run", "--data.mix", tmp_path / "nowhere"], tmp_path / "command"
    )
    assert command.wait() == 2, command.lines
    assert not (tmp_path / "run").exists()
