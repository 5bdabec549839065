"""The stage-by-stage backward against the one-graph objective, and what may send gradient where."""

import pytest
import torch

from cognica_poe.recipe.fields import ObjectiveRecipe
from cognica_poe.training.objective import Objective
from tests.conftest import make_model
from tests.oracles.objective import one_shot_loss, stage_losses

LAYOUTS = ([5], [3, 2], [2, 1, 2], [2, 1, 1, 1], [1, 1, 1, 2])


def training_model(mode="flat", stages=(2, 1, 2), **changes):
    return make_model(poe_mode=mode, poe_stage_layers=list(stages), **changes).train()


def tokens(length=24, rows=2, seed=1):
    ids = torch.randint(97, (rows, length + 1), generator=torch.Generator().manual_seed(seed))
    return ids[:, :-1], ids[:, 1:]


def accumulated(model):
    return {name: p.grad for name, p in model.named_parameters()}


def assert_same_gradients(actual, expected):
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (actual[name] is None) == (gradient is None), name
        if gradient is not None:
            torch.testing.assert_close(
                actual[name], gradient, atol=1e-10, rtol=1e-8, msg=lambda text, n=name: f"{n}: {text}"
            )


def one_graph(model, inputs, targets, scale=1.0):
    """Value and gradients of the reference; the model's own gradients are cleared."""
    model.zero_grad()
    loss = one_shot_loss(model, inputs, targets)
    (loss * scale).backward()
    gradients = accumulated(model)
    model.zero_grad()
    return loss.detach(), gradients


@pytest.mark.parametrize("alpha", [0.0, 0.5])
@pytest.mark.parametrize("stages", LAYOUTS)
@pytest.mark.parametrize("mode", ["flat", "hier", "residual_logop"])
def test_backward_equals_the_one_graph_objective(mode, stages, alpha):
    model = training_model(mode, stages, poe_alpha=alpha)
    inputs, targets = tokens()
    value, expected = one_graph(model, inputs, targets)
    losses = Objective(model).backward(inputs, targets)
    assert_same_gradients(accumulated(model), expected)
    K = len(stages)
    assert losses.shape == (K,) and not losses.requires_grad
    torch.testing.assert_close(losses.sum() / K ** (1 - alpha), value, atol=1e-10, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["flat", "hier", "none"])
def test_recomputed_activations_give_the_same_gradients_bit_for_bit(mode, dtype):
    model = training_model(mode, [5] if mode == "none" else [2, 1, 2]).float()
    inputs, targets = tokens()
    runs, found = [], []
    run = model.transformer.h[0].forward
    for recompute in ("off", "layers"):
        calls = []
        model.transformer.h[0].forward = lambda *a, calls=calls, **k: (calls.append(1), run(*a, **k))[1]
        model.zero_grad()
        losses = Objective(model, dtype, recompute).backward(inputs, targets)
        runs.append(len(calls))
        found.append({**accumulated(model), "losses": losses})
    assert runs == [1, 2]
    for name, gradient in found[0].items():
        assert gradient is None if found[1][name] is None else torch.equal(gradient, found[1][name]), name


@pytest.mark.parametrize("stages", [[5], [2, 1, 2]])
def test_plain_path_equals_the_one_graph_objective(stages):
    model = training_model("none", stages)
    inputs, targets = tokens()
    value, expected = one_graph(model, inputs, targets)
    losses = Objective(model).backward(inputs, targets)
    assert_same_gradients(accumulated(model), expected)
    torch.testing.assert_close(losses, value[None], atol=1e-10, rtol=0)


