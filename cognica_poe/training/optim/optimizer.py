"""Muon for block matrices, AdamW for everything else, in nanochat's groups (``model_facts`` section 9 of the release).

State is keyed by parameter name, so that a checkpoint does not depend on the order or the grouping of parameters.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping

import torch
from torch import nn

from cognica_poe.recipe.fields import OptimizerRecipe
from cognica_poe.training.optim.muon import descend, muon_update, second_moment_shape

BATCH_REFERENCE = 2**19
WIDTH_REFERENCE = 768


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
        parameters: what is updated, by name, when that is not the model's own parameters but rows of them.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: OptimizerRecipe,
        batch_tokens: int,
        parameters: dict[str, nn.Parameter] | None = None,
    ):
        self.recipe = recipe
        self.batch_scale = math.sqrt(batch_tokens / BATCH_REFERENCE) if recipe.lr_scaling else 1.0
        self.iteration_dtype = getattr(torch, recipe.muon_dtype)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.shapes = {name: p.shape for name, p in trained.items()}
        self.parameters = parameters or trained
        settings = adamw_groups(recipe, model.config.hidden_size)
        members: dict[str, list[nn.Parameter]] = {group: [] for group in settings}
        self.stacks: dict[torch.Size, list[str]] = {}
        for name, parameter in self.parameters.items():
            if group_of(name) == "muon":
                self.stacks.setdefault(self.shapes[name], []).append(name)
            else:
                members[group_of(name)].append(parameter)
        groups = [
            {"params": members[group], "base_lr": values["lr"], **values}
            for group, values in settings.items()
            if members[group]
        ]
        self.adamw = torch.optim.AdamW(groups, eps=1e-10, fused=True)
        self.muon_state: dict[str, dict[str, torch.Tensor]] = {}

    def micro_batch(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """Wrap the backward pass of every micro-batch; ``last`` marks that of a step."""
        return contextlib.nullcontext()

    def gradients(self) -> list[torch.Tensor]:
        """The gradients that this process will apply: each element of the whole is held by one rank."""
        return [p.grad for p in self.parameters.values() if p.grad is not None]

    @torch.no_grad()
    def step(
        self, lr_scale: float, momentum: float, weight_decay_scale: float, keep: torch.Tensor | None = None
    ) -> None:
        """One update of every parameter that has a gradient, with the schedule's multipliers.

        ``keep``, a 0-dim bool tensor, decides where it lives whether there is an update at all: where it is false,
        weights and state stay bit for bit as they were, and nobody waits for it.
        """
        self._step_adamw(lr_scale, keep)
        for shape, names in self._present_stacks().items():
            self._step_stack(names, momentum, *self._muon_rates(shape, lr_scale, weight_decay_scale), keep)

    def _step_adamw(self, lr_scale: float, keep: torch.Tensor | None) -> None:
        for group in self.adamw.param_groups:
            group["lr"] = group["base_lr"] * lr_scale * self.batch_scale
        self.adamw.found_inf = None if keep is None else (~keep).float()
        self.adamw.step()

    def _present_stacks(self) -> dict[torch.Size, list[str]]:
        """Matrices that have a gradient, by shape."""
        present = {
            shape: [name for name in names if self.parameters[name].grad is not None]
            for shape, names in self.stacks.items()
        }
        return {shape: names for shape, names in present.items() if names}

    def _muon_rates(self, shape: torch.Size, lr_scale: float, weight_decay_scale: float) -> tuple[float, float]:
        """Learning rate and decay of matrices of a shape."""
        lr = self.recipe.matrix_lr * lr_scale * self.batch_scale * max(1.0, shape[0] / shape[1]) ** 0.5
        return lr, self.recipe.weight_decay * weight_decay_scale * self.batch_scale

    def _step_stack(
        self, names: list[str], momentum: float, lr: float, decay: float, keep: torch.Tensor | None
    ) -> None:
        states = [self._state(name) for name in names]
        buffer = torch.stack([state["momentum"] for state in states])
        normalise = self.recipe.muon_beta2 < 1.0
        second = torch.stack([state["second_moment"] for state in states]) if normalise else None
        gradient = torch.stack([self.parameters[name].grad for name in names])
        beta2, iteration = self.recipe.muon_beta2, self.recipe.muon_iteration
        update = muon_update(gradient, buffer, second, momentum, beta2, iteration, self.iteration_dtype, keep)
        for i, (name, state) in enumerate(zip(names, states, strict=True)):
            state["momentum"].copy_(buffer[i])
            if normalise:
                state["second_moment"].copy_(second[i])
            descend(self.parameters[name], update[i], lr, decay)

    def _state(self, name: str) -> dict[str, torch.Tensor]:
        if name not in self.muon_state:
            parameter = self.parameters[name]
            state = {"momentum": torch.zeros_like(parameter)}
            if self.recipe.muon_beta2 < 1.0:
                state["second_moment"] = parameter.new_zeros(second_moment_shape(*self.shapes[name]))
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

    def load_state_dict(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Restore what ``state_dict`` returned. Raises ValueError for a tensor of an unknown parameter or shape."""
        self.muon_state.clear()
        self.adamw.state.clear()
        for full_name, value in tensors.items():
            name, key = full_name.rsplit(".", 1)
            if name not in self.parameters:
                raise ValueError(f"the optimiser state holds {full_name}, which the model does not have")
            shape = self.shapes[name]
            if key in ("momentum", "exp_avg", "exp_avg_sq") and value.shape != shape:
                raise ValueError(f"{full_name} has shape {list(value.shape)}, the parameter {list(shape)}")
            self._restore(name, key, value)

    def _restore(self, name: str, key: str, value: torch.Tensor) -> None:
        """Take one tensor of the state, in its global shape."""
        parameter = self.parameters[name]
        if group_of(name) == "muon":
            self.muon_state.setdefault(name, {})[key] = value.to(parameter.device)
        else:
            # The fused kernel reads the step count where the parameter lives, always in fp32, and counts in place.
            step = {"dtype": torch.float32, "copy": True} if key == "step" else {}
            self.adamw.state[parameter][key] = value.to(parameter.device, **step)
