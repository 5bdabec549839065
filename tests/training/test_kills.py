"""Nothing is lost: random kills of random ranks, also during a save, and workers that torchrun restarts.

Signals, and kills of whole commands: tests/border/test_interruptions.py.
"""

import dataclasses
import json
import random
import resource
import shutil
import subprocess
import sys
import time

import pytest
import torch

from cognica_poe import pipeline
from cognica_poe.errors import UserError
from cognica_poe.files import MANIFEST, verify_manifest
from cognica_poe.leftovers import PREFIX
from cognica_poe.seals import open_line
from cognica_poe.training.checkpoint import CheckpointFolder
from cognica_poe.training.trainer import Trainer
from tests.gloo import run_ranks, start_ranks
from tests.runs import small_recipe, write_texts

WORLD, KILLS, EVERY = 3, 20, 2


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    settings = {"steps": 80, "batch_rows": 6, "micro_rows": 1, "checkpoint_every": EVERY, "compute_dtype": "float32"}
    recipe = small_recipe(write_texts(folder / "texts"), **settings)
    pipeline.prepare(recipe, folder / "run", lambda line: None)
    pipeline.open_rows(folder / "run", recipe).facts(0)
    return folder / "run"


@pytest.fixture
def fresh(prepared, tmp_path):
    return lambda name: shutil.copytree(prepared, tmp_path / name)


def train(ranks, run):
    recipe = pipeline.read_recipe(run)
    Trainer(recipe, run, pipeline.open_rows(run, recipe), resume=True, ranks=ranks).train()


def sound_steps(run):
    """Steps whose folder passes its manifest; every step folder must."""
    steps = CheckpointFolder(run / "checkpoints").steps()
    for step in steps:
        verify_manifest(run / "checkpoints" / f"step-{step}")
    return steps


def last_metric(run):
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.is_file() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


def assert_same_end(run, whole):
    last = pipeline.read_recipe(run).training.steps
    ends = [CheckpointFolder(folder / "checkpoints").load(last) for folder in (run, whole)]
    for part in ("weights", "optimizer"):
        actual, expected = (getattr(end, part) for end in ends)
        assert actual.keys() == expected.keys()
        assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.slow
def test_twenty_kills_of_random_ranks_lose_no_checkpoint(fresh, tmp_path):
    whole, run, rng = fresh("whole"), fresh("run"), random.Random(20261124)
    run_ranks(WORLD, train, whole)
    known, during_save = [], 0
    for kill in range(KILLS):
        meeting = tmp_path / f"meeting-{kill}"
        meeting.mkdir()
        processes = start_ranks(WORLD, meeting, train, run)
        first = last_metric(run)
        goal = first + rng.randrange(1, 4)
        while last_metric(run) < goal and all(p.exitcode is None for p in processes):
            time.sleep(0.002)
        if kill % 2:  # in the middle of the next save
            while not list((run / "checkpoints").glob(f"{PREFIX}step-*")) and all(
                p.exitcode is None for p in processes
            ):
                pass
            time.sleep(rng.random() * 0.01)
        else:
            time.sleep(rng.random() * 0.1)
        processes[rng.randrange(WORLD)].kill()
        during_save += bool(list((run / "checkpoints").glob(f"{PREFIX}step-*")))
        time.sleep(0.02)
        for process in processes:
            process.kill()
            process.join()
        reached, steps = last_metric(run), sound_steps(run)
        assert not known or steps[-1] >= known[-1], "a checkpoint was lost"
        assert reached - (steps[-1] if steps else 0) <= EVERY
        known = steps
    assert 0 < known[-1] < 80 and during_save >= 3, (known, during_save)
    run_ranks(WORLD, train, run)
    assert_same_end(run, whole)


def flip_and_resume(ranks, run):
    lines = []
    recipe = pipeline.read_recipe(run)
    trainer = Trainer(recipe, run, pipeline.open_rows(run, recipe), resume=True, ranks=ranks, log=lines.append)
    trainer.start()
    return trainer.step, lines


