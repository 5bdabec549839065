"""The probes of a run in the report: the table of steps and prompts, and every continuation behind it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cognica_poe.release.card.capabilities import Capabilities, anecdote, verdict
from cognica_poe.release.report import page
from cognica_poe.release.text import count, html_text


def probes_section(records: Sequence[Mapping[str, Any]]) -> str:
    """Table and folds, HTML; empty where no record has probes."""
    found = Capabilities.of(records)
    if not found.prompts:
        return ""
    head = ["step", *(html_text(name, 60) for name in found.columns)]
    rows = [[count(step), *(_cell(cell) for cell in cells)] for step, cells in found.rows]
    table = page.table(head, rows, "Right answers by step", text_columns=len(head))
    said = f"<p>{html_text(anecdote(found.prompts), 600)}</p>"
    return "\n".join([said, table, *_folds(records, found.prompts)])


def _cell(cell: str) -> str:
    kind = "signal" if cell.startswith(("right", "yes")) else "noise"
    return f'<span class="{kind}">{html_text(cell, 60)}</span>'


def _folds(records: Sequence[Mapping[str, Any]], prompts: Sequence[str]) -> list[str]:
    blocks: list[str] = []
    for prompt in prompts:
        found = [(record["step"], probe) for record in records for probe in record.get("probes") or []
                 if str(probe.get("prompt")) == prompt]  # fmt: skip
        rows = [
            (count(step), _cell(verdict(probe)), html_text(probe.get("continuation", ""), 400)) for step, probe in found
        ]
        right = sum(bool(probe.get("correct")) for _, probe in found)
        expected = html_text(found[-1][1].get("expected", ""), 70)
        summary = f"{html_text(prompt)} <em>expected: {expected}; right at {right} of {len(rows)} steps</em>"
        body = page.table(("step", "graded", "greedy continuation"), rows, "", text_columns=2, last_is_text=True)
        blocks.append(page.fold(summary, body, is_open=not blocks))
    return blocks
