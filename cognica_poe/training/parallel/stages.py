"""Stage-parallel training: every rank owns some stages, activations stream forward, no gradient travels back.

In ``flat`` the residual stream is detached where a stage starts, so that a stage needs its input and nothing else from
its neighbours. A rank receives the boundary states of a micro-batch, runs its stages, sends theirs on before its own
backward, and turns to the next micro-batch; there is no backward bubble, only the first states' way down the line::

    rank 0   F0 B0 F1 B1 F2 B2 F3 B3 .  .         Fi Bi: forward and backward of micro-batch i on a rank's stages
    rank 1   .  F0 B0 F1 B1 F2 B2 F3 B3 .         idle per step: N - 1 forwards, while others work
    rank 2   .  .  F0 B0 F1 B1 F2 B2 F3 B3

What all stages share (embedding, smear, lambdas, the shared head) is on every rank: each makes ``x0`` from the ids by
itself, and the gradients are summed in one exchange at the end of the step. Every rank then makes the same update of
them, and its own of its stages. Layers, value embeddings and heads of other ranks' stages are not held at all.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import nn

from cognica_poe.errors import UserError
from cognica_poe.modeling.configuration_cognica_poe import CognicaPoEConfig
from cognica_poe.modeling.modeling_cognica_poe import CognicaPoEForCausalLM
from cognica_poe.recipe.fields import ObjectiveRecipe, OptimizerRecipe
from cognica_poe.training.objective import Objective
from cognica_poe.training.optim.optimizer import MuonAdamW, gradient_of
from cognica_poe.training.parallel.ranks import Pending, Ranks

IN_FLIGHT = 2
"""Boundary states under way to the next rank; a rank that is further ahead waits."""


def assign_stages(config: CognicaPoEConfig, world: int) -> list[range]:
    """Stages of every rank: neighbouring ones together, the busiest rank with as little work as possible.

    Raises UserError when there are more ranks than stages.
    """
    K = config.num_stages
    if world > K:
        raise UserError(f"stage-parallel training of {K} stages on {world} ranks: use at most {K} ranks")
    work = [_stage_work(config, stage) for stage in range(K)]
    cuts = min(itertools.combinations(range(1, K), world - 1), key=lambda cut: _busiest(work, cut))
    edges = (0, *cuts, K)
    return [range(first, last) for first, last in itertools.pairwise(edges)]


def _stage_work(config: CognicaPoEConfig, stage: int) -> int:
    """Multiplications per token of a stage's layers and of its heads, those of exits among them."""
    D, h = config.hidden_size, config.head_dim
    layer = 2 * D * h * (config.num_attention_heads + config.num_key_value_heads) + 2 * D * config.intermediate_size
    heads = 1 + len(config.exits_of(stage))
    return len(config.stage_layers(stage)) * layer + heads * D * config.vocab_size


def _busiest(work: list[int], cuts: tuple[int, ...]) -> int:
    edges = (0, *cuts, len(work))
    return max(sum(work[first:last]) for first, last in itertools.pairwise(edges))


def drop_other_stages(model: CognicaPoEForCausalLM, stages: range) -> None:
    """Free what only stages beside ``stages`` need: those parameters move to the meta device and are not trained."""
    config = model.config
    for stage in range(config.num_stages):
        if stage in stages:
            continue
        layers = config.stage_layers(stage)
        parts = [model.get_submodule(f"transformer.h.{layer}") for layer in layers]
        parts += [model.value_embeds[str(i)] for i in layers if str(i) in model.value_embeds]
        parts += [model.lm_head_stages[stage]] if config.per_stage_head else []
        parts += [model.lm_head_exits[exit] for exit in config.exits_of(stage)]
        for part in parts:
            part.to_empty(device="meta").requires_grad_(False)


def shared_parameters(model: CognicaPoEForCausalLM) -> dict[str, nn.Parameter]:
    """What every stage uses: embedding, smear, lambdas, the shared head."""
    own = ("transformer.h.", "value_embeds.", "lm_head_stages.", "lm_head_exits.", "backout_lambda")
    return {name: p for name, p in model.named_parameters() if not name.startswith(own)}


def sum_over_ranks(parameters: Sequence[nn.Parameter]) -> None:
    """Sum the gradients of ``parameters`` over all ranks, in one exchange; a missing one counts as zero."""
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    dist.all_reduce(flat)
    parts = torch.split(flat, [p.numel() for p in parameters])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.grad = part.view_as(parameter)