def train_to(ranks, run, steps):
    recipe = pipeline.read_recipe(run)
    recipe = dataclasses.replace(recipe, training=dataclasses.replace(recipe.training, steps=steps))
    Trainer(recipe, run, pipeline.open_rows(run, recipe), ranks=ranks).train()


@pytest.fixture(scope="module")
def four_steps(prepared, tmp_path_factory):
    run = shutil.copytree(prepared, tmp_path_factory.mktemp("four") / "run")
    run_ranks(2, train_to, run, 4)
    return run


def test_a_flipped_byte_in_any_file_is_named(four_steps, tmp_path):
    """Every file of the newest step in turn; the run goes on from the step before."""
    newest = four_steps / "checkpoints" / "step-4"
    names = sorted(file.name for file in newest.iterdir())
    parts = [f"{part}-0000{rank}-of-00002.safetensors" for part in ("model", "optimizer") for rank in (0, 1)]
    assert names == sorted([MANIFEST, "state.json", *parts])
    rng = random.Random(1)
    for name in names:
        run = shutil.copytree(four_steps, tmp_path / name)
        file = run / "checkpoints" / "step-4" / name
        data = bytearray(file.read_bytes())
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        file.write_bytes(data)
        (step, lines), (other, silent) = run_ranks(2, flip_and_resume, run)
        assert step == other == 2 and silent == []
        damage = next(line for line in lines if "passed over" in line)
        assert "step-4" in damage and (name in damage or name == MANIFEST), damage
        event = open_line((run / "events.jsonl").read_bytes().splitlines()[-1])
        assert event == {"event": "damaged checkpoint", "found": damage}


def save_on_a_full_disk(ranks, run, full_rank):
    """The kernel refuses one rank's file after its first kilobyte."""
    recipe = pipeline.read_recipe(run)
    trainer = Trainer(recipe, run, pipeline.open_rows(run, recipe), resume=True, ranks=ranks)
    save = trainer.checkpoints.save

    def save_with_a_limit(checkpoint, background):
        if ranks.rank == full_rank:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1024, resource.RLIM_INFINITY))
        try:
            save(checkpoint, background)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    trainer.checkpoints.save = save_with_a_limit
    try:
        trainer.train()
    except UserError as error:
        return str(error)
    raise AssertionError("the full disk went unnoticed")


@pytest.mark.parametrize("full_rank", [0, 1])
def test_a_full_disk_on_one_rank_stops_all_and_leaves_the_checkpoints(full_rank, four_steps, tmp_path):
    run = shutil.copytree(four_steps, tmp_path / "run")
    errors = run_ranks(2, save_on_a_full_disk, run, full_rank)
    assert errors[0] == errors[1] and "no space left while writing" in errors[0]
    assert sound_steps(run) == [2, 4]
    assert [p.name for p in sorted((run / "checkpoints").iterdir())] == ["step-2", "step-4"]
    assert run_ranks(2, flip_and_resume, run)[0][0] == 4


SCRIPT = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from cognica_poe import pipeline
from cognica_poe.training.parallel.ranks import join_ranks
from cognica_poe.training.trainer import Trainer
run = Path(sys.argv[1])
kills = {0: (1, 5), 1: (0, 9)}  # restart: rank, step
with join_ranks() as ranks:
    recipe = pipeline.read_recipe(run)
    trainer = Trainer(recipe, run, pipeline.open_rows(run, recipe), ranks=ranks)
    one_step = trainer._train_step
    def step():
        if kills.get(ranks.restarts) == (ranks.rank, trainer.step):
            os.kill(os.getpid(), signal.SIGKILL)
        return one_step()
    trainer._train_step = step
    trainer.train()
"""


@pytest.mark.slow
def test_torchrun_restarts_from_the_latest_checkpoint(fresh, tmp_path):
    whole, run = fresh("whole"), fresh("run")
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    run_ranks(2, train, whole)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=3"]
    done = subprocess.run([*launch, str(script), str(run)], capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    starts = [(e["event"], e["step"], e["restarts"]) for e in events if e["event"] in ("start", "resume")]
    assert starts == [("start", 0, 0), ("resume", 4, 1), ("resume", 8, 2)]
    assert_same_end(run, whole)
