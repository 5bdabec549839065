"""A run that is followed: each released step is measured, exported and published when its checkpoint is there.

That is done by a process of its own, so that training goes on; it can be ended and started again at any time, on any
machine that sees the run folder, and does what is not done yet.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from cognica_poe import pipeline
from cognica_poe.analysis.record import AnalysisRecord, read_record, record_path
from cognica_poe.analysis.validation import validation_slice
from cognica_poe.data.manifest import read_documents
from cognica_poe.errors import UserError
from cognica_poe.files import MANIFEST, Manifest
from cognica_poe.locks import is_held
from cognica_poe.recipe.fields import Recipe
from cognica_poe.training.checkpoint import CheckpointFolder
from cognica_poe.training.journal import read_lines
from cognica_poe.training.lineage import require_parts

Log = Callable[[str], None]
WAIT = 2.0
"""Seconds between looks at a run in training."""
_OF_RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


def sound_record(run: Path, recipe: Recipe, step: int, slice_sha256: str | None = None) -> AnalysisRecord | None:
    """The record of ``step``, if it is readable, of this run's parts and settings, and not older than its checkpoint.

    ``slice_sha256``: of the run's validation slice, computed when omitted.
    """
    file = record_path(Path(run) / "analysis", step)
    checkpoint = CheckpointFolder(Path(run) / "checkpoints").path(step) / MANIFEST
    try:
        record, parts = read_record(file), require_parts(run, recipe)
        newer = checkpoint.is_file() and checkpoint.stat().st_mtime_ns > file.stat().st_mtime_ns
    except (UserError, OSError):
        return None
    asked = (recipe.release.wand_safety, recipe.release.k_draft, slice_sha256 or slice_of(run, recipe))
    found = (record.wand.safety, record.speculative.k_draft, record.validation.sha256)
    same = record.made_from is not None and record.made_from.model_dump() == parts
    return record if same and found == asked and not newer else None


def slice_of(run: Path, recipe: Recipe) -> str:
    """sha256 of the validation slice that records of a run stand on."""
    texts = (document.text for document in read_documents(Path(run) / "data", "val"))
    return validation_slice(texts, recipe.release.val_max_bytes).sha256


def follow(run: Path, to: str, *, replace: bool = False, log: Log = lambda line: None, wait: float = WAIT) -> list[int]:
    """Measure, export and publish to ``to`` every released step of ``run``, until its training has ended; the steps.

    ``replace``: as for publishing. What is done already is left as it is. Raises UserError when the run cannot be read,
    or the place refuses a step, after the others were done.
    """
    recipe, slice_sha256, done = pipeline.read_recipe(run), "", dict[int, int]()
    refused: dict[int, str] = {}
    while True:
        training = in_training(run)  # asked first: what is there afterwards is all
        for step, made in _waiting(run, recipe).items():
            if done.get(step) == made:
                continue
            slice_sha256 = slice_sha256 or slice_of(run, recipe)
            try:
                _release(run, recipe, step, slice_sha256, log)
                if twin := _twin(run, step):
                    log(f"step {step} is not published: it holds the weights of {twin}")
                else:
                    pipeline.publish_run(run, recipe, [step], log, to, replace)
                refused.pop(step, None)
            except UserError as error:
                if step not in _waiting(run, recipe):  # a roll-back took it
                    continue
                refused[step] = str(error)
                log(f"step {step} is not published: {error}")
            done[step] = made
        if not training:
            break
        time.sleep(wait)
    if refused:
        raise UserError(f"step {min(refused)} of {run} is not published: {refused[min(refused)]}")
    return sorted(done)


def in_training(run: Path) -> bool:
    """Whether a process trains in ``run``: its journal has not ended, and its lock is held."""
    kinds = [line.record.get("event") for line in read_lines(Path(run) / "events.jsonl") if line.record]
    courses = [kind for kind in kinds if kind in ("start", "resume", "end", "stopped")]
    ended = bool(courses) and courses[-1] in ("end", "stopped")
    return not ended and is_held(Path(run))


def _waiting(run: Path, recipe: Recipe) -> dict[int, int]:
    """Released steps that have a checkpoint, and when it was made (ns); without those that were left out."""
    events = [line.record for line in read_lines(Path(run) / "events.jsonl") if line.record]
    left_out = {event.get("step") for event in events if event.get("event") == "release left out"}
    folder, found = CheckpointFolder(Path(run) / "checkpoints"), {}
    for step in sorted(set(folder.steps()) & set(recipe.released_steps()) - left_out):
        with contextlib.suppress(OSError):
            found[step] = (folder.path(step) / MANIFEST).stat().st_mtime_ns
    return found


def _release(run: Path, recipe: Recipe, step: int, slice_sha256: str, log: Log) -> None:
    """Measure and export a step, as far as that is not done."""
    folder = Path(run) / "release" / f"step-{step}"
    sound = sound_record(run, recipe, step, slice_sha256) is not None
    if sound and folder.is_dir():
        return
    model = pipeline.checkpoint_model(run, recipe, step, log)
    if not sound:
        pipeline.analyze_step(run, recipe, model, step, log)
    pipeline.export_step(run, recipe, model, step, log)


def _twin(run: Path, step: int) -> str | None:
    """The release of an earlier step with the same weights."""
    from cognica_poe.release.export import WEIGHTS

    folders = [Path(run) / "release" / f"step-{other}" for other in pipeline.exported_steps(run) if other <= step]
    digests = [Manifest.read(folder).digests.get(WEIGHTS) for folder in folders]
    first = folders[digests.index(digests[-1])].name
    return first if first != f"step-{step}" else None


@contextlib.contextmanager
def followed(run: Path, to: str | None, log: Log) -> Iterator[None]:
    """A process of its own follows ``run`` within the block, and is waited for at its end; none without ``to``.

    It yields to training where both want a processor. An exception that leaves the block ends it. Raises UserError when
    it could not publish everything.
    """
    if to is None:
        yield
        return
    command = [sys.executable, "-m", "cognica_poe.cli.main", "follow", str(run), "--publish-to", to]
    if nice := shutil.which("nice"):
        command = [nice, "-n", "10", *command]
    environment = {key: value for key, value in os.environ.items()
                   if key not in _OF_RANKS and not key.startswith("TORCHELASTIC")}  # fmt: skip
    process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        yield
    except BaseException:
        process.terminate()
        process.wait()
        raise
    log("waiting for the releases that are still being measured")
    if code := process.wait():
        again = f"cognica-poe follow {run} --publish-to {to}"
        raise UserError(f"following {run} ended with code {code}, see above; finish with `{again}`")
