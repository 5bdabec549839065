"""A run stops between micro-batches, on all ranks at once, and loses nothing but the step that was not finished."""

import dataclasses
import json
import os
import signal
import subprocess
import sys

import pytest
import torch

from cognica_poe import pipeline
from cognica_poe.errors import TrainingStopped
from cognica_poe.interrupts import arrived
from cognica_poe.leftovers import PREFIX
from cognica_poe.training.checkpoint import CheckpointFolder
from cognica_poe.training.trainer import Trainer
from tests.gloo import run_ranks
from tests.runs import small_recipe, with_ranks, write_texts


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("texts") / "texts")


@pytest.fixture
def fresh(texts, tmp_path):
    def make(name, parallel="rows"):
        recipe = small_recipe(texts, steps=6, micro_rows=1, compute_dtype="float32", checkpoint_every=4)
        release = dataclasses.replace(recipe.release, log_steps=False, every=2)
        recipe = dataclasses.replace(with_ranks(recipe, parallel=parallel), release=release)
        pipeline.prepare(recipe, tmp_path / name, lambda line: None)
        return recipe, tmp_path / name

    return make


def interrupted(trainer, number, at):
    """Send ``number`` to this process after the ``at``-th micro-batch that it computes."""
    backward, count = trainer.objective.backward, [0]

    def counted(*arguments):
        losses = backward(*arguments)
        count[0] += 1
        if count[0] == at:
            os.kill(os.getpid(), number)
        return losses

    trainer.objective.backward = counted
    return count


def open_trainer(recipe, run, **options):
    trainer = Trainer(recipe, run, pipeline.open_rows(run, recipe), **options)
    trainer.start()
    return trainer


def last_event(run):
    return json.loads((run / "events.jsonl").read_text().splitlines()[-1])


def assert_equal_ends(first, second):
    ends = [CheckpointFolder(run / "checkpoints").load(6) for run in (first, second)]
    for part in ("weights", "optimizer"):
        values, others = (getattr(end, part) for end in ends)
        assert values.keys() == others.keys()
        assert all(torch.equal(values[name], others[name]) for name in values)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_step_under_way_is_dropped_and_the_last_complete_one_saved(fresh, number):
    recipe, whole = fresh("whole")
    open_trainer(recipe, whole).train()
    _, run = fresh("run")
    trainer = open_trainer(recipe, run)
    count = interrupted(trainer, number, 14)  # four micro-batches a step: the second of step 3
    with pytest.raises(TrainingStopped) as stopped:
        trainer.train()
    assert (stopped.value.step, stopped.value.number, count[0]) == (3, number, 14)
    assert CheckpointFolder(run / "checkpoints").steps()[-1] == 3 and last_event(run)["event"] == "stopped"
    assert arrived() is None, "this process may train again"
    open_trainer(recipe, run, resume=True).train()
    assert_equal_ends(whole, run)


def test_a_step_that_is_saved_is_not_saved_again(fresh):
    recipe, run = fresh("run")
    trainer = open_trainer(recipe, run)
    interrupted(trainer, signal.SIGTERM, 17)  # right after the checkpoint of step 4
    state = run / "checkpoints" / "step-4" / "state.json"
    with pytest.raises(TrainingStopped):
        trainer.train()
    written = state.stat().st_mtime_ns
    trainer = open_trainer(recipe, run, resume=True)
    interrupted(trainer, signal.SIGTERM, 1)
    with pytest.raises(TrainingStopped):
        trainer.train()
    assert state.stat().st_mtime_ns == written


def test_the_file_stops_a_run_and_is_removed(fresh):
    recipe, run = fresh("run")
    trainer = open_trainer(recipe, run, progress=lambda step, metrics: step == 2 and (run / "stop").touch())
    with pytest.raises(TrainingStopped) as stopped:
        trainer.train()
    assert (stopped.value.step, stopped.value.number) == (2, signal.SIGTERM)
    assert not (run / "stop").exists()
    open_trainer(recipe, run, resume=True).train()


def test_a_release_under_way_is_interrupted_and_made_when_the_run_resumes(fresh):
    recipe, run = fresh("run")
    made = []

    def release(step):
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        made.append(step)

    with pytest.raises(TrainingStopped) as stopped:
        open_trainer(recipe, run).train(release)
    assert stopped.value.step == 4 and made == [2]
    open_trainer(recipe, run, resume=True).train(made.append)
    assert made == [2, 4, 6]


def on_ranks(ranks, recipe, run, at, resume):
    trainer = open_trainer(recipe, run, ranks=ranks, resume=resume)
    if ranks.rank == 1 and at:
        interrupted(trainer, signal.SIGTERM, at)
    try:
        trainer.train()
    except TrainingStopped as stopped:
        return stopped.step, stopped.number
    return trainer.step, None


@pytest.mark.parametrize(("parallel", "at", "step"), [("rows", 7, 3), ("stages", 14, 4)])
def test_a_signal_to_one_rank_stops_all(fresh, parallel, at, step):
    recipe, whole = fresh("whole", parallel)
    run_ranks(2, on_ranks, recipe, whole, 0, False)
    _, run = fresh("run", parallel)
    assert run_ranks(2, on_ranks, recipe, run, at, False) == [(step, signal.SIGTERM)] * 2
    run_ranks(2, on_ranks, recipe, run, 0, True)
    assert_equal_ends(whole, run)


SLOW = """
import sys, time
from cognica_poe.cli.main import main
from cognica_poe.training import checkpoint, stopping
stopping.SAVE_SECONDS = 2.0
write = checkpoint.CheckpointFolder._write
def slow(folder, partial, *arguments):
    if "step-4" not in partial.name:
        print("saving", flush=True)
        time.sleep(600)
    return write(folder, partial, *arguments)
checkpoint.CheckpointFolder._write = slow
main()
"""


def test_a_save_that_takes_too_long_is_given_up_and_the_last_checkpoint_stays(texts, tmp_path):
    from cognica_poe.recipe.stored import save_recipe

    recipe = small_recipe(texts, steps=2000, micro_rows=1, compute_dtype="float32", checkpoint_every=4)
    save_recipe(recipe, tmp_path / "recipe.json")
    run, words = tmp_path / "run", ["--release.no-log-steps", "--release.every", "1000", "--training.checkpoint-every"]
    command = [sys.executable, "-c", SLOW, "train", str(tmp_path / "recipe.json"), "--out", str(run), *words, "4"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "saving\n"  # of step 8
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 143
    assert said.splitlines()[-1] == (
        "cognica-poe: ended 2 seconds after the signal, before the step was saved: "
        "the last checkpoint is of step 4; go on with --resume"
    )
    assert CheckpointFolder(run / "checkpoints").steps() == [4] and not list(run.rglob(f"{PREFIX}*"))
