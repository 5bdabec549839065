"""The commands that pass a model on: ``export``, ``add-exit``, ``publish``, ``follow`` and ``report``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

from cognica_poe.cli.arguments import Count, Flag, Natural, Positive, ReleaseFolder, RunFolder, RunFolders
from cognica_poe.cli.output import print_json, print_table
from cognica_poe.cli.progress import TrainingProgress, log
from cognica_poe.errors import UserError
from cognica_poe.recipe.fields import Range


def export(
    run: RunFolder,
    step: Natural,
    out: Path | None = None,
    control: Path | None = None,
    shallow: Path | None = None,
) -> None:
    """Write the release folder of a measured step.

    Args:
        run: Run folder.
        step: A step with a checkpoint and a record.
        out: Where to; RUN/release/step-N when omitted.
        control: Run of the same layers by backprop: the card says the gap to it, as compute too.
        shallow: Run of stage 0's layers alone by backprop, beside --control: the card says what depth yields.
    """
    from cognica_poe import pipeline
    from cognica_poe.release.card.gap import gap_of_runs
    from cognica_poe.training.preparation import sweep_run

    recipe = pipeline.read_recipe(run)
    sweep_run(run)
    out = pipeline.release_folder(run, step, out)
    if shallow and not control:
        raise UserError("--shallow needs --control: R is the part of the control's gain over it")
    gap = gap_of_runs(run, control, shallow, step) if control else None
    print(pipeline.export_step(run, recipe, pipeline.checkpoint_model(run, recipe, step, log), step, log, out, gap))


def publish(run: RunFolder, to: str, replace: Flag = False, json: Flag = False) -> None:
    """Publish every release folder of a run, one revision per step.

    Args:
        run: Run folder.
        to: org/name on the Hub (token from HF_TOKEN), or file:FOLDER for a local Hub cache folder.
        replace: Allow a step to be published again with other content, and files in the way that were not written by
            cognica-poe, or changed since, to be replaced; what others wrote stays otherwise.
        json: Print one JSON document.
    """
    from cognica_poe import pipeline
    from cognica_poe.training.preparation import sweep_run

    recipe = pipeline.read_recipe(run)
    sweep_run(run)
    done = pipeline.publish_run(run, recipe, pipeline.exported_steps(run), log, to, replace)
    if json:
        return print_json(dataclasses.asdict(done))
    rows = [[f"step-{step}", commit] for step, commit in done.revisions.items()]
    print_table(f"{done.repo_id} at {done.where}", ["revision", "commit"], [*rows, ["main", done.main]])


def report(runs: RunFolders, out: Path | None = None, since: Natural | None = None) -> None:
    """Trajectory report of one or several runs, as one self-contained page.

    A pool beside a run of the same layers trained by backprop, and one of stage 0's layers alone, is compared with
    them: the gap as compute, and what part of depth's gain the pool finds. What `trajectory import` made is drawn
    beside the runs, with the intervals that its sample sizes imply.

    Args:
        runs: Run folders, and folders of imported trajectories.
        out: Folder or .html file; the first run's report/ when omitted.
        since: Step that cumulative changes start from; the first measured one when omitted.
    """
    from cognica_poe import pipeline
    from cognica_poe.release.published import is_published
    from cognica_poe.release.report.html import write_report

    if not runs:
        raise UserError("report: pass at least one run folder")
    own = [path for path in runs if not is_published(path)]
    if out is None and not own:
        raise UserError("report: pass --out for imported trajectories alone")
    out = out or own[0] / "report"
    for run in own:
        pipeline.read_recipe(run)
        pipeline.require_outside(run, out, takes=["report"])
    print(write_report(list(runs), out, since))


def add_exit(
    checkpoint: ReleaseFolder,
    layer: Annotated[int, Range(1, 1023)],
    out: Path,
    text: str,
    tokens: Positive = 2_000_000,
    rank: Annotated[int, Range(0, 2**17)] = 0,
    batch_rows: Count = 16,
    lr: Annotated[float, Range(0, 100, above=True)] = 0.008,
    seed: Natural = 0,
    json: Flag = False,
) -> None:
    """Train an exit inside a stage of a release and write it as another release; nothing else changes.

    Args:
        checkpoint: Release folder, left as it is.
        layer: Layers before the exit.
        out: Release folder to write.
        text: Mix, folder or file of parquet, jsonl or text to train on; a twentieth of it is held out and measured on.
        tokens: Tokens to train on; a shorter text is read again.
        rank: Rank of the exit's head beside the shared one; 0 is a full matrix.
        batch_rows: Rows of the context length per step.
        lr: Rate of the head, scaled by batch and width as that of all heads.
        seed: Seed of the held-out part, the order of the rows and the head.
        json: Print one JSON document instead of a table.
    """
    from cognica_poe.release.contents import check_contents
    from cognica_poe.release.exits import add_exit as add
    from cognica_poe.release.export import check_release
    from cognica_poe.training.exits import ExitRecipe

    recipe = ExitRecipe(layer, rank, tokens, batch_rows, lr, seed)
    release = check_release(checkpoint)
    check_contents(checkpoint)
    context = release.config["max_position_embeddings"]
    with TrainingProgress(recipe.steps(context), losses="loss") as progress:
        added = add(checkpoint, out, text, recipe, log=log, progress=progress)
    if json:
        return print_json({**added.as_dict(), "out": str(out)})
    drafts = added.speculative
    interval = "" if drafts.low is None else f" ({drafts.low:.3f} to {drafts.high:.3f})"
    accepted = "-" if drafts.acceptance is None else f"{drafts.acceptance:.3f}{interval}"
    rows = [
        ["nats per token", f"{added.measure.nats:.4f}"],
        ["nats of the pool", f"{added.measure.pool_nats:.4f}"],
        ["agrees with the pool", f"{added.measure.agreement:.4f}"],
        ["positions", f"{added.measure.positions:,}"],
        [f"accepted drafts, {drafts.k_draft} a round", accepted],
        ["WAND p99 bound (nats)", f"{added.measure.bound:.4f}"],
    ]
    print_table(f"exit behind {layer} layers, on held-out text", ["measure", "value"], rows)
    print(out)


def follow(run: RunFolder, publish_to: str, replace: Flag = False, json: Flag = False) -> None:
    """Measure, export and publish every released step of a run as its checkpoint appears, until training has ended.

    What `train --publish-to` starts by itself; by hand it goes on where that stopped, also on another machine that sees
    the run folder. What is done is left as it is.

    Args:
        run: Run folder.
        publish_to: org/name on the Hub (token from HF_TOKEN), or file:FOLDER for a local Hub cache folder.
        replace: Allow a step to be published again with other content, as for `publish`.
        json: Print one JSON document.
    """
    from cognica_poe import following

    steps = following.follow(run, publish_to, replace=replace, log=log)
    if json:
        return print_json({"run": str(run), "steps": steps, "to": publish_to})
    print(f"published steps {', '.join(map(str, steps)) or 'none'} of {run} to {publish_to}")
