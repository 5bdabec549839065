"""The commands that take in what others made: ``import`` a checkpoint, ``trajectory import`` a table of checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional

from cognica_poe.cli.arguments import Flag, Natural, Positive
from cognica_poe.cli.output import print_json, print_table
from cognica_poe.cli.progress import log

Source = Positional[Annotated[Path, tyro.conf.arg(metavar="CHECKPOINT")]]
Table = Positional[Annotated[Path, tyro.conf.arg(metavar="CSV")]]


def import_weights(
    checkpoint: Source,
    out: Path,
    text: str,
    tokenizer: Path | None = None,
    name: str | None = None,
    step: Natural | None = None,
    allow_pickle: Flag = False,
    measured_bytes: Positive = 200_000,
) -> None:
    """Make a release folder of a checkpoint that others published or trained, and measure it.

    Names are mapped; a tensor that is missing, unexpected or of another shape is an error that lists it.

    Args:
        checkpoint: Folder with config.json and safetensors, or nanochat's folder or file model_N.pt with meta_N.json.
        out: Where to; free, or a release folder to replace.
        text: Mix, folder or file of parquet, jsonl or text to measure on.
        tokenizer: Folder or tokenizer.json; the one beside the weights when omitted.
        name: Name of the release; that of the folder when omitted.
        step: Training step; that of the checkpoint's name when omitted.
        allow_pickle: Read a .pt file; tensors alone are taken from it.
        measured_bytes: Most text to measure on.
    """
    from cognica_poe.release.imports import import_checkpoint

    found = import_checkpoint(
        checkpoint,
        out,
        text,
        tokenizer=tokenizer,
        name=name,
        step=step,
        allow_pickle=allow_pickle,
        measured_bytes=measured_bytes,
        log=log,
    )
    print(found)


def import_trajectory(
    table: Table,
    out: Path,
    name: str | None = None,
    tokens: Positive | None = None,
    drafts: Positive | None = None,
    positions: Positive | None = None,
    json: Flag = False,
) -> None:
    """Take in a published table of checkpoints; `report` draws it beside runs.

    A value that is not there is missing. Intervals are those that the sample sizes imply; without a size there is none.

    Args:
        table: CSV with a column step and at least one of the figures that a card has.
        out: Where to; free, or an imported trajectory to replace.
        name: Name in reports; that of the file when omitted.
        tokens: Tokens that accuracy was counted on.
        drafts: Draft tokens that acceptance was counted on, at each step.
        positions: Positions that the routed share was counted on.
        json: Print one JSON document.
    """
    from cognica_poe.release.published import FIGURES, Sizes, import_table, readings, steps_of

    found = import_table(table, out, name or table.stem, Sizes(tokens, drafts, positions))
    changes = {key: steps_of(found, key) for key, _ in FIGURES}
    if json:
        noise = {key: [{"since": s.since, "step": s.step, "change": s.value} for s in steps if s.noise]
                 for key, steps in changes.items() if steps}  # fmt: skip
        return print_json({"name": found.name, "rows": len(found.rows), "out": str(out), "noise": noise})
    for key, words in FIGURES:
        rows = [[f"{s.since:,} to {s.step:,}", f"{s.value:+.4f}", f"[{s.low:+.4f}, {s.high:+.4f}]",
                 "noise" if s.noise else "signal" if s.survives else "signal, not after Holm's correction"]
                for s in changes[key]]  # fmt: skip
        if rows:
            print_table(f"changes of {words}", ["steps", "change", "95 % interval", "reading"], rows)
    for line in readings(found):
        print(line)
    print(f"{len(found.rows)} checkpoints in {out}; next: cognica-poe report RUN {out}")
