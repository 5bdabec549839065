"""Training throughput: whole steps, forward, backward and update, of one shape under each objective.

Every workload runs in a process of its own (``python -m cognica_poe.bench.training WORKLOAD``), in turn with the
others, on random tokens. ``gemm_peak_fraction`` is the model's operations (6 per weight of every product, attention
over its whole window; the same count for nanochat) over the rate of a large product in the same dtype, taken in the
same process before and after the steps.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from cognica_poe.bench.nanochat import build_step, check_checkout
from cognica_poe.bench.processes import interleaved, peak_memory, reset_peak_memory
from cognica_poe.errors import UserError
from cognica_poe.planning.machine import product_rate, synchronize
from cognica_poe.recipe.fields import ModelRecipe, OptimizerRecipe, Recipe, TrainingRecipe
from cognica_poe.recipe.rules import check

STAGES = 4

Mode = Literal["none", "flat", "hier"]
Dtype = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True)
class Workload:
    """One row of the benchmark."""

    name: str
    poe_mode: Mode
    shape: str
    """Layers x width."""
    dtype: Dtype
    compile: bool
    rows: int = 32
    micro_rows: int = 8
    vocab: int = 32768
    length: int = 512
    warmup: int = 2
    """Micro-batches, each with an update, before the timed steps."""
    steps: int = 2
    keep_freed_memory: bool = True
    """Whether the allocator keeps freed blocks (``training.memory``); no effect on nanochat."""
    nanochat: str | None = None
    """Checkout whose model is run instead of ours."""


def find_shape(text: str) -> tuple[int, int]:
    """Layers and width of ``4x256``. Raises UserError for what no benchmark shape can be."""
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if not match:
        raise UserError(f"bench: shape {text!r} must read LAYERSxWIDTH, such as 4x256")
    layers, width = int(match[1]), int(match[2])
    if layers < STAGES or width < 64 or width % 64:
        raise UserError(f"bench: shape {text} needs at least {STAGES} layers and a width that is a multiple of 64")
    return layers, width


def make_recipe(workload: Workload) -> Recipe:
    """A workload's shape: heads of 64, MLP four times the width, full windows, four stages of nearly equal depth."""
    layers, width = find_shape(workload.shape)
    edges = [round(layers * k / STAGES) for k in range(STAGES + 1)]
    stages = tuple(b - a for a, b in itertools.pairwise(edges))
    model = ModelRecipe(
        vocab_size=workload.vocab,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        head_dim=64,
        max_position_embeddings=workload.length,
        window_pattern="L",
        poe_mode=workload.poe_mode,
        poe_stage_layers=(layers,) if workload.poe_mode == "none" else stages,
        per_stage_head=workload.poe_mode != "none",
    )
    optimizer = OptimizerRecipe(muon_dtype=workload.dtype)
    training = TrainingRecipe(
        batch_rows=workload.rows, micro_rows=workload.micro_rows, compute_dtype=workload.dtype, optimizer=optimizer
    )
    return check(Recipe(name=workload.name, model=model, training=training))


def time_steps(workload: Workload) -> dict[str, Any]:
    """Median step of a workload in this process."""
    from cognica_poe.planning.costs import Costs
    from cognica_poe.training.precision import default_device

    torch.manual_seed(0)
    device, recipe = default_device(), make_recipe(workload)
    backward, update = _step(workload, recipe, device)
    for _ in range(workload.warmup):
        backward(micro_batches=1), update()
    dtype = getattr(torch, workload.dtype)
    rate = product_rate(dtype, device)
    reset_peak_memory(device)
    whole, updates = [], []
    times, began = os.times(), time.perf_counter()
    for _ in range(workload.steps):
        start = _now(device)
        backward()
        middle = _now(device)
        update()
        end = _now(device)
        whole.append(end - start)
        updates.append(end - middle)
    user, kernel = (after - before for after, before in zip(os.times()[:2], times[:2], strict=True))
    busy = (user + kernel) / (time.perf_counter() - began) / torch.get_num_threads()
    memory = peak_memory(device)
    rate = max(rate, product_rate(dtype, device))
    tokens, seconds = workload.rows * workload.length, statistics.median(whole)
    flops = Costs(recipe).flops_per_token()
    return {
        "name": workload.name,
        "poe_mode": workload.poe_mode,
        "shape": workload.shape,
        "dtype": workload.dtype,
        "compile": workload.compile,
        "tokens_per_s": tokens / seconds,
        "gemm_peak_fraction": flops * tokens / seconds / rate,
        "peak_memory_bytes": memory,
        "flops_per_token": flops,
        "gemm_flops_per_s": rate,
        "step_seconds": seconds,
        "update_share": statistics.median(updates) / seconds,
        "tokens_per_cpu_s": workload.steps * tokens / max(user + kernel, 1e-9),
        "system_time_share": kernel / max(user + kernel, 1e-9),
        "cpu_share": busy,
        "tokens_per_step": tokens,
        "threads": torch.get_num_threads(),
        "device": str(device),
    }


