"""Which device trains here, which dtype it multiplies fastest, and which attention it runs."""

from __future__ import annotations

import time

import torch

from cognica_poe.errors import UserError

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


def choose_attention(choice: str, device: torch.device, head_dim: int) -> str:
    """Name of the attention that trains, as transformers knows it.

    ``auto`` takes flex_attention, which leaves out what a sliding window hides, on CUDA devices of capability 8.0 and
    later; its kernel wants heads of at least 16 dimensions. sdpa computes whole rows and masks them, anywhere.

    Raises UserError where a device cannot train with what was chosen.
    """
    if choice == "auto":
        skips = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0) and head_dim >= 16
        return "flex_attention" if skips else "sdpa"
    if choice == "flex_attention" and device.type != "cuda":
        raise UserError("training.attention flex_attention trains on CUDA alone; use sdpa, or auto")
    return choice


def default_device() -> torch.device:
    """CUDA, MPS or CPU, whichever comes first."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")
