"""A run that is killed and resumed equals an uninterrupted one bit for bit."""

import dataclasses
import json
import random
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from cognica_poe import pipeline
from cognica_poe.errors import UserError
from cognica_poe.recipe.named import RECIPES
from cognica_poe.training.build import build_model
from cognica_poe.training.checkpoint import CheckpointFolder
from cognica_poe.training.objective import Objective
from cognica_poe.training.trainer import Trainer
from tests.runs import small_recipe, with_training, write_texts

STEPS = 24

TRAIN = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from cognica_poe import pipeline
from cognica_poe.training.trainer import Trainer
run, kill = Path(sys.argv[1]), int(sys.argv[2])
recipe = pipeline.read_recipe(run)
def progress(step, metrics):
    if step == kill:
        os.kill(os.getpid(), getattr(signal, sys.argv[3]))
Trainer(recipe, run, pipeline.open_rows(run, recipe), resume=True, progress=progress).train()
"""


def train(run, kill=-1, sig="SIGKILL") -> int:
    done = subprocess.run([sys.executable, "-c", TRAIN, str(run), str(kill), sig], capture_output=True, text=True)
    assert done.returncode in (0, -signal.SIGKILL) or "TrainingStopped" in done.stderr, done.stderr
    return done.returncode


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("texts") / "texts")


@pytest.fixture
def fresh(texts, tmp_path):
    def make(name, **training):
        recipe = small_recipe(texts, **{"steps": STEPS, **training})
        pipeline.prepare(recipe, tmp_path / name, lambda line: None)
        return recipe, tmp_path / name

    return make


def weights(run, step=STEPS):
    return {
        part: load_file(run / "checkpoints" / f"step-{step}" / f"{part}.safetensors") for part in ("model", "optimizer")
    }


def assert_equal_runs(first, second):
    for part, tensors in weights(first).items():
        others = weights(second)[part]
        assert tensors.keys() == others.keys()
        for name, tensor in tensors.items():
            assert torch.equal(tensor, others[name]), name
    lines = [(run / "metrics.jsonl").read_text().splitlines() for run in (first, second)]
    losses = [[json.loads(line)["loss_stages"] for line in part] for part in lines]
    assert losses[0] == losses[1] and len(losses[0]) == STEPS


def test_five_random_kills_change_nothing(fresh):
    _, whole = fresh("whole")
    _, killed = fresh("killed")
    assert train(whole) == 0
    rng = random.Random(20261123)
    for step in sorted(rng.sample(range(1, STEPS), 5)):
        assert train(killed, step) == -signal.SIGKILL
    assert train(killed) == 0
    assert_equal_runs(whole, killed)


def test_sigterm_saves_the_step(fresh):
    _, whole = fresh("whole")
    _, stopped = fresh("stopped")
    train(whole)
    assert train(stopped, 7, "SIGTERM") == 1
    assert max(CheckpointFolder(stopped / "checkpoints").steps()) == 7
    train(stopped)
    assert_equal_runs(whole, stopped)


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(fresh):
    recipe, run = fresh("run", steps=6)
    rows = pipeline.open_rows(run, recipe)
    Trainer(recipe, run, rows).train()
    file = run / "checkpoints" / "step-6" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0x40
    file.write_bytes(data)
    lines = []
    trainer = Trainer(recipe, run, rows, resume=True, log=lines.append)
    trainer.start()
    assert trainer.step == 3
    assert any("model.safetensors" in line and "corrupt" in line for line in lines)
    with pytest.raises(UserError, match=r"model\.safetensors is corrupt"):
        CheckpointFolder(run / "checkpoints").load(6)


def test_a_run_is_not_overwritten_or_mixed(fresh, texts):
    recipe, run = fresh("run", steps=3)
    Trainer(recipe, run, pipeline.open_rows(run, recipe)).train()
    with pytest.raises(UserError, match="already holds"):
        Trainer(recipe, run, pipeline.open_rows(run, recipe)).start()
    with pytest.raises(UserError, match=r"another recipe \(small-test\): training.batch-rows differ"):
        pipeline.prepare(small_recipe(texts, batch_rows=8, steps=3), run, lambda line: None, resume=True)


def test_a_run_that_is_extended_equals_one_of_that_length(fresh):
    """Where the schedule does not look at the length: no warm-down, no weight decay. Recomputing changes nothing."""
    tiny = RECIPES["tiny"].training
    same = {
        "schedule": dataclasses.replace(tiny.schedule, warmup_steps=2, warmdown_ratio=0.0),
        "optimizer": dataclasses.replace(tiny.optimizer, weight_decay=0.0),
    }
    recipe, whole = fresh("whole", **same)
    Trainer(recipe, whole, pipeline.open_rows(whole, recipe)).train()
    short, run = fresh("run", steps=10, **same)
    Trainer(short, run, pipeline.open_rows(run, short)).train()
    longer = with_training(recipe, recompute="layers")
    pipeline.prepare(longer, run, lambda line: None, resume=True)
    assert pipeline.read_recipe(run) == longer
    Trainer(longer, run, pipeline.open_rows(run, longer), resume=True).train()
    assert_equal_runs(whole, run)
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    (changed,) = [event for event in events if event["event"] == "recipe changed"]
    assert changed["step"] == 10 and changed["changes"] == {
        "training.steps": {"before": 10, "after": STEPS},
        "training.recompute": {"before": "off", "after": "layers"},
    }


def test_rates_change_from_there_on(fresh):
    """Muon's normalisation, off at first, has no state to take up."""
    recipe, run = fresh(
        "run", steps=6, optimizer=dataclasses.replace(RECIPES["tiny"].training.optimizer, muon_beta2=1.0)
    )
    Trainer(recipe, run, pipeline.open_rows(run, recipe)).train()
    on = dataclasses.replace(recipe.training.optimizer, muon_beta2=0.9, matrix_lr=0.01)
    changed = with_training(recipe, steps=9, optimizer=on)
    pipeline.prepare(changed, run, lambda line: None, resume=True)
    Trainer(changed, run, pipeline.open_rows(run, changed), resume=True).train()
    state = load_file(run / "checkpoints" / "step-9" / "optimizer.safetensors")
    assert any(name.endswith("second_moment") for name in state)


