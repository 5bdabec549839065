"""Muon for block matrices, AdamW for everything else, in nanochat's groups (``model_facts`` section 9 of the release).

State is keyed by parameter name, so that a checkpoint does not depend on the order or the grouping of parameters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from cognica_poe.training.muon import muon_update, second_moment_shape

BATCH_REFERENCE = 2**19
WIDTH_REFERENCE = 768


@dataclass(frozen=True)
class OptimizerRecipe:
    """Learning rates and decays; the card's values are the defaults."""

    matrix_lr: float = 0.015
    """Muon, matrices of the blocks."""
    embedding_lr: float = 0.3
    """AdamW, token embeddings; value embeddings get half of it."""
    unembedding_lr: float = 0.008
    """AdamW, shared and stage heads."""
    scalar_lr: float = 0.5
    """AdamW, x0 lambdas; residual lambdas get a hundredth of it."""
    gate_lr: float = 0.2
    """AdamW, smear and backout."""
    weight_decay: float = 0.28
    """Muon's cautious decay; follows a cosine to 0 over the run."""
    lr_scaling: bool = True
    """Multiply every rate by sqrt(batch tokens / 2^19), embeddings and heads also by (width / 768)^-0.5."""
    muon_beta2: float = 0.9
    """Decay of Muon's factored second moment; 1 turns the normalisation off."""
    muon_iteration: Literal["polar_express", "quintic"] = "polar_express"
    """Newton-Schulz coefficients."""
    muon_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the Newton-Schulz products."""


def adamw_groups(recipe: OptimizerRecipe, width: int) -> dict[str, dict]:
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
    """The optimiser group of a parameter: ``muon`` or a key of ``adamw_groups``."""
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


class MuonAdamW:
    """Both optimisers behind one ``step``.

    Args:
        model: its named parameters are grouped by ``group_of``; a parameter without a gradient is left alone.
        recipe: rates and decays.
        batch_tokens: tokens of one optimiser step, for the batch scaling.
    """

    def __init__(self, model: nn.Module, recipe: OptimizerRecipe, batch_tokens: int):
        self.recipe = recipe
        self.batch_scale = math.sqrt(batch_tokens / BATCH_REFERENCE) if recipe.lr_scaling else 1.0
        self.iteration_dtype = getattr(torch, recipe.muon_dtype)
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        settings = adamw_groups(recipe, model.config.hidden_size)
        members: dict[str, list[nn.Parameter]] = {group: [] for group in settings}
        self.stacks: dict[torch.Size, list[str]] = {}
        for name, parameter in self.parameters.items():
            if group_of(name) == "muon":
                self.stacks.setdefault(parameter.shape, []).append(name)
            else:
                members[group_of(name)].append(parameter)
        groups = [
            {"params": members[group], "base_lr": values["lr"], **values}
            for group, values in settings.items()
            if members[group]
        ]
        self.adamw = torch.optim.AdamW(groups, eps=1e-10, fused=True)
        self.muon_state: dict[str, dict[str, torch.Tensor]] = {}

    @torch.no_grad()
    def step(self, lr_scale: float, momentum: float, weight_decay_scale: float) -> None:
        """One update of every parameter that has a gradient, with the schedule's multipliers."""
        for group in self.adamw.param_groups:
            group["lr"] = group["base_lr"] * lr_scale * self.batch_scale
        self.adamw.step()
        decay = self.recipe.weight_decay * weight_decay_scale * (self.batch_scale if self.recipe.lr_scaling else 1.0)
        for shape, names in self.stacks.items():
            names = [name for name in names if self.parameters[name].grad is not None]
            if names:
                lr = self.recipe.matrix_lr * lr_scale * self.batch_scale * max(1.0, shape[0] / shape[1]) ** 0.5
                self._step_stack(names, lr, momentum, decay)

    def _step_stack(self, names: list[str], lr: float, momentum: float, decay: float) -> None:
        states = [self._state(name) for name in names]
        buffer = torch.stack([state["momentum"] for state in states])
        normalise = self.recipe.muon_beta2 < 1.0
        second = torch.stack([state["second_moment"] for state in states]) if normalise else None
        gradient = torch.stack([self.parameters[name].grad for name in names])
        update = muon_update(
            gradient, buffer, second, momentum, self.recipe.muon_beta2, self.recipe.muon_iteration, self.iteration_dtype
        )
        for i, (name, state) in enumerate(zip(names, states, strict=True)):
            parameter = self.parameters[name]
            state["momentum"].copy_(buffer[i])
            if normalise:
                state["second_moment"].copy_(second[i])
            if decay:  # cautious: only where the update also shrinks the weight
                shrink = (update[i] * parameter > 0).to(parameter.dtype).mul_(parameter)
                parameter.sub_(shrink, alpha=lr * decay)
            parameter.sub_(update[i], alpha=lr)

    def _state(self, name: str) -> dict[str, torch.Tensor]:
        if name not in self.muon_state:
            parameter = self.parameters[name]
            rows, cols = parameter.shape
            state = {"momentum": torch.zeros_like(parameter)}
            if self.recipe.muon_beta2 < 1.0:
                state["second_moment"] = parameter.new_zeros(second_moment_shape(rows, cols))
            self.muon_state[name] = state
        return self.muon_state[name]

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Flat tensors named ``<parameter>.<momentum|second_moment|exp_avg|exp_avg_sq|step>``."""
        tensors = {f"{name}.{key}": value for name, state in self.muon_state.items() for key, value in state.items()}
        for name, parameter in self.parameters.items():
            for key, value in self.adamw.state.get(parameter, {}).items():
                tensors[f"{name}.{key}"] = value
        return tensors

    def load_state_dict(self, tensors: dict[str, torch.Tensor]) -> None:
        """Restore what ``state_dict`` returned. Raises ValueError for a tensor of an unknown parameter or shape."""
        self.muon_state.clear()
        self.adamw.state.clear()
        for full_name, value in tensors.items():
            name, key = full_name.rsplit(".", 1)
            if name not in self.parameters:
                raise ValueError(f"the optimiser state holds {full_name}, which the model does not have")
            parameter = self.parameters[name]
            if key in ("momentum", "exp_avg", "exp_avg_sq") and value.shape != parameter.shape:
                raise ValueError(f"{full_name} has shape {list(value.shape)}, the parameter {list(parameter.shape)}")
            if group_of(name) == "muon":
                self.muon_state.setdefault(name, {})[key] = value.to(parameter.device)
            else:
                self.adamw.state[parameter][key] = value if key == "step" else value.to(parameter.device)
