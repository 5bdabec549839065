"""Peak activation memory of one backward pass under each objective, at one shape; layout (16, 6, 5, 5) by default.

Method: every allocation and release of torch's CPU allocator during ``Objective.backward`` is taken from the profiler
and summed up in order; the peak of that sum is reported. A first, unmeasured pass makes the gradients, masks and
rotary tables, so that they and the parameters are outside the sum: what is left are activations and scratch space.
Each mode runs in a process of its own.

    python benchmarks/memory.py [--width 128] [--vocab 512] [--length 256] [--rows 4] [--layers 16 6 5 5]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from cognica_poe.modeling.configuration_cognica_poe import CognicaPoEConfig
from cognica_poe.modeling.modeling_cognica_poe import CognicaPoEForCausalLM
from cognica_poe.training.objective import Objective

MODES = ("none", "hier", "flat")


def peak_bytes(run: Callable[[], object]) -> int:
    """Most bytes that tensors allocated inside ``run`` occupied at once (CPU)."""
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            run()
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = [(event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]"]
    if not changes:
        raise RuntimeError("the profiler recorded no allocation; this torch was built without it")
    live = peak = 0
    for _, size in sorted(changes, key=lambda change: change[0]):
        live += size
        peak = max(peak, live)
    return peak


def measure(mode: str, *, width: int, vocab: int, length: int, rows: int, layers: list[int], threads: int = 1) -> int:
    """Peak activation bytes of one fp32 micro-batch of ``rows`` x ``length`` tokens under ``poe_mode`` ``mode``."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    heads = max(1, width // 32)
    config = CognicaPoEConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=sum(layers),
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=32,
        max_position_embeddings=length,
        poe_mode=mode,
        poe_stage_layers=layers,
    )
    model = CognicaPoEForCausalLM(config).train()
    ids = torch.randint(vocab, (rows, length + 1))
    objective = Objective(model)

    def step() -> None:
        objective.backward(ids[:, :-1], ids[:, 1:])

    step()
    return peak_bytes(step)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Peak activation memory of one backward pass under each objective.")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--vocab", type=int, default=512)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--layers", type=int, nargs="+", default=[16, 6, 5, 5])
    parser.add_argument("--mode", choices=MODES, help="measure this mode only, in this process; prints the bytes")
    return parser.parse_args()


def main() -> None:
    """Print a table and one JSON line; exit 1 when ``flat`` needs more than 60 % of ``none``."""
    arguments = _arguments()
    shape = {name: getattr(arguments, name) for name in ("width", "vocab", "length", "rows", "layers")}
    if arguments.mode:
        print(measure(arguments.mode, **shape))
        return
    peaks = {}
    for mode in MODES:
        command = [sys.executable, __file__, *sys.argv[1:], "--mode", mode]
        peaks[mode] = int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[-1])
    rows = [
        {"poe_mode": mode, "peak_activation_bytes": peak, "ratio_to_none": round(peak / peaks["none"], 4)}
        for mode, peak in peaks.items()
    ]
    print(f"{'poe_mode':<10}{'peak MiB':>12}{'of none':>10}")
    for row in rows:
        print(f"{row['poe_mode']:<10}{row['peak_activation_bytes'] / 2**20:>12.1f}{row['ratio_to_none']:>10.1%}")
    print(json.dumps({"shape": shape, "torch": torch.__version__, "rows": rows}))
    if peaks["flat"] > 0.6 * peaks["none"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
