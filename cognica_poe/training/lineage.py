"""Whether the parts of a run folder belong together: recipe, data, tokenizer, and what was made from the three."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from cognica_poe.data.engine.plan import mix_name
from cognica_poe.data.manifest import DataManifest, load_manifest
from cognica_poe.data.tokenizer import Tokenizer, load_tokenizer
from cognica_poe.errors import UserError
from cognica_poe.recipe.fields import CleaningRecipe, Recipe
from cognica_poe.recipe.stored import fixed_sha256
from cognica_poe.seals import require_made_from
from cognica_poe.training.initial import read_origin

Parts = dict[str, str]
"""Hex sha256 of what a checkpoint, record or release was made from: ``recipe``, ``data``, ``tokenizer``."""


def parts_of(recipe: Recipe, data: DataManifest, tokenizer: Tokenizer) -> Parts:
    """What is made from these three."""
    return {"recipe": fixed_sha256(recipe), "data": data.sha256, "tokenizer": tokenizer.sha256}


def require_parts(run: Path, recipe: Recipe) -> Parts:
    """The parts of a run folder. Raises UserError when one is missing, corrupt, or not of the recipe."""
    data = require_data(run, recipe)
    return parts_of(recipe, data, require_tokenizer(run, recipe, data))


def require_data(run: Path, recipe: Recipe) -> DataManifest:
    """What the run's data say of themselves. Raises UserError naming the setting in which they are not the recipe's."""
    folder, wanted = Path(run) / "data", recipe.data
    manifest = load_manifest(folder)
    settings = {
        "mix": (mix_name(wanted.mix) or manifest.mix, manifest.mix),
        "seed": (wanted.seed, manifest.seed),
        "val-fraction": (wanted.val_fraction, manifest.val_fraction),
        "val-min-bytes": (wanted.val_min_bytes, manifest.val_min_bytes),
        "max-bytes": (wanted.max_bytes, manifest.max_bytes),
        "shard-bytes": (wanted.shard_bytes, manifest.shard_bytes),
    }
    cleaning = dataclasses.asdict(wanted.cleaning)
    as_built = {**dataclasses.asdict(CleaningRecipe()), **manifest.cleaning}
    settings |= {f"cleaning.{name.replace('_', '-')}": (cleaning[name], as_built.get(name)) for name in cleaning}
    for name, (expected, found) in settings.items():
        if expected != found:
            raise UserError(
                f"{folder} was built with {name} {found}, the recipe's data.{name} is {expected}: use another --out, "
                f"or remove {folder} to build it as the recipe says"
            )
    return manifest


def require_tokenizer(run: Path, recipe: Recipe, data: DataManifest | None = None) -> Tokenizer:
    """The run's tokenizer. Raises UserError: it has not the recipe's number of ids, or is not made from ``data``."""
    folder, vocabulary = Path(run) / "tokenizer", recipe.model.vocab_size
    tokenizer = load_tokenizer(folder)
    again = f"use another --out, or remove {folder} to train it again"
    if tokenizer.vocab_size != vocabulary:
        found = tokenizer.vocab_size
        raise UserError(f"{folder} has {found} ids, the recipe's model.vocab-size is {vocabulary}: {again}")
    if data is not None:
        origin = read_origin(run)  # whose tokenizer came with its weights
        made_from = {"weights": origin.sha256} if origin else {"data": data.sha256}
        require_made_from(tokenizer.made_from, made_from, folder, again)
    return tokenizer