def _now(device: torch.device) -> float:
    synchronize(device)
    return time.perf_counter()


def _step(workload: Workload, recipe: Recipe, device: torch.device) -> tuple[Callable[..., None], Callable[[], None]]:
    """``backward(micro_batches=None)`` of the first micro-batches of a step, or all of them, and ``update()``."""
    if workload.nanochat is not None:
        path = Path(workload.nanochat)
        return build_step(
            path, recipe.model, workload.dtype, device, workload.rows, workload.micro_rows, workload.compile
        )
    from cognica_poe.training.build import build_model
    from cognica_poe.training.memory import keep_freed_memory
    from cognica_poe.training.objective import Objective
    from cognica_poe.training.optim.optimizer import MuonAdamW

    if workload.keep_freed_memory:
        keep_freed_memory()
    model: Any = build_model(recipe.model)  # transformers' `to` has no usable type
    model.to(device).train()
    optimizer = MuonAdamW(model, recipe.training.optimizer, workload.rows * workload.length)
    objective = Objective(model, getattr(torch, workload.dtype))
    if workload.compile:
        for block in model.transformer.h:
            block.compile()
    ids = torch.randint(workload.vocab, (workload.rows, workload.length + 1), device=device)

    def backward(micro_batches: int | None = None) -> None:
        for part in ids.split(workload.micro_rows)[:micro_batches]:
            objective.backward(part[:, :-1], part[:, 1:], workload.micro_rows / workload.rows)

    def update() -> None:
        optimizer.step(1.0, 0.95, 1.0)
        optimizer.zero_grad()

    return backward, update


def useful_dtypes() -> tuple[Dtype, ...]:
    """fp32, and bf16 where this device multiplies it faster."""
    from cognica_poe.training.precision import choose_compute_dtype, default_device

    faster = choose_compute_dtype("auto", default_device()) == torch.bfloat16
    return ("float32", "bfloat16") if faster else ("float32",)


def can_compile() -> bool:
    """Whether torch.compile has what it needs: a GPU's own tools, or a C++ compiler."""
    from cognica_poe.modeling.graphs_cognica_poe import has_compiler

    return torch.cuda.is_available() or has_compiler()


def make_workloads(
    shapes: Sequence[str],
    modes: Sequence[Mode],
    dtypes: Sequence[Dtype],
    compiled: bool,
    nanochat: Path | None,
    **settings: Any,
) -> list[Workload]:
    """Workloads in the order they run: for each shape and dtype nanochat first, then ours."""
    for text in shapes:
        find_shape(text)
    checkout = str(check_checkout(nanochat)) if nanochat is not None else None
    workloads: list[Workload] = []
    for shape in shapes:
        for dtype in dtypes:
            if checkout is not None:
                workloads.append(Workload("nanochat", "none", shape, dtype, compiled, nanochat=checkout, **settings))
            workloads += [Workload("cognica-poe", mode, shape, dtype, compiled, **settings) for mode in modes]
    return workloads


def run_workloads(workloads: Sequence[Workload], rounds: int, log: Callable[[str], None]) -> list[dict[str, Any]]:
    """Rows of all workloads, medians over rounds, each with its speed relative to what it is compared with."""
    rows = interleaved(__name__, [dataclasses.asdict(workload) for workload in workloads], rounds, log)
    for row in rows:
        same = [other for other in rows if (other["shape"], other["dtype"]) == (row["shape"], row["dtype"])]
        if row["name"] == "nanochat":
            continue
        base = "nanochat" if row["poe_mode"] == "none" else "cognica-poe"
        reference = next((o for o in same if o["name"] == base and o["poe_mode"] == "none"), None)
        if reference is not None:
            row["relative_to"] = f"{base} none"
            row["relative_speed"] = row["tokens_per_s"] / reference["tokens_per_s"]
            # What the operations alone would give: each stage has a product with the whole vocabulary.
            row["relative_work"] = row["flops_per_token"] / reference["flops_per_token"]
    return rows


if __name__ == "__main__":
    print(json.dumps(time_steps(Workload(**json.loads(sys.argv[1])))))
