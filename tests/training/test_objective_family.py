"""The family of objectives: beta, gamma and their schedule against one graph; what recomputing by stages keeps."""

import pytest
import torch

from cognica_poe.recipe.fields import ObjectiveRecipe
from cognica_poe.training.objective import Objective
from tests.oracles.objective import one_shot_loss
from tests.training.test_objective import accumulated, assert_same_gradients, tokens, training_model

WEIGHTS = [(), (0.2, 0.2, 1.0), (0.0, 0.0, 1.0), (0.3, 0.0, 0.7)]


def expected_gradients(model, inputs, targets, flow, weights):
    """Of the one graph; None where it sends zeros alone, as where nothing is sent."""
    model.zero_grad()
    one_shot_loss(model, inputs, targets, flow, weights).backward()
    gradients = found_gradients(model)
    model.zero_grad()
    return gradients


def found_gradients(model):
    return {name: g if g is not None and g.any() else None for name, g in accumulated(model).items()}


@pytest.mark.parametrize("recompute", ["off", "layers", "stages"])
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("flow", [0.0, 0.3, 1.0])
def test_the_family_equals_one_graph(flow, weights, recompute):
    model = training_model()
    inputs, targets = tokens()
    expected = expected_gradients(model, inputs, targets, flow, weights)
    options = ObjectiveRecipe(gradient_flow=flow, exit_weights=weights)
    Objective(model, recompute=recompute, options=options).backward(inputs, targets)
    assert_same_gradients(found_gradients(model), expected)


@pytest.mark.parametrize(("mode", "flow"), [("flat", 0.0), ("hier", 1.0)])
def test_modes_are_presets(mode, flow):
    """The same gradients bit for bit, whatever the preset that the numbers stand beside."""
    inputs, targets = tokens()
    found = []
    for model, options in (
        (training_model(mode), ObjectiveRecipe()),
        (training_model("hier" if mode == "flat" else "flat"), ObjectiveRecipe(gradient_flow=flow)),
    ):
        Objective(model, options=options).backward(inputs, targets)
        found.append(accumulated(model))
    for name, gradient in found[0].items():
        assert gradient is None if found[1][name] is None else torch.equal(gradient, found[1][name]), name


def test_flow_scales_what_deeper_stages_send():
    """One boundary crossed: beta times; two: beta squared."""
    inputs, targets = tokens()
    by_flow = {}
    for flow in (0.0, 0.5, 1.0):
        model = training_model()
        Objective(model, options=ObjectiveRecipe(gradient_flow=flow)).backward(inputs, targets)
        by_flow[flow] = accumulated(model)
    middle = "transformer.h.2.mlp.c_fc.weight"  # the stage before the last
    sent = by_flow[1.0][middle] - by_flow[0.0][middle]
    torch.testing.assert_close(by_flow[0.5][middle] - by_flow[0.0][middle], 0.5 * sent, atol=1e-10, rtol=1e-8)
    last = "transformer.h.4.mlp.c_fc.weight"
    torch.testing.assert_close(by_flow[0.5][last], by_flow[0.0][last], atol=1e-10, rtol=1e-8)


def test_an_exit_without_weight_learns_and_teaches_nothing():
    inputs, targets = tokens()
    model = training_model("hier")
    Objective(model, options=ObjectiveRecipe(exit_weights=(0.0, 0.0, 1.0))).backward(inputs, targets)
    found = accumulated(model)
    assert found["lm_head_stages.0.weight"].any()
    alone = training_model("hier")
    z = alone.all_logits(inputs)[0][-1]
    (torch.nn.functional.cross_entropy(z.flatten(0, 1), targets.flatten()) / 3).backward()
    for name, gradient in accumulated(alone).items():
        if name.startswith(("transformer.h.", "value_embeds.")):
            torch.testing.assert_close(found[name], gradient, atol=1e-10, rtol=1e-8)


def test_the_flow_of_the_end_of_a_run():
    options = ObjectiveRecipe(gradient_flow=0.0, late_gradient_flow=1.0, late_from=0.5)
    objective = Objective(training_model(), options=options)
    assert objective.stage_by_stage
    assert [objective.begin(step / 4) for step in range(4)] == [False, False, True, False]
    assert not objective.stage_by_stage
    inputs, targets = tokens()
    expected = expected_gradients(objective.model, inputs, targets, 1.0, ())
    objective.backward(inputs, targets)
    assert_same_gradients(found_gradients(objective.model), expected)


@pytest.mark.parametrize("flow", [0.0, 1.0])
def test_low_rank_heads_learn_as_in_one_graph(flow):
    model = training_model(stage_head_rank=5)
    inputs, targets = tokens()
    expected = expected_gradients(model, inputs, targets, flow, ())
    Objective(model, options=ObjectiveRecipe(gradient_flow=flow)).backward(inputs, targets)
    assert_same_gradients(found_gradients(model), expected)
    assert accumulated(model)["lm_head_stages.1.down.weight"].any()
