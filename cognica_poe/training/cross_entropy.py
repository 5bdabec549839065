"""Soft-capped cross-entropy that never holds ``[tokens, V]`` for a whole batch.

torch's ``F.linear_cross_entropy`` has no soft cap, so this is a small autograd function of ours: rows are taken in
chunks, and one pass over a chunk's logits serves for its loss and its gradients.
"""

from __future__ import annotations

from typing import Any

import torch

CHUNK_ELEMENTS = 1 << 25
"""Logits held at once on a processor: 1,024 rows at 32,768 tokens of vocabulary.

Each chunk reads the head and adds to its whole gradient. In bf16 with tile instructions, 256 rows reached 178 GFLOP/s
in that sum of width 512, 1,024 rows 423, 2,048 rows 527, of 1,800 in a square product.
"""
BLOCK_ELEMENTS = 1 << 18
"""Logits taken through the exponentials at once on a processor: 1 MiB of fp32, which stays in its L2 cache."""


def chunk_rows(rows: int, vocab: int, device: torch.device) -> int:
    """Rows per chunk; accelerators want larger products."""
    elements = CHUNK_ELEMENTS if device.type == "cpu" else 4 * CHUNK_ELEMENTS
    return min(rows, max(1, elements // vocab))


def block_rows(rows: int, vocab: int, device: torch.device) -> int:
    """Rows of a chunk that pass through the exponentials at once: all of them on an accelerator."""
    return min(rows, max(1, BLOCK_ELEMENTS // vocab)) if device.type == "cpu" else rows


def exponentiate(z: torch.Tensor, cap: float, accumulate: torch.dtype) -> torch.Tensor:
    """Replace logits ``[R, V]`` by ``p (1 - t^2)`` in place and return the row sums of ``p``, ``[R, 1]``.

    ``t = tanh(z / cap)`` and ``p = exp(cap t)``; ``1 - t^2`` is the slope of the soft cap. ``|cap t|`` is at most 15,
    so that ``exp`` needs no running maximum: ``e^15 V`` is far inside fp32. ``accumulate`` is the dtype of everything
    between; the pass runs in blocks of rows over two buffers that stay in the cache.
    """
    rows, vocab = z.shape
    step, same = block_rows(rows, vocab, z.device), z.dtype == accumulate
    total = z.new_empty(rows, 1, dtype=accumulate)
    tanh, p = (z.new_empty(step, vocab, dtype=accumulate) for _ in range(2))
    for start in range(0, rows, step):
        block = z[start : start + step]
        t, e = tanh[: len(block)], p[: len(block)]
        (torch.div(block, cap, out=t) if same else t.copy_(block).div_(cap)).tanh_()
        torch.mul(t, cap, out=e).exp_()
        torch.sum(e, dim=1, keepdim=True, out=total[start : start + step])
        torch.addcmul(e, e, t.square_(), value=-1.0, out=block if same else e)
        if not same:
            block.copy_(e)
    return total


class _SoftcapCrossEntropy(torch.autograd.Function):
    """With ``s = sum p``, the gradient by logits is ``(p / s - onehot) (1 - t^2) / R``.

    Its softmax part needs ``s`` only as a factor of a row, which is applied to rows of D elements instead of V: before
    the product that gives the head's gradient, behind the one that gives the states'. One pass over the logits
    therefore serves for both loss and gradient.
    """

    @staticmethod
    def forward(ctx: Any, n: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, cap: float) -> torch.Tensor:
        wants_gradient = n.requires_grad or weight.requires_grad
        compute = weight.to(n.dtype)
        rows, vocab = n.shape[0], weight.shape[0]
        accumulate = torch.float64 if n.dtype == torch.float64 else torch.float32
        grad_n = torch.empty_like(n if n.requires_grad else n[:0])
        grad_w = torch.zeros_like(weight if wants_gradient else weight[:0], dtype=accumulate)
        loss = torch.zeros((), dtype=accumulate, device=n.device)
        step = chunk_rows(rows, vocab, n.device)
        for start in range(0, rows, step):
            chunk, target = n[start : start + step], targets[start : start + step, None]
            z = chunk @ compute.T
            t = z.gather(1, target).to(accumulate).div_(cap).tanh_()
            total = exponentiate(z, cap, accumulate)
            loss += (total.log() - cap * t).sum()
            if wants_gradient:
                own = (torch.exp(cap * t) - total) * (1.0 - t.square())
                z.scatter_(1, target, own.to(z.dtype))
                scale = 1.0 / (total * rows)
                if n.requires_grad:  # an exit may teach nothing but its head
                    grad_n[start : start + step] = (z @ compute) * scale
                scaled = (chunk * scale).to(n.dtype)
                if z.dtype == accumulate:
                    grad_w.addmm_(z.T, scaled)
                else:
                    grad_w.add_(z.T @ scaled)
        if wants_gradient:
            ctx.save_for_backward(grad_n, grad_w)
            ctx.weight_dtype = weight.dtype
        return loss / rows

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor, None, None]:
        grad_n, grad_w = ctx.saved_tensors
        by_n = grad_n * grad_output.to(grad_n.dtype) if ctx.needs_input_grad[0] else None
        return by_n, (grad_w * grad_output).to(ctx.weight_dtype), None, None


def softcap_cross_entropy(n: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, cap: float) -> torch.Tensor:
    """Mean cross-entropy of soft-capped logits, chunk by chunk; its gradients are made in the same pass.

    Args:
        n: normed boundary states ``[R, D]`` in the compute dtype.
        weight: folded head ``[V, D]``, fp32 masters allowed.
        targets: token ids ``[R]``.
        cap: soft cap of the logits; ``cap`` must stay small enough for ``exp(cap) * V`` in fp32 (15 is).
    """
    loss: torch.Tensor = _SoftcapCrossEntropy.apply(n, weight, targets, cap)  # type: ignore[no-untyped-call]  # torch's
    return loss