class StageParallelObjective(Objective):
    """``flat`` on the stages of one rank; a micro-batch must be given to all ranks in the same order.

    Args:
        model: full model, equal on every rank. What belongs to other ranks' stages is dropped from it: those
            parameters move to the meta device and no longer require gradients.
        compute_dtype: as for ``Objective``.
        ranks: this process among the others.
        recompute, options: as for ``Objective``.
    """

    def __init__(
        self,
        model: CognicaPoEForCausalLM,
        compute_dtype: torch.dtype,
        ranks: Ranks,
        recompute: str = "off",
        options: ObjectiveRecipe | None = None,
    ):
        super().__init__(model, compute_dtype, recompute, options)
        if self.mode == "residual_logop":
            raise UserError("stage-parallel training cannot train residual_logop: a stage needs the heads before it")
        if not self.stage_by_stage or (self.options.late_gradient_flow or 0.0) > 0.0:
            raise UserError(
                "stage-parallel training needs poe_mode flat without gradient flow, or gradients that come a step late "
                "(--training.objective.gradient-delay 1): where gradients cross stages they wait for each other"
            )
        self.ranks = ranks
        self.stages = assign_stages(self.config, ranks.world)[ranks.rank]
        self.under_way: list[Pending] = []
        self.finished = False
        drop_other_stages(model, self.stages)

    def shared(self) -> dict[str, nn.Parameter]:
        """Parameters that stages of several ranks add to: embedding, smear, lambdas, the shared head."""
        return shared_parameters(self.model)

    def _local(self, ids: torch.Tensor, targets: torch.Tensor, scale: float, autocast: torch.autocast) -> torch.Tensor:
        """Losses ``[K + E]``: own ones times the number of ranks, others zero, so that the mean over ranks is each."""
        self.finished = False
        with autocast:
            x0_graph = self._embed(ids)
        x0 = x0_graph.detach().requires_grad_()
        rotary, masks = self._inputs(x0)
        x = self._receive(x0) if self.stages.start else x0
        losses = self.no_losses(x0)
        for stage in self.stages:
            with autocast:
                x, states = self._through(self.config.stage_layers(stage), x, x0, ids, rotary, masks)
                if stage == self.stages[-1]:
                    self._send(x.detach())
                exits = self._exit_losses(states, targets)
                loss = self._stage_loss(x, stage, targets)
            torch.autograd.backward(sum(exits, loss) * (scale * self.stage_scale))
            self.put_losses(losses, stage, loss, exits, self.ranks.world)
            x = x.detach()
        torch.autograd.backward(x0_graph, x0.grad)
        return losses

    def _receive(self, like: torch.Tensor) -> torch.Tensor:
        """Boundary states ``[B, T, D]`` from the rank before."""
        x = torch.empty_like(like, requires_grad=False)
        Pending(dist.irecv(x, self.ranks.rank - 1), x).wait()
        return x

    def _send(self, x: torch.Tensor) -> None:
        """Boundary states to the next rank; the last rank has none."""
        if self.ranks.rank + 1 == self.ranks.world:
            return
        while len(self.under_way) >= IN_FLIGHT:
            self.under_way.pop(0).wait()
        x = x.contiguous()
        self.under_way.append(Pending(dist.isend(x, self.ranks.rank + 1), x))

    @torch.no_grad()
    def finish(self) -> None:
        """After the last micro-batch: sum the gradients of what stages share over all ranks, in one exchange.

        Does nothing when called again before the next backward.
        """
        while self.under_way:
            self.under_way.pop(0).wait()
        if self.ranks.world == 1 or self.finished:
            return
        self.finished = True
        sum_over_ranks(list(self.shared().values()))


class StageObjective(Protocol):
    """What the optimiser needs of an objective on the stages of one rank."""

    model: CognicaPoEForCausalLM
    ranks: Ranks

    def shared(self) -> dict[str, nn.Parameter]:
        """Parameters that stages of several ranks add to."""

    def finish(self) -> None:
        """After the last micro-batch of a step: make the gradients whole that are to be applied."""


class StageParallelMuonAdamW(MuonAdamW):
    """``MuonAdamW`` of one rank's stages and of what all share: an ``Optimizer``.

    Every matrix is orthogonalised by its owner alone. Pieces of a checkpoint are whole tensors: those of a stage on its
    rank, those that are shared on the first.
    """

    def __init__(self, objective: StageObjective, recipe: OptimizerRecipe, batch_tokens: int):
        self.objective = objective
        super().__init__(objective.model, recipe, batch_tokens)

    def gradients(self) -> list[torch.Tensor]:
        """As for ``MuonAdamW``: what is shared counts on the first rank alone."""
        self.objective.finish()
        ours = self._ours()
        return [gradient_of(p) for name, p in self.parameters.items() if name in ours and p.grad is not None]

    def step(
        self, lr_scale: float, momentum: float, weight_decay_scale: float, keep: torch.Tensor | None = None
    ) -> None:
        """One update, once the shared gradients are summed; arguments as for ``Optimizer``."""
        self.objective.finish()
        super().step(lr_scale, momentum, weight_decay_scale, keep)

    def _ours(self) -> set[str]:
        """Names that this rank answers for in a checkpoint."""
        shared = {*self.objective.shared(), "backout_lambda"}
        names = self.parameters.keys() - shared
        return names | (shared & self.parameters.keys()) if self.objective.ranks.is_first else names

    def weights(self) -> dict[str, torch.Tensor]:
        """This rank's tensors; those of all ranks together are the weights."""
        return {name: self.parameters[name].detach() for name in sorted(self._ours())}

    def state_dict(self) -> dict[str, torch.Tensor]:
        """This rank's part of what ``MuonAdamW.state_dict`` holds."""
        ours = self._ours()
        return {key: value for key, value in super().state_dict().items() if key.rsplit(".", 1)[0] in ours}

    def load_state_dict(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Restore this rank's part of a whole model's state."""
        mine = {key: tensors[key] for key in tensors if key.rsplit(".", 1)[0] in self.parameters}
        super().load_state_dict(mine)
