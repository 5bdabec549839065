"""Updates with the gradient of the step before, as stages on ranks of their own make them that never wait.

At step t the gradient is taken at the weights ``w_t`` and that of step t - 1 is applied; the last one of a run never is
(PipeDream-2BW, arXiv 2006.09503; one step of delay costs Muon little and AdamW much, arXiv 2606.30634). With error
feedback an update is corrected by what the one before lacked: ``u_{t-1}`` stood in for ``u_t``, which is known a step
later, so that ``2 u_t - u_{t-1}`` is applied in its place.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence

import torch

from cognica_poe.recipe.fields import ObjectiveRecipe
from cognica_poe.training.optim.groups import group_of
from cognica_poe.training.optim.optimizer import MuonAdamW, Optimizer

PENDING, LAST = "pending", "last_update"


def with_delay(optimizer: MuonAdamW, recipe: ObjectiveRecipe) -> Optimizer:
    """``optimizer``, delayed where the recipe wants it."""
    return DelayedOptimizer(optimizer, recipe.error_feedback) if recipe.gradient_delay else optimizer


class DelayedOptimizer:
    """An ``Optimizer`` that applies every gradient one step after it was taken.

    A step that is left out drops its own gradient; the one that was due waits for the next step.

    Args:
        inner: applies them; of one process or of a rank among others.
        error_feedback: correct every update by what the one before lacked.
    """

    def __init__(self, inner: MuonAdamW, error_feedback: bool = False):
        self.inner, self.error_feedback = inner, error_feedback
        self.pending: dict[str, torch.Tensor] = {}
        """Gradients that were not applied yet, by name."""
        self.last: dict[str, torch.Tensor] = {}
        """The last update before its correction, by name."""

    def arrange(self, sections: Sequence[Mapping[str, int]]) -> None:
        """As for ``Optimizer``."""
        self.inner.arrange(sections)

    def micro_batch(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """As for ``Optimizer``."""
        return self.inner.micro_batch(last)

    def gradients(self) -> list[torch.Tensor]:
        """The gradients of this step, which the next one will apply."""
        return self.inner.gradients()

    @torch.no_grad()
    def step(
        self, lr_scale: float, momentum: float, weight_decay_scale: float, keep: torch.Tensor | None = None
    ) -> None:
        """Apply the gradients of the step before with the rates of this one; arguments as for ``Optimizer``."""
        self.inner.gradients()
        parameters = self.inner.parameters
        fresh = {name: p.grad for name, p in parameters.items() if p.grad is not None}
        if self.pending:
            for name, parameter in parameters.items():
                parameter.grad = self.pending.get(name)
            self._apply((lr_scale, momentum, weight_decay_scale), keep)
        if keep is not None:
            old = {name: self.pending.get(name, torch.zeros_like(gradient)) for name, gradient in fresh.items()}
            fresh = {name: torch.where(keep, gradient, old[name]) for name, gradient in fresh.items()}
        self.pending = fresh

    def _apply(self, rates: tuple[float, float, float], keep: torch.Tensor | None) -> None:
        if not self.error_feedback:
            return self.inner.step(*rates, keep=keep)
        before = {name: p.detach().clone() for name, p in self.inner.parameters.items() if p.grad is not None}
        self.inner.step(*rates, keep=keep)
        for name, old in before.items():
            update = self.inner.parameters[name] - old
            last = self.last.get(name, update)  # the first update has nothing to correct
            self.inner.parameters[name].add_(_where(keep, update - last, 0.0))
            self.last[name] = _where(keep, update, last)
        self.inner.gather_replicas()

    def zero_grad(self) -> None:
        """Drop the gradients of this step, not those that wait."""
        self.inner.zero_grad()

    def weights(self) -> dict[str, torch.Tensor]:
        """As for ``Optimizer``."""
        return self.inner.weights()

    def load_weights(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """As for ``Optimizer``."""
        self.inner.load_weights(tensors)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The inner state with ``<parameter>.<pending|last_update>``, in the same pieces as the weights."""
        own = {PENDING: self.pending, LAST: self.last}
        held = {f"{name}.{key}": t for key, tensors in own.items() for name, t in tensors.items() if t.numel()}
        return {**self.inner.state_dict(), **held}

    def load_state_dict(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Restore a whole state. Raises ValueError for a tensor of an unknown parameter or shape."""
        own: dict[str, dict[str, torch.Tensor]] = {PENDING: {}, LAST: {}}
        for full_name, value in tensors.items():
            name, key = full_name.rsplit(".", 1)
            if key in own:
                rows = self.inner.own_rows(name, value)
                if rows.numel() or group_of(name) == "muon":
                    own[key][name] = rows.to(self.inner.parameters[name].device, copy=True)
        self.inner.load_state_dict({name: t for name, t in tensors.items() if name.rsplit(".", 1)[1] not in own})
        self.pending, self.last = own[PENDING], own[LAST]


def _where(keep: torch.Tensor | None, value: torch.Tensor, otherwise: torch.Tensor | float) -> torch.Tensor:
    return value if keep is None else torch.where(keep, value, otherwise)
