"""The ``bench`` commands: each prints a table, or one JSON document with ``--json``. A new one joins ``COMMANDS``."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import tyro

from cognica_poe.cli.output import print_json, table
from cognica_poe.cli.progress import log
from cognica_poe.errors import UserError

Mode = Literal["none", "flat", "hier"]
Dtype = Literal["float32", "bfloat16"]


def bench_train(
    shapes: tuple[str, ...] = ("4x256", "8x512"),
    modes: tuple[Mode, ...] = ("none", "flat"),
    dtypes: tuple[Dtype, ...] = (),
    nanochat: Path | None = None,
    compile: Literal["auto", "on", "off"] = "auto",
    rounds: int = 3,
    steps: int = 2,
    rows: int = 32,
    micro_rows: int = 8,
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
        steps: Measured steps per process, after two micro-batches that are not.
        rows: Rows per step.
        micro_rows: Rows of one forward and backward pass.
        vocab: Tokens of the vocabulary.
        length: Tokens of a row.
        freed_memory: Whether our process keeps freed blocks of memory, as training does, or gives them back.
        json: Print one JSON document instead of a table.
    """
    from cognica_poe.bench.training import make_cases, run_cases

    for name, value in (("rounds", rounds), ("steps", steps), ("rows", rows), ("length", length), ("vocab", vocab)):
        if value < 1:
            raise UserError(f"bench train: --{name} is {value}; it must be at least 1")
    micro_rows = min(micro_rows, rows)
    if micro_rows < 1 or rows % micro_rows:
        raise UserError(f"bench train: --rows {rows} is no multiple of --micro-rows {micro_rows}")
    skipped = [] if nanochat else ["nanochat: not compared, no checkout given (--nanochat PATH)"]
    settings = {"rows": rows, "micro_rows": micro_rows, "vocab": vocab, "length": length, "steps": steps}
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

    from cognica_poe.modeling.graphs_cognica_poe import has_compiler

    compiler = torch.cuda.is_available() or has_compiler()
    if choice == "on" and not compiler:
        raise UserError("bench train: --compile on needs a C++ compiler (g++ or clang++); install one")
    if choice == "auto" and not compiler:
        skipped.append("torch.compile: off, no C++ compiler found")
    return choice == "on" or (choice == "auto" and compiler)


