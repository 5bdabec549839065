"""Which device trains here, and which dtype it multiplies fastest."""

from __future__ import annotations

import time

import torch

ON_PROCESSOR, ON_ACCELERATOR = 512, 4096
"""Rows and columns of the product that is timed; a smaller one is over on an accelerator before it is launched."""


def choose_compute_dtype(choice: str, device: torch.device) -> torch.dtype:
    """fp32 or bf16 for the matrix products; weights stay fp32 either way.

    ``auto`` takes bf16 on a CUDA device that has instructions for it. Elsewhere it times both on a large product and
    takes bf16 where it is at least 1.2 times faster: who has no such instructions emulates them at a fraction of the
    speed of fp32.
    """
    if choice != "auto":
        named: torch.dtype = getattr(torch, choice)
        return named
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    seconds = {dtype: _product_seconds(dtype, device) for dtype in (torch.float32, torch.bfloat16)}
    return torch.bfloat16 if seconds[torch.bfloat16] * 1.2 < seconds[torch.float32] else torch.float32


def _product_seconds(dtype: torch.dtype, device: torch.device) -> float:
    size = ON_PROCESSOR if device.type == "cpu" else ON_ACCELERATOR
    a = torch.ones(size, size, dtype=dtype, device=device)
    return min((_cuda_seconds if device.type == "cuda" else _seconds)(a) for _ in range(4))


def _seconds(a: torch.Tensor) -> float:
    start = time.perf_counter()
    (a @ a).sum().item()
    return time.perf_counter() - start


def _cuda_seconds(a: torch.Tensor) -> float:
    """By the device's own clock: launching takes as long as a small product."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]  # torch's
    start.record()
    a @ a
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000


def default_device() -> torch.device:
    """CUDA, MPS or CPU, whichever comes first."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")
