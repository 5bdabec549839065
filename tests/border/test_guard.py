"""Healthy runs go on, spikes leave no trace, and what cannot go on ends with advice that works."""

import dataclasses
import math
import random
import re

import pytest
import torch

from cognica_poe import pipeline
from cognica_poe.cli.main import main
from cognica_poe.errors import UserError
from cognica_poe.files import verify_manifest
from cognica_poe.recipe.fields import GuardRecipe
from cognica_poe.recipe.stored import save_recipe
from cognica_poe.training.checkpoint import CheckpointFolder
from cognica_poe.training.guard import SpikePolicy, StepGuard
from cognica_poe.training.journal import read_records
from cognica_poe.training.trainer import Trainer
from tests.gloo import run_ranks
from tests.runs import small_recipe, with_training, write_texts

GUARD = GuardRecipe()
NAN = (math.nan, math.nan)


def drive(values, policy=None):
    """What guard and policy make of a run's pairs of loss and gradient norm; roll-backs are taken in place."""
    guard, policy, told = StepGuard(GUARD), policy or SpikePolicy(GUARD), []
    for step, (loss, norm) in enumerate(values):
        guard.check(torch.tensor(loss, dtype=torch.float64), [torch.tensor([norm], dtype=torch.float64)])
        decision = policy.judge(guard.observation(step).read())
        told.append(decision.action)
        if decision.action == "stop":
            break
    return told


def healthy(rng, steps, noise):
    return [(3.0 * (1 + noise * rng.gauss(0, 1)), 0.7 * (1 + noise * rng.gauss(0, 1))) for _ in range(steps)]


def scaled(values, first, loss=1.0, norm=1.0):
    return [(a * loss, b * norm) if step >= first else (a, b) for step, (a, b) in enumerate(values)]


@pytest.mark.parametrize("noise", [0.0, 0.003, 0.01, 0.03, 0.1, 0.15])
def test_a_level_that_changes_for_good_is_adapted_to(noise):
    """Loss, gradient norm or both become higher once and for all, at any time and by any factor."""
    rng, tried, most = random.Random(20261126), 0, 0
    for factor in (1.1, 1.5, 2.0, 2.0, 2.0, 5.0, 100.0, 1e6):
        for loss, norm in ((factor, 1.0), (1.0, factor), (factor, factor)):
            first = rng.randrange(100, 400)
            told = drive(scaled(healthy(rng, 700, noise), first, loss, norm))
            assert "stop" not in told and "roll_back" not in told
            # Normal noise passes six deviations in one step of a billion: the rest is due to the change.
            assert told[:first].count("left_out") == 0
            tried, most = tried + 1, max(most, told.count("left_out"))
    print(f"levels at noise {noise}: {tried} tried, 0 stops, 0 roll-backs, at most {most} steps left out")
    assert most <= 3


def test_a_level_that_doubles_again_and_again_is_adapted_to():
    values = healthy(random.Random(1), 1400, 0.02)
    for first in range(200, 1400, 200):
        values = scaled(values, first, 2.0, 2.0)
    told = drive(values)
    print(f"levels doubled 6 times: {told.count('left_out')} steps left out")
    assert set(told) == {"go", "left_out"} and told.count("left_out") <= 18


def test_a_spike_is_left_out_and_nothing_else():
    rng, tried = random.Random(20261127), 0
    for sigmas in (20, 100, 1000, 1e9):
        for where in (0, 1):
            for _ in range(5):
                values, at = healthy(rng, 500, 0.02), rng.randrange(128, 500)
                mean = (3.0, 0.7)[where]
                values[at] = tuple(mean * (1 + 0.02 * sigmas) if i == where else v for i, v in enumerate(values[at]))
                told = drive(values)
                assert told.count("left_out") == 1 and told[at] == "left_out"
                tried += 1
    print(f"single spikes of 20 to 1e9 sigma: {tried} tried, {tried} left out, no other step")


def test_spikes_that_grow_roll_back():
    rng, tried = random.Random(20261128), 0
    for growth in (1.6, 2.0, 5.0, 100.0):
        for height in (1.0, 10.0):
            values, at = healthy(rng, 400, 0.02), rng.randrange(200, 390)
            for i in range(4):
                values[at + i] = 3.0 + height * growth**i, 0.7
            told = drive(values)
            assert told[at : at + 4] == ["left_out"] * 3 + ["roll_back"]
            tried += 1
    print(f"four growing spikes in a row: {tried} tried, {tried} rolled back")


