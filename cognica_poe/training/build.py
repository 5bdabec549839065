"""What a recipe trains with: the model, and the objective and optimiser that fit the ranks of a run.

Here alone it is decided how ranks share the work: one process, parts of the rows (``zero2``) or stages (``stages``).
"""

from __future__ import annotations

import dataclasses

import torch

from cognica_poe.errors import UserError
from cognica_poe.modeling.configuration_cognica_poe import CognicaPoEConfig
from cognica_poe.modeling.modeling_cognica_poe import CognicaPoEForCausalLM
from cognica_poe.recipe.fields import ModelRecipe, RanksRecipe, Recipe
from cognica_poe.training.objective import Objective
from cognica_poe.training.optim.delay import with_delay
from cognica_poe.training.optim.optimizer import MuonAdamW, Optimizer
from cognica_poe.training.parallel.delayed import DelayedStageMuonAdamW, DelayedStageObjective
from cognica_poe.training.parallel.ranks import Ranks
from cognica_poe.training.parallel.stages import StageParallelMuonAdamW, StageParallelObjective
from cognica_poe.training.parallel.zero2 import DistMuonAdamW


def build_model(recipe: ModelRecipe, seed: int = 0) -> CognicaPoEForCausalLM:
    """A freshly initialised model. Raises UserError when the shape contradicts itself."""
    try:
        config = CognicaPoEConfig(**dataclasses.asdict(recipe))
    except ValueError as error:
        raise UserError(f"recipe: {error}") from error
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CognicaPoEForCausalLM(config)


def works_by_stages(recipe: Recipe, ranks: Ranks) -> bool:
    """Whether every rank runs its stages of all rows, instead of the whole model on its part of the rows."""
    return recipe.training.ranks.parallel == "stages" and ranks.world > 1


def rows_of_a_rank(recipe: Recipe, ranks: Ranks) -> slice:
    """The rows of a step that a rank trains on. Raises UserError unless they are whole micro-batches on every rank."""
    training = recipe.training
    parts = 1 if works_by_stages(recipe, ranks) else ranks.world
    if training.batch_rows % (training.micro_rows * parts):
        raise UserError(
            f"recipe {recipe.name}: training.batch-rows {training.batch_rows} cannot be shared by {parts} ranks in "
            f"micro-batches of {training.micro_rows} rows; change --training.micro-rows or the number of ranks"
        )
    rows = training.batch_rows // parts
    first = ranks.rank % parts * rows
    return slice(first, first + rows)


def build_objective_and_optimizer(
    model: CognicaPoEForCausalLM, recipe: Recipe, compute_dtype: torch.dtype, ranks: Ranks
) -> tuple[Objective, Optimizer]:
    """Both for this rank.

    Args:
        model: full model on its device, equal on every rank; what this rank does not need of it is dropped.
        recipe: the run.
        compute_dtype: dtype of the matrix products.
        ranks: this process among the others.
    """
    training = recipe.training
    batch_tokens = training.batch_rows * recipe.model.max_position_embeddings
    if works_by_stages(recipe, ranks) and training.objective.gradient_delay:
        micro_batches = training.batch_rows // training.micro_rows
        late = DelayedStageObjective(model, compute_dtype, ranks, micro_batches, training.recompute, training.objective)
        return late, DelayedStageMuonAdamW(late, training.optimizer, batch_tokens)
    if works_by_stages(recipe, ranks):
        staged = StageParallelObjective(model, compute_dtype, ranks, training.recompute, training.objective)
        return staged, StageParallelMuonAdamW(staged, training.optimizer, batch_tokens)
    objective = Objective(model, compute_dtype, training.recompute, training.objective)
    if ranks.world == 1:
        return objective, with_delay(MuonAdamW(model, training.optimizer, batch_tokens), training.objective)
    options, sections = _with_replica_dtype(training.ranks, compute_dtype), objective.sections()
    sharded = DistMuonAdamW(model, training.optimizer, batch_tokens, ranks, options, sections)
    return objective, with_delay(sharded, training.objective)


def _with_replica_dtype(recipe: RanksRecipe, compute_dtype: torch.dtype) -> RanksRecipe:
    """``auto`` made explicit: replicas in the dtype of the products."""
    if recipe.replica_dtype != "auto":
        return recipe
    return dataclasses.replace(recipe, replica_dtype="bfloat16" if compute_dtype == torch.bfloat16 else "float32")
