"""Muon's orthogonalisation by singular values."""

import torch


def reference_orthogonalize(x: torch.Tensor) -> torch.Tensor:
    """Exact polar factor ``U V^T`` of every matrix of a stack ``[M, rows, cols]``."""
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    return u @ v
