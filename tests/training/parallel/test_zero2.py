"""The same weights on any number of ranks as on one plain process."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn

from cognica_poe.recipe.fields import OptimizerRecipe, RanksRecipe
from cognica_poe.training.objective import Objective
from cognica_poe.training.optim.groups import adamw_groups, group_of
from cognica_poe.training.optim.optimizer import MuonAdamW
from cognica_poe.training.parallel.zero2 import DistMuonAdamW
from tests.conftest import make_model
from tests.gloo import run_ranks

STEPS = 10
TOKENS = 2**18
SHAPES = {
    "transformer.h.0.tall.weight": (50, 12),
    "transformer.h.0.wide.weight": (12, 37),
    "transformer.h.0.square.weight": (24, 24),
    "transformer.h.0.flat.weight": (2, 9),  # fewer rows than ranks: empty shards
    "transformer.h.1.tall.weight": (50, 12),
    "transformer.h.1.wide.weight": (12, 37),
    "transformer.h.1.square.weight": (24, 24),
    "transformer.h.2.wide.weight": (12, 37),
    "transformer.h.2.lone.weight": (11, 5),  # one matrix of its shape: fewer than ranks
    "transformer.h.2.missing.weight": (24, 24),
    "transformer.wte.weight": (32, 12),  # 32 rows on 3 ranks are padded, as 32768 are on 12
    "value_embeds.0.weight": (32, 6),
    "lm_head.weight": (32, 12),
    "lm_head_stages.0.weight": (32, 12),
    "resid_lambdas": (3,),
    "x0_lambdas": (3,),
    "smear_gate.weight": (1, 7),
    "smear_lambda": (1,),
    "backout_lambda": (1,),
}
MISSING = ("transformer.h.2.missing.weight", "backout_lambda")
WORLDS = (1, 2, 3, 4)


class Shapes(nn.Module):
    """Parameters of many shapes under the model's names; no forward pass."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.config = SimpleNamespace(hidden_size=12)
        generator = torch.Generator().manual_seed(7)
        for name, shape in SHAPES.items():
            owner, *path = self, *name.split(".")
            *modules, last = path
            for part in modules:
                if part not in dict(owner.named_children()):
                    owner.add_module(part, nn.Module())
                owner = owner.get_submodule(part)
            value = 0.3 * torch.randn(shape, generator=generator, dtype=torch.float64)
            owner.register_parameter(last, nn.Parameter(value.to(dtype)))


def gradient(name, step, part, dtype=torch.float32):
    """Gradient of one of eight parts of a batch."""
    generator = torch.Generator().manual_seed(1_000_000 * list(SHAPES).index(name) + 100 * step + part)
    return torch.randn(SHAPES[name], generator=generator, dtype=torch.float64).to(dtype) / 8


def schedule(step):
    return 1.0 - 0.05 * step, 0.85 + 0.01 * step, 1.0 - 0.09 * step


