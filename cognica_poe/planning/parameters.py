"""Exact parameter counts, by the groups of the model card."""

from __future__ import annotations

from typing import Any

import torch

from cognica_poe.recipe.fields import Recipe
from cognica_poe.training.build import build_model

GROUPS = (
    ("trunk", "transformer.h."),
    ("wte", "transformer.wte"),
    ("value_embeds", "value_embeds."),
    ("lm_head_stages", "lm_head_stages."),
    ("lm_head_exits", "lm_head_exits."),
    ("lm_head", "lm_head."),
    ("scalars", ""),
)
"""Group name and prefix of its parameters; the first match counts. ``ve_gates`` are split from the trunk."""


def count_parameters(recipe: Recipe) -> dict[str, Any]:
    """``{"total": n, "groups": {...}}`` of a recipe's model, built on the meta device."""
    with torch.device("meta"):
        model = build_model(recipe.model)
    groups = {name: 0 for name, _ in GROUPS} | {"ve_gates": 0}
    for name, parameter in model.named_parameters():
        group = next(group for group, prefix in GROUPS if name.startswith(prefix))
        groups["ve_gates" if ".ve_gate." in name else group] += parameter.numel()
    if not recipe.model.poe_exit_layers:
        del groups["lm_head_exits"]
    return {"total": sum(groups.values()), "groups": groups}
