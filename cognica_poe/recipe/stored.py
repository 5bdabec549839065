"""``recipe.json``: a recipe as a run folder keeps it, sealed, and as a user may write one."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from cognica_poe.errors import UserError
from cognica_poe.files import read_json
from cognica_poe.recipe.fields import Recipe
from cognica_poe.recipe.rules import settings
from cognica_poe.seals import SEAL, content_sha256, read_sealed, write_sealed


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write a recipe as sealed JSON."""
    write_sealed(path, dataclasses.asdict(recipe))


def load_recipe(path: Path) -> Recipe:
    """Read a ``recipe.json``, sealed or not. Raises UserError: missing, no JSON, no recipe, a broken seal."""
    values = read_json(path, "recipe")
    if isinstance(values, dict) and SEAL in values:
        values = read_sealed(path, "recipe", f"undo the change, or remove its line {SEAL} to start a run from it")
    return recipe_from_dict(values, str(path))


def load_run_recipe(path: Path) -> Recipe:
    """Read the ``recipe.json`` of a run folder. Raises UserError as ``load_recipe``, and without a seal."""
    remedy = (
        "undo the change, for settings change through options with --resume; or delete the file and --resume with the "
        "name and the options of the recipe"
    )
    return recipe_from_dict(read_sealed(path, "recipe", remedy), str(path))


def fixed_sha256(recipe: Recipe) -> str:
    """Hex sha256 of the settings that a resumed run may not change: the identity of what is trained, and on what."""
    fixed = [setting for setting in settings(recipe) if not (setting.resume or setting.value == setting.absent)]
    return content_sha256({setting.option: setting.value for setting in fixed})


def recipe_from_dict(values: Any, where: str) -> Recipe:
    """Build a recipe from JSON values. Raises UserError naming each unknown, missing or mistyped field."""
    from pydantic import (
        TypeAdapter,
        ValidationError,
    )  # a third of a second that a command's help need not wait for

    try:
        return TypeAdapter(Recipe).validate_json(json.dumps(values), strict=True, extra="forbid")
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, e['loc'])) or 'the file'}: {e['msg'].lower()}" for e in error.errors()]
        raise UserError(f"recipe {where}: {'; '.join(problems)}") from error
