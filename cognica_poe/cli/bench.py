"""The ``bench`` commands: each prints a table, or one JSON document with ``--json``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from cognica_poe.cli.arguments import Checkpoint, Count, Counts, Flag, Length, Share
from cognica_poe.cli.output import print_json, print_table
from cognica_poe.cli.progress import log
from cognica_poe.errors import UserError
from cognica_poe.recipe.fields import Range

Mode = Literal["none", "flat", "hier"]
Dtype = Literal["float32", "bfloat16"]


def bench_train(
    shapes: tuple[str, ...] = ("4x256", "8x512"),
    modes: tuple[Mode, ...] = ("none", "flat"),
    dtypes: tuple[Dtype, ...] = (),
    nanochat: Path | None = None,
    compile: Literal["auto", "on", "off"] = "auto",
    rounds: Count = 3,
    steps: Count = 2,
    rows: Count = 32,
    micro_rows: Count = 8,
    vocab: Annotated[int, Range(266, 2**20)] = 32_768,
    length: Length = 512,
    freed_memory: Literal["kept", "given-back"] = "kept",
    json: Flag = False,
) -> None:
    """Training throughput and peak memory of each objective, beside nanochat's own trainer when a checkout is given.

    Each workload runs in its own process, in turn with the others; medians are printed. Whole steps count: forward,
    backward and update. The share of the peak is the model's operations over a large product's measured rate.

    Args:
        shapes: Layers x width, such as 4x256.
        modes: Objectives; flat and hier have four stages with a head each.
        dtypes: Dtypes of the products; fp32, and bf16 where the device multiplies it faster, when omitted.
        nanochat: A checkout of nanochat to compare with.
        compile: torch.compile, for both sides; auto: where a C++ compiler is found.
        rounds: Processes per workload.
        steps: Timed steps per process, after two micro-batches that are not.
        rows: Rows per step.
        micro_rows: Rows of one forward and backward pass.
        vocab: Tokens of the vocabulary.
        length: Tokens of a row.
        freed_memory: Whether our process keeps freed blocks of memory, as training does, or gives them back.
        json: Print one JSON document instead of a table.
    """
    from cognica_poe.bench import training

    micro_rows = min(micro_rows, rows)
    if rows % micro_rows:
        raise UserError(f"bench train: --rows {rows} is no multiple of --micro-rows {micro_rows}")
    if compile == "on" and not training.can_compile():
        raise UserError("bench train: --compile on needs a C++ compiler (g++ or clang++); install one")
    compiled = compile != "off" and training.can_compile()
    chosen = dtypes or training.useful_dtypes()
    skipped = [] if nanochat else ["nanochat: not compared, no checkout given (--nanochat PATH)"]
    if chosen == ("float32",) and not dtypes:
        skipped.append("bfloat16: left out, this device multiplies it no faster than fp32 (--dtypes bfloat16 insists)")
    if compile == "auto" and not compiled:
        skipped.append("torch.compile: off, no C++ compiler found")
    sizes = {"rows": rows, "micro_rows": micro_rows, "vocab": vocab, "length": length, "steps": steps}
    kept = freed_memory == "kept"
    workloads = training.make_workloads(shapes, modes, chosen, compiled, nanochat, keep_freed_memory=kept, **sizes)
    for line in skipped:
        log(line)
    found = training.run_workloads(workloads, rounds, log)
    if json:
        return print_json({"rows": found, "skipped": skipped})
    print_training(found, f"training, {rows} x {length} tokens per step, medians of {rounds} processes")


def print_training(found: list[dict[str, Any]], title: str) -> None:
    """Table of what :func:`cognica_poe.bench.training.run_workloads` found."""
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
        for row in found
    ]
    print_table(title, ["workload", "tokens/s", "of peak", "peak MiB", "update", "speed", "work"], cells)
    if any(row["cpu_share"] < 0.9 and row["device"] == "cpu" for row in found):
        log("note: the processor was shared while some workloads ran (cpu_share below 0.9): repeat on a quiet machine")


def bench_memory(
    width: Annotated[int, Range(32, 2**14)] = 128,
    vocab: Annotated[int, Range(1, 2**20)] = 512,
    length: Length = 256,
    rows: Count = 4,
    layers: Counts = (16, 6, 5, 5),
    json: Flag = False,
) -> None:
    """Peak activation memory of one backward pass under each objective, in fp32 on the processor.

    Args:
        width: Width of the model; heads have 32 dimensions, the MLP four times the width.
        vocab: Tokens of the vocabulary.
        length: Tokens of a row.
        rows: Rows of the micro-batch.
        layers: Layers of each stage.
        json: Print one JSON document instead of a table.
    """
    from cognica_poe.bench import memory

    if not layers:
        raise UserError("bench memory: --layers names no stage; give the layers of at least one")
    if width % 32:
        raise UserError(f"bench memory: --width is {width}; it must be a multiple of 32")
    workload = memory.MemoryWorkload(width, vocab, length, rows, layers)
    found = memory.run_modes(workload, log)
    if json:
        return print_json(found)
    cells = [
        [row["poe_mode"], f"{row['peak_activation_bytes'] / 2**20:.1f}", f"{row['ratio_to_none']:.1%}"] for row in found
    ]
    print_table(f"memory of a backward pass, {rows} x {length} tokens", ["poe_mode", "peak MiB", "of none"], cells)


def bench_decode(
    checkpoint: Checkpoint,
    text: Path | None = None,
    prompts: Count = 20,
    prompt_tokens: Length = 32,
    new_tokens: Length = 128,
    batch: Annotated[int, Range(1, 4096)] = 1,
    k_draft: Counts = (4, 7),
    drafters: tuple[Literal["stage", "int8", "int4", "lookup"], ...] = ("stage", "int8", "int4", "lookup"),
    dtype: Dtype = "bfloat16",
    compile: Flag = False,
    width: Annotated[int | None, Range(1, 64)] = None,
    rounds: Count = 3,
    peers: Flag = True,
    threads: Annotated[int | None, Range(1, 1024)] = None,
    synthetic_acceptance: Share = 0.98,
    exit_acceptance: Share = 0.9,
    exit_layers: Counts = (),
    json: Flag = False,
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
        peers: Leave out transformers' generate and the uncached reference.
        threads: Threads of the processor; torch's choice when omitted.
        synthetic_acceptance: For a recipe: probability that a draft is accepted.
        exit_acceptance: For a recipe: the same for a draft of an exit.
        exit_layers: For a recipe: exits to give its random model, by the layers before each. A release has its own.
        json: Print one JSON document instead of a table.
    """
    import torch

    from cognica_poe.bench import decoding
    from cognica_poe.bench.prompts import find_model, find_prompts
    from cognica_poe.bench.training import can_compile
    from cognica_poe.training.precision import default_device

    if not k_draft:
        raise UserError("bench decode: --k-draft names no draft length; give at least one")
    if compile and not can_compile():
        raise UserError("bench decode: --compile needs a C++ compiler (g++ or clang++); install one")
    if threads is not None:
        torch.set_num_threads(threads)
    device = default_device()
    model, tokenizer = find_model(checkpoint, getattr(torch, dtype), device, exit_layers)
    ids = find_prompts(tokenizer, model.config, text, prompts, prompt_tokens, batch, new_tokens, log)
    rates = (synthetic_acceptance, exit_acceptance) if tokenizer is None else (None, None)
    settings = decoding.Settings(new_tokens, rounds, k_draft, drafters, compile, width, *rates)
    found = decoding.time_contenders(model, [part.to(device) for part in ids], settings, peers, log)
    if json:
        return print_json(found)
    print_decoding(found)


def print_decoding(found: dict[str, Any]) -> None:
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
    print_table(title, columns, rows)
    if found["peers"]:
        cells = [
            [p["name"], f"{p['tokens_per_s']:,.1f}", f"{p['cached_greedy_is_faster_by']:.2f}x"] for p in found["peers"]
        ]
        print_table("others", ["name", "tokens/s", "cached greedy is faster by"], cells)
    for row in found["rows"]:
        if row["mode"].split()[0] == "wand":
            print(f"{row['mode']}: tokens by stages used {row['stages_used']}")
    rate = found["copy_bytes_per_s"]
    print(
        f"a plain step reads {found['weight_bytes_per_step'] / 1e6:,.1f} MB of weights and takes "
        f"{found['step_over_floor']:.2f} times as long as copying moves them ({rate / 1e9:.1f} GB/s); heads and pool "
        f"take {found['heads_share']:.1%}; {found['threads']} threads; compiled in {found['compile_seconds']:.1f} s"
    )
