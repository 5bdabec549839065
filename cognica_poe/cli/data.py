"""The commands about text: ``data build``, ``pack``, ``task`` and ``which-docs``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

import tyro

from cognica_poe.cli.arguments import (
    Count,
    DataFolder,
    Flag,
    MixName,
    Natural,
    Positive,
    RunFolder,
    StageName,
    TaskNumber,
)
from cognica_poe.cli.output import as_dicts, print_json, print_table
from cognica_poe.cli.progress import log
from cognica_poe.errors import UserError
from cognica_poe.locks import hold_run_of
from cognica_poe.recipe.fields import LONGEST_CONTEXT, CleaningRecipe, DataRecipe, Range

if TYPE_CHECKING:
    from cognica_poe.data.engine.job import Job

EngineName: TypeAlias = Literal["local", "slurm", "ray"]
Workers: TypeAlias = Annotated[int | None, Range(1, 100_000)]
RowLength: TypeAlias = Annotated[int, Range(4, LONGEST_CONTEXT + 1)]


def build_data(
    mix: MixName,
    out: Path,
    val_fraction: Annotated[float, Range(0, 0.5)] = DataRecipe.val_fraction,
    val_min_bytes: Positive = DataRecipe.val_min_bytes,
    max_bytes: Annotated[int | None, Range(1)] = DataRecipe.max_bytes,
    seed: Natural = DataRecipe.seed,
    shard_bytes: Annotated[int, Range(1, 10**9)] = DataRecipe.shard_bytes,
    cleaning: Annotated[CleaningRecipe, tyro.conf.arg(name="")] = CleaningRecipe(),  # noqa: B008
    engine: EngineName = "local",
    workers: Workers = None,
    engine_option: tuple[str, ...] = (),
    plan: Flag = False,
) -> None:
    """Collect a mix, or local files, into parquet shards with a manifest; the same as a run's with the same options.

    What an interrupted build has done is kept beside OUT, and the same command goes on from there.

    Args:
        mix: python-docs, frontier_v1, a mix file, or a folder or file of parquet, jsonl or text.
        out: Data folder to make.
        val_fraction: Share of the documents held out for validation.
        val_min_bytes: Hold out at least this much text.
        max_bytes: Take a sample of this many bytes of text; a mix of Hub datasets needs it.
        seed: Seed of the split.
        shard_bytes: Text of a training shard, about.
        cleaning: Which documents are dropped.
        engine: Who does the work: processes of this machine, or Slurm or Ray through cognica-poe[cluster].
        workers: Tasks at a time; when omitted one per processor here, all of them on a cluster.
        engine_option: Options of the cluster's executor, key=value; Slurm needs partition and time.
        plan: Only write the plan and list its tasks, for `cognica-poe data task` in any other scheduler.
    """
    from cognica_poe.data.build import build, plan_only
    from cognica_poe.data.cleaning.rules import Cleaning
    from cognica_poe.data.engine.engines import Engine

    chosen = Engine.of(engine, workers, engine_option)
    options: dict[str, Any] = {
        "val_fraction": val_fraction,
        "val_min_bytes": val_min_bytes,
        "max_bytes": max_bytes,
        "seed": seed,
        "shard_bytes": shard_bytes,
        "cleaning": Cleaning(**dataclasses.asdict(cleaning)),
    }
    with hold_run_of(out):
        if plan:
            return _print_stages(plan_only(mix, out, **options, log=log), out)
        manifest = build(mix, out, **options, engine=chosen, log=log)
    rows = [[name, total.documents, total.bytes] for name, total in manifest.splits.items()]
    print_table(f"data in {out}", ["split", "documents", "bytes"], rows)


def pack_rows(
    data: DataFolder,
    tokenizer: Path,
    out: Path,
    row_len: RowLength = 2049,
    epoch: Natural = 0,
    epochs: Count = 1,
    seed: Natural = DataRecipe.seed,
    engine: EngineName = "local",
    workers: Workers = None,
    engine_option: tuple[str, ...] = (),
    plan: Flag = False,
) -> None:
    """Pack epochs of a data folder into uint16 rows, every shard by itself.

    A run whose rows these are (RUN/rows, with its row length and seed) reads them and leaves them where they are.

    Args:
        data: Data folder.
        tokenizer: Tokenizer folder.
        out: Folder for the rows.
        row_len: Context length + 1.
        epoch: First epoch to pack; it seeds order and case.
        epochs: How many epochs.
        seed: Seed of order and case.
        engine: Who does the work: processes of this machine, or Slurm or Ray through cognica-poe[cluster].
        workers: Tasks at a time; when omitted one per processor here, all of them on a cluster.
        engine_option: Options of the cluster's executor, key=value; Slurm needs partition and time.
        plan: Only write the plan and list its tasks, for `cognica-poe data task` in any other scheduler.
    """
    from cognica_poe.data.engine.engines import Engine
    from cognica_poe.data.epochs import pack_epochs, plan_pack
    from cognica_poe.data.rows.sequence import RowSettings

    chosen = Engine.of(engine, workers, engine_option)
    if out.is_dir():
        others = sorted(path.name for path in out.iterdir() if not path.name.startswith(("rows-", ".")))
        if others:
            raise UserError(f"{out} holds {others[0]}, so it is no folder of packed rows: choose another --out")
    with hold_run_of(out):
        if plan:
            return _print_stages(plan_pack(data, tokenizer, out, RowSettings(seed, row_len), epoch, epochs), out)
        packed = pack_epochs(data, tokenizer, out, RowSettings(seed, row_len), epoch, epochs, chosen, log)
    if len(packed) == 1:
        facts = [[key, value] for key, value in dataclasses.asdict(packed[0]).items()]
        return print_table(f"rows in {out}", ["fact", "value"], facts)
    columns = ["epoch", "shard", "rows", "documents", "document_tokens", "kept_fraction"]
    print_table(f"rows in {out}", columns, [[getattr(facts, column) for column in columns] for facts in packed])


def _print_stages(job: Job, out: Path) -> None:
    """The stages of a planned job, with the number of tasks where that is known already."""
    rows = []
    for stage in job.stages:
        try:
            count = str(job.count(stage))
        except UserError:
            count = "known once the stages before are done"
        rows.append([stage, count])
    print_table(f"stages planned for {out}, one after the other", ["stage", "tasks"], rows)
    print(f"next: cognica-poe data task STAGE N --out {out} for every task; then this command again without --plan")


def run_task(stage: StageName, number: TaskNumber, out: Path) -> None:
    """Do one task of a planned build or packing, as a job of any scheduler; a finished one is left as it is.

    Stages come in the order that `--plan` prints, the tasks of one in any order and at the same time. The command that
    planned them, without `--plan`, checks them, does what is left, and makes OUT.

    Args:
        stage: Name of the stage.
        number: Task of the stage, from 0.
        out: OUT of the command that planned it.
    """
    from cognica_poe.data.build import stages_folder
    from cognica_poe.data.engine.stages import run_task
    from cognica_poe.data.epochs import pack_folder

    folder = pack_folder(out) if pack_folder(out).is_dir() else stages_folder(out)
    if not folder.is_dir():
        raise UserError(f"data task: nothing is planned for {out}: run data build or data pack with --plan first")
    made = run_task(folder, stage, number, log)
    print(f"{stage} {number}: {'was done before' if made.kept else 'done'}")


def which_docs(run: RunFolder, step: Natural | None = None, text: str | None = None, json: Flag = False) -> None:
    """List the documents that an optimiser step of a run reads (0-based), or the steps that read a text.

    Shards that the run has not packed yet are packed into RUN/rows, where it will look for them.

    Args:
        run: Run folder.
        step: Optimiser step, counted from 0.
        text: Regular expression: only documents whose text it matches; without --step, every step that reads one.
        json: Print one JSON document.
    """
    from cognica_poe import pipeline
    from cognica_poe.data.rows.search import find_text

    recipe = pipeline.read_recipe(run)
    if step is None and text is None:
        raise UserError("data which-docs: name a --step or a --text")
    if step is not None and step >= recipe.training.steps:
        raise UserError(
            f"data which-docs: --step is {step}; {run} has {recipe.training.steps} steps, the last one is "
            f"{recipe.training.steps - 1}"
        )
    rows, batch = pipeline.open_rows(run, recipe, log), recipe.training.batch_rows
    if text is not None:
        found = list(find_text(rows, text, batch, range(recipe.training.steps) if step is None else [step]))
        pieces, columns, title = [each.as_dict() for each in found], ["step", *_PIECE], f"documents with {text!r}"
    else:
        assert step is not None
        pieces = as_dicts(rows.documents(step, batch))
        columns, title = list(_PIECE), f"documents of step {step}"
    if json:
        return print_json(pieces)
    print_table(title, columns, [[piece[column] for column in columns] for piece in pieces])


_PIECE = ("row", "epoch", "shard", "source", "origin", "start", "tokens", "case")
