"""The recipes that have a name: ``tiny`` for two processor cores up to ``3b``, the release, each with a control arm."""

from __future__ import annotations

import dataclasses
import difflib
from pathlib import Path

from cognica_poe.errors import UserError
from cognica_poe.recipe.fields import (
    DataRecipe,
    ModelRecipe,
    OptimizerRecipe,
    Recipe,
    ReleaseRecipe,
    ScheduleRecipe,
    TrainingRecipe,
)
from cognica_poe.recipe.stored import load_recipe

TINY = Recipe(
    name="tiny",
    model=ModelRecipe(
        vocab_size=2048,
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=3,
        num_key_value_heads=3,
        head_dim=64,
        max_position_embeddings=256,
        window_pattern="L",
        poe_stage_layers=(3, 2, 1),
    ),
    data=DataRecipe(mix="python-docs", case_aug_prob=0.0),
    training=TrainingRecipe(
        steps=200,
        batch_rows=16,
        micro_rows=16,
        checkpoint_every=50,
        schedule=ScheduleRecipe(warmup_steps=10, momentum_warmup_steps=100),
        optimizer=OptimizerRecipe(lr_scaling=False, matrix_lr=0.02, weight_decay=0.1),
    ),
    release=ReleaseRecipe(repo_id="cognica/tiny-poe", every=50, log_steps=False),
)
"""A few minutes on two processor cores: it shows that the machinery works."""

DEEP = Recipe(
    name="deep",
    model=ModelRecipe(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=16,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=512,
        window_pattern="L",
        poe_stage_layers=(8, 8),
    ),
    data=DataRecipe(mix="python-docs", case_aug_prob=0.0),
    training=TrainingRecipe(
        steps=600,
        batch_rows=8,
        micro_rows=8,
        checkpoint_every=100,
        schedule=ScheduleRecipe(warmup_steps=20, momentum_warmup_steps=200),
        optimizer=OptimizerRecipe(lr_scaling=False, matrix_lr=0.02, weight_decay=0.1),
    ),
    release=ReleaseRecipe(repo_id="cognica/deep-poe", every=300, log_steps=False),
)
"""Half of its layers draft for the other half: the shape on which decoding is measured."""

SMALL = Recipe(
    name="small",
    model=ModelRecipe(
        vocab_size=8192,
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=1024,
        poe_stage_layers=(6, 2, 2, 2),
    ),
    data=DataRecipe(mix="python-docs"),
    training=TrainingRecipe(
        steps=5000,
        batch_rows=64,
        micro_rows=8,
        checkpoint_every=250,
        schedule=ScheduleRecipe(warmup_steps=100),
        optimizer=OptimizerRecipe(lr_scaling=False, matrix_lr=0.02, weight_decay=0.05),
    ),
    release=ReleaseRecipe(repo_id="cognica/small-poe", every=1000),
)
"""A shape for one GPU or a patient processor."""

MEASURED_BYTES = 20_000_000
"""Text that a release of a large model is measured on. Of what ``3b`` reads 2 % are held out, 1.3 of 66 billion tokens,
and measuring its 53 releases on all of that would read as many tokens as training does. 20 MB are about 4.5 million
tokens, 240 million for all releases: 0.4 % of those trained on, in forward passes alone."""

BILLION = ModelRecipe(
    hidden_size=1536, intermediate_size=6144, num_hidden_layers=24, num_attention_heads=12, num_key_value_heads=12
)
"""What the shapes of the two releases below 3B share."""

RELEASES = (
    Recipe(
        name="1.3b",
        model=dataclasses.replace(BILLION, poe_stage_layers=(6, 6, 6, 6), per_stage_head=False),
        training=TrainingRecipe(steps=26_430, batch_rows=512),
        release=ReleaseRecipe(repo_id="cognica/poe-1.3b", val_max_bytes=MEASURED_BYTES),
    ),
    Recipe(
        name="1.5b",
        model=dataclasses.replace(BILLION, vocab_size=48_000, num_key_value_heads=6, poe_stage_layers=(12, 5, 4, 3)),
        training=TrainingRecipe(steps=40_000),
        release=ReleaseRecipe(repo_id="cognica/poe-1.5b", val_max_bytes=MEASURED_BYTES),
    ),
    Recipe(name="3b", release=ReleaseRecipe(repo_id="cognica/poe-3b", val_max_bytes=MEASURED_BYTES)),
)
"""The shapes of the published models; the defaults of the fields are those of the 3B release."""


def _backprop_arm(recipe: Recipe) -> Recipe:
    """The control arm: same shape, data, seed and steps, ordinary backprop, one head."""
    model = dataclasses.replace(
        recipe.model,
        poe_mode="none",
        poe_stage_layers=(recipe.model.num_hidden_layers,),
        per_stage_head=False,
    )
    release = dataclasses.replace(recipe.release, repo_id=recipe.release.repo_id + "-bp")
    return dataclasses.replace(recipe, name=recipe.name + "-bp", model=model, release=release)


RECIPES = {r.name: r for recipe in (TINY, DEEP, SMALL, *RELEASES) for r in (recipe, _backprop_arm(recipe))}
"""Every named recipe, each followed by its control arm ``NAME-bp``."""


def find_recipe(name: str) -> Recipe:
    """A recipe by name, or from a ``recipe.json``.

    Raises:
        UserError: neither a known name (the nearest one is suggested) nor a readable recipe file.
    """
    if name in RECIPES:
        return RECIPES[name]
    path = Path(name)
    if path.is_dir():
        path = path / "recipe.json"
    if path.suffix == ".json":
        return load_recipe(path)
    near = difflib.get_close_matches(name, RECIPES, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise UserError(f"unknown recipe {name!r}: {hint}recipes are {', '.join(RECIPES)}, or a path to a recipe.json")
