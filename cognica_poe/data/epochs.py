"""Epochs of rows packed before a run: all shards of each, by any engine, to be kept."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from cognica_poe.data.engine.engines import Engine
from cognica_poe.data.engine.job import Job, write_plan
from cognica_poe.data.engine.local import SMALL
from cognica_poe.data.engine.stages import open_job
from cognica_poe.data.manifest import load_manifest
from cognica_poe.data.rows.sequence import RowSettings
from cognica_poe.data.rows.store import PackedRows
from cognica_poe.data.tokenizer import load_tokenizer
from cognica_poe.files import folder_for

SHORT = 2_000
"""Rows of a shard below which the one that packing gives up is felt."""


def pack_folder(out: Path) -> Path:
    """Where the job of packing into ``out`` stands until it is done."""
    return Path(out) / ".stages"


def pack_epochs(
    data: Path,
    tokenizer: Path,
    out: Path,
    settings: RowSettings,
    first_epoch: int,
    epochs: int,
    engine: Engine,
    log: Callable[[str], None],
) -> list[PackedRows]:
    """Pack ``epochs`` epochs into ``out``, to last, and return the facts of every shard.

    Raises UserError as packing does; what was packed by then is kept.
    """
    with folder_for(out):
        job = plan_pack(data, tokenizer, out, settings, first_epoch, epochs)
        try:
            engine.run(job, log, small=load_manifest(data).bytes * epochs < SMALL)
            found = [PackedRows(**made.counts) for made in job.all_made("pack")]
        finally:
            shutil.rmtree(job.folder, ignore_errors=True)  # the rows have sidecars of their own
    for facts in found:
        log(
            f"rows: {settings.split} epoch {facts.epoch} shard {facts.shard}: {facts.rows:,} rows of {facts.row_len}, "
            f"{100 * facts.kept_fraction:.2f} % of {facts.document_tokens:,} tokens kept"
        )
    least = min(found, key=lambda facts: facts.rows)
    if least.rows < SHORT and job.plan["shards"] > 1:
        log(f"rows: shard {least.shard} has {least.rows:,} rows; each shard loses about one: use larger shards")
    return found


def plan_pack(data: Path, tokenizer: Path, out: Path, settings: RowSettings, first_epoch: int, epochs: int) -> Job:
    """Write the plan of packing ``epochs`` epochs. Raises UserError for parts that are no good."""
    manifest = load_manifest(data)
    settings.require(manifest)
    load_tokenizer(tokenizer)
    paths = {"data": data, "tokenizer": tokenizer, "out": out}
    plan = {
        "kind": "pack",
        **{name: os.path.abspath(path) for name, path in paths.items()},
        "settings": asdict(settings),
        "first_epoch": first_epoch,
        "epochs": epochs,
        "shards": len(manifest.shards_of(settings.split)),
    }
    write_plan(pack_folder(out), plan)
    return open_job(pack_folder(out), plan)
