"""The plan against the released card, the measured facts, and what really runs: state, operations, allocations."""

import dataclasses
import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cognica_poe.bench.memory import peak_bytes
from cognica_poe.errors import UserError
from cognica_poe.planning.cluster import Cluster
from cognica_poe.planning.costs import Costs
from cognica_poe.planning.plan import GIB, Planner, make_plan
from cognica_poe.recipe.fields import RanksRecipe, Recipe
from cognica_poe.recipe.named import RECIPES
from cognica_poe.recipe.rules import check
from cognica_poe.training.build import build_model
from cognica_poe.training.objective import Objective
from cognica_poe.training.optim.muon import orthogonalize
from cognica_poe.training.optim.optimizer import MuonAdamW
from cognica_poe.training.parallel.ranks import Ranks
from cognica_poe.training.parallel.zero2 import DistMuonAdamW
from tests.oracles.objective import one_shot_loss
from tests.runs import with_ranks

CARD = Cluster(gpus=12, gpu="a100-80g", nodes=3)


def by_name(figures):
    return {figure.name: figure.value for figure in figures}


def small(mode="flat", stages=(2, 1, 1), width=96, vocab=512, length=64, **training) -> Recipe:
    recipe = RECIPES["tiny"]
    model = dataclasses.replace(
        recipe.model,
        poe_mode=mode,
        poe_stage_layers=stages,
        num_hidden_layers=sum(stages),
        hidden_size=width,
        intermediate_size=4 * width,
        num_attention_heads=3,
        num_key_value_heads=3,
        head_dim=width // 3,
        max_position_embeddings=length,
        vocab_size=vocab,
    )
    training = dataclasses.replace(recipe.training, **training)
    return check(dataclasses.replace(recipe, model=model, training=training))


def batch(recipe: Recipe, rows: int):
    ids = torch.randint(recipe.model.vocab_size, (rows, recipe.model.max_position_embeddings + 1))
    return ids[:, :-1], ids[:, 1:]


# ---- the released run --------------------------------------------------------------------------------------------


def test_totals_of_the_card():
    totals = by_name(make_plan(RECIPES["3b"], CARD).totals)
    assert totals["parameters"] == 3_019_900_506
    assert totals["tokens per step"] == 786_432
    assert int(totals["tokens"] / 1e7) / 100 == 65.99  # the card cuts off, 65.9997B
    assert totals["warm-down from step"] == 29_373
    assert round(totals["tokens per parameter"], 2) == 21.85


def test_memory_table_of_the_layouts():
    layouts = make_plan(RECIPES["3b"], CARD).layouts
    assert [round(figure.value / GIB, 1) for figure in layouts] == [37.3, 23.7, 13.4, 8.7, 3.1]


def test_weights_gradients_and_state_are_those_of_the_layout():
    memory = by_name(make_plan(RECIPES["3b"], CARD).memory)
    parts = ("replicas of the weights", "fp32 masters", "gradients", "optimiser state")
    assert round(sum(memory[part] for part in parts) / GIB, 1) == 8.7


def test_traffic_of_one_reduction_per_step():
    once = with_ranks(RECIPES["3b"], grad_sync="last_microbatch")
    scatter, gather, exchange = (f.value / 1e9 for f in make_plan(once, CARD).traffic)
    assert round(scatter + gather, 1) == 16.6
    assert 2 * scatter == pytest.approx(22.15, rel=0.002)  # both in fp32
    half = make_plan(with_ranks(once, reduce_dtype="bfloat16"), CARD).traffic
    assert round((half[0].value + half[1].value) / 1e9, 1) == 11.1
    assert exchange == pytest.approx(2 * 0.64, rel=0.01)  # fp32, twice what bf16 would send


def test_operations_of_the_release():
    totals = by_name(make_plan(RECIPES["3b"], CARD).totals)
    assert f"{totals['FLOP per token']:.3e}" == "1.480e+10"
    assert f"{by_name(make_plan(RECIPES['3b-bp'], CARD).totals)['FLOP per token']:.3e}" == "1.359e+10"
    assert f"{totals['Newton-Schulz FLOP per step']:.1e}" == "9.4e+13"


