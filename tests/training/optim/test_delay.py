"""Gradients applied a step late: against the definition, over ranks, and over an interruption."""

import dataclasses

import pytest
import torch

from cognica_poe import pipeline
from cognica_poe.recipe.fields import ObjectiveRecipe, OptimizerRecipe, RanksRecipe
from cognica_poe.training.optim.delay import DelayedOptimizer
from cognica_poe.training.optim.optimizer import MuonAdamW
from cognica_poe.training.parallel.zero2 import DistMuonAdamW
from cognica_poe.training.trainer import Trainer
from tests.gloo import run_ranks
from tests.runs import small_recipe, with_training, write_texts
from tests.training.parallel.test_zero2 import (
    MISSING,
    STEPS,
    TOKENS,
    Shapes,
    gradient,
    relative_error,
    schedule,
    step_once,
    values,
)


def set_gradients(model, step):
    """The gradient of a step depends on the weights, so that it matters at which it is taken."""
    for name, parameter in model.named_parameters():
        if name not in MISSING:
            fresh = gradient(name, step, 0, parameter.dtype)
            parameter.grad = fresh + 0.01 * parameter.detach() ** 3


def train_by_definition(steps, error_feedback=False, left_out=()):
    """Two lists: gradients at every step, and updates; each update uses the oldest gradient that was not applied."""
    model = Shapes(torch.float64)
    optimizer = MuonAdamW(model, OptimizerRecipe(muon_dtype="float64"), TOKENS)
    waiting, last = [], None
    for step in range(steps):
        set_gradients(model, step)
        if step in left_out:
            optimizer.zero_grad()
            continue
        waiting.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        if len(waiting) == 2:
            before = values(model)
            for name, parameter in model.named_parameters():
                parameter.grad = waiting[0].get(name)
            optimizer.step(*schedule(step))
            update = {name: value - before[name] for name, value in values(model).items()}
            if error_feedback and last is not None:
                with torch.no_grad():
                    for name, parameter in model.named_parameters():
                        parameter.copy_(before[name] + 2 * update[name] - last[name])
            waiting.pop(0)
            last = update
        optimizer.zero_grad()
    return values(model)


def train_delayed(steps, error_feedback=False, left_out=(), on_device=False):
    model = Shapes(torch.float64)
    inner = MuonAdamW(model, OptimizerRecipe(muon_dtype="float64"), TOKENS)
    optimizer = DelayedOptimizer(inner, error_feedback)
    for step in range(steps):
        set_gradients(model, step)
        keep = torch.tensor(step not in left_out)
        if on_device:
            optimizer.step(*schedule(step), keep=keep)
        elif keep:
            optimizer.step(*schedule(step))
        optimizer.zero_grad()
    return values(model)


@pytest.mark.parametrize("error_feedback", [False, True])
@pytest.mark.parametrize("left_out", [(), (0,), (3, 4)])
def test_delayed_equals_its_definition(left_out, error_feedback):
    expected = train_by_definition(STEPS, error_feedback, left_out)
    assert relative_error(train_delayed(STEPS, error_feedback, left_out), expected) <= 1e-12


@pytest.mark.parametrize("error_feedback", [False, True])
def test_a_step_that_is_left_out_where_it_lives(error_feedback):
    """A device that decides by itself does what the host does."""
    expected = train_delayed(STEPS, error_feedback, (3, 4))
    assert relative_error(train_delayed(STEPS, error_feedback, (3, 4), on_device=True), expected) <= 1e-6


def test_the_first_update_comes_with_the_second_step():
    start = values(Shapes(torch.float64))
    assert relative_error(train_delayed(1), start) == 0.0
    assert relative_error(train_delayed(2), start) > 0.0


def train_on_ranks(ranks, error_feedback, stop_at=None):
    """Delayed training of the same batches on every number of ranks; ``stop_at``: through a saved state there."""

    def make():
        model = Shapes()
        inner = DistMuonAdamW(model, OptimizerRecipe(), TOKENS, ranks, RanksRecipe())
        return model, DelayedOptimizer(inner, error_feedback)

    model, optimizer = make()
    for step in range(STEPS):
        step_once(model, optimizer, step, list(range(8))[ranks.rank :: ranks.world], 1)
        if step == stop_at:
            state, weights = whole(optimizer.state_dict(), ranks), values(model)
            model, optimizer = make()
            optimizer.load_weights(weights)
            optimizer.load_state_dict(state)
    return values(model)


def whole(pieces, ranks):
    """The state that a checkpoint of all ranks holds."""
    every = [None] * ranks.world
    torch.distributed.all_gather_object(every, pieces)
    names = dict.fromkeys(name for part in every for name in part)
    joined = {name: [part[name] for part in every if name in part] for name in names}
    return {name: parts[0] if parts[0].ndim == 0 else torch.cat(parts) for name, parts in joined.items()}


def train_one_process(error_feedback):
    model = Shapes()
    optimizer = DelayedOptimizer(MuonAdamW(model, OptimizerRecipe(), TOKENS), error_feedback)
    for step in range(STEPS):
        step_once(model, optimizer, step, list(range(8)), 1)
    return values(model)


@pytest.mark.parametrize("error_feedback", [False, True])
@pytest.mark.parametrize("world", [2, 4])
def test_ranks_with_delay_equal_one_process_with_the_same_delay(world, error_feedback):
    expected = train_one_process(error_feedback)
    for found in run_ranks(world, train_on_ranks, error_feedback):
        assert relative_error(found, expected) <= 4e-6


@pytest.mark.parametrize("error_feedback", [False, True])
def test_a_gradient_in_flight_survives_a_checkpoint_of_ranks(error_feedback):
    expected = run_ranks(2, train_on_ranks, error_feedback)[0]
    found = run_ranks(2, train_on_ranks, error_feedback, 4)[0]
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("error_feedback", [False, True])
def test_a_run_resumed_with_a_gradient_in_flight(tmp_path, error_feedback):
    objective = ObjectiveRecipe(gradient_flow=1.0, gradient_delay=1, error_feedback=error_feedback)
    recipe = constant(small_recipe(write_texts(tmp_path / "texts"), steps=8, objective=objective))
    found = {}
    for name, ends in (("whole", [8]), ("parts", [3, 8])):
        run = tmp_path / name
        for end in ends:
            part, resume = with_training(recipe, steps=end), end != ends[0]
            pipeline.prepare(part, run, lambda line: None, resume=resume)
            trainer = Trainer(part, run, pipeline.open_rows(run, part), resume=resume)
            trainer.train()
        found[name] = {**trainer.optimizer.weights(), **trainer.optimizer.state_dict()}
    assert any(name.endswith(".pending") for name in found["whole"])
    assert found["whole"].keys() == found["parts"].keys()
    for name, value in found["whole"].items():
        assert torch.equal(value, found["parts"][name]), name


def constant(recipe):
    """With rates that do not look at the length of the run."""
    training = recipe.training
    schedule = dataclasses.replace(training.schedule, warmup_steps=2, warmdown_ratio=0.0)
    return with_training(recipe, schedule=schedule, optimizer=dataclasses.replace(training.optimizer, weight_decay=0.0))
