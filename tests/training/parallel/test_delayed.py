"""Stages on ranks of their own with gradients that come a step late: the weights of one process with the same delay."""

import pytest
import torch

from cognica_poe.errors import UserError
from cognica_poe.recipe.fields import ObjectiveRecipe, OptimizerRecipe
from cognica_poe.training.objective import Objective
from cognica_poe.training.optim.delay import DelayedOptimizer
from cognica_poe.training.optim.optimizer import MuonAdamW
from cognica_poe.training.parallel.delayed import DelayedStageMuonAdamW, DelayedStageObjective
from cognica_poe.training.parallel.ranks import Ranks
from tests.conftest import make_model
from tests.gloo import run_ranks

STEPS, MICRO, ROWS, LENGTH = 5, 6, 2, 20
LAYOUTS = {2: [2, 1, 2], 4: [2, 1, 1, 1]}
WEIGHTS = {2: (0.2, 0.5, 1.0), 4: (0.2, 0.0, 0.5, 1.0)}
RATES = OptimizerRecipe(lr_scaling=False)


def options(world):
    return ObjectiveRecipe(gradient_flow=0.7, exit_weights=WEIGHTS[world], gradient_delay=1)


def fresh_model(world, dtype):
    stages = LAYOUTS[world]
    return make_model(poe_stage_layers=stages, num_hidden_layers=sum(stages), poe_mode="hier", dtype=dtype).train()


def micro_batches(step):
    ids = torch.randint(97, (MICRO * ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(step))
    return [(part[:, :-1], part[:, 1:]) for part in ids.split(ROWS)]


def advance(objective, optimizer, step, left_out=False):
    losses = sum(objective.backward(*part, 1 / MICRO) for part in micro_batches(step)) / MICRO
    optimizer.gradients()
    if not left_out:
        optimizer.step((step + 1) / 40, 0.85 + 0.02 * step, 1.0 - 0.1 * step)
    optimizer.zero_grad()
    return losses


def one_process(world, dtype):
    model = fresh_model(world, dtype)
    objective = Objective(model, options=options(world))
    optimizer = DelayedOptimizer(MuonAdamW(model, RATES, 2**18))
    losses = [advance(objective, optimizer, step) for step in range(STEPS)]
    return {n: p.detach().clone() for n, p in model.named_parameters()}, optimizer.state_dict(), torch.stack(losses)


def staged(ranks, dtype):
    model = fresh_model(ranks.world, dtype)
    objective = DelayedStageObjective(model, torch.float32, ranks, MICRO, options=options(ranks.world))
    return objective, DelayedStageMuonAdamW(objective, RATES, 2**18)


def train(ranks, dtype, saved_at=(), resumed_at=()):
    """``saved_at``: steps after which the state is looked at; ``resumed_at``: after which another process goes on."""
    objective, optimizer = staged(ranks, dtype)
    losses = []
    for step in range(STEPS):
        losses.append(ranks.mean(advance(objective, optimizer, step)))
        if step in saved_at or step in resumed_at:
            state, weights = gathered(optimizer.state_dict()), gathered(optimizer.weights())
        if step in resumed_at:
            objective, optimizer = staged(ranks, dtype)
            optimizer.load_weights(weights)
            optimizer.load_state_dict(state)
    return optimizer.weights(), optimizer.state_dict(), torch.stack(losses)


def gathered(pieces):
    """What a checkpoint of all ranks holds: every tensor is whole on one of them."""
    every = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(every, {name: t.clone() for name, t in pieces.items()})
    return {name: t for part in every for name, t in part.items()}


def relative_error(actual, expected):
    return float((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-6), (torch.float64, 1e-10)])
@pytest.mark.parametrize("world", [2, 4])
def test_weights_state_and_losses_are_those_of_one_process_with_the_same_delay(world, dtype, tolerance):
    weights, state, losses = one_process(world, dtype)
    results = run_ranks(world, train, dtype)
    found = {name: value for result in results for name, value in result[0].items()}
    assert found.keys() == weights.keys()
    start = dict(fresh_model(world, dtype).named_parameters())
    for name, value in found.items():
        assert relative_error(value, weights[name]) <= tolerance, name
        assert name == "backout_lambda" or not torch.equal(value, start[name]), name
    parts = {name: value for result in results for name, value in result[1].items()}
    assert parts.keys() == state.keys()
    assert any(name.endswith(".pending") for name in parts)
    for name, value in parts.items():
        assert relative_error(value, state[name]) <= 100 * tolerance, name
    for result in results:
        torch.testing.assert_close(result[2], losses, rtol=tolerance, atol=0)


@pytest.mark.parametrize("world", [2, 4])
def test_looking_at_the_state_and_going_on_elsewhere_change_no_bit(world):
    plain = run_ranks(world, train, torch.float32)
    looked = run_ranks(world, train, torch.float32, (0, 2))
    resumed = run_ranks(world, train, torch.float32, (), (0, 2))
    for first, *others in zip(plain, looked, resumed, strict=True):
        for other in others:
            for part in range(2):
                assert first[part].keys() == other[part].keys()
                for name, value in first[part].items():
                    assert torch.equal(value, other[part][name]), name
            assert torch.equal(first[2], other[2])


def train_from_one_process(ranks, weights, state):
    objective, optimizer = staged(ranks, torch.float64)
    optimizer.load_weights(weights)
    optimizer.load_state_dict(state)
    advance(objective, optimizer, STEPS)
    objective.drain()
    return optimizer.weights()


def test_a_checkpoint_of_one_process_goes_on_in_a_line():
    weights, state, _ = one_process(2, torch.float64)
    model = fresh_model(2, torch.float64)
    objective, optimizer = Objective(model, options=options(2)), DelayedOptimizer(MuonAdamW(model, RATES, 2**18))
    optimizer.load_weights(weights)
    optimizer.load_state_dict({name: value.clone() for name, value in state.items()})
    advance(objective, optimizer, STEPS)
    for pieces in run_ranks(2, train_from_one_process, weights, state):
        for name, value in pieces.items():
            assert relative_error(value, dict(model.named_parameters())[name].detach()) <= 1e-10, name


def train_with_a_step_left_out(ranks):
    objective, optimizer = staged(ranks, torch.float64)
    kept = []
    for step in range(4):
        advance(objective, optimizer, step, left_out=step == 2)
        kept.append({name: value.clone() for name, value in optimizer.weights().items()})
    objective.drain()
    return kept


def test_a_step_that_is_left_out_leaves_the_weights_alone_and_the_line_goes_on():
    for kept in run_ranks(2, train_with_a_step_left_out):
        for name, value in kept[1].items():
            assert torch.equal(kept[2][name], value), name
        assert any(not torch.equal(kept[3][name], value) for name, value in kept[2].items())


def test_too_few_micro_batches_are_refused():
    with pytest.raises(UserError, match="at least 6 micro-batches in a step to work without waiting, not 5"):
        DelayedStageObjective(fresh_model(4, torch.float32), torch.float32, Ranks(0, 4), 5)
