"""Peak activation memory of one backward pass under each objective, at one shape.

Method: every allocation and release of torch's CPU allocator during ``Objective.backward`` is taken from the profiler
and summed up in order; the peak of that sum is reported. A first pass, which does not count, makes the gradients,
masks and rotary tables, so that they and the parameters are outside the sum: what is left are activations and scratch
space. Each mode runs in a process of its own (``python -m cognica_poe.bench.memory WORKLOAD``).
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from cognica_poe.bench.processes import run_alone
from cognica_poe.leftovers import scratch_folder
from cognica_poe.modeling.configuration_cognica_poe import CognicaPoEConfig
from cognica_poe.modeling.modeling_cognica_poe import CognicaPoEForCausalLM
from cognica_poe.training.objective import Objective

MODES = ("none", "hier", "flat")


@dataclasses.dataclass(frozen=True)
class MemoryWorkload:
    """One fp32 micro-batch of a model whose heads have 32 dimensions and whose MLP is four times the width."""

    width: int = 128
    vocab: int = 512
    length: int = 256
    """Tokens of a row."""
    rows: int = 4
    layers: tuple[int, ...] = (16, 6, 5, 5)
    """Layers of each stage."""


def peak_bytes(run: Callable[[], object]) -> int:
    """Most bytes that tensors allocated inside ``run`` occupied at once (CPU)."""
    with scratch_folder() as folder:
        trace = folder / "trace.json"
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            run()
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = [(event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]"]
    if not changes:
        raise RuntimeError("the profiler recorded no allocation; this torch was built without it")
    held = peak = 0
    for _, size in sorted(changes, key=lambda change: change[0]):
        held += size
        peak = max(peak, held)
    return peak


def peak_activations(mode: str, workload: MemoryWorkload) -> int:
    """Peak activation bytes of one micro-batch under ``poe_mode`` ``mode``, on one thread of this process."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    heads = max(1, workload.width // 32)
    config = CognicaPoEConfig(
        vocab_size=workload.vocab,
        hidden_size=workload.width,
        intermediate_size=4 * workload.width,
        num_hidden_layers=sum(workload.layers),
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=32,
        max_position_embeddings=workload.length,
        poe_mode=mode,
        poe_stage_layers=list(workload.layers),
    )
    model = CognicaPoEForCausalLM(config).train()
    ids = torch.randint(workload.vocab, (workload.rows, workload.length + 1))
    objective = Objective(model)

    def step() -> None:
        objective.backward(ids[:, :-1], ids[:, 1:])

    step()
    return peak_bytes(step)


def run_modes(workload: MemoryWorkload, log: Callable[[str], None]) -> list[dict[str, Any]]:
    """One row per mode: its peak, and its ratio to that of ordinary backprop (``none``)."""
    peaks = {}
    for mode in MODES:
        log(f"memory: {mode}")
        row = run_alone(__name__, {"mode": mode, **dataclasses.asdict(workload)}, f"memory of {mode}")
        peaks[mode] = row["peak_activation_bytes"]
    return [
        {"poe_mode": mode, "peak_activation_bytes": peak, "ratio_to_none": round(peak / peaks["none"], 4)}
        for mode, peak in peaks.items()
    ]


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    poe_mode = given.pop("mode")
    workload = MemoryWorkload(**{**given, "layers": tuple(given["layers"])})
    print(json.dumps({"peak_activation_bytes": peak_activations(poe_mode, workload)}))
