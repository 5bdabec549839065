"""Schedules as functions of the step: learning-rate multiplier, Muon momentum, Muon weight decay (card, "Training")."""

from __future__ import annotations

import math

from cognica_poe.recipe.fields import ScheduleRecipe


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

    def rates(self, step: int) -> tuple[float, float, float]:
        """What a step takes: multiplier of the learning rates, Muon momentum, multiplier of Muon's weight decay."""
        return self.lr_scale(step), self.muon_momentum(step), self.weight_decay_scale(step)

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