def test_a_trainer_that_was_not_started_has_touched_nothing(fresh):
    recipe, run = fresh("run", steps=3)
    rows, before = pipeline.open_rows(run, recipe), sorted(run.rglob("*"))
    trainer = Trainer(recipe, run, rows)
    assert sorted(run.rglob("*")) == before and not hasattr(trainer, "model")
    trainer.start()
    assert trainer.step == 0 and trainer.model.training
    trainer.train()  # does not start again
    assert CheckpointFolder(run / "checkpoints").steps()[-1] == trainer.step == 3


def test_flex_attention_is_refused_on_a_processor(fresh):
    recipe, run = fresh("run", steps=3, attention="flex_attention")
    with pytest.raises(UserError, match="trains on CUDA alone; use sdpa"):
        Trainer(recipe, run, pipeline.open_rows(run, recipe)).start()


def test_a_run_that_recomputes_activations_has_the_same_weights(fresh):
    runs = []
    for name, recompute in (("kept", "off"), ("again", "layers")):
        recipe, run = fresh(name, steps=3, recompute=recompute)
        trainer = Trainer(recipe, run, pipeline.open_rows(run, recipe))
        trainer.train()
        runs.append(trainer.model.state_dict())
    assert all(torch.equal(value, runs[1][name]) for name, value in runs[0].items())


def test_a_non_finite_weight_is_neither_trained_with_nor_saved(fresh):
    recipe, run = fresh("run")
    trainer = Trainer(recipe, run, pipeline.open_rows(run, recipe))
    trainer.start()
    with torch.no_grad():
        trainer.model.transformer.h[0].mlp.c_fc.weight[0, 0] = float("nan")
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    with pytest.raises(UserError, match="not finite at step 0"):
        trainer.train()
    assert CheckpointFolder(run / "checkpoints").steps() == []
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, before[name]) or parameter.isnan().any()
    assert json.loads((run / "events.jsonl").read_text().splitlines()[-1])["event"] == "non-finite loss"


def test_accumulation_does_not_change_the_gradient(fresh):
    recipe, run = fresh("run")
    batch = torch.from_numpy(pipeline.open_rows(run, recipe).batch(0, 4))
    gradients = []
    for micro in (4, 2, 1):
        model = build_model(recipe.model).double().train()
        objective = Objective(model)
        for rows in batch.split(micro):
            objective.backward(rows[:, :-1], rows[:, 1:], micro / 4)
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    for other in gradients[1:]:
        assert other.keys() == gradients[0].keys()
        for name, value in gradients[0].items():
            torch.testing.assert_close(other[name], value, rtol=1e-10, atol=1e-12)


@pytest.mark.slow
def test_residual_pools_train_and_resume(fresh):
    """What is journalled last is the loss of the whole pool, and it falls; a run that stops midway loses nothing."""
    _, whole = fresh("whole", poe_mode="residual_logop")
    _, killed = fresh("killed", poe_mode="residual_logop")
    assert train(whole) == 0
    assert train(killed, 10) == -signal.SIGKILL
    assert train(killed) == 0
    assert_equal_runs(whole, killed)
    losses = [json.loads(line)["loss_stages"] for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1][-1] < losses[0][-1] - 0.1
