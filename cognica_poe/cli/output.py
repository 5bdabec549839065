"""What commands print on stdout: tables for people, JSON for programs."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Any


def print_table(title: str, columns: list[str], rows: list[list[Any]]) -> None:
    """Print a small table on stdout."""
    from rich.console import Console
    from rich.table import Table

    grid = Table(title=title, title_justify="left", title_style="bold")
    for index, column in enumerate(columns):
        grid.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        grid.add_row(*(_cell(value) for value in row))
    # A file or a pipe has no width to fit; a terminal tells its own.
    Console(width=None if sys.stdout.isatty() else 120).print(grid)


def _cell(value: Any) -> str:
    from rich.markup import escape

    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.4f}" if abs(value) < 100 else f"{value:,.1f}"
    return f"{value:,}" if isinstance(value, int) else escape(str(value))


def as_dicts(items: list[Any]) -> list[dict]:
    """Dataclasses as plain dicts."""
    return [dataclasses.asdict(item) for item in items]


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def print_records(records: list[Any]) -> None:
    """Table of analysis records, and the xz figures of the same text."""
    rows = []
    for record in records:
        best = min(record.bpb.stage) if record.bpb.stage else None
        wand = record.wand.exit_fraction[0] if len(record.wand.exit_fraction) > 1 else None
        accepted = record.speculative.acceptance
        rows.append([record.step, record.bpb.full, best, record.bpb.plain, record.accuracy.full, wand, accepted])
    columns = ["step", "BPB", "best stage", "plain", "accuracy", "exit at 0", "accepted"]
    print_table("checkpoints on held-out text (BPB of the trained path)", columns, rows)
    last = records[-1].baseline if records else None
    if last is not None:
        print(f"xz -9e on the same text: {last.xz_bpb:.4f}; primed with the training text: {last.xz_primed_bpb:.4f}")


def summary(sample: Any) -> str:
    """One line on a generation: speed, stages used, acceptance."""
    parts = [f"{sample.mode}: {sample.new_tokens} tokens, {sample.tokens_per_second:.0f} tokens/s"]
    if sample.mean_stages_used is not None:
        parts.append(f"{sample.mean_stages_used:.2f} stages used")
    if sample.acceptance is not None:
        parts.append(f"acceptance {sample.acceptance:.3f} ({sample.accepted} of {sample.proposed} drafts)")
    return ", ".join(parts)


def print_samples(samples: list[Any]) -> None:
    """Generated texts, each under its summary."""
    for sample in samples:
        print(f"\n[{summary(sample)}]\n{sample.prompt}{sample.text}")
