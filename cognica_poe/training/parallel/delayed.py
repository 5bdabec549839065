"""Stages on ranks of their own though gradients cross them: no rank waits for one, since updates come a step late.

Every rank runs its stages of all rows, as in ``stages``. Boundary states go down the line and their gradients come
back, one forward and one backward in turn (1F1B); rank r of N has ``2 (N - 1 - r)`` micro-batches under way. At the end
of a step some of them still miss their backward. They get it within the next step, at the weights that they ran forward
with: the gradient that is complete at the end of step t is that of step t - 1, and the update with it makes the weights
of step t + 1 (PipeDream-2BW, arXiv 2006.09503)::

    rank 0   F0 F1 F2B0 F3B1 . | F0B2 F1B3 F2B0 F3B1 . |   steps of 4 micro-batches: | ends one, where all ranks meet
    rank 1   . F0B0 F1B1 F2B2 F3B3 | . F0B0 F1B1 ...       idle per step: N - 1 forwards, as with local losses

That needs at least ``2 (N - 1)`` micro-batches in a step, two copies of the weights to run with beside those that are
updated, and the activations of the micro-batches under way. The weights are those of one process with
``gradient_delay 1``: what is in flight is brought home before a checkpoint, which holds it as that process does.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from cognica_poe.errors import UserError
from cognica_poe.modeling.modeling_cognica_poe import CognicaPoEForCausalLM
from cognica_poe.recipe.fields import ObjectiveRecipe, OptimizerRecipe
from cognica_poe.training.objective import Objective, scale_gradient
from cognica_poe.training.optim.delay import PENDING
from cognica_poe.training.parallel.ranks import Pending, Ranks
from cognica_poe.training.parallel.stages import (
    StageParallelMuonAdamW,
    assign_stages,
    drop_other_stages,
    shared_parameters,
    sum_over_ranks,
)


class _UnderWay(NamedTuple):
    """A micro-batch that ran forward and not yet backward."""

    total: torch.Tensor
    """Its losses on this rank as they enter the gradient, scalar."""
    before: torch.Tensor | None
    """Boundary states ``[B, T, D]`` from the rank before, a leaf; None on the first."""
    behind: torch.Tensor
    """Boundary states ``[B, T, D]`` for the next rank."""


class DelayedStageObjective(Objective):
    """The family of objectives with ``gradient_delay`` 1, on the stages of one rank.

    A micro-batch must be given to all ranks in the same order, as many of one shape in every step.

    Args:
        model: full model, equal on every rank. What belongs to other ranks' stages is dropped from it.
        compute_dtype: as for ``Objective``.
        ranks: this process among the others.
        micro_batches: of a step. Raises UserError when they are fewer than the line of ranks needs.
        recompute, options: as for ``Objective``.
    """

    def __init__(
        self,
        model: CognicaPoEForCausalLM,
        compute_dtype: torch.dtype,
        ranks: Ranks,
        micro_batches: int,
        recompute: str = "off",
        options: ObjectiveRecipe | None = None,
    ):
        super().__init__(model, compute_dtype, recompute, options)
        if micro_batches < (needed := 2 * (ranks.world - 1)):
            raise UserError(
                f"{ranks.world} ranks in a line need at least {needed} micro-batches in a step to work without "
                f"waiting, not {micro_batches}: lower --training.micro-rows"
            )
        self.ranks, self.stages = ranks, assign_stages(self.config, ranks.world)[ranks.rank]
        drop_other_stages(model, self.stages)
        self.weights = model
        """What is updated; the two banks are what runs."""
        self.banks = [copy.deepcopy(model) for _ in range(2)]
        self.lag = 2 * (ranks.world - 1 - ranks.rank)
        self.queue: deque[_UnderWay] = deque()
        self.sends: deque[Pending] = deque()
        self.now = 1
        """Bank of the step under way; the other one is that of the step before."""
        self.between_steps = True
        self.whole: set[int] = set()
        """Banks whose gradient is that of all micro-batches and ranks already."""

    def shared(self) -> dict[str, nn.Parameter]:
        """Parameters that stages of several ranks add to."""
        return shared_parameters(self.weights)

    def backward(self, inputs: torch.Tensor, targets: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        """Forward of this micro-batch and, once enough are under way, backward of the one that is due.

        Arguments as for ``Objective``. Returns the losses ``[K + E]`` of this one: own ones times the number of ranks,
        others zero, so that the mean over ranks is each loss.
        """
        if self.between_steps:
            self._begin_step()
        autocast = torch.autocast(inputs.device.type, torch.bfloat16, enabled=self.compute_dtype == torch.bfloat16)
        with autocast:
            losses = self._forward(inputs, targets.reshape(-1), scale)
        if len(self.queue) > self.lag:
            self._backward()
        return losses

    @torch.no_grad()
    def _begin_step(self) -> None:
        """Run with the weights as they are now; the bank of the step before last is free for them."""
        self.between_steps, self.now = False, 1 - self.now
        self.whole.discard(self.now)
        self.model = self.banks[self.now]
        for mine, weight in zip(self.model.parameters(), self.weights.parameters(), strict=True):
            if weight.requires_grad:
                mine.copy_(weight)
                mine.grad = None

    def _forward(self, ids: torch.Tensor, targets: torch.Tensor, scale: float) -> torch.Tensor:
        x0 = x = self._embed(ids)
        rotary, masks = self._inputs(x0)
        before = None
        if self.stages.start:
            before = torch.empty_like(x0, requires_grad=False)
            Pending(dist.irecv(before, self.ranks.rank - 1), before).wait()
            x = before.requires_grad_()
        losses = self.no_losses(x0)
        total = x0.new_zeros(())
        for stage in self.stages:
            x = scale_gradient(x, self.gradient_flow) if stage else x
            x, states = self._run_stage(stage, x, x0, ids, rotary, masks)
            if stage == self.stages[-1]:
                self._send(x.detach(), self.ranks.rank + 1)
            exits = self._exit_losses(states, targets)
            loss = self._stage_loss(x, stage, targets)
            total = total + sum(exits, loss) * (scale * self.stage_scale)
            self.put_losses(losses, stage, loss, exits, self.ranks.world)
        self.queue.append(_UnderWay(total, before, x))
        return losses

    def _backward(self) -> None:
        """The oldest micro-batch under way; its gradients land in the bank that it ran forward with."""
        done = self.queue.popleft()
        tensors: list[torch.Tensor] = [done.total]
        gradients: list[torch.Tensor | None] = [None]  # of a scalar: 1
        if self.ranks.rank + 1 < self.ranks.world:
            arrived = torch.empty_like(done.behind, requires_grad=False)
            Pending(dist.irecv(arrived, self.ranks.rank + 1), arrived).wait()
            tensors, gradients = [*tensors, done.behind], [*gradients, arrived]
        torch.autograd.backward(tensors, gradients)
        if done.before is not None:
            gradient = done.before.grad
            self._send(torch.zeros_like(done.before) if gradient is None else gradient, self.ranks.rank - 1)

    def _send(self, x: torch.Tensor, to: int) -> None:
        """Start sending; a rank beyond either end of the line is none."""
        if 0 <= to < self.ranks.world:
            while len(self.sends) > 2 * self.lag + 4:
                self.sends.popleft().wait()
            x = x.contiguous()
            self.sends.append(Pending(dist.isend(x, to), x))

    @torch.no_grad()
    def finish(self) -> None:
        """After the last micro-batch of a step: hand the gradient of the step before to the weights.

        Does nothing when called again before the next backward.
        """
        if self.between_steps:
            return
        self.between_steps = True
        self._complete(1 - self.now)
        for mine, weight in zip(self.banks[1 - self.now].parameters(), self.weights.parameters(), strict=True):
            weight.grad, mine.grad = mine.grad, None

    def drain(self) -> dict[str, torch.Tensor]:
        """Bring home what is under way; the gradients of the step that ended last, by name. Collective."""
        while self.queue:
            self._backward()
        while self.sends:
            self.sends.popleft().wait()
        self._complete(self.now)
        return {name: p.grad for name, p in self.banks[self.now].named_parameters() if p.grad is not None}

    def restore(self, pending: Mapping[str, torch.Tensor]) -> None:
        """Take gradients that :meth:`drain` returned, of this rank's stages and of what is shared."""
        self.queue.clear()
        self.between_steps, self.whole = True, {self.now}
        for name, parameter in self.banks[self.now].named_parameters():
            own = pending[name].to(parameter.device, parameter.dtype, copy=True) if name in pending else None
            parameter.grad = own if parameter.requires_grad else None

    def _complete(self, bank: int) -> None:
        """Sum what stages share over all ranks, once per step; nothing before the first one."""
        parameters = shared_parameters(self.banks[bank])
        if bank in self.whole or not self.ranks.any([any(p.grad is not None for p in parameters.values())])[0]:
            return
        self.whole.add(bank)
        if self.ranks.world > 1:
            sum_over_ranks(list(parameters.values()))


class DelayedStageMuonAdamW(StageParallelMuonAdamW):
    """``MuonAdamW`` of one rank's stages, fed with the gradients of the step before: an ``Optimizer``."""

    def __init__(self, objective: DelayedStageObjective, recipe: OptimizerRecipe, batch_tokens: int):
        self.delayed = objective
        super().__init__(objective, recipe, batch_tokens)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """This rank's part of the state with ``<parameter>.pending``, the gradients that the next step applies."""
        ours = self._ours()
        pending = self.delayed.drain()
        held = {f"{name}.{PENDING}": gradient for name, gradient in pending.items() if name in ours}
        return {**super().state_dict(), **held}

    def load_state_dict(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Restore this rank's part of a whole model's state, what was in flight included."""
        pending = {n.rsplit(".", 1)[0]: t for n, t in tensors.items() if n.rsplit(".", 1)[1] == PENDING}
        self.delayed.drain()  # what others sent must be taken before anything is sent anew
        super().load_state_dict({n: t for n, t in tensors.items() if n.rsplit(".", 1)[1] != PENDING})
        self.delayed.restore(pending)