def values(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def step_once(model, optimizer, step, parts, micro_batches):
    """Micro-batches of ``parts`` (numbers below 8), then an update."""
    size = len(parts) // micro_batches
    parameters = dict(model.named_parameters())
    for micro in range(micro_batches):
        with optimizer.micro_batch(last=micro == micro_batches - 1):
            for name, parameter in parameters.items():
                if name not in MISSING:
                    own = parts[micro * size : (micro + 1) * size]
                    fresh = sum(gradient(name, step, part) for part in own)
                    parameter.grad = fresh if parameter.grad is None else parameter.grad + fresh
    optimizer.step(*schedule(step))
    optimizer.zero_grad()


def train_plain(recipe=None):
    model = Shapes()
    optimizer = MuonAdamW(model, recipe or OptimizerRecipe(), TOKENS)
    for step in range(STEPS):
        step_once(model, optimizer, step, list(range(8)), 1)
    return values(model)


def train_ranks(ranks, options, micro_batches, recipe=None):
    """Weights after every step, and the optimiser state at the end."""
    model = Shapes()
    optimizer = DistMuonAdamW(model, recipe or OptimizerRecipe(), TOKENS, ranks, options)
    share = 8 // ranks.world if 8 % ranks.world == 0 else None
    history = []
    for step in range(STEPS):
        parts = list(range(8))
        own = parts[ranks.rank * share : (ranks.rank + 1) * share] if share else parts[ranks.rank :: ranks.world]
        step_once(model, optimizer, step, own, micro_batches)
        history.append(values(model))
    return history


def relative_error(actual, expected):
    """Largest deviation of any weight, relative to the largest weight of its parameter."""
    assert actual.keys() == expected.keys()
    return max(((actual[n] - expected[n]).abs().max() / expected[n].abs().max()).item() for n in expected)


@pytest.fixture(scope="module")
def plain():
    return train_plain()


@pytest.mark.parametrize("world", WORLDS)
def test_same_weights_as_one_plain_process(world, plain):
    histories = run_ranks(world, train_ranks, None, 1)
    assert relative_error(histories[0][-1], plain) <= 2e-6
    for step in range(STEPS):
        for other in histories[1:]:
            for name, value in histories[0][step].items():
                assert torch.equal(value, other[step][name]), (step, name)
    for name in MISSING:
        assert torch.equal(plain[name], values(Shapes())[name]) and torch.equal(histories[0][-1][name], plain[name])


@pytest.mark.parametrize("world", [1, 3])
def test_bit_equal_run_to_run(world):
    first, second = run_ranks(world, train_ranks, None, 1), run_ranks(world, train_ranks, None, 1)
    for name, value in first[0][-1].items():
        assert torch.equal(value, second[0][-1][name]), name


@pytest.mark.parametrize("grad_sync", ["every_microbatch", "last_microbatch"])
@pytest.mark.parametrize(("world", "micro_batches"), [(1, 8), (2, 4), (4, 2), (8, 1)])
def test_ranks_and_micro_batches_trade(world, micro_batches, grad_sync, plain):
    histories = run_ranks(world, train_ranks, RanksRecipe(grad_sync=grad_sync), micro_batches)
    assert relative_error(histories[0][-1], plain) <= 2e-6


@pytest.mark.parametrize("recipe", [OptimizerRecipe(muon_beta2=1.0, muon_iteration="quintic", weight_decay=0.0)])
def test_without_normalisation_and_decay(recipe):
    assert relative_error(run_ranks(3, train_ranks, None, 1, recipe)[0][-1], train_plain(recipe)) <= 2e-6


def train_and_compare_with_torch(ranks):
    """What must be off for equality: variance normalisation, cautious decay, 1.01 in the scaling (quintic has none)."""
    torch.Tensor.bfloat16 = torch.Tensor.clone  # torch's Muon multiplies in bf16; lift it to fp32
    recipe = OptimizerRecipe(muon_iteration="quintic", muon_beta2=1.0, weight_decay=0.0, lr_scaling=False)
    ours, theirs = Shapes(), Shapes()
    optimizer = DistMuonAdamW(ours, recipe, TOKENS, ranks)
    named, groups = dict(theirs.named_parameters()), adamw_groups(recipe, 12)
    matrices = [p for name, p in named.items() if group_of(name) == "muon"]
    muon = torch.optim.Muon(matrices, lr=0.015, momentum=0.9, nesterov=True, weight_decay=0.0, adjust_lr_fn="original")
    others = [{"params": [p], **groups[group_of(name)]} for name, p in named.items() if group_of(name) != "muon"]
    adamw = torch.optim.AdamW(others, eps=1e-10)
    for step in range(STEPS):
        for model in (ours, theirs):
            for name, parameter in model.named_parameters():
                parameter.grad = None if name in MISSING else gradient(name, step, 0)
        with optimizer.micro_batch(last=True):
            pass
        optimizer.step(1.0, 0.9, 1.0)
        optimizer.zero_grad()
        muon.step()
        adamw.step()
    return relative_error(values(ours), values(theirs))


@pytest.mark.parametrize("world", [1])
def test_equal_to_the_optimisers_of_torch(world):
    assert run_ranks(world, train_and_compare_with_torch)[0] <= 1e-6


def count_traffic(ranks, options, micro_batches):
    """Calls and bytes handed to torch.distributed in the second step, and the formula."""
    seen = {}

    def counting(kind, function, argument):
        def call(*args, **kwargs):
            count, size = seen.get(kind, (0, 0))
            seen[kind] = count + 1, size + args[argument].nbytes
            return function(*args, **kwargs)

        return call

    for name, kind, argument in (
        ("reduce_scatter_single", "reduce_scatter", 1),
        ("all_gather_single", "all_gather", 1),
        ("all_to_all_single", "all_to_all", 1),
        ("all_reduce", "all_reduce", 0),
    ):
        setattr(dist, name, counting(kind, getattr(dist, name), argument))
    model = Shapes()
    names = list(SHAPES)
    sections = [{n: 0 if n in MISSING else 1 for n in part} for part in (names[:4], names[4:13], names[13:])]
    optimizer = DistMuonAdamW(model, OptimizerRecipe(), TOKENS, ranks, options, sections)
    for step in range(2):
        seen.clear()
        step_once(model, optimizer, step, list(range(4)), micro_batches)
    counted = {kind: {"count": count, "bytes": size} for kind, (count, size) in seen.items()}
    return counted, optimizer.traffic(micro_batches)


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize(
    "options",
    [
        RanksRecipe(),
        RanksRecipe(grad_sync="last_microbatch"),
        RanksRecipe(replica_dtype="bfloat16", reduce_dtype="bfloat16"),
    ],
)
def test_counted_traffic_equals_the_formula(world, options):
    for counted, formula in run_ranks(world, count_traffic, options, 4):
        assert counted == formula
        sends = 1 if options.grad_sync == "last_microbatch" else 4
        assert counted["reduce_scatter"]["count"] == 3 * sends
        assert counted["all_to_all"]["count"] == 2 * 5  # five shapes, there and back


def train_in_bf16(ranks):
    model = Shapes()
    optimizer = DistMuonAdamW(model, OptimizerRecipe(), TOKENS, ranks, RanksRecipe(replica_dtype="bfloat16"))
    for step in range(STEPS):
        step_once(model, optimizer, step, list(range(8))[ranks.rank :: ranks.world], 1)
    return values(model), optimizer.weights()


def test_bf16_replicas_of_fp32_masters(plain):
    """Replicas are the rounded masters; the masters never see the rounding of an earlier step."""
    outcomes = run_ranks(2, train_in_bf16)
    for name, expected in plain.items():
        master = torch.cat([weights[name] for _, weights in outcomes if name in weights])
        torch.testing.assert_close(master, expected, rtol=0, atol=2e-6 * expected.abs().max().item())
        for replicas, _ in outcomes:
            assert replicas[name].dtype == (torch.bfloat16 if expected.ndim > 1 else torch.float32)
            assert torch.equal(replicas[name], master.to(replicas[name].dtype))


def held_gradients(ranks, grad_sync):
    """Largest number of gradient elements alive at once in a micro-batch, and the elements of each section."""
    model = make_model(poe_stage_layers=[1, 2, 2], dtype=torch.float32).train()
    objective = Objective(model)
    sections = objective.sections()
    options = RanksRecipe(grad_sync=grad_sync)
    optimizer = DistMuonAdamW(model, OptimizerRecipe(), TOKENS, ranks, options, sections)
    parameters, most = dict(model.named_parameters()), 0

    def count(_):
        nonlocal most
        most = max(most, sum(p.numel() for p in parameters.values() if p.grad is not None))

    for parameter in parameters.values():
        parameter.register_post_accumulate_grad_hook(count)
    ids = torch.randint(97, (2, 25), generator=torch.Generator().manual_seed(ranks.rank))
    for micro in range(2):
        with optimizer.micro_batch(last=micro == 1):
            objective.backward(ids[:, :-1], ids[:, 1:], 1 / 4)
        left = sum(p.numel() for p in parameters.values() if p.grad is not None)
    optimizer.finish_gradients()
    gradients = {n: p.grad for n, p in optimizer.parameters.items() if p.grad is not None}
    trained = [sum(parameters[n].numel() for n, count in section.items() if count) for section in sections]
    return most, left, trained, gradients


def test_full_gradients_leave_section_by_section():
    """ZeRO-2: beside the shared section a rank never holds more than the gradients of one layer or head."""
    for most, left, trained, _ in run_ranks(2, held_gradients, "every_microbatch"):
        assert left == 0
        assert most <= trained[-1] + max(trained[:-1]) < sum(trained) / 2


def test_both_ways_of_sending_give_the_same_gradients():
    every, once = (run_ranks(2, held_gradients, mode) for mode in ("every_microbatch", "last_microbatch"))
    assert once[0][0] > every[0][0]
    for (*_, first), (*_, second) in zip(every, once, strict=True):
        assert first.keys() == second.keys()
        for name, value in first.items():
            torch.testing.assert_close(value, second[name], rtol=1e-4, atol=1e-6)


def restore_elsewhere(ranks):
    """Device and dtype of every tensor of the state once restored beside parameters on another device."""
    model = Shapes()
    optimizer = DistMuonAdamW(model, OptimizerRecipe(), TOKENS, ranks, RanksRecipe())
    step_once(model, optimizer, 0, range(8), 1)
    state = optimizer.state_dict()
    optimizer.parameters = {name: nn.Parameter(p.to("meta")) for name, p in optimizer.parameters.items()}
    optimizer.load_state_dict(state)
    restored = optimizer.state_dict()
    return restored.keys() == state.keys(), {(value.device.type, value.dtype) for value in restored.values()}


def test_restored_state_lives_where_the_parameter_lives():
    assert run_ranks(1, restore_elsewhere) == [(True, {("meta", torch.float32)})]
