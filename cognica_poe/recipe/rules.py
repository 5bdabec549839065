"""What a recipe may say: the range of every number, what must fit together, what a resumed run may change."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

from cognica_poe.errors import UserError
from cognica_poe.files import safe_name
from cognica_poe.recipe.fields import ObjectiveRecipe, Range, Recipe

SHORTEST_CONTEXT = 64
"""Tokens that a measured draft, prompt and continuation, takes."""
LARGEST_VOCABULARY = 2**16
MOST_RELEASES = 100_000
REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)


@dataclasses.dataclass(frozen=True)
class Setting:
    """One field of a recipe with its value."""

    option: str
    """Name as the command line has it, such as ``training.micro-rows``."""
    value: Any
    range: Range
    resume: bool
    """A resumed run may change it."""
    absent: Any
    """Value of a field that came later, which runs from before it have; ``MISSING`` for all others."""


def settings(part: Any, prefix: str = "") -> Iterator[Setting]:
    """Every field of a recipe, or of a part of one, in the order of their definition."""
    for field in dataclasses.fields(part):
        value, option = getattr(part, field.name), f"{prefix}{field.name.replace('_', '-')}"
        if dataclasses.is_dataclass(value):
            yield from settings(value, f"{option}.")
        else:
            rules = {"range": Range(), "resume": False, "absent": dataclasses.MISSING, **field.metadata}
            yield Setting(option, value, **rules)


def field_ranges(kind: type) -> dict[str, Range]:
    """Range of every field of a dataclass, by name."""
    return {field.name: field.metadata.get("range", Range()) for field in dataclasses.fields(kind)}


def require_ranges(part: Any, where: str) -> None:
    """Raise UserError, beginning with ``where``, for a number of a dataclass that is out of its range."""
    for setting in settings(part):
        if problem := setting.range.problem(setting.value):
            raise UserError(f"{where}{setting.option} {problem}")


def check(recipe: Recipe) -> Recipe:
    """Return ``recipe``. Raises UserError for a value that no run can have."""
    safe_name(recipe.name, "recipe name")
    require_ranges(recipe, f"recipe {recipe.name}: ")
    training = recipe.training
    if training.batch_rows % training.micro_rows:
        raise UserError(
            f"recipe {recipe.name}: training.batch-rows {training.batch_rows} is not a multiple of "
            f"training.micro-rows {training.micro_rows}"
        )
    if training.steps // recipe.release.every > MOST_RELEASES:
        raise UserError(
            f"recipe {recipe.name}: release.every {recipe.release.every} would release "
            f"{training.steps // recipe.release.every:,} steps; at most {MOST_RELEASES:,} are"
        )
    if recipe.release.repo_id.count("/") != 1:
        raise UserError(f"recipe {recipe.name}: release.repo-id {recipe.release.repo_id!r} must read org/name")
    return recipe


def check_run(recipe: Recipe) -> Recipe:
    """Return ``recipe``, which a run may start from. Raises UserError for what would stop it later, before any work.

    Beyond :func:`check`: the shape must make a model, and training, measuring and publishing must have what they need.
    """
    from cognica_poe.modeling.configuration_cognica_poe import CognicaPoEConfig

    check(recipe)
    try:
        CognicaPoEConfig(**dataclasses.asdict(recipe.model))
    except ValueError as error:
        raise UserError(f"recipe {recipe.name}: {error}") from error
    for problem in (*_misfits(recipe), *_objective_misfits(recipe)):
        raise UserError(f"recipe {recipe.name}: {problem}")
    return recipe


def _misfits(recipe: Recipe) -> Iterator[str]:
    """Settings that are sound one by one and not together."""
    model, training = recipe.model, recipe.training
    if model.poe_mode == "none" and len(model.poe_stage_layers) > 1:
        yield (
            f"model.poe-mode none trains one path, and model.poe-stage-layers names {len(model.poe_stage_layers)} "
            f"stages; set --model.poe-stage-layers {model.num_hidden_layers}"
        )
    if training.schedule.warmup_steps > training.steps:
        yield (
            f"training.schedule.warmup-steps {training.schedule.warmup_steps} is longer than the run of "
            f"{training.steps} steps; lower it to at most {training.steps}"
        )
    if model.max_position_embeddings < SHORTEST_CONTEXT:
        yield (
            f"model.max-position-embeddings is {model.max_position_embeddings}; releases are measured with prompts and "
            f"continuations of {SHORTEST_CONTEXT} tokens together: use at least as many"
        )
    if model.vocab_size > LARGEST_VOCABULARY:
        yield f"model.vocab-size is {model.vocab_size}; packed rows hold 16-bit ids: at most {LARGEST_VOCABULARY}"
    if not REPO_ID.fullmatch(recipe.release.repo_id):
        yield f"release.repo-id {recipe.release.repo_id!r} must read org/name, in letters, digits, dots, - and _"


def _objective_misfits(recipe: Recipe) -> Iterator[str]:
    """Settings of the objective that contradict each other, or would only look like an effect."""
    mode, K, objective = recipe.model.poe_mode, len(recipe.model.poe_stage_layers), recipe.training.objective
    default, weights = ObjectiveRecipe(), objective.exit_weights
    flows = {objective.flow(mode, 0.0), objective.flow(mode, 1.0)}
    if objective != default and (mode == "none" or K == 1):
        yield "training.objective is about several stages, and this model is trained as one: leave it out"
    elif weights and len(weights) != K:
        yield f"training.objective.exit-weights has {len(weights)} numbers for {K} stages: give one per stage"
    elif weights and (flows == {0.0} or len(set(weights)) == 1):
        yield (
            "training.objective.exit-weights would change next to nothing: Muon and AdamW are blind to the scale of a "
            "gradient, only the ratio of an exit's own to what deeper stages send counts; use different weights and a "
            "gradient flow above 0"
        )
    elif weights and not weights[-1]:
        yield "training.objective.exit-weights ends with 0: the last stage would learn nothing"
    elif objective.late_gradient_flow is None and objective.late_from != default.late_from:
        yield "training.objective.late-from needs --training.objective.late-gradient-flow"
    elif objective.late_gradient_flow is not None and len(flows) == 1:
        yield f"training.objective.late-gradient-flow is the flow of the whole run, {flows.pop():g}: leave it out"
    elif objective.gradient_delay and flows == {0.0}:
        yield "training.objective.gradient-delay needs a gradient flow above 0: without one no stage waits for another"
    elif objective.error_feedback and not objective.gradient_delay:
        yield "training.objective.error-feedback corrects a delay: add --training.objective.gradient-delay 1"
    if recipe.training.recompute == "stages" and max(flows) == 0.0:
        yield "training.recompute stages is for gradients that cross stages; without them each stage is freed anyway"
    if recipe.training.ranks.parallel == "stages" and max(flows) > 0.0 and not objective.gradient_delay:
        yield (
            "training.ranks.parallel stages needs a gradient flow of 0 or --training.objective.gradient-delay 1: where "
            "gradients cross at once, stages wait for each other"
        )
    if recipe.training.ranks.parallel == "stages" and recipe.training.eval_every:
        yield (
            "training.eval-every needs training.ranks.parallel rows: where ranks hold stages none has the model; leave "
            "it out, and measure the released steps"
        )
    if recipe.training.ranks.parallel == "stages" and mode == "residual_logop":
        yield (
            "training.ranks.parallel stages cannot train residual_logop: a stage's loss needs the heads of all stages "
            "before it, which other ranks hold; use rows"
        )
    if recipe.training.ranks.parallel == "stages" and objective.error_feedback:
        yield "training.objective.error-feedback is not made for training.ranks.parallel stages: use rows"


@dataclasses.dataclass(frozen=True)
class Change:
    """A setting that differs between two recipes."""

    option: str
    before: Any
    after: Any
    allowed: bool
    """A resumed run may do that."""


def changes(earlier: Recipe, later: Recipe) -> list[Change]:
    """Settings of ``later`` that differ from ``earlier``."""
    before = {setting.option: setting.value for setting in settings(earlier)}
    return [
        Change(setting.option, before[setting.option], setting.value, setting.resume)
        for setting in settings(later)
        if setting.value != before[setting.option]
    ]