def bench_decode(
    checkpoint: tyro.conf.Positional[str],
    text: Path | None = None,
    prompts: int = 20,
    prompt_tokens: int = 32,
    new_tokens: int = 128,
    batch: int = 1,
    k_draft: tuple[int, ...] = (4, 7),
    drafters: tuple[Literal["stage", "int8", "int4", "lookup"], ...] = ("stage", "int8", "int4", "lookup"),
    dtype: Literal["float32", "bfloat16"] = "bfloat16",
    compile: bool = False,
    width: int | None = None,
    rounds: int = 3,
    peers: bool = True,
    threads: int | None = None,
    synthetic_acceptance: float = 0.98,
    json: bool = False,
) -> None:
    """Decoding speed of every mode and drafter against our own cached greedy decoding, in one interleaved run.

    Args:
        checkpoint: Release folder, or the name of a recipe: random weights of its shape, and drafts that are accepted
            at random (labelled synthetic), for planning.
        text: Run folder, whose held-out documents give the prompts, or folder or file of parquet, jsonl or text; the
            seven probe prompts when omitted.
        prompts: How many prompts at most.
        prompt_tokens: Tokens of a prompt.
        new_tokens: Tokens to generate per prompt.
        batch: Rows per call; a call's rows are consecutive prompts.
        k_draft: Draft lengths.
        drafters: Who drafts.
        dtype: Dtype of the weights.
        compile: Run decode steps through torch.compile; the seconds it took are reported.
        width: Lanes of a decode step; the device's natural width when omitted.
        rounds: Repetitions per prompt; medians count.
        peers: Also run transformers' generate and the uncached reference.
        threads: Threads of the processor; torch's choice when omitted.
        synthetic_acceptance: For a recipe: probability that a draft is accepted.
        json: Print one JSON document instead of a table.
    """
    import torch

    from cognica_poe.bench import decoding
    from cognica_poe.bench.prompts import find_model, find_prompts
    from cognica_poe.modeling.graphs_cognica_poe import has_compiler

    for name, value in (("prompts", prompts), ("prompt-tokens", prompt_tokens), ("new-tokens", new_tokens)):
        if value < 1:
            raise UserError(f"bench decode: --{name} is {value}; it must be at least 1")
    if min(batch, rounds, *k_draft) < 1:
        raise UserError("bench decode: --batch, --rounds and --k-draft must be at least 1")
    if compile and not torch.cuda.is_available() and not has_compiler():
        raise UserError("bench decode: --compile needs a C++ compiler (g++ or clang++); install one")
    if threads is not None:
        torch.set_num_threads(threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = find_model(checkpoint, getattr(torch, dtype), device)
    texts = find_prompts(tokenizer, model.config, text, prompts, prompt_tokens, batch, new_tokens)
    settings = decoding.Settings(
        new_tokens, rounds, k_draft, drafters, compile, width, synthetic_acceptance if tokenizer is None else None
    )
    found = decoding.time_contenders(model, [ids.to(device) for ids in texts], settings, peers, log)
    if json:
        return print_json(found)
    print_decoding(found)


def print_decoding(found: dict) -> None:
    """Tables of what :func:`cognica_poe.bench.decoding.time_contenders` found."""
    rows = [
        [
            " ".join(str(part) for part in (row["mode"], row["drafter"], row["k_draft"]) if part is not None),
            row["width"],
            f"{row['tokens_per_s']:,.1f}",
            f"{row['ratio_to_cached_greedy']:.2f}x"
            + (" ({:.2f} to {:.2f})".format(*row["ratio_interval"]) if row["ratio_interval"] else ""),
            "yes" if row["identical_to_greedy"] else None if row["identical_to_greedy"] is None else "no",
            f"{row['acceptance']:.3f}" if row["acceptance"] is not None else None,
            f"{row['tokens_per_round']:.2f}" if row["tokens_per_round"] is not None else None,
            f"{row['agreement']:.4f}" if row["agreement"] is not None else None,
        ]
        for row in found["rows"]
    ]
    first = found["rows"][0]
    synthetic = next((row["synthetic_acceptance"] for row in found["rows"] if "synthetic_acceptance" in row), None)
    title = f"decoding, {first['dtype']}, batch {first['batch']}, {'compiled' if first['compiled'] else 'eager'}"
    title += f", drafts accepted at random (synthetic, {synthetic})" if synthetic is not None else ""
    columns = ["mode", "lanes", "tokens/s", "speed (95 %)", "same text", "accepted", "tokens/round", "agrees"]
    table(title, columns, rows)
    if found["peers"]:
        cells = [
            [p["name"], f"{p['tokens_per_s']:,.1f}", f"{p['cached_greedy_is_faster_by']:.2f}x"] for p in found["peers"]
        ]
        table("others", ["name", "tokens/s", "cached greedy is faster by"], cells)
    for row in found["rows"]:
        if row["mode"] == "wand":
            print(f"wand: tokens by stages used {row['stages_used']}")
    rate = found["copy_bytes_per_s"]
    print(
        f"a plain step reads {found['weight_bytes_per_step'] / 1e6:,.1f} MB of weights and takes "
        f"{found['step_over_floor']:.2f} times as long as copying moves them ({rate / 1e9:.1f} GB/s); heads and pool "
        f"take {found['heads_share']:.1%}; {found['threads']} threads; compiled in {found['compile_seconds']:.1f} s"
    )


COMMANDS = {"bench train": bench_train, "bench decode": bench_decode}
