"""The ``bench`` commands: each prints a table, or one JSON document with ``--json``. A new one joins ``COMMANDS``."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Literal

from cognica_poe.errors import UserError
from cognica_poe.progress import log
from cognica_poe.tables import print_json, table

Mode = Literal["none", "flat", "hier"]
Dtype = Literal["float32", "bfloat16"]


def bench_train(
    shapes: tuple[str, ...] = ("4x256", "8x512"),
    modes: tuple[Mode, ...] = ("none", "flat"),
    dtypes: tuple[Dtype, ...] = (),
    nanochat: Path | None = None,
    compile: Literal["auto", "on", "off"] = "auto",
    rounds: int = 3,
    steps: int = 4,
    rows: int = 8,
    vocab: int = 32_768,
    length: int = 512,
    freed_memory: Literal["kept", "given-back"] = "kept",
    json: bool = False,
) -> None:
    """Training throughput and peak memory of each objective, beside nanochat's own trainer when a checkout is given.

    Each case runs in its own process, in turn with the others; medians are printed. Whole steps count: forward,
    backward and update. The share of the peak is the model's operations over a large product's measured rate.

    Args:
        shapes: Layers x width, such as 4x256.
        modes: Objectives; flat and hier have four stages with a head each.
        dtypes: Dtypes of the products; fp32, and bf16 where the device multiplies it faster, when omitted.
        nanochat: A checkout of nanochat to compare with.
        compile: torch.compile, for both sides; auto: where a C++ compiler is found.
        rounds: Processes per case.
        steps: Measured steps per process, after two that are not.
        rows: Rows per step.
        vocab: Tokens of the vocabulary.
        length: Tokens of a row.
        freed_memory: Whether our process keeps freed blocks of memory, as training does, or gives them back.
        json: Print one JSON document instead of a table.
    """
    from cognica_poe.bench.training import make_cases, run_cases

    for name, value in (("rounds", rounds), ("steps", steps), ("rows", rows), ("length", length), ("vocab", vocab)):
        if value < 1:
            raise UserError(f"bench train: --{name} is {value}; it must be at least 1")
    skipped = [] if nanochat else ["nanochat: not compared, no checkout given (--nanochat PATH)"]
    settings = {"rows": rows, "micro_rows": rows, "vocab": vocab, "length": length, "steps": steps}
    settings["keep_freed_memory"] = freed_memory == "kept"
    dtypes = dtypes or _useful_dtypes(skipped)
    cases = make_cases(shapes, modes, dtypes, _compiled(compile, skipped), nanochat, **settings)
    for line in skipped:
        log(line)
    measured = run_cases(cases, rounds, log)
    if json:
        return print_json({"rows": measured, "skipped": skipped})
    cells = [
        [
            f"{row['name']} {row['poe_mode']} {row['shape']} {row['dtype']}",
            f"{row['tokens_per_s']:,.0f}",
            f"{row['gemm_peak_fraction']:.1%}",
            f"{row['peak_memory_bytes'] / 2**20:,.0f}",
            f"{row['update_share']:.1%}",
            f"{row['relative_speed']:.2f}x of {row['relative_to']}" if "relative_speed" in row else None,
            f"{row['relative_work']:.2f}x" if "relative_work" in row else None,
        ]
        for row in measured
    ]
    columns = ["case", "tokens/s", "of peak", "peak MiB", "update", "speed", "work"]
    table(f"training, {rows} x {length} tokens per step, medians of {rounds} processes", columns, cells)
    if any(row["cpu_share"] < 0.9 and row["device"] == "cpu" for row in measured):
        log("note: the processor was shared while some cases ran (cpu_share below 0.9): repeat on a quiet machine")


def _useful_dtypes(skipped: list[str]) -> tuple[Dtype, ...]:
    import torch

    from cognica_poe.training.precision import choose_compute_dtype, default_device

    if choose_compute_dtype("auto", default_device()) == torch.bfloat16:
        return ("float32", "bfloat16")
    skipped.append("bfloat16: not measured, this device multiplies it no faster than fp32 (--dtypes bfloat16 insists)")
    return ("float32",)


def _compiled(choice: str, skipped: list[str]) -> bool:
    import torch

    compiler = torch.cuda.is_available() or any(map(shutil.which, ("c++", "g++", "clang++", "gcc", "clang")))
    if choice == "on" and not compiler:
        raise UserError("bench train: --compile on needs a C++ compiler (g++ or clang++); install one")
    if choice == "auto" and not compiler:
        skipped.append("torch.compile: off, no C++ compiler found")
    return choice == "on" or (choice == "auto" and bool(compiler))


COMMANDS = {"bench train": bench_train}
