"""Workloads in processes of their own, interleaved, so that none inherits another's memory or a quiet minute."""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from cognica_poe.errors import UserError


def interleaved(
    module: str, workloads: Sequence[Mapping[str, Any]], rounds: int, log: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Run every workload ``rounds`` times in turn; ``python -m module WORKLOAD`` prints one JSON object.

    Returns one row per workload in their order: medians of the numbers, and ``spread``, the smallest and largest
    tokens per second. Raises UserError as :func:`run_alone`.
    """
    found: list[list[dict[str, Any]]] = [[] for _ in workloads]
    for number in range(rounds):
        for workload, runs in zip(workloads, found, strict=True):
            what = f"{workload['name']} {workload['shape']} {workload['dtype']}"
            log(f"round {number + 1} of {rounds}: {what}")
            runs.append(run_alone(module, workload, what))
    return [median_row(runs) for runs in found]


def run_alone(module: str, workload: Mapping[str, Any], what: str) -> dict[str, Any]:
    """What ``python -m module WORKLOAD`` prints as its last line, from a process of its own.

    Raises UserError that names ``what``, with the last line of a process that fails.
    """
    command = [sys.executable, "-m", module, json.dumps(workload)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise UserError(f"bench: {what} failed: {last}")
    row: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return row


def median_row(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One row of several: medians of floats, the first value of everything else."""
    row = {
        key: statistics.median(run[key] for run in runs) if isinstance(value, float) else value
        for key, value in runs[0].items()
    }
    speeds = [run["tokens_per_s"] for run in runs]
    row["peak_memory_bytes"] = int(statistics.median(run["peak_memory_bytes"] for run in runs))
    return {**row, "spread": [min(speeds), max(speeds)], "rounds": len(runs)}


def reset_peak_memory(device: torch.device) -> None:
    """Forget the peak so far: compilation and warm-up do not count. Without effect where the system cannot."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif os.access("/proc/self/clear_refs", os.W_OK):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> int:
    """Bytes: most that tensors held at once on CUDA, most that the process had resident elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