@pytest.mark.parametrize("mode", ["flat", "hier", "none"])
def test_the_loss_is_that_of_the_models_own_logits(mode):
    """Not only does the fast path match the slow one: both are the cross-entropy of what the model outputs."""
    model = training_model(mode)
    inputs, targets = tokens()
    stages, plain = model.all_logits(inputs)
    expected = torch.stack(
        [torch.nn.functional.cross_entropy(z.flatten(0, 1), targets.flatten()) for z in (*stages, plain)]
    ).detach()
    losses = Objective(model).backward(inputs, targets)
    torch.testing.assert_close(losses, expected[-1:] if mode == "none" else expected[:-1], atol=1e-10, rtol=0)


@pytest.mark.parametrize("mode", ["flat", "hier", "none", "residual_logop"])
def test_scaled_micro_batches_accumulate_to_the_whole_batch(mode):
    model = training_model(mode)
    inputs, targets = tokens(rows=4)
    _, expected = one_graph(model, inputs, targets)
    objective = Objective(model)
    for rows in range(4):
        objective.backward(inputs[rows : rows + 1], targets[rows : rows + 1], 1 / 4)
    assert_same_gradients(accumulated(model), expected)


@pytest.mark.parametrize("mode", ["flat", "hier", "none", "residual_logop"])
def test_windows_shorter_than_the_text(mode):
    """Three windows fit into the text; a longer window gives another gradient, so the window is really applied."""
    changes = {"short_window": 8, "window_pattern": "SL"}
    inputs, targets = tokens(length=24)
    model = training_model(mode, **changes)
    _, expected = one_graph(model, inputs, targets)
    Objective(model).backward(inputs, targets)
    assert_same_gradients(accumulated(model), expected)
    _, wide = one_graph(training_model(mode, **{**changes, "short_window": 64}), inputs, targets)
    name = "transformer.h.0.attn.c_q.weight"
    assert not torch.allclose(wide[name], expected[name], atol=1e-6)


def test_changing_shapes_do_not_reuse_masks():
    model = training_model(short_window=8)
    objective = Objective(model)
    for length, rows in ((24, 2), (12, 2), (24, 1), (24, 2)):
        inputs, targets = tokens(length, rows)
        _, expected = one_graph(model, inputs, targets)
        objective.backward(inputs, targets)
        assert_same_gradients(accumulated(model), expected)
        model.zero_grad()