def test_no_run_is_stopped_that_goes_on():
    """Levels, spikes and bursts that are not finite, shorter than what all roll-backs take, in any order."""
    rng, tried, left_out, rolled_back = random.Random(20261129), 0, 0, 0
    for _ in range(60):
        values = healthy(rng, 1200, rng.choice([0.0, 0.01, 0.1]))
        for _ in range(rng.randrange(1, 12)):
            at, kind = rng.randrange(1200), rng.choice(["level", "spikes", "burst"])
            if kind == "level":
                values = scaled(values, at, rng.uniform(0.2, 5.0), rng.uniform(0.2, 5.0))
            for step in range(at, min(1200, at + rng.randrange(1, 8)) if kind != "level" else at):
                values[step] = (rng.uniform(1, 1e12), rng.uniform(1, 1e12)) if kind == "spikes" else NAN
        broken = [step for step in range(1200 - 16) if all(math.isnan(values[step + i][0]) for i in range(16))]
        told = drive(values)
        assert "stop" not in told or broken
        tried, left_out = tried + 1, left_out + told.count("left_out")
        rolled_back += told.count("roll_back")
    print(f"mixed faults: {tried} runs tried, 0 stopped, {left_out} steps left out, {rolled_back} roll-backs")


def test_what_is_not_finite_for_ever_stops_after_sixteen_steps():
    for first in (0, 1, 127, 128, 500):
        told = drive(healthy(random.Random(first), first, 0.02) + [NAN] * 100)
        assert told.index("stop") == first + 15 and told.count("roll_back") == 3


# ---- whole runs --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("texts") / "texts")


@pytest.fixture(scope="module")
def data(texts, tmp_path_factory):
    """Data and tokenizer that every run here shares."""
    run = tmp_path_factory.mktemp("data") / "run"
    pipeline.prepare(small_recipe(texts), run, lambda line: None)
    return run


def quiet(line):
    pass


def recipe_of(texts, log_steps=False, **training):
    recipe = small_recipe(texts, compute_dtype="float32", **training)
    return dataclasses.replace(recipe, release=dataclasses.replace(recipe.release, log_steps=log_steps))


def make(data, run, recipe, resume=False):
    """A trainer in ``run``, whose data are those of the module."""
    if not run.exists():
        run.mkdir()
        for name in ("data", "tokenizer"):
            (run / name).symlink_to(data / name)
    pipeline.prepare(recipe, run, quiet, resume)
    return Trainer(recipe, run, pipeline.open_rows(run, recipe), resume=resume)


def events(run, *kinds):
    return [line for line in read_records(run / "events.jsonl") if line["event"] in kinds]


def losses(run):
    return [line["loss"] for line in read_records(run / "metrics.jsonl")]


@pytest.fixture
def bad_steps(monkeypatch):
    """Steps whose loss is not finite, in every trainer."""
    bad, backward = set(), Trainer._backward
    monkeypatch.setattr(Trainer, "_backward", lambda self: backward(self) * (math.nan if self.step in bad else 1.0))
    return bad


@pytest.mark.parametrize("factor", [2.0, 100.0])
def test_a_run_whose_gradients_change_for_good_goes_on(texts, data, tmp_path, monkeypatch, factor):
    guard = dataclasses.replace(GUARD, spike_window=16)
    trainer = make(data, tmp_path / "run", recipe_of(texts, steps=48, checkpoint_every=4, guard=guard))
    trainer.start()
    check = trainer.guard.check

    def scaled_check(loss, gradients):
        return check(loss, [part * (factor if trainer.step >= 30 else 1.0) for part in gradients])

    monkeypatch.setattr(trainer.guard, "check", scaled_check)
    trainer.train()
    left_out = events(tmp_path / "run", "step left out")
    print(f"gradient norm times {factor:g} in a run: {len(left_out)} steps left out")
    assert trainer.step == 48 and len(left_out) <= 3 and not events(tmp_path / "run", "roll back")
    assert factor < 100 or [event["step"] for event in left_out] == [30, 31, 32][: len(left_out)] != []


