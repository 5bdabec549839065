"""What fine-tuning with transformers' tools needs: the loss of labels, and tables and heads for another vocabulary.

``config.finetune_objective`` says what ``labels`` teach:

=========  ====================================================================================================
``pool``   cross-entropy of the pool of all stages: what the released model answers with. A stage alone may drift
``stages`` mean of the stages' own cross-entropies, with gradients through the whole trunk: every stage stays a
           model, and so a drafter
``flat``   the same with no gradient from a stage into those before it, as the release was pretrained
=========  ====================================================================================================

A model trained on the plain path (``poe_mode`` none) has one loss, whatever is said.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn

from .blocks_cognica_poe import Trunk
from .configuration_cognica_poe import CognicaPoEConfig, check
from .heads_cognica_poe import LowRankHead


class PoEFinetuningMixin:
    """Losses of labels and a vocabulary that can change."""

    config: CognicaPoEConfig
    transformer: Trunk
    value_embeds: nn.ModuleDict
    lm_head: nn.Linear
    lm_head_stages: nn.ModuleList
    lm_head_exits: nn.ModuleList
    loss_function: Callable[..., torch.Tensor]
    stage_head: Callable[[torch.Tensor, int], torch.Tensor]

    def label_loss(
        self, logits: torch.Tensor, states: list[torch.Tensor], labels: torch.Tensor, **kwargs
    ) -> torch.Tensor:
        """Scalar loss of ``labels`` ``[B, T]``.

        Args:
            logits: those of the pool or the plain path ``[B, T', V]``.
            states: behind every stage ``[B, T', D]``.
            labels: ids, -100 where none counts.
            **kwargs: of transformers' loss.
        """
        size = self.config.vocab_size
        if self.config.poe_mode == "none" or self.config.finetune_objective == "pool":
            return self.loss_function(logits=logits, labels=labels, vocab_size=size, **kwargs)
        losses = [
            self.loss_function(logits=self.stage_head(x, stage), labels=labels, vocab_size=size, **kwargs)
            for stage, x in enumerate(states)
        ]
        return torch.stack(losses).mean()

    @property
    def teaches_locally(self) -> bool:
        """Whether labels teach every stage by its own loss alone."""
        return self.config.finetune_objective == "flat" and self.config.poe_mode != "none"

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """Change the vocabulary in every table and every head; ``config.vocab_size`` follows.

        Args:
            new_num_tokens: ids of the new vocabulary; as many as now when None.
            pad_to_multiple_of: round up to a multiple.
            mean_resizing: begin new rows as the mean of those before; as zeros otherwise.

        Returns:
            the input embeddings.

        Raises:
            ValueError: a vocabulary of fewer than one id.
        """
        size = self.config.vocab_size if new_num_tokens is None else new_num_tokens
        if pad_to_multiple_of is not None:
            check(pad_to_multiple_of > 0, f"pad_to_multiple_of is {pad_to_multiple_of}; it must be at least 1")
            size = -(-size // pad_to_multiple_of) * pad_to_multiple_of
        check(size >= 1, f"new_num_tokens is {size}; a vocabulary has at least one token")
        table = self.transformer.wte
        for module in (table, *self.value_embeds.values(), *self._heads()):
            _resize(module, size, mean_resizing)
        self.config.vocab_size = size
        return table

    def _heads(self) -> list[nn.Linear]:
        """All matrices whose rows are those of the vocabulary, the tables apart."""
        own: list[Any] = [*self.lm_head_stages, *self.lm_head_exits]
        return [self.lm_head, *(head.up if isinstance(head, LowRankHead) else head for head in own)]


@torch.no_grad()
def _resize(module: nn.Module, size: int, mean: bool) -> None:
    """Give the weight ``[V, ...]`` of a table or a head ``size`` rows."""
    before = cast(nn.Parameter, module.weight)
    kept = min(size, len(before))
    weight = before.new_zeros(size, *before.shape[1:])
    weight[:kept] = before[:kept]
    if mean and size > kept:
        weight[kept:] = before.float().mean(dim=0).to(before.dtype)
    module.weight = nn.Parameter(weight, requires_grad=before.requires_grad)
    name = "num_embeddings" if isinstance(module, nn.Embedding) else "out_features"
    setattr(module, name, size)