def single_stage_gradients(model, inputs, targets):
    """Gradients of every stage's loss alone, by name; zeros where autograd reports none."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    return [
        dict(zip(names, torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True), strict=True))
        for loss in stage_losses(model, inputs, targets)
    ]


def owner(name, config):
    """Stage of a block's or value embedding's parameter; None for parameters of no single stage."""
    if name.startswith(("transformer.h.", "value_embeds.", "lm_head_stages.")):
        index = next(int(part) for part in name.split(".") if part.isdigit())
        if name.startswith("lm_head_stages."):
            return index
        return next(k for k in range(config.num_stages) if index in config.stage_layers(k))
    return None


def test_flat_losses_are_local_to_their_stage():
    model = training_model(stages=[2, 1, 2])
    config = model.config
    for stage, gradients in enumerate(single_stage_gradients(model, *tokens())):
        for name, gradient in gradients.items():
            if (belongs := owner(name, config)) is not None:
                assert bool(gradient.any()) == (belongs == stage), (stage, name)
        for name in ("resid_lambdas", "x0_lambdas"):
            touched = gradients[name].nonzero().flatten().tolist()
            assert touched == list(config.stage_layers(stage)), (stage, name)
        # x0 is not detached: every stage teaches the embedding, the smear and the shared head.
        for name in ("transformer.wte.weight", "smear_gate.weight", "smear_lambda", "lm_head.weight"):
            assert gradients[name].any(), (stage, name)
        assert not gradients["backout_lambda"].any()


def test_later_stages_reach_the_embedding_through_x0_alone():
    """With the x0 lambdas of the later stages at zero, only the first stage still teaches the embedding."""
    model = training_model(stages=[2, 1, 2])
    with torch.no_grad():
        model.x0_lambdas[2:] = 0.0
    touched = [bool(g["transformer.wte.weight"].any()) for g in single_stage_gradients(model, *tokens())]
    assert touched == [True, False, False]


def test_hier_losses_flow_into_every_stage_below():
    model = training_model("hier", [2, 1, 2])
    for stage, gradients in enumerate(single_stage_gradients(model, *tokens())):
        for name, gradient in gradients.items():
            if (belongs := owner(name, model.config)) is not None and not name.startswith("lm_head_stages."):
                assert bool(gradient.any()) == (belongs <= stage), (stage, name)


def test_backout_learns_on_the_plain_path_only():
    for mode in ("flat", "hier", "none"):
        model = training_model(mode)
        Objective(model).backward(*tokens())
        gradient = model.backout_lambda.grad
        assert (gradient is not None and bool(gradient.any())) == (mode == "none"), mode


def test_shared_head_only():
    model = training_model(per_stage_head=False)
    inputs, targets = tokens()
    _, expected = one_graph(model, inputs, targets)
    Objective(model).backward(inputs, targets)
    assert_same_gradients(accumulated(model), expected)


def test_bf16_compute_keeps_fp32_gradients():
    model = training_model()
    inputs, targets = tokens()
    _, expected = one_graph(model, inputs, targets)
    model.float()  # the same weights
    Objective(model, torch.bfloat16).backward(inputs, targets)
    for name in ("transformer.wte.weight", "transformer.h.0.mlp.c_fc.weight", "lm_head_stages.2.weight"):
        gradient = accumulated(model)[name]
        assert gradient.dtype == torch.float32
        assert torch.cosine_similarity(gradient.double().flatten(), expected[name].flatten(), dim=0) > 0.99, name


def test_residual_losses_are_those_of_the_prefixes_that_decode():
    """What a stage is trained on is the loss of the pool that ``max_stages`` gives."""
    model = training_model("residual_logop", poe_alpha=0.5)
    inputs, targets = tokens()
    with torch.no_grad():
        pools = [model.forward_aggregated(inputs, k + 1).flatten(0, 1) for k in range(3)]
    expected = torch.stack([torch.nn.functional.nll_loss(pool.double(), targets.flatten()) for pool in pools])
    losses = Objective(model).backward(inputs, targets)
    torch.testing.assert_close(losses, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("flow, weights", [(0.0, ()), (0.3, ()), (0.3, (0.2, 0.0, 1.0)), (1.0, (0.2, 0.0, 1.0))])
def test_residual_pools_with_gradients_that_cross(flow, weights):
    model = training_model("residual_logop")
    inputs, targets = tokens()
    one_shot_loss(model, inputs, targets, flow, weights).backward()
    expected = accumulated(model)
    model.zero_grad()
    options = ObjectiveRecipe(gradient_flow=flow, exit_weights=weights)
    Objective(model, options=options).backward(inputs, targets)
    assert_same_gradients(accumulated(model), expected)


@pytest.mark.parametrize("changes", [{}, {"per_stage_head": False}])
@pytest.mark.parametrize("mode", ["flat", "hier", "none", "residual_logop"])
def test_sections_say_when_gradients_are_complete(mode, changes):
    """Measured with hooks: additions per parameter, and no section is complete before the one before it."""
    model = training_model(mode, **changes)
    assert_sections_are_in_order(model)


def assert_sections_are_in_order(model):
    """As often as a section says a parameter's gradient is added to, and sections are complete one after the other."""
    arrived, objective = [], Objective(model)
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: arrived.append(name))
    objective.backward(*tokens())
    sections = objective.sections()
    assert {n for section in sections for n in section} == {n for n, _ in model.named_parameters()}
    for section in sections:
        for name, count in section.items():
            assert arrived.count(name) == count, name
    ends = [
        max(len(arrived) - arrived[::-1].index(n) for n, count in s.items() if count)
        for s in sections[:-1]
        if any(s.values())
    ]
    assert ends == sorted(ends)
