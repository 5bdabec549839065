"""Cross-entropy of a pool whose newest member alone learns: what a stage of ``residual_logop`` is trained on.

The pool of ``k + 1`` stages is ``softmax(a sum_j c_j)`` with the soft-capped logits ``c_j`` and ``a = (k + 1)^(alpha -
1)``, the combiner of decoding; what normalises a stage by itself is one number per row and falls out. The stages before
are constants, and their logits are made again chunk by chunk: no ``[tokens, V]`` is held for a whole batch. The newest
one's gradient is ``a (pool - onehot) (1 - t^2)``: it learns what the pool before it lacks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from cognica_poe.training.cross_entropy import chunk_rows

Member = tuple[torch.Tensor, torch.Tensor]
"""Normed states ``[R, D]`` and folded head ``[V, D]`` of a stage, both constants."""


class _ResidualCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        n: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        cap: float,
        factor: float,
        earlier: Sequence[Member],
    ) -> torch.Tensor:
        compute, rows = weight.to(n.dtype), len(n)
        accumulate = torch.float64 if n.dtype == torch.float64 else torch.float32
        grad_n, grad_w = torch.empty_like(n), torch.zeros_like(weight, dtype=accumulate)
        loss = torch.zeros((), dtype=accumulate, device=n.device)
        step = chunk_rows(rows, len(weight), n.device)
        for start in range(0, rows, step):
            part = slice(start, start + step)
            chunk, target = n[part], targets[part, None]
            t = torch.tanh((chunk @ compute.T).to(accumulate) / cap)
            pool = cap * t
            for states, head in earlier:
                pool += cap * torch.tanh((states[part] @ head.to(n.dtype).T).to(accumulate) / cap)
            log_pool = torch.log_softmax(factor * pool, dim=1)
            loss -= log_pool.gather(1, target).sum()
            z = log_pool.exp_().scatter_add_(1, target, -torch.ones_like(target, dtype=accumulate))
            z = z.mul_(1.0 - t.square()).mul_(factor / rows).to(n.dtype)
            grad_n[part] = z @ compute
            grad_w += (z.T @ chunk).to(accumulate)
        ctx.save_for_backward(grad_n, grad_w)
        ctx.weight_dtype = weight.dtype
        return loss / rows

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_n, grad_w = ctx.saved_tensors
        return grad_n * grad_output.to(grad_n.dtype), (grad_w * grad_output).to(ctx.weight_dtype), *(None,) * 4


def residual_cross_entropy(
    n: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, cap: float, alpha: float, earlier: Sequence[Member]
) -> torch.Tensor:
    """Mean cross-entropy of the pool of a stage and those before it; its gradient reaches the stage alone.

    Args:
        n: normed boundary states ``[R, D]`` of the stage, in the compute dtype.
        weight: its folded head ``[V, D]``.
        targets: token ids ``[R]``.
        cap: soft cap of the logits, applied to every member before the sum.
        alpha: exponent of the number of experts.
        earlier: the stages before it, detached.
    """
    factor = (len(earlier) + 1) ** (alpha - 1.0)
    loss: torch.Tensor = _ResidualCrossEntropy.apply(n, weight, targets, cap, factor, earlier)  # type: ignore[no-untyped-call]  # torch's
    return loss
