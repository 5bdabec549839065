"""Steps that were launched and whose numbers the host has not read yet, and what reading them leads to."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from cognica_poe.data.rows.reader import Reading
from cognica_poe.recipe.fields import Recipe
from cognica_poe.training.guard import Decision, LateObservation, SpikePolicy
from cognica_poe.training.journal import Journal
from cognica_poe.training.optim.schedule import Schedule

Progress = Callable[[int, dict[str, Any]], None]


@dataclass(frozen=True)
class LaunchedStep:
    """A step whose numbers are on their way to the host."""

    step: int
    began: float
    """Seconds of ``time.perf_counter``."""
    losses: torch.Tensor
    """Mean cross-entropy over all ranks of every stage, then of every exit, ``[K + E]``; complete once the observation
    has been read."""
    observation: LateObservation
    reading: Reading
    """Where its rows stand, and how long the step waited for them."""


class Backlog:
    """Launched steps, oldest first; reading one writes its line of ``metrics.jsonl`` or ``events.jsonl``.

    Args:
        recipe: the run.
        policy: judges every step that is read.
        metrics, events: the journals.
        log: receives a line for every step that was left out.
        progress: receives ``(step, metrics)`` for every other one.
    """

    def __init__(
        self,
        recipe: Recipe,
        policy: SpikePolicy,
        metrics: Journal,
        events: Journal,
        log: Callable[[str], None],
        progress: Progress,
    ):
        self.policy, self.metrics, self.events, self.log, self.progress = policy, metrics, events, log, progress
        self.schedule = Schedule(recipe.training.schedule, recipe.training.steps)
        self.exits = len(recipe.model.poe_exit_layers)
        self.step_tokens = recipe.training.batch_rows * recipe.model.max_position_embeddings
        self._steps: list[LaunchedStep] = []
        self._last_read = 0.0

    def add(self, launched: LaunchedStep) -> None:
        """Remember a step, to be read later."""
        self._steps.append(launched)

    def clear(self) -> None:
        """Forget what has not been read."""
        self._steps.clear()

    def read(self, in_flight: int) -> Decision | None:
        """Read all but the last ``in_flight`` steps, or up to a decision to roll back or stop, returned then."""
        while len(self._steps) > in_flight:
            launched = self._steps.pop(0)
            observation = launched.observation.read()
            decision = self.policy.judge(observation)
            if decision.action == "go":
                self._record(launched, observation.gradient_norm)
                continue
            self.log(
                f"step {observation.step} left out ({observation.verdict}): loss {observation.loss:.4g}, "
                f"gradient norm {observation.gradient_norm:.4g}"
            )
            if decision.action != "left_out":
                return decision
            self.events.write(decision.event)
        return None

    def _record(self, launched: LaunchedStep, gradient_norm: float) -> None:
        now, losses = time.perf_counter(), launched.losses.tolist()
        values, of_exits = losses[: len(losses) - self.exits], losses[len(losses) - self.exits :]
        seconds = now - max(launched.began, self._last_read)
        metrics = {
            "step": launched.step + 1,
            "loss": sum(values) / len(values),
            "loss_stages": values,
            **({"loss_exits": of_exits} if of_exits else {}),
            "gradient_norm": gradient_norm,
            "lr_scale": self.schedule.lr_scale(launched.step),
            "tokens": self.step_tokens * (launched.step + 1),
            "tokens_per_second": self.step_tokens / seconds,
            "epoch": launched.reading.epoch,
            "shard": launched.reading.shard,
            "rows_wait": launched.reading.seconds / seconds,
        }
        self._last_read = now
        self.metrics.write(metrics)
        self.progress(launched.step + 1, metrics)
