"""Muon: orthogonalised momentum for block matrices, by Polar Express, with a factored second moment and cautious decay.

Matrices of one shape are stepped as one stack ``[M, rows, cols]``.
"""

from __future__ import annotations

import torch

POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
"""Quintic coefficients of five Polar Express steps (Amsel et al. 2025, arXiv 2505.16932), safety .02, cushion 2."""

QUINTIC = ((3.4445, -4.7750, 2.0315),) * 5
"""Keller Jordan's fixed quintic, the iteration of ``torch.optim.Muon``."""

ITERATIONS = {"polar_express": POLAR_EXPRESS, "quintic": QUINTIC}


def orthogonalize(x: torch.Tensor, iteration: str = "polar_express", dtype: torch.dtype | None = None) -> torch.Tensor:
    """Approximate polar factor of every matrix of a stack by a Newton-Schulz iteration.

    Args:
        x: ``[M, rows, cols]``.
        iteration: ``polar_express`` or ``quintic``.
        dtype: dtype of the products; that of ``x`` when omitted.
    """
    tall = x.shape[-2] > x.shape[-1]
    y = (x.mT if tall else x).to(dtype or x.dtype)
    norm = y.norm(dim=(-2, -1), keepdim=True)
    # Polar Express wants a spectral norm safely below 1; torch's Muon divides by the Frobenius norm itself.
    y = y / (norm * 1.01 + 1e-6) if iteration == "polar_express" else y / norm.clamp_min(1e-7)
    for a, b, c in ITERATIONS[iteration]:
        gram = y @ y.mT
        y = torch.baddbmm(y, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    return (y.mT if tall else y).to(x.dtype)


def normalize_variance(update: torch.Tensor, second_moment: torch.Tensor, beta2: float) -> torch.Tensor:
    """Divide rows (tall) or columns (wide) by their running magnitude, keeping each matrix's norm (NorMuon).

    Args:
        update: orthogonalised updates ``[M, rows, cols]``.
        second_moment: running mean square ``[M, rows, 1]`` or ``[M, 1, cols]``, updated in place.
    """
    dim = -1 if second_moment.shape[-1] == 1 else -2
    size = update.shape[dim]
    mean_square = update.square().mean(dim=dim, keepdim=True)
    norm = (mean_square.sum(dim=(-2, -1), keepdim=True) * size).sqrt()
    second_moment.lerp_(mean_square, 1.0 - beta2)
    scale = second_moment.clamp_min(1e-10).rsqrt()
    new_norm = ((mean_square * size) * scale.square()).sum(dim=(-2, -1), keepdim=True).sqrt()
    return update * (scale * (norm / new_norm.clamp_min(1e-10)))


def second_moment_shape(rows: int, cols: int) -> tuple[int, int]:
    """Factored second moment: one value per row of a tall or square matrix, per column of a wide one."""
    return (rows, 1) if rows >= cols else (1, cols)


def nesterov(
    gradient: torch.Tensor, momentum_buffer: torch.Tensor, momentum: float, keep: torch.Tensor | None = None
) -> torch.Tensor:
    """Update the momentum in place and look ahead; elementwise, any shape.

    Where the 0-dim bool ``keep`` is false the momentum stays, bit for bit, and a non-finite gradient goes no further.
    """
    if keep is not None:
        gradient = torch.where(keep, gradient, momentum_buffer)
    momentum_buffer.lerp_(gradient, 1.0 - momentum)
    return torch.lerp(gradient, momentum_buffer, momentum)


def direction(
    x: torch.Tensor,
    second_moment: torch.Tensor | None,
    beta2: float,
    iteration: str,
    dtype: torch.dtype | None,
    keep: torch.Tensor | None = None,
) -> torch.Tensor:
    """What a stack of looked-ahead momenta ``[M, rows, cols]`` moves along: orthogonalised, normalised.

    Zero where the 0-dim bool ``keep`` is false: ``descend`` then neither moves nor decays; the second moment stays.
    """
    update = orthogonalize(x, iteration, dtype)
    if second_moment is not None:
        before = second_moment if keep is None else second_moment.clone()
        update = normalize_variance(update, second_moment, beta2)
        if keep is not None:
            second_moment.copy_(torch.where(keep, second_moment, before))
    return update if keep is None else torch.where(keep, update, 0.0)


def muon_update(
    gradient: torch.Tensor,
    momentum_buffer: torch.Tensor,
    second_moment: torch.Tensor | None,
    momentum: float,
    beta2: float,
    iteration: str,
    dtype: torch.dtype | None,
    keep: torch.Tensor | None = None,
) -> torch.Tensor:
    """Direction of one Muon step for a stack ``[M, rows, cols]``: Nesterov momentum, orthogonalised, normalised."""
    ahead = nesterov(gradient, momentum_buffer, momentum, keep)
    return direction(ahead, second_moment, beta2, iteration, dtype, keep)


def descend(parameter: torch.Tensor, update: torch.Tensor, lr: float, decay: float) -> None:
    """Move a parameter, or some rows of it, along its update; the decay is cautious.

    Weights decay only where the update also shrinks them.
    """
    if decay:
        shrink = (update * parameter > 0).to(parameter.dtype).mul_(parameter)
        parameter.sub_(shrink, alpha=lr * decay)
    parameter.sub_(update, alpha=lr)
