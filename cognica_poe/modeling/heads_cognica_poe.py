"""Heads: the shared one, what every stage and every exit adds to it, and the logits that they give.

A stage's head is an expert of the pool. An exit inside a stage has a head of the same kind that is none: it drafts, or
answers alone, and its training reaches nothing but the head itself.

Shapes: ``D`` width, ``V`` vocab.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from .blocks_cognica_poe import rmsnorm, softcap
from .configuration_cognica_poe import CognicaPoEConfig


class LowRankHead(nn.Module):
    """A head as two thin matrices, ``up @ down``, behind the shared one."""

    def __init__(self, config: CognicaPoEConfig, rank: int):
        super().__init__()
        self.down = nn.Linear(config.hidden_size, rank, bias=False)
        self.up = nn.Linear(rank, config.vocab_size, bias=False)

    @property
    def weight(self) -> Tensor:
        """The whole matrix ``[V, D]``."""
        return self.up.weight @ self.down.weight

    def forward(self, n: Tensor) -> Tensor:
        """Logits ``[..., V]`` of normed states ``[..., D]``."""
        return cast(Tensor, self.up(self.down(n)))


Head = nn.Linear | LowRankHead


def make_heads(config: CognicaPoEConfig, count: int, rank: int) -> nn.ModuleList:
    """So many heads of a rank; 0 makes full matrices."""
    width, vocab = config.hidden_size, config.vocab_size
    return nn.ModuleList(
        [LowRankHead(config, rank) if rank else nn.Linear(width, vocab, bias=False) for _ in range(count)]
    )


def factor(head: Head) -> nn.Parameter:
    """The parameter that a head scales with: its matrix, or the upper one of two."""
    return cast(nn.Parameter, head.up.weight if isinstance(head, LowRankHead) else head.weight)


class PoEHeadsMixin:
    """The heads of a model that has ``lm_head``, ``lm_head_stages``, ``lm_head_exits`` and ``backout_lambda``."""

    config: CognicaPoEConfig
    lm_head: nn.Linear
    lm_head_stages: nn.ModuleList
    lm_head_exits: nn.ModuleList
    backout_lambda: nn.Parameter

    def stage_weight(self, stage: int) -> Tensor:
        """A stage's own head ``[V, D]``, which adds to the shared one."""
        return cast(Head, self.lm_head_stages[stage]).weight

    def stage_factor(self, stage: int) -> Tensor:
        """The parameter that a stage's own head scales with: its matrix, or the upper one of two."""
        return factor(cast(Head, self.lm_head_stages[stage]))

    def head_weight(self, stage: int) -> Tensor:
        """Folded head ``lm_head + lm_head_stages[stage]``, ``[V, D]``: one product instead of two."""
        weight = self.lm_head.weight
        return weight + self.stage_weight(stage) if self.config.per_stage_head else weight

    def exit_weight(self, exit: int) -> Tensor:
        """Folded head ``lm_head + lm_head_exits[exit]``, ``[V, D]``; its gradient reaches the exit's own part alone."""
        return self.lm_head.weight.detach() + cast(Head, self.lm_head_exits[exit]).weight

    def segment_weight(self, segment: int) -> Tensor:
        """Folded head ``[V, D]`` of the stage or the exit that ends a segment of layers."""
        stages = self.config.stage_segments
        if segment in stages:
            return self.head_weight(stages.index(segment))
        return self.exit_weight(self.config.poe_exit_layers.index(self.config.poe_cuts[segment]))

    def stage_head(self, x: Tensor, stage: int) -> Tensor:
        """Capped logits ``[..., V]`` of one stage from its boundary state ``x`` ``[..., D]``: sum first, then cap."""
        n = rmsnorm(x, self.config.rms_norm_eps)
        z = self.lm_head(n)
        z = z + self.lm_head_stages[stage](n) if self.config.per_stage_head else z
        return softcap(z, self.config.logit_softcap)

    def exit_head(self, x: Tensor, exit: int) -> Tensor:
        """Capped logits ``[..., V]`` of one exit from the state ``x`` ``[..., D]`` behind its layers."""
        n = rmsnorm(x, self.config.rms_norm_eps)
        return softcap(self.lm_head(n) + self.lm_head_exits[exit](n), self.config.logit_softcap)

    def plain_head(self, x: Tensor, middle: Tensor) -> Tensor:
        """Capped logits of the plain path: last layer minus the backout of layer L//2, shared head only."""
        x = x - self.backout_lambda * middle
        return softcap(self.lm_head(rmsnorm(x, self.config.rms_norm_eps)), self.config.logit_softcap)
