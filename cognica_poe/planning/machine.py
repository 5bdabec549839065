"""How fast this machine multiplies, measured."""

from __future__ import annotations

import time

import torch


def product_rate(dtype: torch.dtype, device: torch.device, size: int = 2048) -> float:
    """FLOP/s of the fastest of several ``size``-cubed products."""
    size = size * 4 if device.type == "cuda" else size
    a = torch.ones(size, size, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(5):
        synchronize(device)
        start = time.perf_counter()
        a @ a
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def synchronize(device: torch.device) -> None:
    """Wait for an accelerator; nothing on a processor."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
