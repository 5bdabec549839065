"""A run that is followed: releases appear while it trains, nothing is done twice, what was interrupted is finished."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from cognica_poe import pipeline
from cognica_poe.analysis.record import read_record, record_path
from cognica_poe.cli.main import main
from cognica_poe.errors import UserError
from cognica_poe.following import follow, in_training, slice_of, sound_record
from cognica_poe.locks import hold, is_held
from cognica_poe.recipe.stored import save_recipe
from cognica_poe.training.journal import Journal
from cognica_poe.training.trainer import Trainer
from tests.runs import small_recipe, write_texts


def small(folder, **training):
    recipe = small_recipe(write_texts(folder / "texts"), compute_dtype="float32", **training)
    return dataclasses.replace(recipe, release=dataclasses.replace(recipe.release, log_steps=False))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of 12 steps with checkpoints at its releases, 6 and 12, and nothing measured; do not alter."""
    folder = tmp_path_factory.mktemp("following")
    recipe = small(folder)
    pipeline.prepare(recipe, folder / "run", lambda line: None)
    Trainer(recipe, folder / "run", pipeline.open_rows(folder / "run", recipe)).train()
    return folder / "run"


@pytest.fixture(scope="module")
def told():
    """Lines of the log of ``released``."""
    return []


@pytest.fixture(scope="module")
def released(trained, told, tmp_path_factory):
    """The same, followed once into ``hub`` beside it; do not alter."""
    run = shutil.copytree(trained, tmp_path_factory.mktemp("released") / "run")
    assert follow(run, f"file:{run.parent / 'hub'}", log=told.append) == [6, 12]
    return run


@pytest.fixture
def run(released, tmp_path):
    return shutil.copytree(released, tmp_path / "run")


def refs(hub):
    folder = hub / "models--test--small" / "refs"
    return sorted(file.name for file in folder.iterdir()) if folder.is_dir() else []


def test_what_is_there_is_published_and_done_once(released, told):
    hub = released.parent / "hub"
    assert refs(hub) == ["main", "step-12", "step-6"]
    assert sum("measuring on" in line for line in told) == 2
    stamps = {file: file.stat().st_mtime_ns for file in released.rglob("*.json")}
    again: list[str] = []
    assert follow(released, f"file:{hub}", log=again.append) == [6, 12]
    assert not any("measuring on" in line for line in again)
    assert sum("published already" in line for line in again) == 2
    assert stamps == {file: file.stat().st_mtime_ns for file in released.rglob("*.json")}


def test_a_step_that_was_left_out_is_not_published(run, tmp_path):
    Journal(run / "events.jsonl", True).write({"event": "release left out", "step": 6, "reason": "a roll-back"})
    hub = tmp_path / "hub"
    assert follow(run, f"file:{hub}") == [12] and refs(hub) == ["main", "step-12"]


def test_a_record_of_something_else_is_not_sound(run):
    recipe, file = pipeline.read_recipe(run), record_path(run / "analysis", 6)
    assert sound_record(run, recipe, 6, slice_of(run, recipe)) is not None
    for change in ({"k_draft": 3}, {"wand_safety": 2.0}, {"val_max_bytes": 3000}):
        other = dataclasses.replace(recipe, release=dataclasses.replace(recipe.release, **change))
        assert sound_record(run, other, 6) is None, change
    later = time.time_ns() + 10**9
    os.utime(run / "checkpoints" / "step-12" / "MANIFEST.sha256", ns=(later, later))
    assert sound_record(run, recipe, 12) is None, "older than its checkpoint"
    file.write_text(file.read_text().replace("small-test", "small-best"))
    assert sound_record(run, recipe, 6) is None and sound_record(run, recipe, 99) is None


def test_analyze_leaves_sound_records_alone(run, capsys):
    record_path(run / "analysis", 12).unlink()
    before = record_path(run / "analysis", 6).stat().st_mtime_ns
    main(["analyze", str(run), "--json"])
    shown = capsys.readouterr()
    assert "step 6 has a sound record" in shown.err and record_path(run / "analysis", 6).stat().st_mtime_ns == before
    assert {record["step"] for record in json.loads(shown.out)} >= {6, 12}
    assert record_path(run / "analysis", 12).is_file()


def test_what_is_refused_is_said_after_the_rest_was_done(run, tmp_path):
    damaged = run / "checkpoints" / "step-6" / "MANIFEST.sha256"
    damaged.write_text(damaged.read_text().replace("0", "1"))
    record_path(run / "analysis", 6).unlink()
    with pytest.raises(UserError, match=r"step 6 of .* is not published"):
        follow(run, f"file:{tmp_path / 'other'}")
    assert refs(tmp_path / "other") == ["main", "step-12"]


def test_a_lock_is_seen_without_being_taken(tmp_path):
    assert not is_held(tmp_path) and not in_training(tmp_path)
    with hold(tmp_path):
        assert is_held(tmp_path) and is_held(tmp_path) and in_training(tmp_path)
        Journal(tmp_path / "events.jsonl", True).write({"event": "end", "step": 3})
        assert not in_training(tmp_path)
    assert not is_held(tmp_path)


COMMAND = [sys.executable, "-m", "cognica_poe.cli.main"]


@pytest.mark.slow
def test_run_publishes_while_it_trains(tmp_path):
    recipe = small(tmp_path, steps=400, checkpoint_every=50)
    recipe = dataclasses.replace(recipe, release=dataclasses.replace(recipe.release, every=100))
    save_recipe(recipe, tmp_path / "recipe.json")
    hub, out = tmp_path / "hub", tmp_path / "run"
    words = ["run", str(tmp_path / "recipe.json"), "--out", str(out), "--publish-to", f"file:{hub}"]
    done = subprocess.run([*COMMAND, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert refs(hub) == ["main", *sorted(f"step-{step}" for step in (100, 200, 300, 400))]
    assert "training paused" not in done.stderr
    assert (
        read_record(record_path(out / "analysis", 100)).bpb.full
        > read_record(record_path(out / "analysis", 400)).bpb.full
    )


@pytest.mark.slow
def test_torchrun_publishes_and_a_stopped_follower_is_finished_by_hand(tmp_path):
    recipe = small(tmp_path, steps=200, checkpoint_every=50)
    recipe = dataclasses.replace(recipe, release=dataclasses.replace(recipe.release, every=100))
    save_recipe(recipe, tmp_path / "recipe.json")
    hub, out = tmp_path / "hub", tmp_path / "run"
    words = ["train", str(tmp_path / "recipe.json"), "--out", str(out), "--publish-to", f"file:{hub}"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m",
              "cognica_poe.cli.main"]  # fmt: skip
    done = subprocess.run([*launch, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert refs(hub) == ["main", "step-100", "step-200"]
    second = subprocess.Popen([*COMMAND, "follow", str(out), "--publish-to", f"file:{tmp_path / 'again'}"])
    time.sleep(1.0)
    second.send_signal(signal.SIGTERM)
    second.wait()
    assert follow(out, f"file:{tmp_path / 'again'}") == [100, 200]
    assert refs(tmp_path / "again") == ["main", "step-100", "step-200"]
