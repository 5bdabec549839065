"""Muon + AdamW against a slow reference written from nanochat's definition, and against torch's own optimisers."""

import math
from types import SimpleNamespace

import pytest
import torch

from cognica_poe.recipe.fields import OptimizerRecipe
from cognica_poe.recipe.named import RECIPES
from cognica_poe.training.optim.groups import adamw_groups, group_of
from cognica_poe.training.optim.muon import POLAR_EXPRESS
from cognica_poe.training.optim.optimizer import MuonAdamW
from tests.conftest import make_model

TOKENS = 3 * 2**18


def set_gradients(model, step, skip=()):
    generator = torch.Generator().manual_seed(1000 + step)
    for name, parameter in model.named_parameters():
        gradient = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.grad = None if name in skip else gradient.to(parameter.dtype)


def train(model, optimizer, steps, skip=()):
    """Steps with other multipliers each: a schedule in small."""
    for step in steps:
        set_gradients(model, step, skip)
        optimizer.step(lr_scale=1.0 - 0.05 * step, momentum=0.85 + 0.01 * step, weight_decay_scale=1.0 - 0.09 * step)
        optimizer.zero_grad()


def values(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


class SlowOptimizer:
    """One parameter at a time, nothing shared with the package but the Polar Express coefficients."""

    def __init__(self, width, tokens):
        batch = math.sqrt(tokens / 524_288)
        wide = math.sqrt(768 / width)
        self.decay = 0.28 * batch
        self.adam = {  # prefix: rate, betas, decay
            "transformer.wte": (0.3 * wide * batch, (0.8, 0.995), 0.001),
            "value_embeds": (0.15 * wide * batch, (0.8, 0.995), 0.01),
            "lm_head": (0.008 * wide * batch, (0.8, 0.96), 0.01),
            "resid_lambdas": (0.005 * batch, (0.8, 0.95), 0.05),
            "x0_lambdas": (0.5 * batch, (0.96, 0.95), 0.0),
            "smear_": (0.2 * batch, (0.8, 0.95), 0.0),
            "backout_": (0.2 * batch, (0.8, 0.95), 0.0),
        }
        self.matrix_lr = 0.015 * batch
        self.state = {}

    def step(self, weights, gradients, t, lr_scale, momentum, decay_scale):
        for name, w in weights.items():
            g, state = gradients[name], self.state.setdefault(name, {})
            if name.startswith("transformer.h."):
                weights[name] = self.muon(w, g, state, lr_scale, momentum, self.decay * decay_scale)
            else:
                found = next(v for prefix, v in self.adam.items() if name.startswith(prefix))
                weights[name] = self.adamw(w, g, state, t, found[0] * lr_scale, *found[1:])

    @staticmethod
    def adamw(w, g, state, t, lr, betas, decay):
        state["m"] = betas[0] * state.get("m", 0.0) + (1 - betas[0]) * g
        state["v"] = betas[1] * state.get("v", 0.0) + (1 - betas[1]) * g * g
        m, v = state["m"] / (1 - betas[0] ** t), state["v"] / (1 - betas[1] ** t)
        return w - lr * decay * w - lr * m / (v.sqrt() + 1e-10)

    def muon(self, w, g, state, lr_scale, momentum, decay):
        rows, cols = w.shape
        state["m"] = momentum * state.get("m", 0.0) + (1 - momentum) * g
        x = (1 - momentum) * g + momentum * state["m"]  # Nesterov
        x = x / (1.01 * x.norm() + 1e-6)
        for a, b, c in POLAR_EXPRESS:
            square = x @ x.T if rows <= cols else x.T @ x
            polynomial = b * square + c * square @ square
            x = a * x + (polynomial @ x if rows <= cols else x @ polynomial)
        line = 1 if rows >= cols else 0
        state["v"] = 0.9 * state.get("v", 0.0) + 0.1 * x.square().mean(dim=line, keepdim=True)
        u = x / state["v"].clamp_min(1e-10).sqrt()
        u = u * (x.norm() / u.norm())
        lr = self.matrix_lr * lr_scale * math.sqrt(max(1.0, rows / cols))
        shrinks = (u * w > 0).to(w.dtype)  # cautious
        return w - lr * decay * shrinks * w - lr * u


@pytest.mark.parametrize("steps", [1, 10])
def test_equal_to_the_slow_reference(steps):
    model = make_model()
    slow, weights = SlowOptimizer(48, TOKENS), values(model)
    optimizer = MuonAdamW(model, OptimizerRecipe(), TOKENS)
    optimizer.iteration_dtype = torch.float64
    for step in range(steps):
        set_gradients(model, step)
        gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        schedule = (1.0 - 0.05 * step, 0.85 + 0.01 * step, 1.0 - 0.09 * step)
        optimizer.step(*schedule)
        slow.step(weights, gradients, step + 1, *schedule)
    for name, value in values(model).items():
        torch.testing.assert_close(value, weights[name], atol=1e-9, rtol=1e-9, msg=lambda text, n=name: f"{n}: {text}")


def test_equal_to_the_optimisers_of_torch(monkeypatch):
    """Without normalisation and decay, Muon's quintic is torch.optim.Muon, whose bf16 products are lifted to fp32."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    ours, theirs = make_model(dtype=torch.float32), make_model(dtype=torch.float32)
    recipe = OptimizerRecipe(muon_iteration="quintic", muon_beta2=1.0, weight_decay=0.0, lr_scaling=False)
    optimizer = MuonAdamW(ours, recipe, TOKENS)
    named = dict(theirs.named_parameters())
    matrices = [p for name, p in named.items() if name.startswith("transformer.h.")]
    muon = torch.optim.Muon(matrices, lr=0.015, momentum=0.9, nesterov=True, weight_decay=0.0, adjust_lr_fn="original")
    groups = adamw_groups(recipe, 48)
    others = [
        {"params": [p], **groups[group_of(name)]} for name, p in named.items() if not name.startswith("transformer.h.")
    ]
    adamw = torch.optim.AdamW(others, eps=1e-10)
    for step in range(10):
        for model in (ours, theirs):
            set_gradients(model, step)
        optimizer.step(1.0, 0.9, 1.0)
        muon.step()
        adamw.step()
    for name, value in values(ours).items():
        torch.testing.assert_close(value, named[name].detach(), atol=1e-6, rtol=1e-6, msg=lambda t, n=name: f"{n}: {t}")


@pytest.mark.parametrize("changes", [{}, {"per_stage_head": False}, {"poe_stage_layers": [5], "poe_mode": "none"}])
def test_every_parameter_belongs_to_exactly_one_group(changes):
    model = make_model(**changes)
    optimizer = MuonAdamW(model, OptimizerRecipe(), TOKENS)
    names = {id(p): name for name, p in model.named_parameters()}
    adamw = [names[id(p)] for group in optimizer.adamw.param_groups for p in group["params"]]
    muon = [name for stack in optimizer.stacks.values() for name in stack]
    assert sorted(adamw + muon) == sorted(names.values())
    assert all(name.startswith("transformer.h.") for name in muon)
    before = values(model)
    train(model, optimizer, range(1))
    assert all(not torch.equal(before[name], value) for name, value in values(model).items())


def test_unknown_parameter_names_are_refused():
    with pytest.raises(ValueError, match=r"extra\.weight belongs to no optimiser group"):
        group_of("extra.weight")


@pytest.mark.parametrize("changes", [{}, {"muon_beta2": 1.0}])
def test_restored_state_continues_bit_for_bit(changes):
    recipe = OptimizerRecipe(**changes)
    model = make_model(dtype=torch.float32)
    optimizer = MuonAdamW(model, recipe, TOKENS)
    train(model, optimizer, range(4))
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    state = {name: value.clone() for name, value in optimizer.state_dict().items()}
    train(model, optimizer, range(4, 8))

    other = make_model(seed=5, dtype=torch.float32)
    other.load_state_dict(weights)
    resumed = MuonAdamW(other, recipe, TOKENS)
    resumed.load_state_dict(state)
    train(other, resumed, range(4, 8))
    for name, value in values(model).items():
        assert torch.equal(value, values(other)[name]), name
    for name, value in optimizer.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name

    fresh = make_model(seed=5, dtype=torch.float32)  # and the state matters: without it the run goes elsewhere
    fresh.load_state_dict(weights)
    train(fresh, MuonAdamW(fresh, recipe, TOKENS), range(4, 8))
    assert not torch.equal(values(fresh)["transformer.wte.weight"], values(model)["transformer.wte.weight"])


def test_restored_state_lives_where_the_parameter_lives():
    model = make_model(dtype=torch.float32)
    optimizer = MuonAdamW(model, OptimizerRecipe(), TOKENS)
    train(model, optimizer, range(1))
    state = optimizer.state_dict()
    optimizer.parameters = {name: torch.nn.Parameter(p.to("meta")) for name, p in optimizer.parameters.items()}
    optimizer.load_state_dict(state)
    restored = optimizer.state_dict()
    assert restored.keys() == state.keys()
    assert {(value.device.type, value.dtype) for value in restored.values()} == {("meta", torch.float32)}


def test_counting_on_leaves_the_loaded_state_alone():
    optimizer = MuonAdamW(make_model(dtype=torch.float32), OptimizerRecipe(), TOKENS)
    state = {"lm_head.weight.step": torch.tensor(4.0, dtype=torch.float64)}
    optimizer.load_state_dict(state)
    assert optimizer.state_dict()["lm_head.weight.step"].dtype == torch.float32
    optimizer.state_dict()["lm_head.weight.step"].add_(1)
    assert state["lm_head.weight.step"] == 4


def test_weights_go_from_one_optimiser_to_another():
    model, other = make_model(dtype=torch.float32), make_model(seed=5, dtype=torch.float32)
    weights = {name: value.clone() for name, value in MuonAdamW(model, OptimizerRecipe(), TOKENS).weights().items()}
    assert weights.keys() == model.state_dict().keys()
    optimizer = MuonAdamW(other, OptimizerRecipe(), TOKENS)
    optimizer.load_weights(weights)
    assert all(torch.equal(value, values(model)[name]) for name, value in values(other).items())
    with pytest.raises(ValueError, match=r"weights and model differ in extra\.weight, x0_lambdas"):
        optimizer.load_weights(
            {**{n: v for n, v in weights.items() if n != "x0_lambdas"}, "extra.weight": torch.ones(1)}
        )
    with pytest.raises(ValueError, match=r"x0_lambdas has shape \[7\], the model wants \[5\]"):
        optimizer.load_weights({**weights, "x0_lambdas": torch.ones(7)})


def test_state_is_keyed_by_parameter_name():
    model = make_model()
    optimizer = MuonAdamW(model, OptimizerRecipe(), TOKENS)
    assert optimizer.state_dict() == {}
    train(model, optimizer, range(1))
    state = optimizer.state_dict()
    assert state["transformer.h.0.mlp.c_fc.weight.second_moment"].shape == (96, 1)
    assert state["transformer.h.0.mlp.c_proj.weight.second_moment"].shape == (1, 96)
    assert {name.rsplit(".", 1)[0] for name in state} == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("nothing.momentum", torch.zeros(1), "nothing.momentum, which the model does not have"),
        ("transformer.h.0.attn.c_q.weight.momentum", torch.zeros(2, 3), r"shape \[2, 3\], the parameter \[48, 48\]"),
        ("lm_head.weight.exp_avg", torch.zeros(7), r"shape \[7\], the parameter \[97, 48\]"),
    ],
)
def test_foreign_state_is_refused(name, value, message):
    with pytest.raises(ValueError, match=message):
        MuonAdamW(make_model(), OptimizerRecipe(), TOKENS).load_state_dict({name: value})


@pytest.mark.parametrize("skip", ["backout_lambda", "transformer.h.1.mlp.c_fc.weight", "lm_head_stages.1.weight"])
def test_a_missing_gradient_leaves_the_parameter_alone(skip):
    model, full = make_model(), make_model()
    before = values(model)
    optimizer = MuonAdamW(model, OptimizerRecipe(), TOKENS)
    train(model, optimizer, range(3), skip=(skip,))
    train(full, MuonAdamW(full, OptimizerRecipe(), TOKENS), range(3))
    after, others = values(model), values(full)
    assert torch.equal(after[skip], before[skip])
    assert not any(name.startswith(f"{skip}.") for name in optimizer.state_dict())
    for name in after.keys() - {skip}:  # a smaller stack does not change its members
        torch.testing.assert_close(after[name], others[name], atol=1e-6, rtol=1e-6)


def test_zero_grad_drops_gradients():
    model = make_model()
    set_gradients(model, 0)
    MuonAdamW(model, OptimizerRecipe(), TOKENS).zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_rates_of_the_3b_recipe():
    """Measured on what a step moves: Adam's first step is its rate exactly, Muon's is rate times a polar factor."""
    recipe = RECIPES["3b"]
    tokens = recipe.training.batch_rows * recipe.model.max_position_embeddings
    assert tokens == 786_432
    shape = {"hidden_size": recipe.model.hidden_size, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = make_model(**shape, intermediate_size=8, num_hidden_layers=1, poe_stage_layers=[1])
    moved = {
        "transformer.wte.weight": 0.225,
        "value_embeds.0.weight": 0.1125,
        "lm_head.weight": 0.006,
        "lm_head_stages.0.weight": 0.006,
        "resid_lambdas": 0.005 * 1.2247,
        "x0_lambdas": 0.5 * 1.2247,
        "smear_gate.weight": 0.2 * 1.2247,
        "backout_lambda": 0.2 * 1.2247,
    }
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()  # no decay
    for name in moved:
        model.get_parameter(name).grad = torch.ones_like(model.get_parameter(name))
    gate = model.transformer.h[0].attn.ve_gate.weight  # [1, 12]: its polar factor is the unit vector
    gate.grad = torch.ones_like(gate)
    optimizer = MuonAdamW(model, recipe.training.optimizer, tokens)
    optimizer.step(1.0, 0.95, 1.0)
    for name, rate in moved.items():
        parameter = model.get_parameter(name)
        torch.testing.assert_close(parameter.data, torch.full_like(parameter, -rate), rtol=1e-4, atol=0)
    polar = 1.0
    for a, b, c in POLAR_EXPRESS:
        polar = polar / (1.01 if (a, b, c) == POLAR_EXPRESS[0] else 1.0)
        polar = a * polar + b * polar**3 + c * polar**5
    assert gate.norm().item() == pytest.approx(0.01837 * polar, rel=1e-3)
    assert polar == pytest.approx(1.0, abs=0.15)


@pytest.mark.parametrize("changes", [{}, {"muon_beta2": 1.0}])
def test_a_step_left_out_leaves_no_trace(changes):
    """With ``keep`` false, weights and state stay bit for bit; with true, it is the step without ``keep``."""
    model, plain = make_model(dtype=torch.float32), make_model(dtype=torch.float32)
    optimizer, other = (MuonAdamW(m, OptimizerRecipe(**changes), TOKENS) for m in (model, plain))
    for step in range(4):
        for m in (model, plain):
            set_gradients(m, step)
        optimizer.step(0.9, 0.9, 0.5, keep=torch.tensor(True))
        other.step(0.9, 0.9, 0.5)
        set_gradients(model, 100 + step)
        if step % 2:
            for gradient in optimizer.gradients():
                gradient.view(-1)[0] = float("nan" if step == 1 else "inf")
        optimizer.step(0.9, 0.9, 0.5, keep=torch.tensor(False))
    for name, value in values(plain).items():
        assert torch.equal(value, values(model)[name]), name
    assert optimizer.state_dict().keys() == other.state_dict().keys()
    for name, value in other.state_dict().items():
        assert torch.equal(value, optimizer.state_dict()[name]), name


@pytest.mark.parametrize("size", [1, 2, 3])
def test_matrices_stepped_in_slices_move_as_in_one_stack(monkeypatch, size):
    """How a GPU, which has no room for five copies of all matrices, steps them."""
    states = []
    for cut in (False, True):
        model = make_model()
        optimizer = MuonAdamW(model, OptimizerRecipe(), TOKENS)
        if cut:
            monkeypatch.setattr(optimizer, "_slices", lambda names: filter(None, (names[:size], names[size:])))
        train(model, optimizer, range(2))
        states.append({**model.state_dict(), **optimizer.state_dict()})
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=0, atol=1e-12)


def test_a_processor_steps_one_stack_and_a_gpu_slices():
    optimizer, names = MuonAdamW(make_model(), OptimizerRecipe(), TOKENS), [f"matrix{i}" for i in range(20)]
    optimizer.parameters = {"matrix0": SimpleNamespace(is_cuda=False)}
    assert list(optimizer._slices(names)) == [names]
    optimizer.parameters = {"matrix0": SimpleNamespace(is_cuda=True)}
    assert list(optimizer._slices(names)) == [names[:8], names[8:16], names[16:]]