def poisoned(ranks, run, where):
    """Train until a number of the last rank's becomes NaN where no loss shows it; returns the error."""
    recipe = pipeline.read_recipe(run)
    trainer = Trainer(recipe, run, pipeline.open_rows(run, recipe), ranks=ranks)
    trainer.start()
    one_step = trainer._train_step

    def poison():
        done = one_step()
        if trainer.step == 5 and ranks.rank == ranks.world - 1:
            table = trainer.optimizer.parameters["transformer.wte.weight"]
            target = table if where == "weight" else trainer.optimizer.adamw.state[table]["exp_avg_sq"]
            with torch.no_grad():
                target[-1, 3] = math.nan if where == "weight" else math.inf
        return done

    trainer._train_step = poison
    try:
        trainer.train()
    except UserError as error:
        return str(error)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("where", ["weight", "optimiser"])
def test_what_is_not_finite_is_found_before_it_is_saved(world, where, texts, data, tmp_path):
    """In the row of a token that no text holds."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    recipe = recipe_of(texts, steps=12, micro_rows=1, checkpoint_every=3)
    make(data, run, recipe)
    (message,) = set(run_ranks(world, poisoned, run, where))
    name = "transformer.wte.weight" + (".exp_avg_sq" if where == "optimiser" else "")
    assert message.startswith(f"{name} is not finite at step 6: ") and "\n" not in message
    assert "--resume goes on from step 3" in message
    assert events(run, "weights not finite") == [{"event": "weights not finite", "step": 6, "parameter": name}]
    folder = CheckpointFolder(run / "checkpoints")
    assert folder.steps() == [3]
    verify_manifest(folder.path(3))
    make(data, run, recipe, resume=True).train()
    make(data, whole, recipe).train()
    ends = [CheckpointFolder(path / "checkpoints").load(12).weights for path in (run, whole)]
    if world == 1:
        assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert len(losses(run)) == 12


# ---- what a roll-back passes over --------------------------------------------------------------------------------

FATES = {
    "one step": ({1}, [0, 1, 4, 6, 8, 12]),
    "at the beginning": ({0, 1}, [0, 4, 6, 8, 12]),
    "rolled back": ({5, 6, 7, 8}, [0, 1, 12]),
    "at the end": ({10, 11}, [0, 1, 2, 4, 6]),
    "rolled back at the end": ({8, 9, 10, 11}, [0, 1, 2, 4]),
    "rolled back to the beginning": ({0, 1, 2, 3}, [0, 6, 8, 12]),
}


QUICK = ("one step", "rolled back at the end")


@pytest.mark.parametrize(
    "fate", [fate if fate in QUICK else pytest.param(fate, marks=pytest.mark.slow) for fate in FATES]
)
def test_a_run_is_finished_and_published_whatever_was_left_out(fate, texts, data, tmp_path, bad_steps):
    steps, released = FATES[fate]
    bad_steps |= steps
    run, lines = tmp_path / "run", []
    recipe = recipe_of(texts, log_steps=True, checkpoint_every=3)
    make(data, run, recipe)
    done = pipeline.run_recipe(recipe, run, resume=False, log=lines.append, progress=lambda step, metrics: None)
    assert done == released
    for folder in ("release", "analysis"):
        found = {int(re.match(r"step-(\d+)", path.name)[1]) for path in (run / folder).glob("step-*")}
        assert sorted(found) == released, folder
    refs = run / "release" / "hub" / "models--test--small" / "refs"
    assert sorted(int(path.name.removeprefix("step-")) for path in refs.glob("step-*")) == released
    dropped = sorted(set(recipe.released_steps()) - set(released))
    assert sorted({event["step"] for event in events(run, "release left out")}) == dropped
    assert all(any(f"step {step} is not released" in line for line in lines) for step in dropped)
    again = pipeline.run_recipe(recipe, run, resume=True, log=lines.append, progress=lambda step, metrics: None)
    assert again == released


def test_weights_that_never_change_are_published_once(texts, data, tmp_path):
    """All rates 0: no step is left out, and every release holds the same weights."""
    rates = ("matrix_lr", "embedding_lr", "unembedding_lr", "scalar_lr", "gate_lr")
    optimizer = dataclasses.replace(small_recipe(texts).training.optimizer, **dict.fromkeys(rates, 0.0))
    recipe, lines = recipe_of(texts, optimizer=optimizer), []
    make(data, tmp_path / "run", recipe)
    pipeline.run_recipe(recipe, tmp_path / "run", resume=False, log=lines.append, progress=lambda step, metrics: None)
    refs = tmp_path / "run" / "release" / "hub" / "models--test--small" / "refs"
    assert sorted(path.name for path in refs.iterdir()) == ["main", "step-6"]
    assert any("step 12 is not published" in line for line in lines)


# ---- advice that is followed to the letter -----------------------------------------------------------------------

LOWERED = "0.02"


def follow(message, command, out):
    """The command line that ``message`` advises, with nothing added but the value of the option that it names."""
    (option,) = set(re.findall(r"--training[\w.-]+", message))
    assert "lower the learning rates" in message and message.count("\n") == 0
    if "another --out" in message and "--resume" not in message:
        out = out.with_name("another")
    elif "--resume" in message:
        command = [*command, "--resume"]
    return [*command, "--out", str(out), option, LOWERED], out


@pytest.mark.parametrize(
    ("rate", "log_steps", "advice"),
    [
        ("1e15", True, "--resume: the run goes on from step 0"),
        ("1e15", False, "start again in another --out"),
        ("1e30", True, "--resume goes on from step 1"),
        ("1e30", False, "--resume starts again"),
    ],
)
def test_the_advice_works_when_it_is_followed(rate, log_steps, advice, texts, data, tmp_path, capsys):
    """Learning rates that make a run diverge, from the command line."""
    recipe, out = recipe_of(texts, log_steps, steps=40, checkpoint_every=3), tmp_path / "run"
    save_recipe(recipe, tmp_path / "recipe.json")
    command = ["train", str(tmp_path / "recipe.json")]
    for folder in (out, out.with_name("another")):
        folder.mkdir()
        for name in ("data", "tokenizer"):
            (folder / name).symlink_to(data / name)
    with pytest.raises(SystemExit, match="2"):
        main([*command, "--out", str(out), "--training.optimizer.matrix-lr", rate])
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert "not finite" in message and advice in message
    arguments, out = follow(message, command, out)
    main(arguments)
    assert CheckpointFolder(out / "checkpoints").steps()[-1] == 40
    assert pipeline.read_recipe(out).training.optimizer.matrix_lr == float(LOWERED)
    assert math.isfinite(losses(out)[-1])
    if "goes on from step 1" not in advice:  # there the weights have been trained with the rate
        assert losses(out)[-1] < losses(out)[0] - 0.5
    if "another" not in advice:
        (change,) = events(out, "recipe changed")
        expected = {"training.optimizer.matrix-lr": {"before": float(rate), "after": float(LOWERED)}}
        assert change["changes"] == expected


def test_a_run_that_diverges_late_goes_on_from_before(texts, data, tmp_path):
    """Sound until step 6, then resumed with a rate that ruins it, then resumed with a lower one."""
    run, recipe = tmp_path / "run", recipe_of(texts, steps=6, checkpoint_every=3)
    make(data, run, recipe).train()
    with pytest.raises(UserError, match="would end it before; use at least 6"):
        make(data, run, recipe_of(texts, steps=5), resume=True)
    longer = with_training(recipe, steps=40)
    ruinous = dataclasses.replace(recipe.training.optimizer, matrix_lr=1e15)
    with pytest.raises(UserError, match=r"not finite at step \d+, nor at any .* the run goes on from step 3$"):
        make(data, run, with_training(longer, optimizer=ruinous), resume=True).train()
    assert CheckpointFolder(run / "checkpoints").steps() == [3]
    assert not any(CheckpointFolder(run / "checkpoints").load(3).state["policy"].values())
    make(data, run, longer, resume=True).train()
    assert CheckpointFolder(run / "checkpoints").steps()[-1] == 40 and len(losses(run)) == 40
    assert losses(run)[-1] < losses(run)[0] - 0.5
    changed = [set(event["changes"]) for event in events(run, "recipe changed")]
    rate = "training.optimizer.matrix-lr"
    assert changed == [{"training.steps", rate}, {rate}]
