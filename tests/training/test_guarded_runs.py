"""Faults inside a whole run: a bad gradient on one rank, spikes, a rank that computes wrongly, late observations."""

import shutil

import pytest
import torch

from cognica_poe import pipeline
from cognica_poe.errors import UserError
from cognica_poe.recipe.fields import GuardRecipe
from cognica_poe.recipe.stored import save_recipe
from cognica_poe.training import replica as replica_module
from cognica_poe.training.build import build_model
from cognica_poe.training.checkpoint import CheckpointFolder
from cognica_poe.training.journal import read_records
from cognica_poe.training.parallel.ranks import Ranks
from cognica_poe.training.trainer import Trainer
from tests.gloo import run_ranks
from tests.runs import small_recipe, with_training, write_texts

STEPS = 12
GROWING = {7: 1e9, 8: 1e18}
SPIKES = GuardRecipe(spike_window=4, spike_sigma=1000.0, max_in_a_row=2, pass_over=1, compare_ranks_every=2)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    training = {"steps": STEPS, "batch_rows": 4, "micro_rows": 1, "checkpoint_every": 3, "compute_dtype": "float32"}
    recipe = small_recipe(write_texts(folder / "texts"), **training)
    pipeline.prepare(recipe, folder / "run", lambda line: None)
    pipeline.open_rows(folder / "run", recipe).facts(0)
    return folder / "run"


@pytest.fixture
def fresh(prepared, tmp_path):
    return lambda name: shutil.copytree(prepared, tmp_path / name)


def train(ranks, run, factors, alone=False, in_flight=0, resume=False):
    """Train in fp64; ``factors`` multiplies gradients by step, on the last rank only.

    Returns the weights before every step that was launched, and the error that ended the run, if any.
    """
    replica_module.build_model = lambda *args: build_model(*args).double()
    recipe = with_training(pipeline.read_recipe(run), guard=SPIKES)
    ranks = Ranks() if alone else ranks
    trainer = Trainer(recipe, run, pipeline.open_rows(run, recipe), resume=resume, ranks=ranks)
    trainer.start()
    trainer.steps_in_flight = in_flight
    history = []

    def faulty(gradient):
        factor = factors.get(trainer.step, 1.0)
        return gradient * factor if ranks.rank == ranks.world - 1 else gradient

    trainer.model.transformer.h[1].mlp.c_fc.weight.register_hook(faulty)
    one_step = trainer._train_step

    def recorded():
        history.append((trainer.step, {n: p.detach().clone() for n, p in trainer.model.named_parameters()}))
        return one_step()

    trainer._train_step = recorded
    try:
        trainer.train()
    except UserError as error:
        return history, str(error)
    return history, None


def events(run):
    return [line for line in read_records(run / "events.jsonl") if line["event"] not in ("start", "end", "resume")]


def metric_steps(run):
    return [line["step"] for line in read_records(run / "metrics.jsonl")]


def equal(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


def end(run):
    return CheckpointFolder(run / "checkpoints").load(STEPS).weights


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_gradient_on_one_rank_is_left_out_on_all(world, bad, fresh):
    run = fresh("run")
    for history, error in run_ranks(world, train, run, {5: bad}):
        assert error is None
        before = dict(history)
        assert equal(before[5], before[6]) and not equal(before[6], before[7])
    (event,) = events(run)
    assert (event["event"], event["step"], event["reason"]) == ("step left out", 5, "non-finite")
    assert metric_steps(run) == [1, 2, 3, 4, 5, 7, 8, 9, 10, 11, 12]


def test_ranks_and_one_process_leave_out_alike(fresh):
    """On one process the fault stands in the last micro-batches alone, as on the last rank."""
    one, two = fresh("one"), fresh("two")
    run_ranks(1, train, one, {5: float("nan")}, True)
    run_ranks(2, train, two, {5: float("nan")})
    expected = end(one)
    for name, value in end(two).items():
        assert (value - expected[name]).norm() <= 2e-6 * expected[name].norm(), name


@pytest.mark.parametrize("world", [1, 2])
def test_spikes_roll_back_and_are_passed_over(world, fresh):
    """Steps 7 and 8 spike, each above the one before: rolled back to step 6; steps 6 to 8 are passed over."""
    run = fresh("run")
    histories = run_ranks(world, train, run, GROWING)
    for history, error in histories:
        assert error is None
        assert [step for step, _ in history] == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]
        assert equal(history[7][1], history[8][1]) and equal(history[9][1], history[6][1])  # left out; rolled back
    first, second = events(run)
    assert (first["event"], first["step"]) == ("step left out", 7)
    assert (second["event"], second["step"], second["pass_over"], second["to"]) == ("roll back", 8, [6, 8], 6)
    assert metric_steps(run) == [1, 2, 3, 4, 5, 6, 10, 11, 12]


