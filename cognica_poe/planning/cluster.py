"""Where a run takes place: devices with their data-sheet rates, nodes, network; what can be split over them."""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass

from cognica_poe.errors import UserError
from cognica_poe.recipe.fields import Recipe, setting
from cognica_poe.recipe.rules import require_ranges


@dataclass(frozen=True)
class Gpu:
    """A device; rates are dense, without sparsity, from the vendor's data sheet or measured."""

    memory_gib: float
    bf16_tflops: float
    fp32_tflops: float
    """Products in true fp32, TF32 off."""
    link_gbyte: float
    """GB/s per direction between devices of one node."""


GPUS = {
    "a100-40g": Gpu(40, 312, 19.5, 300),
    "a100-80g": Gpu(80, 312, 19.5, 300),
    "h100-80g": Gpu(80, 989, 67, 450),
    "h200-141g": Gpu(141, 989, 67, 450),
    "b200-180g": Gpu(180, 2250, 75, 900),
    "l40s-48g": Gpu(48, 362, 91.6, 32),
    "rtx4090-24g": Gpu(24, 165, 82.6, 32),
    "rtx3090-24g": Gpu(24, 71, 35.6, 16),
}


@dataclass(frozen=True)
class Cluster:
    """Where the run takes place."""

    gpus: int = setting(1, low=1, high=1_000_000)
    """Ranks, one per GPU."""
    gpu: str = "a100-80g"
    """Device, or "here" to measure this machine's; an unknown name lists the known ones."""
    nodes: int | None = setting(None, low=1, high=1_000_000)
    """Nodes; as few as hold at most eight GPUs each when omitted."""
    network_gbit: float = setting(25.0, above=True, high=1_000_000)
    """Gbit/s per direction between two nodes."""
    mfu: float = setting(0.4, above=True, high=1)
    """Share of the bf16 peak that forward and backward reach while they compute."""
    micro_rows: int | None = setting(None, low=1)
    """Rows of one forward and backward on a rank; the most that fit, up to the recipe's, when omitted."""


def find_gpu(name: str) -> Gpu:
    """A known device, or this machine's. Raises UserError that suggests the nearest one."""
    if name in GPUS:
        return GPUS[name]
    if name == "here":
        return measure_here()
    near = difflib.get_close_matches(name.lower(), GPUS, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise UserError(f"unknown GPU {name!r}: {hint}known are {', '.join(GPUS)}, or here for this machine's")


def measure_here() -> Gpu:
    """This machine's device with the measured rates of its large products; the link between devices is assumed."""
    import torch

    from cognica_poe.planning.machine import product_rate
    from cognica_poe.training.precision import default_device

    device = default_device()
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    else:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    bf16, fp32 = (product_rate(dtype, device, 1024) / 1e12 for dtype in (torch.bfloat16, torch.float32))
    return Gpu(memory / 2**30, bf16, fp32, GPUS["a100-80g"].link_gbyte if device.type == "cuda" else 1.0)


def check_world(recipe: Recipe, cluster: Cluster) -> int:
    """Number of nodes. Raises UserError for a number out of its range, and rows or GPUs that cannot be split evenly."""
    rows, gpus = recipe.training.batch_rows, cluster.gpus
    require_ranges(cluster, "plan: --")
    if rows % gpus:
        below = max(n for n in range(1, gpus) if rows % n == 0)
        above = next((n for n in range(gpus + 1, rows + 1) if rows % n == 0), None)
        choice = f"{below} or {above}" if above else f"{below}"
        raise UserError(f"plan: {rows} rows per step cannot be split over {gpus} GPUs; use --gpus {choice}")
    nodes = cluster.nodes or next(n for n in range(1, gpus + 1) if gpus % n == 0 and gpus // n <= 8)
    if gpus % nodes:
        *fitting, last = [str(n) for n in range(1, gpus + 1) if gpus % n == 0]
        choice = f"{', '.join(fitting)} or {last}" if fitting else last
        raise UserError(f"plan: {gpus} GPUs cannot be spread over {nodes} nodes evenly; use --nodes {choice}")
    return nodes
