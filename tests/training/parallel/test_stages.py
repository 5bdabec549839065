"""Stages on ranks of their own: the weights of one process, and nothing sent backward."""

import dataclasses

import pytest
import torch
import torch.distributed as dist

from cognica_poe.errors import UserError
from cognica_poe.recipe.fields import ObjectiveRecipe, OptimizerRecipe
from cognica_poe.recipe.named import RECIPES
from cognica_poe.recipe.rules import check_run
from cognica_poe.training.objective import Objective
from cognica_poe.training.optim.optimizer import MuonAdamW
from cognica_poe.training.parallel.ranks import Ranks
from cognica_poe.training.parallel.stages import StageParallelMuonAdamW, StageParallelObjective, assign_stages
from tests.conftest import make_model
from tests.gloo import run_ranks

STEPS, MICRO, ROWS, LENGTH = 4, 3, 2, 20
LAYOUTS = {2: [2, 1, 2], 4: [2, 1, 1, 1]}


RATES = OptimizerRecipe(lr_scaling=False)


def fresh_model(stages, **changes):
    changes = {"dtype": torch.float32, **changes}
    return make_model(poe_stage_layers=stages, num_hidden_layers=sum(stages), **changes).train()


def micro_batches(step):
    ids = torch.randint(97, (MICRO * ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(step))
    return [(part[:, :-1], part[:, 1:]) for part in ids.split(ROWS)]


def advance(objective, optimizer, step):
    losses = sum(objective.backward(*part, 1 / MICRO) for part in micro_batches(step)) / MICRO
    # As in a warm-up: at full rate Adam makes a visible step of a gradient that is nothing but rounding.
    optimizer.step((step + 1) / 40, 0.85 + 0.02 * step, 1.0 - 0.1 * step)
    optimizer.zero_grad()
    return losses


def one_process(stages, **changes):
    """Weights, optimiser state and losses of every step on one plain process."""
    model = fresh_model(stages, **changes)
    objective = Objective(model)
    optimizer = MuonAdamW(model, RATES, 2**18)
    losses = [advance(objective, optimizer, step) for step in range(STEPS)]
    return {n: p.detach().clone() for n, p in model.named_parameters()}, optimizer.state_dict(), torch.stack(losses)


def staged(ranks, stages, changes):
    model = fresh_model(stages, **changes)
    objective = StageParallelObjective(model, torch.float32, ranks)
    return model, objective, StageParallelMuonAdamW(objective, RATES, 2**18)


def train(ranks, stages, changes):
    _, objective, optimizer = staged(ranks, stages, changes)
    losses = []
    for step in range(STEPS):
        loss = advance(objective, optimizer, step)
        losses.append(ranks.mean(loss))
    shared = {name: p.detach().clone() for name, p in objective.shared().items()}
    return optimizer.weights(), optimizer.state_dict(), shared, torch.stack(losses)


def relative_error(actual, expected):
    return float((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize(
    ("world", "changes"), [(1, {}), (2, {}), (4, {}), (2, {"per_stage_head": False, "poe_alpha": 0.5})]
)
def test_weights_and_state_are_those_of_one_process(world, changes, dtype, tolerance):
    stages, changes = LAYOUTS.get(world, [2, 1, 2]), {**changes, "dtype": dtype}
    weights, state, losses = one_process(stages, **changes)
    start = {name: p.detach() for name, p in fresh_model(stages, **changes).named_parameters()}
    results = run_ranks(world, train, stages, changes)
    pieces = [result[0] for result in results]
    assert sum(map(len, pieces)) == len(weights)  # every tensor once
    for name, value in {n: v for piece in pieces for n, v in piece.items()}.items():
        assert relative_error(value, weights[name]) <= tolerance, name
        assert name == "backout_lambda" or not torch.equal(value, start[name]), name
    parts = {key: value for result in results for key, value in result[1].items()}
    assert parts.keys() == state.keys()
    for key, value in parts.items():
        assert relative_error(value, state[key]) <= 50 * tolerance, key
    for result in results:
        torch.testing.assert_close(result[3], losses, rtol=tolerance, atol=0)


@pytest.mark.parametrize("world", [2, 4])
def test_what_is_shared_is_bit_equal_on_all_ranks(world):
    first, *others = [result[2] for result in run_ranks(world, train, LAYOUTS[world], {})]
    assert {"lm_head.weight", "transformer.wte.weight", "resid_lambdas", "smear_gate.weight"} <= first.keys()
    for other in others:
        assert all(torch.equal(other[name], value) for name, value in first.items())


def count_messages(ranks, stages):
    """Every call of torch.distributed in one step: ``(kind, peer, shape)``."""
    _, objective, optimizer = staged(ranks, stages, {})
    advance(objective, optimizer, 0)
    seen, originals = [], {}
    for kind in ("isend", "irecv", "send", "recv", "all_reduce", "broadcast", "all_gather", "all_to_all_single"):
        original = originals[kind] = getattr(dist, kind)

        def record(tensor, *args, kind=kind, original=original, **kwargs):
            seen.append((kind, args[0] if args else None, tuple(tensor.shape)))
            return original(tensor, *args, **kwargs)

        setattr(dist, kind, record)
    advance(objective, optimizer, 1)
    for kind, original in originals.items():
        setattr(dist, kind, original)
    return seen, sum(p.numel() for p in objective.shared().values())


@pytest.mark.parametrize("world", [2, 4])
def test_nothing_is_sent_backward(world):
    """Per micro-batch one message to the next rank; per step one sum of what is shared. That is all."""
    states = (ROWS, LENGTH, 48)
    for rank, (seen, shared) in enumerate(run_ranks(world, count_messages, LAYOUTS[world])):
        expected = []
        if rank > 0:
            expected += [("irecv", rank - 1, states)] * MICRO
        if rank < world - 1:
            expected += [("isend", rank + 1, states)] * MICRO
        expected.append(("all_reduce", None, (shared,)))
        assert sorted(seen, key=str) == sorted(expected, key=str)


def norms(ranks, stages):
    """What a trainer's guard sees of one step, and whether a step that is left out changes anything."""
    _, objective, optimizer = staged(ranks, stages, {"dtype": torch.float64})
    for part in micro_batches(0):
        objective.backward(*part, 1 / MICRO)
    squares = sum((g.square().sum() for g in optimizer.gradients()), torch.zeros((), dtype=torch.float64))
    again = sum((g.square().sum() for g in optimizer.gradients()), torch.zeros((), dtype=torch.float64))
    assert torch.equal(squares, again)  # summed once
    before = {name: value.clone() for name, value in optimizer.weights().items()}
    optimizer.step(1.0, 0.9, 1.0, keep=torch.tensor(False))
    unchanged = all(torch.equal(value, before[name]) for name, value in optimizer.weights().items())
    return ranks.mean(squares) * ranks.world, unchanged


def test_the_gradient_norm_counts_every_element_once():
    model = fresh_model(LAYOUTS[4], dtype=torch.float64)
    objective = Objective(model)
    for part in micro_batches(0):
        objective.backward(*part, 1 / MICRO)
    expected = sum(p.grad.square().sum() for p in model.parameters() if p.grad is not None)
    for world in (1, 2, 4):
        for squares, unchanged in run_ranks(world, norms, LAYOUTS[4]):
            torch.testing.assert_close(squares, expected, rtol=1e-12, atol=0)
            assert unchanged


def resume(ranks, stages, weights, state):
    _, objective, optimizer = staged(ranks, stages, {"seed": 5, "dtype": torch.float64})
    optimizer.load_weights(weights)
    optimizer.load_state_dict({key: value.clone() for key, value in state.items()})  # ranks share what they are sent
    for step in range(STEPS, 2 * STEPS):
        advance(objective, optimizer, step)
    return optimizer.weights()


def test_resuming_from_the_pieces_of_one_process():
    """A plain run goes on with its stages on two ranks."""
    stages = LAYOUTS[2]
    weights, state, _ = one_process(stages, dtype=torch.float64)
    model = fresh_model(stages, dtype=torch.float64)
    objective, optimizer = Objective(model), MuonAdamW(model, RATES, 2**18)
    model.load_state_dict(weights)
    optimizer.load_state_dict({key: value.clone() for key, value in state.items()})
    for step in range(STEPS, 2 * STEPS):
        advance(objective, optimizer, step)
    expected = dict(model.named_parameters())
    for piece in run_ranks(2, resume, stages, weights, state):
        for name, value in piece.items():
            assert relative_error(value, expected[name].detach()) <= 1e-12, name


def test_other_ranks_stages_are_not_held():
    """Rank 1 of 2 keeps what is shared and the last stages; the rest has no memory and no gradient."""
    model, objective, optimizer = staged(Ranks(1, 2), LAYOUTS[2], {})
    held = {name for name, p in model.named_parameters() if p.device.type != "meta"}
    assert held == optimizer.parameters.keys()
    layers = {int(name.split(".")[2]) for name in held if name.startswith("transformer.h.")}
    assert layers == {layer for stage in objective.stages for layer in model.config.stage_layers(stage)}
    assert {name for name in held if name.startswith("lm_head_stages.")} == {
        f"lm_head_stages.{stage}.weight" for stage in objective.stages
    }


def test_stages_are_shared_out_by_work():
    config = make_model(poe_stage_layers=[16, 6, 5, 5], num_hidden_layers=32).config
    assert assign_stages(config, 2) == [range(0, 1), range(1, 4)]
    assert assign_stages(config, 4) == [range(0, 1), range(1, 2), range(2, 3), range(3, 4)]
    assert assign_stages(config, 1) == [range(0, 4)]
    even = make_model(poe_stage_layers=[2, 2, 2, 2], num_hidden_layers=8).config
    assert assign_stages(even, 2) == [range(0, 2), range(2, 4)]
    with pytest.raises(UserError, match="at most 4 ranks"):
        assign_stages(even, 5)


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("hier", ObjectiveRecipe()),
        ("flat", ObjectiveRecipe(gradient_flow=0.3)),
        ("flat", ObjectiveRecipe(late_gradient_flow=1.0)),
    ],
)
def test_stages_that_send_gradients_are_not_trained_apart(mode, options):
    with pytest.raises(UserError, match="needs poe_mode flat without gradient flow"):
        StageParallelObjective(make_model(poe_mode=mode), torch.float32, Ranks(0, 2), options=options)


def test_a_pool_over_stages_of_other_ranks_is_refused():
    with pytest.raises(UserError, match="cannot train residual_logop"):
        StageParallelObjective(make_model(poe_mode="residual_logop"), torch.float32, Ranks(0, 2))
    recipe = RECIPES["tiny"]
    model = dataclasses.replace(recipe.model, poe_mode="residual_logop")
    ranks = dataclasses.replace(recipe.training.ranks, parallel="stages")
    with pytest.raises(UserError, match="cannot train residual_logop"):
        check_run(dataclasses.replace(recipe, model=model, training=dataclasses.replace(recipe.training, ranks=ranks)))
