"""The whole life of a model: data, tokenizer, training, a measured release per step, report.

Every part of it reads and writes the run folder alone and leaves finished work as it is, so that an interrupted run
goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cognica_poe.analysis.record import AnalysisRecord, read_record, record_path, sums_path
from cognica_poe.analysis.record_parts import MadeFrom, Speed
from cognica_poe.data.manifest import load_manifest, read_documents
from cognica_poe.data.rows.reader import Rows
from cognica_poe.data.tokenizer import load_tokenizer
from cognica_poe.errors import UserError
from cognica_poe.files import Manifest, require_apart, require_replaceable
from cognica_poe.recipe.fields import Recipe
from cognica_poe.recipe.stored import load_run_recipe
from cognica_poe.seals import read_sealed, require_made_from, write_sealed
from cognica_poe.training.build import build_model
from cognica_poe.training.checkpoint import CheckpointFolder
from cognica_poe.training.initial import read_origin
from cognica_poe.training.journal import Journal
from cognica_poe.training.lineage import require_parts
from cognica_poe.training.parallel.ranks import Ranks
from cognica_poe.training.precision import default_device
from cognica_poe.training.preparation import prepare
from cognica_poe.training.validation import NO_VALIDATION, Validation, slice_bytes

if TYPE_CHECKING:
    from cognica_poe.release.publish.revisions import Publication

Log = Callable[[str], None]


def open_rows(run: Path, recipe: Recipe, log: Log = lambda line: None) -> Rows:
    """The training rows of a run folder. Raises UserError when its parts do not belong together."""
    require_parts(run, recipe)
    return Rows(
        Path(run) / "data",
        Path(run) / "tokenizer",
        Path(run) / "rows",
        seed=recipe.data.seed,
        row_len=recipe.model.max_position_embeddings + 1,
        case_aug_prob=recipe.data.case_aug_prob,
        order=recipe.data.order,
        log=log,
    )


def validation_of(run: Path, recipe: Recipe, ranks: Ranks | None = None, log: Log = lambda line: None) -> Validation:
    """What is measured while a run trains; nothing where its recipe or a lack of held-out text says so.

    Raises UserError where the recipe asks for validation and there is no text for it.
    """
    from cognica_poe.analysis.in_training import FixedSlice
    from cognica_poe.analysis.validation import validation_slice
    from cognica_poe.modeling.configuration_cognica_poe import CognicaPoEConfig

    training = recipe.training
    if training.eval_every == 0 or training.ranks.parallel == "stages":
        return NO_VALIDATION
    ranks = (ranks or Ranks()).patiently()
    texts = (document.text for document in read_documents(Path(run) / "data", "val"))
    try:
        part = ranks.on_first(lambda: validation_slice(texts, slice_bytes(recipe)))
    except UserError as error:
        if training.eval_every:
            raise
        log(f"no validation in training: {error}")
        return NO_VALIDATION
    config = CognicaPoEConfig(**dataclasses.asdict(recipe.model))
    found = Validation.of(recipe, FixedSlice(part, load_tokenizer(Path(run) / "tokenizer"), config))
    if found.every:
        log(f"validation in training: every {found.every} steps on {part.bytes:,} bytes")
    return found if found.every else NO_VALIDATION


def read_recipe(run: Path) -> Recipe:
    """The recipe of a run folder. Raises UserError when there is none, or it was changed."""
    if not (Path(run) / "recipe.json").is_file():
        raise UserError(f"{run} is not a run folder: it holds no recipe.json; make one with `cognica-poe run`")
    return load_run_recipe(Path(run) / "recipe.json")


def baseline(run: Path, recipe: Recipe, log: Log = lambda line: None) -> dict[str, Any]:
    """xz bits per byte of the validation slice, computed once per run (``analysis/baseline.json``)."""
    from cognica_poe.analysis.baseline import xz_baseline
    from cognica_poe.analysis.validation import validation_slice

    data, file = Path(run) / "data", Path(run) / "analysis" / "baseline.json"
    part = validation_slice((d.text for d in read_documents(data, "val")), recipe.release.val_max_bytes)
    made_from = {"slice_sha256": part.sha256, "data_sha256": load_manifest(data).sha256}
    if file.is_file():
        known = read_sealed(file, "baseline", "delete the file: it is computed again")
        if {key: known.pop(key, None) for key in made_from} == made_from:
            return known
    log("baseline: compressing with xz -9e, alone and primed with the training text")
    figures = xz_baseline((d.text for d in read_documents(data, "train")), part.texts)
    write_sealed(file, {**figures, **made_from})
    return figures


def analyze_step(
    run: Path, recipe: Recipe, model: Any, step: int, log: Log, speed: bool = False, heads: bool = False
) -> AnalysisRecord:
    """Analyse ``model`` at ``step`` and write its record; with ``speed`` its modes are timed as well.

    What each stage head is worth is measured with ``heads``, and at the run's last step.
    """
    from cognica_poe.analysis.analyzer import analyze

    folder, parts = Path(run) / "analysis", require_parts(run, recipe)
    record = analyze(
        model,
        load_tokenizer(Path(run) / "tokenizer"),
        Path(run) / "data",
        step=step,
        tokens_seen=step * recipe.training.batch_rows * recipe.model.max_position_embeddings,
        name=recipe.name,
        val_max_bytes=recipe.release.val_max_bytes,
        baseline=baseline(run, recipe, log),
        safety=recipe.release.wand_safety,
        k_draft=recipe.release.k_draft,
        heads=heads or step == recipe.training.steps,
        log=log,
    )
    record.made_from = MadeFrom(**parts)
    if speed:
        from cognica_poe.bench.speeds import margins_of, measure_speeds

        rows = measure_speeds(
            model,
            load_tokenizer(Path(run) / "tokenizer"),
            record.wand_bounds,
            margins_of(record),
            k_draft=recipe.release.k_draft,
            log=log,
        )
        record.speeds = [Speed.model_validate(row) for row in rows]
    record.write(folder)
    return record


def require_outside(run: Path, out: Path, takes: Sequence[str] = ()) -> None:
    """Raise UserError for an ``out`` that is, holds or lies inside anything that a run keeps.

    Of a run, only ``release`` takes further folders, and what ``takes`` names relative to it.
    """
    for part in [*Path(run).iterdir(), Path(run) / "release" / "hub"]:
        if part.relative_to(run).as_posix() not in ("release", *takes):
            require_apart(out, part)


def release_folder(run: Path, step: int, out: Path | None = None) -> Path:
    """Where the release of a step goes, by default ``release/step-N`` of the run. Raises UserError if it may not."""
    place = out or Path(run) / "release" / f"step-{step}"
    require_outside(run, place)
    require_replaceable(place, "release")
    return place


def export_step(
    run: Path,
    recipe: Recipe,
    model: Any,
    step: int,
    log: Log,
    out: Path | None = None,
    gap: dict[str, Any] | None = None,
) -> Path:
    """Write the release folder of a measured step; ``gap``: to a control run, for its card."""
    from cognica_poe.release.export import export_release

    file, parts = record_path(Path(run) / "analysis", step), require_parts(run, recipe)
    record = read_record(file)
    found = record.made_from.model_dump() if record.made_from else {}
    require_made_from(found, parts, file, "analyze the step again")
    folder = release_folder(run, step, out)
    before = [Path(run) / "release" / f"step-{earlier}" for earlier in exported_steps(run) if earlier < step]
    return export_release(
        model,
        Path(run) / "tokenizer",
        folder,
        record=record.model_dump(mode="json"),
        wand_bounds=record.wand_bounds,
        name=recipe.release.repo_id.split("/")[-1],
        step=step,
        repo_id=recipe.release.repo_id,
        about={
            **_started_from(run),
            **describe(run, recipe, step),
            **({"gap": gap} if gap else {}),
            "made_from": parts,
        },
        sums=sums_path(file) if record.sums is not None else None,
        earlier=before,
        log=log,
    )


def describe(run: Path, recipe: Recipe, step: int) -> dict[str, Any]:
    """What the card of ``step`` says beside its record (``release.description``)."""
    from cognica_poe.planning.parameters import count_parameters
    from cognica_poe.release.description import describe_run

    return describe_run(run, recipe, step, count_parameters(recipe))


def _started_from(run: Path) -> dict[str, Any]:
    """What a release says of the weights that its run took over."""
    origin = read_origin(run)
    return {"started_from": dataclasses.asdict(origin)} if origin else {}


def publish_run(
    run: Path, recipe: Recipe, steps: Sequence[int], log: Log, to: str | None = None, replace: bool = True
) -> Publication:
    """Publish measured steps: into the run's own Hub cache folder, ``release/hub``, or ``to`` another place.

    Of steps with the same weights (no step between them changed any) the first is published. ``to`` and ``replace`` are
    those of ``release.publish.revisions.publish``.
    """
    from cognica_poe.release.export import WEIGHTS
    from cognica_poe.release.publish.revisions import publish

    if to and to.startswith("file:"):
        require_outside(run, Path(to.removeprefix("file:")), takes=["release/hub"])
    folders: dict[str, Path] = {}
    for step in sorted(steps):
        folder = Path(run) / "release" / f"step-{step}"
        first = folders.setdefault(Manifest.read(folder).digests.get(WEIGHTS, folder.name), folder)
        if first != folder:
            reason = f"it holds the weights of {first.name}"
            log(f"step {step} is not published: {reason}")
            if to is None:
                Journal(run / "events.jsonl", True).write({"event": "release left out", "step": step, "reason": reason})
    own = f"file:{Path(run) / 'release' / 'hub'}"
    repo_id = recipe.release.repo_id if to is None or to.startswith("file:") else None
    return publish(list(folders.values()), to or own, repo_id, replace=replace, log=log)


def exported_steps(run: Path) -> list[int]:
    """Steps with a release folder. Raises UserError for a folder ``step-...`` of no step."""
    folders = sorted((Path(run) / "release").glob("step-*"))
    for folder in folders:
        if not re.fullmatch(r"step-(0|[1-9][0-9]{0,17})", folder.name):
            raise UserError(f"{folder} is named like a release and is of no step: move it elsewhere")
    return sorted(int(folder.name.removeprefix("step-")) for folder in folders)


def checkpoint_model(run: Path, recipe: Recipe, step: int, log: Log = lambda line: None) -> Any:
    """The model of a checkpoint, on this machine's device and in evaluation mode.

    Raises UserError when the step is missing, damaged, or not of this recipe, data and tokenizer.
    """
    folder, parts = CheckpointFolder(Path(run) / "checkpoints", log), require_parts(run, recipe)
    checkpoint = folder.load(step)
    require_made_from(checkpoint.made_from, parts, folder.path(step), "undo the change, or use another step")
    model = build_model(recipe.model)
    model.load_state_dict(checkpoint.weights)
    return model.to(default_device()).eval()  # type: ignore[arg-type]  # transformers hides the signature


def checkpoint_steps(run: Path, wanted: Sequence[int]) -> list[int]:
    """``wanted``, or every checkpoint step of the run."""
    steps = CheckpointFolder(Path(run) / "checkpoints").steps()
    if not steps:
        raise UserError(f"{run} holds no checkpoints; train it first with `cognica-poe train`")
    return sorted(wanted) if wanted else steps


def run_recipe(
    recipe: Recipe,
    run: Path,
    *,
    resume: bool,
    log: Log,
    progress: Callable[[int, dict], None],
    init_from: Path | None = None,
    beside: contextlib.AbstractContextManager[None] | None = None,
) -> list[int]:
    """Train ``recipe`` in ``run`` and release every step of its schedule; returns the released steps.

    ``beside``: what releases them while training goes on (``following.followed``), instead of pauses for it.
    """
    from cognica_poe.release.report.html import write_report
    from cognica_poe.training.trainer import Trainer

    prepare(recipe, run, log, resume, init_from)
    rows, validation = open_rows(run, recipe, log), validation_of(run, recipe, log=log)
    trainer = Trainer(recipe, run, rows, resume=resume, log=log, progress=progress, validation=validation)

    def release(step: int) -> None:
        if beside is not None:
            return
        began = time.perf_counter()
        _drop_unreleased(run, recipe, trainer.releases)
        analyze_step(run, recipe, trainer.model, step, log)
        export_step(run, recipe, trainer.model, step, log)
        log(f"step {step}: training paused {time.perf_counter() - began:.1f} s for its release")

    with beside or contextlib.nullcontext():
        trainer.train(release)
    steps = trainer.releases
    _drop_unreleased(run, recipe, steps)
    for step in steps:
        if not (Path(run) / "release" / f"step-{step}").is_dir():
            release_from_checkpoint(run, recipe, step, log)  # a kill came between checkpoint and release
    publish_run(run, recipe, steps, log)
    report = write_report([run], Path(run) / "report")
    log(f"report: {report}")
    return steps


def _drop_unreleased(run: Path, recipe: Recipe, releases: Sequence[int]) -> None:
    """Remove records and releases of steps that a roll-back has taken out of the run since."""
    for step in set(recipe.released_steps()) - set(releases):
        shutil.rmtree(Path(run) / "release" / f"step-{step}", ignore_errors=True)
        for file in (Path(run) / "analysis").glob(f"step-{step}.*"):
            file.unlink()


def release_from_checkpoint(run: Path, recipe: Recipe, step: int, log: Log) -> None:
    """Measure and export a step from its checkpoint."""
    model = checkpoint_model(run, recipe, step, log)
    analyze_step(run, recipe, model, step, log)
    export_step(run, recipe, model, step, log)
