"""SIGTERM and SIGINT end a process in time with 143 or 130, also one that sits in compiled code."""

import signal
import subprocess
import sys
import time

import pytest

from cognica_poe.leftovers import PREFIX

CODE = """
import contextlib, hashlib, os, pathlib, signal, sys, time
from cognica_poe import interrupts, leftovers
from cognica_poe.cli import main as command_line
place, how = pathlib.Path(sys.argv[1]), sys.argv[2]
def work():
    with leftovers.partial_file(place) as (file, partial):
        there = lambda: print("there", flush=True)
        if how == "python":
            there()
            time.sleep(60)
        elif how == "compiled":
            there()
            hashlib.pbkdf2_hmac("sha256", b"x", b"x", 2 * 10**9)  # takes many minutes and does not look at signals
        elif how == "swallowed":
            there()
            while True:
                with contextlib.suppress(BaseException):
                    time.sleep(60)
        elif how == "deferred":
            with interrupts.deferred(1.0, lambda: "ended before the step was saved"):
                there()
                time.sleep(60)
        elif how == "patient":
            with interrupts.deferred(60.0, lambda: "not saved"):
                there()
                while True:
                    time.sleep(60)
        elif how == "asked":
            with interrupts.deferred(60.0, lambda: "too late"):
                there()
                while interrupts.arrived() is None:
                    time.sleep(0.01)
                with contextlib.suppress(interrupts.Interrupted):
                    with interrupts.interruptible():
                        print("not reached", flush=True)
                raise interrupts.Interrupted(interrupts.arrived())
interrupts._state.grace, interrupts.AGAIN = 1.0, 0.8
command_line.dispatch = lambda words: work()
sys.argv = ["cognica-poe"]
command_line.main()
"""
SAID = {
    "python": "interrupted by {}",
    "compiled": "interrupted by {}",
    "swallowed": "interrupted by {}",
    "deferred": "ended before the step was saved",
    "asked": "interrupted by {}",
}


def start(tmp_path, how):
    command = [sys.executable, "-c", CODE, str(tmp_path), how]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "there\n"
    return process


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("how", SAID)
def test_a_signal_ends_the_process_in_time(tmp_path, how, number, code):
    process = start(tmp_path, how)
    assert [path.name.startswith(PREFIX) for path in tmp_path.iterdir()] == [True]
    began = time.monotonic()
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (code, "")
    assert err == f"cognica-poe: {SAID[how].format(number.name)}\n"
    assert time.monotonic() - began < 10 and list(tmp_path.iterdir()) == []


def test_a_second_signal_waits_no_longer(tmp_path):
    """But launchers send the first one twice at once."""
    process = start(tmp_path, "patient")
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    time.sleep(1.0)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (143, "cognica-poe: not saved\n")
    assert time.monotonic() - began < 10 and list(tmp_path.iterdir()) == []


def test_a_signal_as_the_interpreter_ends_changes_nothing(tmp_path):
    process = start(tmp_path, "python")
    while process.poll() is None:
        process.send_signal(signal.SIGTERM)
        time.sleep(0.001)
    assert process.communicate() == ("", "cognica-poe: interrupted by SIGTERM\n") and process.returncode == 143


def test_of_several_ranks_the_first_one_speaks(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    process = start(tmp_path, "python")
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=30) == ("", "") and process.returncode == 143