def test_step_time_is_work_over_rate():
    """Twelve A100 at 40 % of 312 TFLOP/s, 22 GB over 25 Gbit/s: each about seven seconds and a half."""
    planner = Planner(RECIPES["3b"], CARD)
    compute = planner.time(1)[0].value
    assert compute == pytest.approx(planner.costs.flops_per_token() * 786_432 / (12 * 312e12 * 0.4))
    once = Planner(with_ranks(RECIPES["3b"], grad_sync="last_microbatch"), CARD)
    scatter = once.traffic(1)[0]
    assert 2 * once._seconds(scatter) == pytest.approx(7.1, abs=0.05)
    exposed = by_name(once.time(1))["reduce-scatter beyond backward"]
    assert exposed == pytest.approx(max(0.0, once._seconds(scatter) - 2 / 3 * compute))
    made = make_plan(RECIPES["3b"], CARD)
    assert made.days == pytest.approx(made.time[-1].value * 83_923 / 86_400)


# ---- against measurement -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "recompute"),
    [("hier", "stages"), *((mode, kept) for mode in ("flat", "hier", "none") for kept in ("off", "layers"))],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_match_the_allocators_peak(mode, dtype, recompute):
    recipe = small(mode, (5,) if mode == "none" else (3, 1, 1), width=192, length=128)
    recipe = dataclasses.replace(recipe, training=dataclasses.replace(recipe.training, recompute=recompute))
    model = build_model(recipe.model).train().to(dtype)
    objective, (inputs, targets) = Objective(model, dtype, recompute), batch(recipe, 4)
    objective.backward(inputs, targets)  # makes gradients, masks and tables, which are no activations
    measured = peak_bytes(lambda: objective.backward(inputs, targets))
    expected = sum(figure.value for figure in Costs(recipe).activations(4, dtype.itemsize, "cpu"))
    # Where one layer's activations are all there is, the temporaries of its backward are no longer small beside them.
    assert expected == pytest.approx(measured, rel=0.2 if recompute != "off" else 0.1)
    if recompute != "off":
        kept = dataclasses.replace(recipe, training=dataclasses.replace(recipe.training, recompute="off"))
        assert measured < 0.7 * sum(figure.value for figure in Costs(kept).activations(4, dtype.itemsize, "cpu"))


@pytest.mark.parametrize("exits", [(), (1, 3)])
@pytest.mark.parametrize("mode", ["flat", "none"])
def test_products_match_the_operation_counter(mode, exits):
    recipe = small(mode, (4,) if mode == "none" else (2, 2))
    recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, poe_exit_layers=exits))
    model = build_model(recipe.model).train()
    ids = batch(recipe, 2)
    with FlopCounterMode(display=False) as counter:
        one_shot_loss(model, *ids).backward()
        states = torch.randn(len(exits), *ids[0].shape, model.config.hidden_size)
        for exit, x in enumerate(states):  # the heads alone: their trunk has run already
            (x @ model.exit_weight(exit).T).sum().backward()
    counted = counter.get_flop_counts()["Global"][torch.ops.aten.mm] / (2 * recipe.model.max_position_embeddings)
    smear = 6 * model.config.smear_channels  # the one product outside blocks and heads
    assert counted == Costs(recipe).product_flops_per_token() + smear


def test_newton_schulz_matches_the_operation_counter():
    costs = Costs(small())
    with FlopCounterMode(display=False) as counter:
        for shape in costs.matrices:
            orthogonalize(torch.randn(1, *shape))
    assert counter.get_total_flops() == sum(costs.newton_schulz_flops())


def test_state_matches_the_optimizers():
    recipe = small()
    model = build_model(recipe.model).train()
    optimizer = MuonAdamW(model, recipe.training.optimizer, 1024)
    Objective(model).backward(*batch(recipe, 2))
    model.backout_lambda.grad = torch.zeros_like(model.backout_lambda)
    optimizer.step(1.0, 0.95, 1.0)
    held = sum(t.numel() * t.element_size() for n, t in optimizer.state_dict().items() if not n.endswith(".step"))
    assert held == Costs(recipe).state_bytes()


@pytest.mark.parametrize("sync", ["every_microbatch", "last_microbatch"])
def test_traffic_is_what_the_optimizer_hands_over(sync):
    """Its own formula is compared with real collectives; a ring then sends (N - 1) / N of what is handed over."""
    recipe, world = small(vocab=509, batch_rows=12, micro_rows=1), 4
    model = build_model(recipe.model)
    sections, options = Objective(model).sections(), RanksRecipe(grad_sync=sync, replica_dtype="float32")
    handed = {"reduce_scatter": 0.0, "all_gather": 0.0, "all_to_all": 0.0}
    for rank in range(world):
        optimizer = DistMuonAdamW(
            build_model(recipe.model), recipe.training.optimizer, 1, Ranks(rank, world), options, sections
        )
        for kind, count in optimizer.traffic(3).items():
            if kind in handed:
                handed[kind] += count["bytes"] / world
    cluster = Cluster(gpus=world, micro_rows=1)
    training = dataclasses.replace(recipe.training, compute_dtype="float32", ranks=options)
    scatter, gather, exchange = (
        f.value for f in make_plan(dataclasses.replace(recipe, training=training), cluster).traffic
    )
    frozen = 4 * (world - 1) / world * world  # backout_lambda, padded to one row per rank, never travels back
    assert scatter == pytest.approx(handed["reduce_scatter"] * (world - 1) / world, rel=1e-3)
    assert gather == pytest.approx(handed["all_gather"] * (world - 1), abs=frozen)
    assert exchange == pytest.approx(handed["all_to_all"] * (world - 1) / world, rel=1e-3)


