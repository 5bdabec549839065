"""An exit for a release that has none there: trained on its frozen weights, measured, written as another release.

The pool, its stages and all that a record says of them stay as they were, since no weight of theirs changes: the record
is taken over, with the digest and the number of parameters of the new weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cognica_poe.analysis.analyzer import weights_sha256
from cognica_poe.analysis.exits import ExitMeasure, measure_exits
from cognica_poe.analysis.speculative import SpeculativeResult, choose_prompts, measure_acceptance
from cognica_poe.analysis.validation import validation_slice
from cognica_poe.data.build import build
from cognica_poe.data.manifest import read_documents
from cognica_poe.data.rows.reader import Rows
from cognica_poe.data.tokenizer import load_tokenizer
from cognica_poe.errors import UserError
from cognica_poe.files import require_apart, require_replaceable
from cognica_poe.leftovers import scratch_folder
from cognica_poe.release.export import Release, check_release, export_release, load_release
from cognica_poe.training.exits import ExitRecipe, train_exit, with_exit
from cognica_poe.training.precision import default_device

if TYPE_CHECKING:
    from cognica_poe.modeling.modeling_cognica_poe import CognicaPoEForCausalLM

HELD_OUT = 0.05
"""Share of the text that is measured on, not trained on."""
MEASURED_BYTES = 2_000_000


@dataclass(frozen=True)
class AddedExit:
    """An exit that was trained afterwards, as ``release.json`` tells of it."""

    recipe: ExitRecipe
    steps: int
    text_sha256: str
    """Of the data that it was trained and measured on."""
    measure: ExitMeasure
    speculative: SpeculativeResult
    """Acceptance of its drafts; ``draft_stage`` is that of the stage it lies in."""

    def as_dict(self) -> dict[str, Any]:
        """One level of names: those of recipe, measure and speculative joined."""
        left_out = ("draft_stage", "by_prompt")
        drafts = {k: v for k, v in dataclasses.asdict(self.speculative).items() if k not in left_out}
        parts = (dataclasses.asdict(self.recipe), dataclasses.asdict(self.measure), drafts)
        merged = {name: value for part in parts for name, value in part.items()}
        return {**merged, "steps": self.steps, "text_sha256": self.text_sha256}


def add_exit(
    source: Path,
    out: Path,
    text: str,
    recipe: ExitRecipe,
    *,
    log: Callable[[str], None] = lambda line: None,
    progress: Callable[[int, dict[str, Any]], None] = lambda step, metrics: None,
) -> AddedExit:
    """Write the release ``out``: that of ``source`` with an exit more, trained on ``text``.

    Args:
        source: release folder; it is left as it is.
        out: free, or a release folder to replace.
        text: mix, folder or file; a part of it is held out and measured on.
        recipe: which exit, and how it is trained.
        log, progress: receive lines, and ``(step, metrics)`` after every step.

    Raises:
        UserError: a damaged release or one without stages to draft for, a layer that can have no exit, too little
            text, an ``out`` that is something else.
    """
    release = check_release(source)
    require_replaceable(out, "release")
    require_apart(out, source)
    model = load_release(source, torch.float32)[0].to(default_device())  # type: ignore[arg-type]  # transformers'
    if model.config.poe_mode == "none":
        raise UserError(f"{source}: poe_mode is none, its text comes from one path without drafts: there is no use")
    model, tokenizer = with_exit(model, recipe), load_tokenizer(source)
    with scratch_folder() as scratch:
        data = build(text, scratch / "data", val_fraction=HELD_OUT, val_min_bytes=1, seed=recipe.seed, log=log)
        length = model.config.max_position_embeddings
        rows = Rows(
            scratch / "data", source, scratch / "rows", seed=recipe.seed, row_len=length + 1, case_aug_prob=0.0, log=log
        )
        train_exit(model, rows, recipe, progress)
        held_out = validation_slice((d.text for d in read_documents(scratch / "data", "val")), MEASURED_BYTES)
    stored = str(release.config["dtype"])
    model.to(getattr(torch, stored)).eval()
    measures = measure_exits(model, tokenizer, held_out.texts, log=log)
    model.config.poe_wand_p99_bounds_per_exit = [measure.bound for measure in measures]
    measure = next(measure for measure in measures if measure.layer == recipe.layer)
    prompts = choose_prompts(tokenizer, held_out.texts, count=20, tokens=min(32, length // 2))
    speculative = measure_acceptance(
        model, prompts, new_tokens=min(128, length // 2), draft_layer=recipe.layer, seed=recipe.seed, log=log
    )
    added = AddedExit(recipe, recipe.steps(length), data.sha256, measure, speculative)
    _write(model, source, out, release, added, stored, log)
    return added


def _write(
    model: CognicaPoEForCausalLM,
    source: Path,
    out: Path,
    release: Release,
    added: AddedExit,
    dtype: str,
    log: Callable[[str], None],
) -> None:
    parameters = sum(parameter.numel() for parameter in model.parameters())
    facts = {**release.record["model"], "parameters": parameters, "weights_sha256": weights_sha256(model)}
    about = {**release.about, "exits": [*release.about.get("exits", []), added.as_dict()]}
    own = ("name", "step", "repo_id")
    export_release(
        model,
        source,
        out,
        record={**release.record, "model": facts},
        wand_bounds=model.config.poe_wand_p99_bounds_per_stage_head or [],
        name=about["name"],
        step=release.step,
        repo_id=about.get("repo_id"),
        about={name: value for name, value in about.items() if name not in own},
        dtype=dtype,
        log=log,
    )
