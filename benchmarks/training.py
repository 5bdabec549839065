"""Training throughput of a recipe: tokens/s, share of the measured fp32 product rate, optimiser and system time.

``python benchmarks/training.py [recipe]`` measures with freed memory kept and given back, interleaved, each in its own
process, and prints a table and one JSON line.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time

import torch

from cognica_poe.recipes import find_recipe
from cognica_poe.training.memory import keep_freed_memory
from cognica_poe.training.objective import Objective
from cognica_poe.training.optimizer import MuonAdamW
from cognica_poe.training.trainer import build_model

STEPS, ROUNDS = 4, 2


def product_rate() -> float:
    """Best GFLOP/s of a 2048-cubed fp32 product."""
    a = torch.randn(2048, 2048)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    return 2 * 2048**3 / best / 1e9


def flops_per_token(recipe) -> float:
    """6 per weight of every product, plus causal attention scores and sums."""
    model = build_model(recipe.model)
    matrices = sum(p.numel() for name, p in model.named_parameters() if name.startswith("transformer.h."))
    shape = recipe.model
    heads = len(shape.poe_stage_layers) * shape.vocab_size * shape.hidden_size
    width = shape.num_attention_heads * shape.head_dim
    return 6 * (matrices + heads) + 6 * shape.num_hidden_layers * width * shape.max_position_embeddings


def measure(name: str, keep: bool) -> dict:
    """Median of a few steps in this process."""
    if keep:
        keep_freed_memory()
    recipe = find_recipe(name)
    model = build_model(recipe.model).train()
    training, length = recipe.training, recipe.model.max_position_embeddings
    optimizer = MuonAdamW(model, training.optimizer, training.batch_rows * length)
    objective = Objective(model)
    batch = torch.randint(0, recipe.model.vocab_size, (training.batch_rows, length + 1))
    whole, optimiser, peak = [], [], product_rate()
    for step in range(STEPS + 2):
        if step == 2:
            before = resource.getrusage(resource.RUSAGE_SELF)
        start = time.perf_counter()
        for rows in batch.split(training.micro_rows):
            objective.backward(rows[:, :-1], rows[:, 1:], training.micro_rows / training.batch_rows)
        middle = time.perf_counter()
        optimizer.step(1.0, 0.95, 1.0)
        optimizer.zero_grad()
        whole.append(time.perf_counter() - start)
        optimiser.append(time.perf_counter() - middle)
    after = resource.getrusage(resource.RUSAGE_SELF)
    seconds = statistics.median(whole[2:])
    tokens = training.batch_rows * length
    user, system = after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime
    return {
        "name": name,
        "freed_memory": "kept" if keep else "given back",
        "tokens_per_s": tokens / seconds,
        "gemm_peak_fraction": flops_per_token(recipe) * tokens / seconds / 1e9 / peak,
        "product_gflop_per_s": peak,
        "optimizer_share": statistics.median(optimiser[2:]) / seconds,
        "system_time_share": system / (user + system),
        "peak_memory_bytes": after.ru_maxrss * 1024,
    }


def main() -> None:
    """Interleave both settings and print their medians."""
    name = sys.argv[1] if len(sys.argv) > 1 else "tiny"
    found: dict[str, list[dict]] = {"1": [], "0": []}
    for _ in range(ROUNDS):
        for keep in found:
            done = subprocess.run([sys.executable, __file__, name, keep], capture_output=True, text=True, check=True)
            found[keep].append(json.loads(done.stdout))
    rows = []
    for runs in found.values():
        median = {
            key: statistics.median(run[key] for run in runs) for key in runs[0] if isinstance(runs[0][key], float)
        }
        rows.append({**runs[0], **median})
    print(f"{'freed memory':14}{'tokens/s':>10}{'of peak':>9}{'peak GFLOP/s':>14}{'optimiser':>11}{'system time':>13}")
    for row in rows:
        print(
            f"{row['freed_memory']:14}{row['tokens_per_s']:10,.0f}{row['gemm_peak_fraction']:9.1%}"
            f"{row['product_gflop_per_s']:14,.0f}{row['optimizer_share']:11.1%}{row['system_time_share']:13.1%}"
        )
    print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    if len(sys.argv) == 3:
        print(json.dumps(measure(sys.argv[1], sys.argv[2] == "1")))
    else:
        main()
