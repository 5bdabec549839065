"""Exits inside stages: they learn what one graph says, send nothing back, and change nothing that is trained beside."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file

from cognica_poe import pipeline
from cognica_poe.modeling.configuration_cognica_poe import CognicaPoEConfig
from cognica_poe.recipe.fields import ModelRecipe, ObjectiveRecipe, OptimizerRecipe, RanksRecipe
from cognica_poe.recipe.named import find_recipe
from cognica_poe.recipe.rules import check_run
from cognica_poe.recipe.stored import fixed_sha256
from cognica_poe.training.build import build_model
from cognica_poe.training.objective import Objective
from cognica_poe.training.optim.delay import DelayedOptimizer
from cognica_poe.training.optim.optimizer import MuonAdamW
from cognica_poe.training.parallel.delayed import DelayedStageMuonAdamW, DelayedStageObjective
from cognica_poe.training.parallel.zero2 import DistMuonAdamW
from cognica_poe.training.trainer import Trainer
from tests.conftest import make_model
from tests.gloo import run_ranks
from tests.oracles.objective import exit_losses, one_shot_loss, stage_losses
from tests.runs import small_recipe, write_texts
from tests.training.parallel import test_delayed as delayed
from tests.training.parallel import test_stages as stages
from tests.training.test_objective import (
    accumulated,
    assert_same_gradients,
    assert_sections_are_in_order,
    tokens,
    training_model,
)
from tests.training.test_objective_family import found_gradients

EXITS = [1, 4]
CASES = [
    ("flat", ObjectiveRecipe(), "off"),
    ("flat", ObjectiveRecipe(), "layers"),
    ("hier", ObjectiveRecipe(), "off"),
    ("hier", ObjectiveRecipe(), "stages"),
    ("hier", ObjectiveRecipe(gradient_flow=0.3, exit_weights=(0.3, 0.0, 0.7)), "stages"),
    ("none", ObjectiveRecipe(), "off"),
]


@pytest.mark.parametrize("rank", [0, 5])
@pytest.mark.parametrize(("mode", "options", "recompute"), CASES)
def test_exits_learn_as_in_one_graph(mode, options, recompute, rank):
    model = training_model(mode, [5] if mode == "none" else [2, 1, 2], poe_exit_layers=EXITS, exit_head_rank=rank)
    inputs, targets = tokens()
    flow = options.flow(mode, 0.0)
    of_stages = stage_losses(model, inputs, targets, flow, options.exit_weights)
    exits = exit_losses(model, inputs, targets)
    total = one_shot_loss(model, inputs, targets, flow, options.exit_weights)
    (total + sum(exits) * (1 if mode == "none" else 1 / 3)).backward()
    expected = found_gradients(model)
    model.zero_grad()
    losses = Objective(model, recompute=recompute, options=options).backward(inputs, targets)
    torch.testing.assert_close(losses, torch.stack([*of_stages, *exits]).detach(), atol=1e-10, rtol=0)
    assert_same_gradients(found_gradients(model), expected)
    names = [name for name in expected if name.startswith("lm_head_exits.")]
    assert len(names) == (4 if rank else 2) and all(expected[name] is not None for name in names)


@pytest.mark.parametrize(("mode", "options", "recompute"), CASES)
def test_nothing_else_is_trained_otherwise(mode, options, recompute):
    """Bit for bit the same gradients of everything else as in the model without exits."""
    layout, inputs = [5] if mode == "none" else [2, 1, 2], tokens()
    with_exits, without = training_model(mode, layout, poe_exit_layers=EXITS), training_model(mode, layout)
    without.load_state_dict({n: w for n, w in with_exits.state_dict().items() if "exits" not in n})
    for model in (with_exits, without):
        Objective(model.float(), recompute=recompute, options=options).backward(*inputs)
    found = accumulated(with_exits)
    assert found.keys() - accumulated(without).keys() == {"lm_head_exits.0.weight", "lm_head_exits.1.weight"}
    for name, gradient in accumulated(without).items():
        assert found[name] is None if gradient is None else torch.equal(found[name], gradient), name


@pytest.mark.parametrize("rank", [0, 5])
def test_a_recipe_with_exits_trains_the_same_model(rank):
    """From the initial weights on: three steps of the optimiser, bit for bit."""
    shape = {"vocab_size": 97, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 5, "head_dim": 12}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    trained = []
    for more in ({}, {"poe_exit_layers": (1, 4), "exit_head_rank": rank}):
        model = build_model(ModelRecipe(**shape, poe_stage_layers=(2, 1, 2), **more), seed=3).train()
        objective, optimizer = Objective(model), MuonAdamW(model, OptimizerRecipe(), 48)
        for step in range(3):
            objective.backward(*tokens(seed=step))
            optimizer.step(1.0, 0.9, 1.0)
            optimizer.zero_grad()
        trained.append(model.state_dict())
    exits = {name for name in trained[1] if name.startswith("lm_head_exits.")}
    assert trained[1].keys() - trained[0].keys() == exits and all(trained[1][name].any() for name in exits)
    for name, weight in trained[0].items():
        assert torch.equal(weight, trained[1][name]), name


@pytest.mark.parametrize("changes", [{}, {"per_stage_head": False}, {"exit_head_rank": 5}])
@pytest.mark.parametrize("mode", ["flat", "hier", "none"])
def test_sections_say_when_gradients_are_complete(mode, changes):
    model = training_model(mode, [5] if mode == "none" else [2, 1, 2], poe_exit_layers=EXITS, **changes)
    assert_sections_are_in_order(model)


def with_exits(recipe, exits=(1,)):
    return check_run(dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, poe_exit_layers=exits)))


def test_a_run_journals_the_losses_of_its_exits_apart(tmp_path):
    """And everything else of the run is what it is without them, the weights to the bit."""
    plain = small_recipe(write_texts(tmp_path / "texts"), steps=4, checkpoint_every=4)
    lines, weights = {}, {}
    for name, recipe in (("plain", plain), ("exits", with_exits(plain))):
        run = tmp_path / name
        pipeline.prepare(recipe, run, lambda line: None)
        Trainer(recipe, run, pipeline.open_rows(run, recipe)).train()
        lines[name] = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        weights[name] = load_file(run / "checkpoints" / "step-4" / "model.safetensors")
    for before, now in zip(lines["plain"], lines["exits"], strict=True):
        assert "loss_exits" not in before and len(now["loss_exits"]) == 1
        assert (before["loss"], before["loss_stages"]) == (now["loss"], now["loss_stages"])
    assert lines["exits"][-1]["loss_exits"][0] < lines["exits"][0]["loss_exits"][0]
    assert weights["exits"].keys() - weights["plain"].keys() == {"lm_head_exits.0.weight"}
    for name, weight in weights["plain"].items():
        assert torch.equal(weight, weights["exits"][name]), name


@pytest.mark.parametrize("line", [stages, delayed], ids=["flat", "delayed"])
def test_exits_on_ranks_of_their_own(line):
    """Stages of two ranks with an exit each: the weights, state and losses of one process."""
    if line is stages:
        changes = {"poe_exit_layers": EXITS, "dtype": torch.float64}
        expected = stages.one_process([2, 1, 2], **changes)
        results = [(w, s, losses) for w, s, _, losses in run_ranks(2, stages.train, [2, 1, 2], changes)]
    else:
        expected = late_process()
        results = run_ranks(2, late_line)
    weights = {name: value for result in results for name, value in result[0].items()}
    assert weights.keys() == expected[0].keys() and sum("exits" in name for name in weights) == 2
    for name, value in weights.items():
        assert stages.relative_error(value, expected[0][name]) <= 1e-10, name
    for result in results:
        torch.testing.assert_close(result[2], expected[2], rtol=1e-10, atol=0)
        assert result[2].shape == (len(expected[2]), 5)


def sharded(ranks):
    """Weights after three steps of ZeRO-2 on this rank's rows."""
    model = make_model(poe_stage_layers=[2, 1, 2], poe_exit_layers=EXITS).train()
    objective = Objective(model)
    options = RanksRecipe(replica_dtype="float32")
    optimizer = DistMuonAdamW(model.float(), stages.RATES, 2**18, ranks, options, objective.sections())
    for step in range(3):
        inputs, targets = tokens(rows=2, seed=step)
        own = slice(ranks.rank * 2 // ranks.world, (ranks.rank + 1) * 2 // ranks.world)
        with optimizer.micro_batch(last=True):
            objective.backward(inputs[own], targets[own])
        optimizer.step((step + 1) / 40, 0.9, 1.0)
        optimizer.zero_grad()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_exits_with_rows_shared_by_ranks():
    """Their gradients arrive where the sections say; their weights are those of one rank."""
    (alone,) = run_ranks(1, sharded)
    names = [name for name in alone if "exits" in name]
    assert len(names) == 2
    for found in run_ranks(2, sharded):
        for name in names:
            assert stages.relative_error(found[name], alone[name]) <= 1e-5, name


def late_model():
    return make_model(poe_stage_layers=[2, 1, 2], poe_mode="hier", poe_exit_layers=EXITS).train()


def late_process():
    model = late_model()
    objective = Objective(model, options=delayed.options(2))
    optimizer = DelayedOptimizer(MuonAdamW(model, delayed.RATES, 2**18))
    losses = [delayed.advance(objective, optimizer, step) for step in range(delayed.STEPS)]
    return {n: p.detach().clone() for n, p in model.named_parameters()}, optimizer.state_dict(), torch.stack(losses)


def late_line(ranks):
    objective = DelayedStageObjective(
        late_model(), torch.float32, ranks, delayed.MICRO, "stages", options=delayed.options(2)
    )
    optimizer = DelayedStageMuonAdamW(objective, delayed.RATES, 2**18)
    losses = [ranks.mean(delayed.advance(objective, optimizer, step)) for step in range(delayed.STEPS)]
    return optimizer.weights(), optimizer.state_dict(), torch.stack(losses)


@pytest.mark.parametrize(
    ("exits", "rank", "message"),
    [
        ((0,), 0, "must ascend from at least 1"),
        ((5,), 0, "must ascend from at least 1"),
        ((4, 1), 0, "must ascend"),
        ((1, 1), 0, "must ascend"),
        ((2,), 0, "a stage ends behind layer \\[2\\], which has a head already"),
        ((1,), 48, "exit_head_rank 48 must be 0"),
        ((), 4, "exit_head_rank 4 needs poe_exit_layers"),
    ],
)
def test_exits_that_cannot_be(exits, rank, message):
    shape = {"num_hidden_layers": 5, "poe_stage_layers": [2, 1, 2], "hidden_size": 48}
    with pytest.raises(ValueError, match=message):
        CognicaPoEConfig(**shape, poe_exit_layers=exits, exit_head_rank=rank)


def test_runs_from_before_exits_go_on():
    """A recipe without exits has the identity that it had; one with exits is another."""
    recipe, before = find_recipe("tiny"), "306c75aee9a6feb6247647c7e00b684af254c80b9678ab3ab6e8678fc1415cc7"
    assert fixed_sha256(recipe) == before
    assert fixed_sha256(with_exits(recipe)) != before
