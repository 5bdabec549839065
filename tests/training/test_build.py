"""Who trains on what: the rows of a rank, and the objective and optimiser that fit."""

import dataclasses

import pytest
import torch

from cognica_poe.errors import UserError
from cognica_poe.recipe.fields import RanksRecipe
from cognica_poe.recipe.named import RECIPES
from cognica_poe.training.build import build_model, build_objective_and_optimizer, rows_of_a_rank
from cognica_poe.training.objective import Objective
from cognica_poe.training.optim.optimizer import MuonAdamW
from cognica_poe.training.parallel.ranks import Ranks
from cognica_poe.training.parallel.stages import StageParallelMuonAdamW, StageParallelObjective
from cognica_poe.training.parallel.zero2 import DistMuonAdamW
from tests.runs import with_training

ROWS, STAGES = RanksRecipe(), RanksRecipe(parallel="stages")
TINY = with_training(RECIPES["tiny"], batch_rows=12, micro_rows=2)


@pytest.mark.parametrize("world", [1, 2, 3, 6])
def test_ranks_take_the_rows_one_after_the_other(world):
    taken = [list(range(12))[rows_of_a_rank(TINY, Ranks(rank, world))] for rank in range(world)]
    assert [row for rows in taken for row in rows] == list(range(12)) and len({len(rows) for rows in taken}) == 1


def test_by_stages_every_rank_takes_all_rows():
    recipe = with_training(TINY, ranks=STAGES)
    assert [rows_of_a_rank(recipe, Ranks(rank, 2)) for rank in range(2)] == [slice(0, 12)] * 2


def test_rows_that_cannot_be_shared_are_refused():
    with pytest.raises(UserError, match="batch-rows 12 cannot be shared by 4 ranks in micro-batches of 2 rows"):
        rows_of_a_rank(TINY, Ranks(0, 4))


@pytest.mark.parametrize(
    ("world", "options", "objective", "optimizer"),
    [
        (1, ROWS, Objective, MuonAdamW),
        (1, STAGES, Objective, MuonAdamW),
        (2, ROWS, Objective, DistMuonAdamW),
        (2, STAGES, StageParallelObjective, StageParallelMuonAdamW),
    ],
)
def test_the_way_of_sharing_chooses_objective_and_optimiser(world, options, objective, optimizer):
    model = build_model(TINY.model)
    recipe = with_training(TINY, ranks=options)
    made = build_objective_and_optimizer(model, recipe, torch.float32, Ranks(0, world))
    assert (type(made[0]), type(made[1])) == (objective, optimizer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replicas_have_the_dtype_of_the_products(dtype):
    model = build_model(TINY.model)
    build_objective_and_optimizer(model, TINY, dtype, Ranks(0, 2))
    assert model.lm_head.weight.dtype == dtype


def test_a_shape_that_contradicts_itself_is_one_line():
    with pytest.raises(UserError, match=r"^recipe: "):
        build_model(dataclasses.replace(TINY.model, num_attention_heads=3, num_key_value_heads=2))
