"""What can go wrong within a step, and what is done about it: no host waits for a device, and no rank decides alone.

``StepGuard`` looks at a step before it is applied. Loss and gradient norm are reduced over ranks in one tensor of two
numbers, in which NaN and infinity of any rank survive, and become ``keep``: true where the step may be applied, false
where it is not finite or stands out from the steps before it. The optimiser selects its update away on the device; the
host reads the ``Observation`` one step later. ``SpikePolicy`` is told it and answers what to do: go on, roll back to
the last checkpoint and pass over the steps around the spike, or stop.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from cognica_poe.recipe.fields import GuardRecipe

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
    before: int | None = None
    """For a roll-back: take the newest checkpoint of at most this many completed steps."""


def copy_to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that CUDA makes in passing: complete once a ``LateObservation`` that was made later has been read."""
    host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
    return host.copy_(tensor, non_blocking=tensor.is_cuda)


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
        self._remember(seen, keep)
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
        # A run that stands still has no deviation: a hundredth of the mean is never a spike.
        limit = mean + torch.maximum(self.recipe.spike_sigma * deviation, 0.01 * mean.abs())
        return (seen > limit).any() & (self.count >= self.recipe.spike_window)

    def _remember(self, seen: torch.Tensor, keep: torch.Tensor) -> None:
        """Accepted steps replace the oldest ones; others leave no trace."""
        place = torch.arange(len(self.history), device=seen.device) == self.count % len(self.history)
        self.history = torch.where((place & keep)[:, None], seen, self.history)
        self.count += keep

    def state(self) -> dict[str, Any]:
        """Plain values for a checkpoint; waits for the device."""
        return {"history": self.history.tolist(), "count": int(self.count)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state()``. Raises ValueError when the window has another length."""
        history = torch.tensor(state["history"], dtype=self.dtype)
        if history.shape != self.history.shape:
            raise ValueError(
                f"the checkpoint watched a window of {len(history)} steps, the recipe asks for {len(self.history)}"
            )
        self.history = history.to(self.history.device)
        self.count.fill_(state["count"])


class SpikePolicy:
    """What follows from the verdicts: a state machine on the host, the same on every rank since verdicts are."""

    def __init__(self, recipe: GuardRecipe):
        self.recipe = recipe
        self.left_out: list[int] = []
        """Steps left out since the last roll-back that are still in the window."""
        self.ranges: list[list[int]] = []
        """First and last step of each range that is passed over."""

    def judge(self, observation: Observation) -> Decision:
        """What to do about a step; steps are told in their order."""
        step, window = observation.step, self.recipe.spike_window
        self.left_out = [old for old in self.left_out if old > step - window]
        if observation.verdict == "ok":
            return Decision("go")
        self.left_out.append(step)
        event = {
            "event": "step left out",
            "step": step,
            "reason": observation.verdict,
            "loss": _plain(observation.loss),
            "gradient_norm": _plain(observation.gradient_norm),
        }
        row = self.recipe.max_in_a_row
        in_a_row = len(self.left_out) >= row and self.left_out[-row:] == list(range(step - row + 1, step + 1))
        if not in_a_row and len(self.left_out) < self.recipe.max_in_window:
            return Decision("left_out", event)
        if len(self.ranges) >= self.recipe.max_rollbacks:
            return Decision("stop", {**event, "event": "stop after repeated spikes", "rollbacks": len(self.ranges)})
        first = max(0, self.left_out[0] - self.recipe.pass_over)
        self.ranges.append([first, step])
        self.left_out = []
        return Decision("roll_back", {**event, "event": "roll back", "pass_over": [first, step]}, first)

    def passes_over(self, step: int) -> bool:
        """Whether a roll-back has taken this step out of the run: it is counted, and nothing is trained on it."""
        return any(first <= step <= last for first, last in self.ranges)

    def state(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {"left_out": list(self.left_out), "ranges": [list(span) for span in self.ranges]}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state()``.

        After a roll-back the ranges of this run are kept although the checkpoint does not know them yet: otherwise
        the same rows would lead to the same spike again.
        """
        known = {tuple(span) for span in state["ranges"]} | {tuple(span) for span in self.ranges}
        self.ranges = [list(span) for span in sorted(known)]
        self.left_out = list(state["left_out"])


def _plain(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)  # JSON has neither NaN nor infinity
