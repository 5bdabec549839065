"""A run folder before its training: the recipe, its data and its tokenizer, or the weights that a run starts from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from cognica_poe.data.build import build
from cognica_poe.data.cleaning.rules import Cleaning
from cognica_poe.data.manifest import load_manifest, read_documents
from cognica_poe.data.tokenizer import copy_tokenizer, train_tokenizer
from cognica_poe.errors import UserError
from cognica_poe.leftovers import sweep
from cognica_poe.locks import require_settled
from cognica_poe.recipe.fields import DataRecipe, Recipe
from cognica_poe.recipe.rules import Change, changes, check_run
from cognica_poe.recipe.stored import load_run_recipe, save_recipe
from cognica_poe.training.checkpoint import CheckpointFolder
from cognica_poe.training.initial import FOLDER as INITIAL
from cognica_poe.training.initial import Source, open_source, read_origin
from cognica_poe.training.journal import Journal
from cognica_poe.training.lineage import require_data, require_parts, require_tokenizer

Log = Callable[[str], None]
_FIRST_PARTS = ("data", "tokenizer", "rows", INITIAL, "events.jsonl")
"""What a run folder may hold before it holds a recipe."""


def prepare(recipe: Recipe, run: Path, log: Log, resume: bool = False, init_from: Path | None = None) -> None:
    """Recipe, data and tokenizer of a run folder, as far as they are not there yet.

    With ``init_from`` a release or checkpoint folder whose weights and tokenizer a new run takes over.

    Raises UserError, and writes nothing, when no run can start from the recipe or the folder belongs to another one.
    """
    check_run(recipe)
    run, saved = Path(run), Path(run) / "recipe.json"
    source = _open_source(recipe, run, init_from, log) if init_from else None
    changed = _changes_of_a_run(recipe, run, resume)
    _require_own_parts(run, recipe)
    if saved.is_file():
        _record_changes(run, recipe, changed, log)
    require_settled(run / "data", run / "tokenizer")
    sweep_run(run)
    if not (run / "data" / "manifest.json").is_file():
        _build_data(recipe.data, run, log)
    if source:
        source.keep(run)
        event = {"event": "weights taken over", "step": 0, "from": dataclasses.asdict(source.origin)}
        Journal(run / "events.jsonl", True).write(event)
        log(f"weights: those of {source.origin.name}, step {source.origin.step}")
    save_recipe(recipe, saved)
    if not (run / "tokenizer" / "tokenizer.json").is_file():
        _make_tokenizer(recipe, run, log)
    require_parts(run, recipe)


def _changes_of_a_run(recipe: Recipe, run: Path, resume: bool) -> list[Change]:
    """What ``recipe`` does differently from the one in the folder. Raises UserError unless the run may go on so."""
    saved = run / "recipe.json"
    if not saved.is_file():
        if other := _other_parts(run):
            raise UserError(f"{run} holds {other[0]} and no recipe.json, so it is no run folder: choose another --out")
        return []
    earlier = load_run_recipe(saved)
    changed = changes(earlier, recipe)
    if refused := [change.option for change in changed if not change.allowed]:
        raise UserError(
            f"{run} holds a run of another recipe ({earlier.name}): {', '.join(refused)} differ; choose another --out"
        )
    if not resume and (run / "checkpoints").is_dir():
        raise UserError(f"{run} already holds a run: add --resume to go on, or choose another --out")
    return changed


def _build_data(options: DataRecipe, run: Path, log: Log) -> None:
    build(
        options.mix,
        run / "data",
        val_fraction=options.val_fraction,
        val_min_bytes=options.val_min_bytes,
        seed=options.seed,
        max_bytes=options.max_bytes,
        shard_bytes=options.shard_bytes,
        cleaning=Cleaning(**dataclasses.asdict(options.cleaning)),
        log=log,
    )


def _make_tokenizer(recipe: Recipe, run: Path, log: Log) -> None:
    """That of the weights that the run starts from, or one trained on its data."""
    data, tokenizer, origin = run / "data", run / "tokenizer", read_origin(run)
    if origin:
        copy_tokenizer(run / INITIAL / "tokenizer.json", tokenizer, {"weights": origin.sha256})
        return
    texts = (document.text for document in read_documents(data, "train"))
    made_from, size = {"data": load_manifest(data).sha256}, recipe.model.vocab_size
    train_tokenizer(texts, size, tokenizer, max_bytes=recipe.data.tokenizer_bytes, made_from=made_from, log=log)


def _other_parts(run: Path) -> list[str]:
    """Names in a folder without a recipe that no run puts there first."""
    names = {path.name for path in run.iterdir()} if run.is_dir() else set()
    return sorted(name for name in names - set(_FIRST_PARTS) if not name.startswith("."))


def _require_own_parts(run: Path, recipe: Recipe) -> None:
    """Raise UserError when data or tokenizer, as far as they are there, are not those of the recipe."""
    manifest = require_data(run, recipe) if (run / "data" / "manifest.json").is_file() else None
    if (run / "tokenizer" / "tokenizer.json").is_file():
        require_tokenizer(run, recipe, manifest)


def _open_source(recipe: Recipe, run: Path, path: Path, log: Log) -> Source | None:
    """What a new run starts from; None when the run has started from it. Raises UserError for any other run."""
    origin = read_origin(run)
    if origin is not None and not path.exists():
        log(f"--init-from {path} is gone: {run} has kept the weights of {origin.name}, step {origin.step}")
        return None
    source = open_source(path, recipe)
    if origin == source.origin:
        return None
    if origin is not None or (run / "checkpoints").is_dir() or (run / "tokenizer").is_dir():
        began = f"from {origin.name}, step {origin.step}" if origin else "without those weights"
        raise UserError(f"{run} started {began}: --init-from {path} is for a new run; choose another --out")
    return source


def _record_changes(run: Path, recipe: Recipe, changed: Sequence[Change], log: Log) -> None:
    """Say in the log and in ``events.jsonl`` what a run does differently from now on.

    Raises UserError when it is to end before where it stands.
    """
    reached = max(CheckpointFolder(run / "checkpoints").steps(), default=0)
    if recipe.training.steps < reached:
        raise UserError(
            f"{run} stands at step {reached}: training.steps {recipe.training.steps} would end it before; "
            f"use at least {reached}"
        )
    if changed:
        said = {change.option: {"before": change.before, "after": change.after} for change in changed}
        Journal(run / "events.jsonl", True).write({"event": "recipe changed", "step": reached, "changes": said})
    for change in changed:
        log(f"recipe changed at step {reached}: {change.option} was {change.before}, is {change.after}")


def sweep_run(run: Path) -> None:
    """Remove what dead processes left half-written in a run folder."""
    sweep(run, *(Path(run) / part for part in ("checkpoints", "analysis", "release", "report")))
