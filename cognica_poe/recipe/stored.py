"""``recipe.json``: a recipe as a run folder keeps it, and as a user may write one."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from cognica_poe.errors import UserError
from cognica_poe.files import read_json, write_json
from cognica_poe.recipe.fields import Recipe


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write a recipe as JSON."""
    write_json(path, dataclasses.asdict(recipe))


def load_recipe(path: Path) -> Recipe:
    """Read a ``recipe.json``. Raises UserError when it is missing, no JSON, or no recipe."""
    return recipe_from_dict(read_json(path, "recipe"), str(path))


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
