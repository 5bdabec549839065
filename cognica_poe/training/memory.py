"""Memory: freed blocks stay in the process, copies to and from a device make nobody wait, a full GPU says so."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator

import torch

from cognica_poe.errors import UserError

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # malloc.h of glibc


def keep_freed_memory() -> bool:
    """Tell glibc's malloc to keep freed blocks instead of giving them back to the kernel.

    By default each block above 32 MiB is mapped and unmapped anew, and each fresh page costs a fault: a copy into fresh
    memory ran at a fifth of the speed of one into kept memory where this was measured (``benchmarks/training.py``).
    Returns False, and changes nothing, where there is no glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # musl
        return False
    return all((mallopt(M_MMAP_MAX, 0), mallopt(M_TRIM_THRESHOLD, 2**31 - 1), mallopt(M_TOP_PAD, 64 << 20)))


def copy_to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that CUDA makes in passing: complete once an event that was recorded later has been waited for."""
    host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
    return host.copy_(tensor, non_blocking=tensor.is_cuda)


def copy_to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the host on a device, for which the host does not wait on CUDA: pages that may move would make it.

    torch keeps the pinned block until the copy is made.
    """
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


@contextlib.contextmanager
def full_memory_explained(micro_rows: int) -> Iterator[None]:
    """Raise UserError, one line of what would take less, where the memory of an accelerator is full within."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        lower = f"--training.micro-rows below {micro_rows} or " if micro_rows > 1 else ""
        raise UserError(
            f"the memory of the GPU is full: train with {lower}--training.recompute layers, and --resume after a "
            "checkpoint"
        ) from error
