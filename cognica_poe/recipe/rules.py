"""What a recipe may say: the range of every number, what must fit together, what a resumed run may change."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from cognica_poe.errors import UserError
from cognica_poe.recipe.fields import Recipe


@dataclasses.dataclass(frozen=True)
class Setting:
    """One field of a recipe with its value."""

    option: str
    """Name as the command line has it, such as ``training.micro-rows``."""
    value: Any
    low: float | None
    high: float | None
    resume: bool
    """A resumed run may change it."""


def settings(part: Any, prefix: str = "") -> Iterator[Setting]:
    """Every field of a recipe, or of a part of one, in the order of their definition."""
    for field in dataclasses.fields(part):
        value, option = (
            getattr(part, field.name),
            f"{prefix}{field.name.replace('_', '-')}",
        )
        if dataclasses.is_dataclass(value):
            yield from settings(value, f"{option}.")
        else:
            rules = {"low": 0, "high": None, "resume": False, **field.metadata}
            yield Setting(option, value, **rules)


def check(recipe: Recipe) -> Recipe:
    """Return ``recipe``. Raises UserError for a value that no run can have."""
    for setting in settings(recipe):
        if problem := _problem(setting):
            raise UserError(f"recipe {recipe.name}: {setting.option} is {setting.value}; it must {problem}")
    training = recipe.training
    if training.batch_rows % training.micro_rows:
        raise UserError(
            f"recipe {recipe.name}: training.batch-rows {training.batch_rows} is not a multiple of "
            f"training.micro-rows {training.micro_rows}"
        )
    if recipe.release.repo_id.count("/") != 1:
        raise UserError(f"recipe {recipe.name}: release.repo-id {recipe.release.repo_id!r} must read org/name")
    return recipe


def _problem(setting: Setting) -> str | None:
    """What a number must do that this one does not; None for a sound one, and for what is no number."""
    value, low, high = setting.value, setting.low, setting.high
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if low is not None and high is not None and not low <= value <= high:
        return f"lie between {low} and {high}"
    if not math.isfinite(value) or (low == 0 and value < 0):
        return "be a number that is not negative" if low == 0 else "be a number"
    if low is not None and value < low:
        return f"be at least {low}"
    return None


def changed_settings(earlier: Recipe, later: Recipe) -> list[Setting]:
    """Settings of ``later`` that differ from ``earlier`` and that a resumed run may not change."""
    before = {setting.option: setting.value for setting in settings(earlier)}
    return [setting for setting in settings(later) if not setting.resume and setting.value != before[setting.option]]
