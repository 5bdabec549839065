"""What can go wrong within a step, and what is done about it: no host waits for a device, and no rank decides alone.

``StepGuard`` looks at a step before it is applied. Loss and gradient norm are reduced over ranks in one tensor of two
numbers, in which NaN and infinity of any rank survive, and become ``keep``: true where the step may be applied, false
where it is not finite or stands out from the steps before it. The optimiser selects its update away on the device; the
host reads the ``Observation`` one step later. ``SpikePolicy`` is told it and answers what to do: go on, roll back to
a checkpoint and pass over the steps around the spike, or stop.

Spikes alone never end a run. Every finite value enters the window, as in OLMo-core's SkipStepOptimizer, and what the
last few steps all show is a level and no spike: where loss or gradient norm change for good, less than ``max_in_a_row``
steps are left out. Only what is not finite for as long as all roll-backs together would take ends it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from cognica_poe.errors import UserError
from cognica_poe.recipe.fields import GuardRecipe
from cognica_poe.training.memory import copy_to_host

Verdict = Literal["ok", "spike", "non-finite"]


@dataclass(frozen=True)
class Observation:
    """What the guard saw in a step, over all ranks."""

    step: int
    loss: float
    gradient_norm: float
    verdict: Verdict


@dataclass(frozen=True)
class Decision:
    """Answer of the policy to one step."""

    action: Literal["go", "left_out", "roll_back", "stop"]
    event: dict[str, Any] = field(default_factory=dict)
    """Line for ``events.jsonl``; empty when nothing happened."""
    first: int = 0
    """The first of the steps left out that led here."""
    pass_over: tuple[int, int] | None = None
    """For a roll-back: first and last step that the run passes over then."""


class LateObservation:
    """An observation that reaches the host while the device goes on working.

    Reading it waits for the work before the copy, not for what was launched since.
    """

    def __init__(self, step: int, tensor: torch.Tensor):
        self.step, self._host = step, copy_to_host(tensor.detach())
        self._event: torch.cuda.Event | None = None
        if tensor.is_cuda:
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch's
            self._event.record()

    def read(self) -> Observation:
        """The observation of the step."""
        if self._event is not None:
            self._event.synchronize()
        loss, norm, finite, keep = self._host.tolist()
        return Observation(self.step, loss, norm, "ok" if keep else "spike" if finite else "non-finite")


class StepGuard:
    """Decides on the device whether a step is applied.

    Args:
        recipe: thresholds.
        mean: mean over ranks of a small tensor, in place; must hand on NaN and infinity of one rank to all.
        world: number of ranks; gradients are taken as shards, whose squares add up over ranks.
        device: where gradients live.
    """

    def __init__(
        self,
        recipe: GuardRecipe,
        mean: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor,
        world: int = 1,
        device: torch.device | str = "cpu",
    ):
        self.recipe, self.mean, self.world = recipe, mean, world
        # fp64 where it exists: sums of squares of large gradients stay finite.
        self.dtype = torch.float32 if torch.device(device).type == "mps" else torch.float64
        self.history = torch.zeros(recipe.spike_window, 2, dtype=self.dtype, device=device)
        self.count = torch.zeros((), dtype=torch.int64, device=device)
        """Values that have entered the window."""
        level = min(max(1, recipe.max_in_a_row - 1), recipe.spike_window)
        self._back = torch.arange(1, level + 1, device=device)
        self._last: torch.Tensor | None = None

    @torch.no_grad()
    def check(self, loss: torch.Tensor, gradients: Iterable[torch.Tensor]) -> torch.Tensor:
        """``keep``: a 0-dim bool tensor, true to apply the step and false to leave it out, equal on all ranks.

        Args:
            loss: this rank's mean loss, 0-dim.
            gradients: this rank's gradients, or shards of the reduced ones; left as they are.
        """
        squares = torch.zeros((), dtype=self.dtype, device=self.history.device)
        gradients = [gradient for gradient in gradients if gradient.numel()]
        if gradients:
            dtype = torch.float32 if gradients[0].element_size() < 4 else None
            squares += torch.stack(torch._foreach_norm(gradients, 2, dtype)).to(self.dtype).square().sum()
        seen = self.mean(torch.stack((loss.detach().to(self.dtype), squares)))
        seen = torch.stack((seen[0], (seen[1] * self.world).sqrt()))
        finite = seen.isfinite().all()
        keep = finite & ~self._stands_out(seen)
        self._remember(seen, finite)
        self._last = torch.cat((seen, torch.stack((finite, keep)).to(self.dtype)))
        return keep

    def observation(self, step: int) -> LateObservation:
        """Observation of the last check, under way to the host; read it one step later."""
        if self._last is None:
            raise RuntimeError("observation() before the first check()")
        return LateObservation(step, self._last)

    def _stands_out(self, seen: torch.Tensor) -> torch.Tensor:
        if not self.recipe.spike_sigma:
            return torch.zeros((), dtype=torch.bool, device=seen.device)
        deviation, mean = torch.std_mean(self.history, dim=0, correction=0)
        # Where the mean lags behind a lasting change, the lowest of the last values is the level.
        recent = self.history.index_select(0, (self.count - self._back) % len(self.history))
        level = torch.maximum(mean, recent.amin(dim=0))
        # A run that stands still has no deviation: a hundredth of the mean is never a spike.
        limit = level + torch.maximum(self.recipe.spike_sigma * deviation, 0.01 * mean.abs())
        return (seen > limit).any() & (self.count >= self.recipe.spike_window)

    def _remember(self, seen: torch.Tensor, finite: torch.Tensor) -> None:
        """Finite values replace the oldest ones; others leave no trace."""
        place = torch.arange(len(self.history), device=seen.device) == self.count % len(self.history)
        self.history = torch.where((place & finite)[:, None], seen, self.history)
        self.count += finite

    def state(self) -> dict[str, Any]:
        """Plain values for a checkpoint; waits for the device."""
        return {"history": self.history.tolist(), "count": int(self.count)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state()``; a window of another length takes the newest values that it has room for."""
        history, count = torch.tensor(state["history"], dtype=self.dtype), int(state["count"])
        if len(history) != len(self.history):
            values = history.roll(-(count % len(history)), dims=0)[len(history) - min(count, len(history)) :]
            values = values[-len(self.history) :]
            count = len(values)
            history = torch.cat((values, values.new_zeros(len(self.history) - count, 2)))
        self.history = history.to(self.history.device)
        self.count.fill_(count)


