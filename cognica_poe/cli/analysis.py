"""The commands that measure: ``analyze`` the checkpoints of a run, ``calibrate`` the exits of a release."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

from cognica_poe.cli.arguments import Flag, Naturals, ReleaseFolder, RunFolder
from cognica_poe.cli.output import print_json, print_records, print_table
from cognica_poe.cli.progress import log
from cognica_poe.errors import UserError
from cognica_poe.recipe.fields import Range


def analyze(run: RunFolder, step: Naturals = (), speed: Flag = False, heads: Flag = False, json: Flag = False) -> None:
    """Measure checkpoints of a run; records land in RUN/analysis.

    Args:
        run: Run folder.
        step: Steps to measure; every checkpoint without a sound record when omitted.
        heads: Switch stage heads off and scale them at every step, not at the last of the run alone.
        speed: Time the modes as well, against plain decoding behind the probe prompts.
        json: Print the records as one JSON document.
    """
    from cognica_poe import pipeline
    from cognica_poe.following import slice_of, sound_record
    from cognica_poe.training.preparation import sweep_run

    recipe = pipeline.read_recipe(run)
    sweep_run(run)
    records = []
    known = "" if step or heads or speed else slice_of(run, recipe)
    for number in pipeline.checkpoint_steps(run, step):
        if known and (record := sound_record(run, recipe, number, known)):
            log(f"step {number} has a sound record; --step {number} measures it again")
            records.append(record)
            continue
        model = pipeline.checkpoint_model(run, recipe, number, log)
        records.append(pipeline.analyze_step(run, recipe, model, number, log, speed, heads))
    if json:
        return print_json([record.model_dump(mode="json") for record in records])
    print_records(records)


def calibrate(
    checkpoint: ReleaseFolder, text: Path, tokens: Annotated[int, Range(1, 2**40)] = 131_072, json: Flag = False
) -> None:
    """WAND p99 bounds of a release folder on text of your own.

    Args:
        checkpoint: Release folder.
        text: Folder or file of parquet, jsonl or text to calibrate on.
        tokens: Positions to calibrate on.
        json: Print one JSON document instead of a table.
    """
    from cognica_poe.analysis.validation import validation_slice
    from cognica_poe.analysis.wand import calibrate as calibrate_bounds
    from cognica_poe.data.texts import collect_texts
    from cognica_poe.data.tokenizer import load_tokenizer
    from cognica_poe.release.loading import load

    model, _ = load(checkpoint)
    if model.config.num_stages < 2 or model.config.poe_mode == "none":
        raise UserError(f"{checkpoint} has one prediction path: there is nothing to exit from")
    part = validation_slice(collect_texts(str(text), log), 8 * tokens)
    result = calibrate_bounds(model, load_tokenizer(checkpoint), part.texts, tokens=tokens, log=log)
    if json:
        return print_json(dataclasses.asdict(result))
    rows = [[f"{k} -> {k + 1}", bound] for k, bound in enumerate(result.bounds)]
    print_table(f"WAND p99 bounds on {result.positions:,} positions", ["transition", "bound (nats)"], rows)
    print(f"agreement with the full pool at safety {result.safety}: {result.agreement:.4f}")
