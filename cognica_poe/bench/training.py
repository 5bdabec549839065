"""Training throughput: whole steps, forward, backward and update, of one shape under each objective.

Every case runs in a process of its own (``python -m cognica_poe.bench.training CASE``), in turn with the others, on
random tokens. ``gemm_peak_fraction`` is the model's operations (6 per weight of every product, attention over its
whole window; the same count for nanochat) over the rate of a large product in the same dtype, measured in the same
process before and after the steps.
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
from typing import Any

import torch

from cognica_poe.bench.nanochat import build_step, check_checkout
from cognica_poe.bench.processes import interleaved, peak_memory, reset_peak_memory
from cognica_poe.errors import UserError
from cognica_poe.planning.machine import product_rate, synchronize
from cognica_poe.recipe.fields import ModelRecipe, OptimizerRecipe, Recipe, TrainingRecipe
from cognica_poe.recipe.rules import check

SHAPES = ("4x256", "8x512")
MODES = ("none", "flat", "hier")
DTYPES = ("float32", "bfloat16")
STAGES = 4


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of the benchmark."""

    name: str
    poe_mode: str
    shape: str
    """Layers x width."""
    dtype: str
    compile: bool
    rows: int = 32
    micro_rows: int = 8
    vocab: int = 32768
    length: int = 512
    warmup: int = 2
    """Micro-batches, each with an update, before measuring."""
    steps: int = 2
    keep_freed_memory: bool = True
    """Whether the allocator keeps freed blocks (``training.memory``); no effect on nanochat."""
    nanochat: str | None = None
    """Checkout whose model is measured instead of ours."""


def find_shape(text: str) -> tuple[int, int]:
    """Layers and width of ``4x256``. Raises UserError for what no benchmark shape can be."""
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if not match:
        raise UserError(f"bench: shape {text!r} must read LAYERSxWIDTH, such as {SHAPES[0]}")
    layers, width = int(match[1]), int(match[2])
    if layers < STAGES or width < 64 or width % 64:
        raise UserError(f"bench: shape {text} needs at least {STAGES} layers and a width that is a multiple of 64")
    return layers, width


def make_recipe(case: Case) -> Recipe:
    """The shape of a case: heads of 64, MLP four times the width, full windows, four stages of nearly equal depth."""
    layers, width = find_shape(case.shape)
    edges = [round(layers * k / STAGES) for k in range(STAGES + 1)]
    stages = tuple(b - a for a, b in itertools.pairwise(edges))
    model = ModelRecipe(
        vocab_size=case.vocab,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        head_dim=64,
        max_position_embeddings=case.length,
        window_pattern="L",
        poe_mode=case.poe_mode,
        poe_stage_layers=(layers,) if case.poe_mode == "none" else stages,
        per_stage_head=case.poe_mode != "none",
    )
    optimizer = OptimizerRecipe(muon_dtype=case.dtype)
    training = TrainingRecipe(
        batch_rows=case.rows, micro_rows=case.micro_rows, compute_dtype=case.dtype, optimizer=optimizer
    )
    return check(Recipe(name=case.name, model=model, training=training))


def measure(case: Case) -> dict[str, Any]:
    """Median step of a case in this process."""
    from cognica_poe.planning.costs import Costs
    from cognica_poe.training.precision import default_device

    torch.manual_seed(0)
    device, recipe = default_device(), make_recipe(case)
    backward, update = _step(case, recipe, device)
    for _ in range(case.warmup):
        backward(micro_batches=1), update()
    dtype = getattr(torch, case.dtype)
    rate = product_rate(dtype, device)
    reset_peak_memory(device)
    whole, updates = [], []
    times, began = os.times(), time.perf_counter()
    for _ in range(case.steps):
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
    tokens, seconds = case.rows * case.length, statistics.median(whole)
    flops = Costs(recipe).flops_per_token()
    return {
        "name": case.name,
        "poe_mode": case.poe_mode,
        "shape": case.shape,
        "dtype": case.dtype,
        "compile": case.compile,
        "tokens_per_s": tokens / seconds,
        "gemm_peak_fraction": flops * tokens / seconds / rate,
        "peak_memory_bytes": memory,
        "flops_per_token": flops,
        "gemm_flops_per_s": rate,
        "step_seconds": seconds,
        "update_share": statistics.median(updates) / seconds,
        "tokens_per_cpu_s": case.steps * tokens / max(user + kernel, 1e-9),
        "system_time_share": kernel / max(user + kernel, 1e-9),
        "cpu_share": busy,
        "tokens_per_step": tokens,
        "threads": torch.get_num_threads(),
        "device": str(device),
    }


def _now(device: torch.device) -> float:
    synchronize(device)
    return time.perf_counter()


def _step(case: Case, recipe: Recipe, device: torch.device) -> tuple[Callable[..., None], Callable[[], None]]:
    """``backward(micro_batches=None)`` of the first micro-batches of a step, or all of them, and ``update()``."""
    if case.nanochat is not None:
        path = Path(case.nanochat)
        return build_step(path, recipe.model, case.dtype, device, case.rows, case.micro_rows, case.compile)
    from cognica_poe.training.build import build_model
    from cognica_poe.training.memory import keep_freed_memory
    from cognica_poe.training.objective import Objective
    from cognica_poe.training.optim.optimizer import MuonAdamW

    if case.keep_freed_memory:
        keep_freed_memory()
    model = build_model(recipe.model).to(device).train()
    optimizer = MuonAdamW(model, recipe.training.optimizer, case.rows * case.length)
    objective = Objective(model, getattr(torch, case.dtype))
    if case.compile:
        for block in model.transformer.h:
            block.compile()
    ids = torch.randint(case.vocab, (case.rows, case.length + 1), device=device)

    def backward(micro_batches: int | None = None) -> None:
        for part in ids.split(case.micro_rows)[:micro_batches]:
            objective.backward(part[:, :-1], part[:, 1:], case.micro_rows / case.rows)

    def update() -> None:
        optimizer.step(1.0, 0.95, 1.0)
        optimizer.zero_grad()

    return backward, update


def make_cases(
    shapes: Sequence[str],
    modes: Sequence[str],
    dtypes: Sequence[str],
    compiled: bool,
    nanochat: Path | None,
    **settings: Any,
) -> list[Case]:
    """Cases in the order they are measured: for each shape and dtype nanochat first, then ours."""
    for text in shapes:
        find_shape(text)
    checkout = str(check_checkout(nanochat)) if nanochat is not None else None
    cases = []
    for shape in shapes:
        for dtype in dtypes:
            if checkout is not None:
                cases.append(Case("nanochat", "none", shape, dtype, compiled, nanochat=checkout, **settings))
            cases += [Case("cognica-poe", mode, shape, dtype, compiled, **settings) for mode in modes]
    return cases


def run_cases(cases: Sequence[Case], rounds: int, log: Callable[[str], None]) -> list[dict[str, Any]]:
    """Rows of all cases, medians over rounds, each with its speed relative to what it is compared with."""
    rows = interleaved(__name__, [dataclasses.asdict(case) for case in cases], rounds, log)
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
    print(json.dumps(measure(Case(**json.loads(sys.argv[1])))))
