"""The commands that judge a release by text and tasks of one's own: ``bpb`` and ``eval``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

from cognica_poe.cli.arguments import Flag, Natural, Positive, ReleaseFolder
from cognica_poe.cli.output import print_json, print_table
from cognica_poe.cli.progress import log
from cognica_poe.errors import UserError
from cognica_poe.recipe.fields import Range


def bpb(
    checkpoint: ReleaseFolder,
    text: Path,
    against: str | None = None,
    max_bytes: Positive | None = None,
    json: Flag = False,
) -> None:
    """Bits per byte of a text of your own by every path of a release, beside xz.

    Args:
        checkpoint: Release folder.
        text: Folder or file of parquet, jsonl or text.
        against: Another model for the same bytes: a release folder, or a folder or name in the local Hub cache.
        max_bytes: Measure on a sample of this many bytes.
        json: Print one JSON document instead of a table.
    """
    from cognica_poe.analysis import own_text
    from cognica_poe.data.texts import collect_texts
    from cognica_poe.data.tokenizer import load_tokenizer
    from cognica_poe.release.loading import load

    model, _ = load(checkpoint)
    part = own_text.text_slice(collect_texts(str(text), log), max_bytes)
    figures, sums = own_text.measure_text(model, load_tokenizer(checkpoint), part, log=log)
    figures.append(own_text.xz_figure(part))
    change = None
    if against is not None:
        if own_text.is_release(against):
            other, _ = load(against)
            nats = own_text.measure_text(other, load_tokenizer(Path(against)), part, log=log)[1].nats["full"]
        else:
            nats = own_text.other_nats(*own_text.other_model(against, model.device), part.texts, log)
        value = own_text.bits(nats, part, sums)
        figures.append(own_text.TextFigure(against, value.value, value.low, value.high))
        change = own_text.difference(sums.nats["full"], nats, part, sums)
    about = {"bytes": part.bytes, "texts": len(part.texts), "unit": part.unit, "sha256": part.sha256}
    if json:
        shown = [dataclasses.asdict(figure) for figure in figures]
        paired = dataclasses.asdict(change) if change else None
        return print_json({**about, "figures": shown, "full_minus_against": paired})
    rows = [[item.name, item.bpb, item.low, item.high, item.accuracy] for item in figures]
    columns = ["path", "bits per byte", "low", "high", "accuracy"]
    print_table(f"{part.bytes:,} bytes in {len(part.texts)} {part.unit}s, 95 % intervals", columns, rows)
    if change:
        print(
            f"full minus {against}: {change.value:+.4f} [{change.low:+.4f}, {change.high:+.4f}] bits per byte, paired"
        )


def eval_tasks(
    checkpoint: ReleaseFolder,
    tasks: tuple[str, ...],
    path: Literal["full", "prefix", "stage"] = "full",
    stages: Annotated[int | None, Range(1, 1024)] = None,
    stage: Annotated[int | None, Range(0, 1023)] = None,
    shots: Natural | None = None,
    limit: Positive | None = None,
    task_folder: Path | None = None,
    seed: Natural = 0,
    out: Path | None = None,
    json: Flag = False,
) -> None:
    """Tasks of lm-evaluation-harness by one path of a release; needs `pip install 'cognica-poe[eval]'`.

    Args:
        checkpoint: Release folder.
        tasks: Names of tasks.
        path: Full pool, pool of the first --stages, or one --stage alone.
        stages: Path prefix: how many stages.
        stage: Path stage: which one, counted from 0.
        shots: Examples before a question; the task's own number when omitted.
        limit: Only so many samples of every task.
        task_folder: Folder of YAML files of tasks of your own.
        seed: Seed of the examples.
        out: File that keeps the results of these weights; RUN/analysis/tasks-N.json for a release of a run.
        json: Print one JSON document instead of a table.
    """
    from cognica_poe.analysis.continuations import Path as UsedPath
    from cognica_poe.data.tokenizer import load_tokenizer
    from cognica_poe.release.export import check_release
    from cognica_poe.release.loading import load
    from cognica_poe.serving import harness

    count = {"full": None, "prefix": stages, "stage": stage}[path]
    for name, value, owner in (("stages", stages, "prefix"), ("stage", stage, "stage")):
        if value is not None and path != owner:
            raise UserError(f"eval: --{name} does nothing with --path {path}: leave it out, or give --path {owner}")
    if path != "full" and count is None:
        needed = "--stages, how many" if path == "prefix" else "--stage, which one"
        raise UserError(f"eval: --path {path} needs {needed}")
    release = check_release(checkpoint, to_load=True)
    facts = release.record.get("model") or {}
    file = out or _file_of_run(checkpoint, release.step)
    if file is not None:
        harness.require_place(file, facts.get("weights_sha256"))
    if task_folder is not None:
        harness.require_tasks(task_folder)
    harness.require_harness()
    model, text_tokenizer = load(checkpoint)
    found = harness.evaluate(
        model, load_tokenizer(checkpoint), text_tokenizer, tasks, UsedPath(path, count),
        shots=shots, limit=limit, task_folder=task_folder, seed=seed, log=log,
    )  # fmt: skip
    if file is not None:
        of = {"name": facts.get("name"), "step": release.step, "weights_sha256": facts.get("weights_sha256")}
        harness.store(file, of, found)
        log(f"eval: results are in {file}")
    if json:
        return print_json(found)
    rows = [
        [task, name, value, result["samples"], result["shots"]]
        for task, result in found["tasks"].items()
        for name, value in result["metrics"].items()
    ]
    print_table(f"tasks by path {found['path']}", ["task", "metric", "value", "samples", "shots"], rows)


def _file_of_run(checkpoint: Path, step: int) -> Path | None:
    """Beside the record of the run that the release lies in."""
    run = checkpoint.resolve().parents[1]
    inside = checkpoint.resolve().parent.name == "release" and (run / "recipe.json").is_file()
    return run / "analysis" / f"tasks-{step}.json" if inside else None
