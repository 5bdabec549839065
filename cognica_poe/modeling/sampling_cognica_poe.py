"""Distributions over the next token: the pool of experts, filters, and the choice of a token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F


def combine(logits: Sequence[torch.Tensor], alpha: float = 0.0, weights: Sequence[float] | None = None) -> torch.Tensor:
    """Log-probabilities ``[..., V]`` of the product of experts (model card, "Inference").

    ``s = K^alpha * sum_k w_k log p_k``, normalised by ``logsumexp``; ``w`` is uniform ``1/K`` unless given. At alpha 0
    this equals the softmax of the mean of the capped logits.

    Args:
        logits: one ``[..., V]`` tensor of logits or log-probabilities per stage.
        alpha: exponent of the number of experts; 0 is the geometric mean, 1 the full product.
        weights: one non-negative weight per stage.
    """
    if weights is None:
        weights = [1.0 / len(logits)] * len(logits)
    if len(weights) != len(logits):
        raise ValueError(f"{len(weights)} weights for {len(logits)} stages; give one weight per stage")
    pooled = sum(weight * F.log_softmax(z, dim=-1) for weight, z in zip(weights, logits, strict=True))
    return F.log_softmax(len(logits) ** alpha * pooled, dim=-1)
