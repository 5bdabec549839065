"""Schedules as functions of the step: learning-rate multiplier, Muon momentum, Muon weight decay (card, "Training")."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class ScheduleRecipe:
    """When the learning rate rises and falls."""

    warmup_steps: int = 1000
    """Steps of linear warm-up."""
    warmdown_ratio: float = 0.65
    """Share of all steps spent in the linear warm-down."""
    final_lr_fraction: float = 0.05
    """Learning-rate multiplier at the last step."""
    momentum_start: float = 0.85
    """Muon momentum at step 0."""
    momentum_peak: float = 0.97
    """Muon momentum after its warm-up."""
    momentum_end: float = 0.90
    """Muon momentum at the last step; it falls during the warm-down."""
    momentum_warmup_steps: int = 400
    """Steps of linear momentum warm-up."""


class Schedule:
    """Multipliers of one run of ``steps`` optimiser steps.

    ``warmdown_start`` of the 3B recipe (83,923 steps, ratio .65) is 29,373, as on the card.
    """

    def __init__(self, recipe: ScheduleRecipe, steps: int):
        self.recipe, self.steps = recipe, steps
        self.warmdown_steps = round(recipe.warmdown_ratio * steps)
        self.warmdown_start = steps - self.warmdown_steps

    def _warmdown(self, step: int) -> float:
        """0 before the warm-down, rising to 1 at the end of the run."""
        if self.warmdown_steps == 0:
            return 0.0
        return min(1.0, max(0.0, (step - self.warmdown_start) / self.warmdown_steps))

    def lr_scale(self, step: int) -> float:
        """Multiplier of every learning rate at 0-based ``step``."""
        if step < self.recipe.warmup_steps:
            return (step + 1) / self.recipe.warmup_steps
        return 1.0 + (self.recipe.final_lr_fraction - 1.0) * self._warmdown(step)

    def muon_momentum(self, step: int) -> float:
        """Linear rise to the peak, then a fall during the warm-down."""
        recipe = self.recipe
        rise = min(1.0, step / recipe.momentum_warmup_steps) if recipe.momentum_warmup_steps else 1.0
        momentum = recipe.momentum_start + rise * (recipe.momentum_peak - recipe.momentum_start)
        return momentum + self._warmdown(step) * (recipe.momentum_end - momentum)

    def weight_decay_scale(self, step: int) -> float:
        """Cosine from 1 to 0 over the whole run; multiplies Muon's weight decay only."""
        return 0.5 * (1.0 + math.cos(math.pi * step / self.steps)) if self.steps else 0.0