def test_a_roll_back_is_remembered_after_a_restart(fresh):
    """The checkpoint that a run went back to knows of it at once, and none is made of steps that are passed over."""
    run, whole = fresh("run"), fresh("whole")
    for folder in (run, whole):
        run_ranks(2, train, folder, GROWING)
    assert CheckpointFolder(run / "checkpoints").steps() == [3, 6, STEPS]
    CheckpointFolder(run / "checkpoints").delete([STEPS])
    ((history, error), _) = run_ranks(2, train, run, {}, False, 0, True)
    assert error is None and history[0][0] == 9
    assert equal(end(run), end(whole))
    state = CheckpointFolder(run / "checkpoints").load(STEPS).state
    assert state["policy"]["ranges"] == [[6, 8]]


def test_faults_that_no_checkpoint_helps_stop_all_ranks(fresh):
    run = fresh("run")
    outcomes = run_ranks(2, train, run, dict.fromkeys(range(STEPS), float("nan")))
    errors = [error for _, error in outcomes]
    assert errors[0] == errors[1] and "not finite at step 0" in errors[0]
    assert errors[0].endswith("--resume: the run starts again")
    assert events(run)[-1] == {"event": "non-finite loss", "step": 0}
    assert CheckpointFolder(run / "checkpoints").steps() == []


def test_late_observations_change_nothing(fresh):
    """As on an accelerator: the host reads a step's numbers after the next step was launched."""
    runs = {in_flight: fresh(f"late-{in_flight}") for in_flight in (0, 1)}
    for in_flight, run in runs.items():
        run_ranks(1, train, run, {5: float("nan")}, True, in_flight)
    assert equal(end(runs[0]), end(runs[1]))
    lines = []
    for run in runs.values():
        metrics = read_records(run / "metrics.jsonl")
        lines.append(
            [{k: v for k, v in line.items() if k not in ("tokens_per_second", "rows_wait")} for line in metrics]
        )
    assert lines[0] == lines[1] and len(lines[0]) == STEPS - 1
    assert events(runs[0]) == events(runs[1])


def diverge(ranks, run):
    recipe = with_training(pipeline.read_recipe(run), guard=SPIKES)
    trainer = Trainer(recipe, run, pipeline.open_rows(run, recipe), ranks=ranks)
    one_step = trainer._train_step

    def flip():
        done = one_step()
        if trainer.step == 4 and ranks.rank == 2:
            with torch.no_grad():
                trainer.model.lm_head.weight.view(torch.int32)[7, 3] ^= 1
        return done

    trainer._train_step = flip
    try:
        trainer.train()
    except UserError as error:
        return str(error)


def test_a_rank_that_differs_is_named_and_nothing_is_saved(fresh):
    run = fresh("run")
    recipe = pipeline.read_recipe(run)
    save_recipe(with_training(recipe, batch_rows=3), run / "recipe.json")
    errors = run_ranks(3, diverge, run)
    assert len(set(errors)) == 1 and "rank 2 differs in lm_head.weight at step 4" in errors[0]
    assert CheckpointFolder(run / "checkpoints").steps() == [3]
    assert events(run)[-1]["event"] == "ranks differ"