# ---- choices and mistakes ----------------------------------------------------------------------------------------


def test_micro_batches_shrink_until_they_fit():
    made = make_plan(RECIPES["3b"], CARD)
    planner = Planner(RECIPES["3b"], CARD)
    assert made.fits and made.micro_rows * made.micro_batches * 12 == 384
    larger = [rows for rows in range(made.micro_rows + 1, 33) if 32 % rows == 0]
    assert larger and not any(planner.fits(rows) for rows in larger)
    tight = make_plan(RECIPES["3b"], dataclasses.replace(CARD, gpu="rtx3090-24g"))
    assert tight.micro_rows < made.micro_rows


def test_flat_needs_less_memory_than_hier():
    hier = dataclasses.replace(RECIPES["3b"], model=dataclasses.replace(RECIPES["3b"].model, poe_mode="hier"))
    held = [sum(f.value for f in Planner(recipe, CARD).memory(8)) for recipe in (RECIPES["3b"], hier)]
    assert held[0] < 0.7 * held[1]


def test_one_gpu_sends_nothing():
    made = make_plan(RECIPES["tiny"], Cluster(gpus=1))
    assert sum(figure.value for figure in made.traffic) == 0
    assert made.time[-1].value == pytest.approx(made.time[0].value + by_name(made.time)["Newton-Schulz"])


def test_this_machine_is_measured(monkeypatch):
    """Rates come from products on the spot, the dtype is chosen as training chooses it."""
    for rates, expected in (({"bf16": 5e10, "fp32": 1e11}, 4), ({"bf16": 2e11, "fp32": 1e11}, 2)):
        asked = iter((rates["bf16"], rates["fp32"]))
        monkeypatch.setattr("cognica_poe.planning.machine.product_rate", lambda *_, asked=asked: next(asked))
        planner = Planner(small(), Cluster(gpus=1, gpu="here", mfu=0.5))
        assert planner.c == expected and planner.gpu.memory_gib > 0.1
        tokens = 16 * planner.costs.config.max_position_embeddings
        seconds = planner.costs.flops_per_token() * tokens / (max(rates.values()) * 0.5)
        assert planner.time(1)[0].value == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"gpu": "a100-80"}, "did you mean 'a100-80g'"),
        ({"gpu": "abacus"}, "known are a100-40g"),
        ({"gpus": 11}, "use --gpus 8 or 12"),
        ({"gpus": 1000}, "use --gpus 384"),
        ({"gpus": 0}, "must be at least 1"),
        ({"nodes": 5}, "cannot be spread over 5 nodes evenly; use --nodes 1, 2, 3, 4, 6 or 12"),
        ({"micro_rows": 5}, "does not divide the 32 rows of a rank; use 4"),
        ({"mfu": 1.5}, "--mfu is 1.5; it must be at most 1"),
        ({"network_gbit": float("nan")}, "--network-gbit is nan"),
    ],
)
def test_clusters_that_cannot_be(changes, says):
    with pytest.raises(UserError) as error:
        make_plan(RECIPES["3b"], dataclasses.replace(CARD, **changes))
    assert says in str(error.value) and "\n" not in str(error.value)


def test_the_command_prints_tables_and_json(capsys):
    from cognica_poe.cli.main import dispatch

    dispatch(["plan", "3b", "--gpus", "12", "--gpu", "a100-80g", "--json"])
    made = json.loads(capsys.readouterr().out)
    assert made["cluster"]["gpus"] == 12 and made["fits"] is True
    assert all(figure["formula"] for part in ("totals", "memory", "traffic", "time") for figure in made[part])
    dispatch(["plan", "3b", "--gpus", "12", "--training.batch-rows", "768", "--training.micro-rows", "8"])
    text = capsys.readouterr().out
    assert "131,999,465,472" in text and "peak" in text and "days" in text
