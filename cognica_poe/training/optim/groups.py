"""Which optimiser a parameter belongs to, and AdamW's settings: nanochat's groups."""

from __future__ import annotations

import math
from typing import TypedDict

from cognica_poe.recipe.fields import OptimizerRecipe

BATCH_REFERENCE = 2**19
"""Tokens of a step for which the rates of a recipe are meant."""
WIDTH_REFERENCE = 768
"""Width for which the rates of embeddings and heads are meant."""


class AdamWSettings(TypedDict):
    """Arguments of ``torch.optim.AdamW`` for a group."""

    lr: float
    betas: tuple[float, float]
    weight_decay: float


def adamw_groups(recipe: OptimizerRecipe, width: int) -> dict[str, AdamWSettings]:
    """AdamW settings by group name, before the batch scaling."""
    scale = (width / WIDTH_REFERENCE) ** -0.5 if recipe.lr_scaling else 1.0
    return {
        "lm_head": {"lr": recipe.unembedding_lr * scale, "betas": (0.8, 0.96), "weight_decay": 0.01},
        "wte": {"lr": recipe.embedding_lr * scale, "betas": (0.8, 0.995), "weight_decay": 0.001},
        "value_embeds": {"lr": recipe.embedding_lr * scale / 2, "betas": (0.8, 0.995), "weight_decay": 0.01},
        "resid_lambdas": {"lr": recipe.scalar_lr * 0.01, "betas": (0.8, 0.95), "weight_decay": 0.05},
        "x0_lambdas": {"lr": recipe.scalar_lr, "betas": (0.96, 0.95), "weight_decay": 0.0},
        "gates": {"lr": recipe.gate_lr, "betas": (0.8, 0.95), "weight_decay": 0.0},
    }


def group_of(name: str) -> str:
    """The optimiser group of a parameter: ``muon`` or a key of ``adamw_groups``. Raises ValueError for none."""
    if name.startswith("transformer.h."):
        return "muon"
    if name.startswith("transformer.wte"):
        return "wte"
    for group in ("lm_head", "value_embeds", "resid_lambdas", "x0_lambdas"):
        if name.startswith(group):
            return group
    if name.startswith(("smear_", "backout_")):
        return "gates"
    raise ValueError(f"parameter {name} belongs to no optimiser group")


def batch_scale(recipe: OptimizerRecipe, batch_tokens: int) -> float:
    """Factor on every rate for steps of ``batch_tokens`` tokens."""
    return math.sqrt(batch_tokens / BATCH_REFERENCE) if recipe.lr_scaling else 1.0
