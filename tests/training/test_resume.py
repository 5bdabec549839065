"""A run that is killed and resumed equals an uninterrupted one bit for bit."""

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
from cognica_poe.training.build import build_model
from cognica_poe.training.checkpoint import CheckpointFolder
from cognica_poe.training.objective import Objective
from cognica_poe.training.trainer import Trainer
from tests.runs import small_recipe, write_texts

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
    with pytest.raises(UserError, match="another recipe"):
        pipeline.prepare(small_recipe(texts, steps=99), run, lambda line: None, resume=True)


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
    for name, recompute in (("kept", False), ("again", True)):
        recipe, run = fresh(name, steps=3, recompute=recompute)
        trainer = Trainer(recipe, run, pipeline.open_rows(run, recipe))
        trainer.train()
        runs.append(trainer.model.state_dict())
    assert all(torch.equal(value, runs[1][name]) for name, value in runs[0].items())


def test_a_non_finite_loss_stops_before_the_update(fresh):
    recipe, run = fresh("run")
    trainer = Trainer(recipe, run, pipeline.open_rows(run, recipe))
    trainer.start()
    with torch.no_grad():
        trainer.model.transformer.h[0].mlp.c_fc.weight[0, 0] = float("nan")
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    with pytest.raises(UserError, match="not finite at step 0"):
        trainer.train()
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
