"""Muon for block matrices, AdamW for everything else, and what a trainer asks of any optimiser.

State is keyed by parameter name, so that a checkpoint does not depend on the order or the grouping of parameters.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import nn

from cognica_poe.modeling.modeling_cognica_poe import CognicaPoEForCausalLM
from cognica_poe.recipe.fields import OptimizerRecipe
from cognica_poe.training.optim.groups import adamw_groups, batch_scale, group_of
from cognica_poe.training.optim.muon import descend, muon_update, second_moment_shape

SLICE = 8
"""Matrices that Muon stacks at once on a GPU: enough to fill it, and of a 3B model's largest 0.8 GB per copy."""


class Optimizer(Protocol):
    """An optimiser of one process or of a rank among others; with ranks, calls are collective."""

    def arrange(self, sections: Sequence[Mapping[str, int]]) -> None:
        """From the next micro-batch on, a backward pass completes gradients in another order (``sections``)."""

    def micro_batch(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """Wrap the backward pass of every micro-batch; ``last`` marks that of a step."""

    def gradients(self) -> list[torch.Tensor]:
        """The gradients that this process will apply: each element of the whole is held by one rank."""

    def step(
        self, lr_scale: float, momentum: float, weight_decay_scale: float, keep: torch.Tensor | None = None
    ) -> None:
        """One update of every parameter that has a gradient, with the schedule's multipliers.

        ``keep``, a 0-dim bool tensor equal on all ranks, decides where it lives whether there is an update at all:
        where it is false, weights and state stay bit for bit as they were, and nobody waits for it.
        """

    def zero_grad(self) -> None:
        """Drop all gradients."""

    def weights(self) -> dict[str, torch.Tensor]:
        """This process's pieces of the weights; joined along the first dimension in rank order they are all of them."""

    def load_weights(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take a whole model's weights. Raises ValueError when names or shapes differ from the model's."""

    def state_dict(self) -> dict[str, torch.Tensor]:
        """This process's pieces of ``<parameter>.<momentum|second_moment|exp_avg|exp_avg_sq|step>``."""

    def load_state_dict(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Restore a whole state. Raises ValueError for a tensor of an unknown parameter or shape."""


class FusedAdamW(torch.optim.AdamW):
    """torch's AdamW in one kernel, which leaves weights and state alone where ``found_inf`` (0-dim fp32) is 1."""

    found_inf: torch.Tensor | None = None


def gradient_of(parameter: nn.Parameter) -> torch.Tensor:
    """The gradient of a parameter that has one."""
    assert parameter.grad is not None
    return parameter.grad


class MuonAdamW:
    """Both optimisers behind one ``step``, for one process: an ``Optimizer``.

    Args:
        model: its named parameters are grouped by ``group_of``; a parameter without a gradient is left alone.
        recipe: rates and decays.
        batch_tokens: tokens of one optimiser step, for the batch scaling.
        parameters: what is updated, by name, when that is not the model's own parameters but rows of them.
    """

    def __init__(
        self,
        model: CognicaPoEForCausalLM,
        recipe: OptimizerRecipe,
        batch_tokens: int,
        parameters: dict[str, nn.Parameter] | None = None,
    ):
        self.recipe = recipe
        self.batch_scale = batch_scale(recipe, batch_tokens)
        self.iteration_dtype: torch.dtype = getattr(torch, recipe.muon_dtype)
        self.names = {name for name, _ in model.named_parameters()}
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
        self.adamw = FusedAdamW(groups, eps=1e-10, fused=True)
        self.muon_state: dict[str, dict[str, torch.Tensor]] = {}

    def arrange(self, sections: Sequence[Mapping[str, int]]) -> None:
        """One process takes gradients in any order."""

    def micro_batch(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """Wrap the backward pass of every micro-batch; ``last`` marks that of a step."""
        return contextlib.nullcontext()

    def gradients(self) -> list[torch.Tensor]:
        """The gradients that this process will apply: each element of the whole is held by one rank."""
        return [gradient_of(p) for p in self.parameters.values() if p.grad is not None]

    @torch.no_grad()
    def step(
        self, lr_scale: float, momentum: float, weight_decay_scale: float, keep: torch.Tensor | None = None
    ) -> None:
        """One update of every parameter that has a gradient; arguments as for ``Optimizer``."""
        self._step_adamw(lr_scale, keep)
        for shape, names in self._present_stacks().items():
            rates = self._muon_rates(shape, lr_scale, weight_decay_scale)
            for some in self._slices(names):
                self._step_stack(some, momentum, *rates, keep)

    def _slices(self, names: list[str]) -> Iterator[list[str]]:
        """Matrices that are stacked at once: five copies of a stack are held, which on a GPU must fit beside the rest.

        All of them on a processor, which has room, and whose products of a batch may round as the batch is long.
        """
        size = SLICE if self.parameters[names[0]].is_cuda else len(names)
        for start in range(0, len(names), size):
            yield names[start : start + size]

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
        gradient = torch.stack([gradient_of(self.parameters[name]) for name in names])
        beta2, iteration = self.recipe.muon_beta2, self.recipe.muon_iteration
        update = muon_update(gradient, buffer, second, momentum, beta2, iteration, self.iteration_dtype, keep)
        for i, (name, state) in enumerate(zip(names, states, strict=True)):
            state["momentum"].copy_(buffer[i])
            if second is not None:
                state["second_moment"].copy_(second[i])
            descend(self.parameters[name], update[i], lr, decay)

    def _state(self, name: str) -> dict[str, torch.Tensor]:
        parameter, state = self.parameters[name], self.muon_state.setdefault(name, {})
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        if "second_moment" not in state and self.recipe.muon_beta2 < 1.0:  # a resumed run may turn it on
            state["second_moment"] = parameter.new_zeros(second_moment_shape(*self.shapes[name]))
        return state

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def weights(self) -> dict[str, torch.Tensor]:
        """The weights themselves, by name."""
        return {name: p.detach() for name, p in self.parameters.items()}

    @torch.no_grad()
    def load_weights(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take a whole model's weights. Raises ValueError when names or shapes differ from the model's."""
        if tensors.keys() != self.names:
            raise ValueError(f"weights and model differ in {', '.join(sorted(tensors.keys() ^ self.names))}")
        for name, shape in self.shapes.items():
            full = tensors[name]
            if full.shape != shape:
                raise ValueError(f"{name} has shape {list(full.shape)}, the model wants {list(shape)}")
            self._set_weight(name, full)

    def _set_weight(self, name: str, full: torch.Tensor) -> None:
        self.parameters[name].copy_(full)

    def own_rows(self, name: str, full: torch.Tensor) -> torch.Tensor:
        """What this process holds of a whole tensor of a parameter's shape. Raises ValueError for another one."""
        if name not in self.parameters or full.shape != self.shapes[name]:
            raise ValueError(f"the model has no {name} of shape {list(full.shape)}")
        return full

    def gather_replicas(self) -> None:
        """One process computes with the weights themselves."""

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
        elif key == "step":
            # The fused kernel reads the step count where the parameter lives, always in fp32, and counts in place.
            self.adamw.state[parameter][key] = value.to(parameter.device, torch.float32, copy=True)
        else:
            self.adamw.state[parameter][key] = value.to(parameter.device)
