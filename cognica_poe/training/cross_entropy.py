"""Soft-capped cross-entropy that never holds ``[tokens, V]`` for a whole batch.

torch's ``F.linear_cross_entropy`` has no soft cap, so this is a small autograd function of ours: rows are taken in
chunks that stay in the processor's cache, and the gradients are formed while the chunk's logits are still there.
``reference_cross_entropy`` beside it is the obvious version that tests compare with.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

CHUNK_ELEMENTS = 1 << 19
"""Logits held at once, in elements: 2 MiB of fp32, which stays in a processor's L2/L3 cache."""
CHUNK_ROWS = 256
"""Rows held at least: every chunk reads the whole head, and fewer rows wait for memory instead of computing.

At 32,768 tokens of vocabulary, 16 rows reached 33 to 37 % of the rate of a large product, 256 rows 66 to 71 %.
"""


def reference_cross_entropy(n: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, cap: float) -> torch.Tensor:
    """Mean cross-entropy of ``cap * tanh(n @ weight.T / cap)``; ``n`` ``[R, D]``, ``weight`` ``[V, D]``."""
    z = n @ weight.T
    return F.cross_entropy(cap * torch.tanh((z if z.dtype == torch.float64 else z.float()) / cap), targets)


def chunk_rows(rows: int, vocab: int, device: torch.device) -> int:
    """Rows per chunk; accelerators want larger products than a processor's cache allows."""
    elements = CHUNK_ELEMENTS if device.type == "cpu" else CHUNK_ELEMENTS * 256
    return min(rows, max(CHUNK_ROWS, elements // vocab))


class _SoftcapCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, n, weight, targets, cap):
        wants_gradient = n.requires_grad or weight.requires_grad
        compute = weight.to(n.dtype)
        rows, vocab = n.shape[0], weight.shape[0]
        accumulate = torch.float64 if n.dtype == torch.float64 else torch.float32
        grad_n = torch.empty_like(n) if wants_gradient else None
        grad_w = torch.zeros_like(weight, dtype=accumulate) if wants_gradient else None
        loss = torch.zeros((), dtype=accumulate, device=n.device)
        step = chunk_rows(rows, vocab, n.device)
        for start in range(0, rows, step):
            chunk, target = n[start : start + step], targets[start : start + step, None]
            t = (chunk @ compute.T).to(accumulate).div_(cap).tanh_()
            # |cap * t| <= 15, so exp needs no running maximum: e^15 * V is far inside fp32.
            p = torch.mul(t, cap).exp_()
            total = p.sum(dim=1, keepdim=True)
            loss += (total.log() - cap * t.gather(1, target)).sum()
            if wants_gradient:
                g = p.div_(total)
                g.scatter_add_(1, target, g.new_full(target.shape, -1.0))
                g.addcmul_(g, t.square_(), value=-1.0)  # times d softcap / dz = 1 - t^2
                g = g.div_(rows).to(n.dtype)
                torch.mm(g, compute, out=grad_n[start : start + step])
                if g.dtype == accumulate:
                    grad_w.addmm_(g.T, chunk)
                else:
                    grad_w.add_(g.T @ chunk)
        if wants_gradient:
            ctx.save_for_backward(grad_n, grad_w)
            ctx.weight_dtype = weight.dtype
        return loss / rows

    @staticmethod
    def backward(ctx, grad_output):
        grad_n, grad_w = ctx.saved_tensors
        return grad_n * grad_output.to(grad_n.dtype), (grad_w * grad_output).to(ctx.weight_dtype), None, None


def softcap_cross_entropy(n: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, cap: float) -> torch.Tensor:
    """Mean cross-entropy of soft-capped logits, chunk by chunk; same value and gradients as the reference.

    Args:
        n: normed boundary states ``[R, D]`` in the compute dtype.
        weight: folded head ``[V, D]``, fp32 masters allowed.
        targets: token ids ``[R]``.
        cap: soft cap of the logits; ``cap`` must stay small enough for ``exp(cap) * V`` in fp32 (15 is).
    """
    return _SoftcapCrossEntropy.apply(n, weight, targets, cap)
