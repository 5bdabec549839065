"""The commands that pass a model on: ``export``, ``publish`` and ``report``."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from cognica_poe.cli.arguments import Flag, Natural, RunFolder, RunFolders
from cognica_poe.cli.output import print_json, print_table
from cognica_poe.cli.progress import log
from cognica_poe.errors import UserError


def export(run: RunFolder, step: Natural, out: Path | None = None) -> None:
    """Write the release folder of a measured step.

    Args:
        run: Run folder.
        step: A step with a checkpoint and a record.
        out: Where to; RUN/release/step-N when omitted.
    """
    from cognica_poe import pipeline
    from cognica_poe.training.preparation import sweep_run

    recipe = pipeline.read_recipe(run)
    sweep_run(run)
    out = pipeline.release_folder(run, step, out)
    print(pipeline.export_step(run, recipe, pipeline.checkpoint_model(run, recipe, step, log), step, log, out))


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


def report(runs: RunFolders, out: Path | None = None) -> None:
    """Trajectory report of one or several runs, as one self-contained page.

    Args:
        runs: Run folders.
        out: Folder or .html file; the first run's report/ when omitted.
    """
    from cognica_poe import pipeline
    from cognica_poe.release.report.html import write_report

    if not runs:
        raise UserError("report: pass at least one run folder")
    out = out or runs[0] / "report"
    for run in runs:
        pipeline.read_recipe(run)
        pipeline.require_outside(run, out, takes=["report"])
    print(write_report(list(runs), out))
