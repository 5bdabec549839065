"""Keep freed memory in the process, so that every step does not fault its pages in again."""

from __future__ import annotations

import ctypes
import sys

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