FORGIVEN_AFTER = 10
"""Windows after which a roll-back no longer counts."""


class SpikePolicy:
    """What follows from the verdicts: a state machine on the host, the same on every rank since verdicts are.

    A step that stands out or is not finite is left out. ``max_in_a_row`` of them in a row, or ``max_in_window`` within
    the window, call for a roll-back, at most ``max_rollbacks`` times within ``FORGIVEN_AFTER`` windows; beyond those,
    and without a checkpoint to go back to, steps go on being left out. The run stops after ``max_in_a_row`` times one
    more than ``max_rollbacks`` steps that are not finite with none beyond them that is: a fresh start gets no further.
    """

    def __init__(self, recipe: GuardRecipe):
        self.recipe = recipe
        self.left_out: list[int] = []
        """Steps left out since a roll-back was last called for that are still in the window."""
        self.skipped: list[int] = []
        """Every step left out since the beginning of the run."""
        self.ranges: list[list[int]] = []
        """First and last step of each range that is passed over."""
        self.rollbacks: list[int] = []
        """Steps after which a roll-back was called for."""
        self.failing: list[int] = []
        """Steps that were not finite, roll-backs included, since the last step beyond them that was."""

    def judge(self, observation: Observation) -> Decision:
        """What to do about a step; steps are told in their order."""
        step, recipe = observation.step, self.recipe
        self.left_out = [old for old in self.left_out if old > step - recipe.spike_window]
        if observation.verdict == "non-finite":
            self.failing.append(step)
        elif self.failing and step > max(self.failing):
            self.failing = []
        if observation.verdict == "ok":
            return Decision("go")
        self.left_out.append(step)
        self.skipped.append(step)
        event = {
            "event": "step left out",
            "step": step,
            "reason": observation.verdict,
            "loss": _plain(observation.loss),
            "gradient_norm": _plain(observation.gradient_norm),
        }
        row = recipe.max_in_a_row
        if observation.verdict == "non-finite" and len(self.failing) >= row * (recipe.max_rollbacks + 1):
            return Decision("stop", event, min(self.failing))
        in_a_row = self.left_out[-row:] == list(range(step - row + 1, step + 1))
        if (in_a_row or len(self.left_out) >= recipe.max_in_window) and self._may_roll_back(step):
            return self._call_back(self.left_out[-row if in_a_row else 0], step, event)
        return Decision("left_out", event)

    def judge_end(self, steps: int) -> Decision | None:
        """What to do after the last of ``steps`` steps: a run does not end on weights of which no step was finite."""
        if not self.failing or not self.left_out or not self._may_roll_back(steps - 1):
            return None
        first, self.failing = min(self.failing), []
        return self._call_back(first, steps - 1, {"step": steps - 1, "reason": "non-finite"})

    def _may_roll_back(self, step: int) -> bool:
        counted = [old for old in self.rollbacks if old > step - FORGIVEN_AFTER * self.recipe.spike_window]
        return len(counted) < self.recipe.max_rollbacks

    def _call_back(self, first: int, step: int, event: Mapping[str, Any]) -> Decision:
        self.rollbacks.append(step)
        self.left_out = []
        return Decision(
            "roll_back", {**event, "event": "roll back"}, first, (max(0, first - self.recipe.pass_over), step)
        )

    def pass_over(self, first: int, last: int) -> None:
        """Take steps ``first`` to ``last`` out of the run."""
        self.ranges.append([first, last])

    def passes_over(self, step: int) -> bool:
        """Whether a roll-back has taken this step out of the run: it is counted, and nothing is trained on it."""
        return any(first <= step <= last for first, last in self.ranges)

    def failed(self, step: int) -> bool:
        """Whether a step was not finite, and no step beyond it has been yet."""
        return step in self.failing

    def next_step(self, step: int) -> int:
        """The first step from ``step`` on that is trained."""
        while self.passes_over(step):
            step += 1
        return step

    def releases(self, steps: Sequence[int]) -> list[int]:
        """What can be released of ``steps``, in order and counted in completed steps.

        A step that was passed over is none; where the last one was, the run ends with the last step that was trained.
        Nor is a step that holds the weights of the one released before it, or of the beginning, since all steps between
        were left out.
        """
        chosen: list[int] = []
        skipped, last = set(self.skipped), max(steps)
        while last and self.passes_over(last - 1):
            last -= 1
        for step in sorted({*steps, last}):
            if step > last or (step and self.passes_over(step - 1)):
                continue
            between = range(chosen[-1] if chosen else 0, step)
            if not step or any(not self.passes_over(old) and old not in skipped for old in between):
                chosen.append(step)
        return chosen

    def state(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {
            "left_out": list(self.left_out),
            "skipped": list(self.skipped),
            "ranges": [list(span) for span in self.ranges],
            "rollbacks": list(self.rollbacks),
            "failing": list(self.failing),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state()``; that of an earlier version knows less."""
        self.rewind(state)
        self.ranges = [list(span) for span in state["ranges"]]
        self.rollbacks = list(state.get("rollbacks", [last for _, last in self.ranges]))
        self.failing = list(state.get("failing", []))

    def rewind(self, state: Mapping[str, Any]) -> None:
        """Go back to the steps of a checkpoint's ``state()`` and remember the roll-backs since.

        Otherwise the same rows would lead to the same spike again.
        """
        self.left_out = list(state["left_out"])
        self.skipped = list(state.get("skipped", state["left_out"]))

    def begin_again(self, step: int) -> None:
        """Forget, at completed step ``step``, what lies ahead: a resumed run meets it as a fresh one would."""
        self.left_out, self.rollbacks, self.failing = [], [], []
        self.ranges = [span for span in self.ranges if span[1] < step]


def never_finite(first: int, way: str) -> UserError:
    """What a run says that gives up; ``way``: what to do beyond lower rates."""
    return UserError(
        f"loss or gradient is not finite at step {first}, nor at any step since: none of them was applied; "
        f"lower the learning rates (--training.optimizer.matrix-lr and the others) and {way}"
    )


def _plain(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)  # JSON has neither NaN nor infinity
