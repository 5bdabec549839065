"""What can go wrong within a step, and what is done about it: no host waits for a device, and no rank decides alone.

``StepGuard`` looks at a step before it is applied. Loss and gradient norm are reduced over ranks in one tensor of two
numbers, in which NaN and infinity of any rank survive, and become ``keep``: true where the step may be applied, false
where it is not finite or stands out from the steps before it. The optimiser selects its update away; the host reads
the figures one step later. ``SpikePolicy`` is told the verdict and answers what to do: go on, roll back to the
last checkpoint and pass over the steps around the spike, or stop. ``find_divergence`` compares the ranks' copies of the
weights bit for bit. A trainer wires them as follows::

    guard, policy = StepGuard(recipe, ranks.mean, ranks.world, device), SpikePolicy(recipe)
    while step < steps:
        if policy.passes_over(step):                   # rows around a spike that was rolled back
            step += 1
            continue
        losses = ...                                   # backward of all micro-batches
        keep = guard.check(losses.mean(), gradients)   # 0-dim bool tensor, nothing waits
        optimizer.step(..., keep=keep)                 # exactly no update where keep is 0
        late, figures = figures, guard.figures(step)
        if late is not None:                           # the step before: its numbers have arrived long ago
            decision = policy.observe(late.read())
        step += 1

What an optimiser does with ``keep``, so that a step left out leaves weights and state bit for bit as they were::

    adamw.found_inf = (~keep).float()                          # torch.optim.AdamW(fused=True) then does nothing
    gradient = select(keep, gradient, momentum_buffer)         # Muon: lerp towards itself changes nothing,
    before = second_moment.clone()                             # and nothing non-finite spreads
    update = select(keep, muon_update(gradient, ...), 0.0)     # neither moves nor decays a weight
    second_moment.copy_(select(keep, second_moment, before))
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from cognica_poe.recipe.fields import GuardRecipe

Verdict = Literal["ok", "spike", "non-finite"]


@dataclass(frozen=True)
class Figures:
    """What the guard saw in a step."""

    step: int
    loss: float
    gradient_norm: float
    verdict: Verdict


@dataclass(frozen=True)
class Decision:
    """Answer of the policy to one step."""

    action: Literal["go", "left_out", "roll_back", "stop"]
    event: dict[str, Any] | None = None
    """Line for ``events.jsonl``; None when nothing happened."""
    before: int | None = None
    """For a roll-back: take the newest checkpoint of at most this many completed steps."""


def select(keep: torch.Tensor, value: torch.Tensor, otherwise: torch.Tensor | float) -> torch.Tensor:
    """``value`` where the 0-dim bool ``keep`` is true, else ``otherwise``: unlike a product, it stops NaN."""
    return torch.where(keep, value, otherwise)


class LateRead:
    """Copy of a small tensor that reaches the host while the device goes on working.

    Reading it waits for the work before the copy, not for what was launched since.
    """

    def __init__(self, step: int, tensor: torch.Tensor):
        self.step, self._event = step, None
        if tensor.device.type == "cuda":
            self._host = torch.empty_like(tensor, device="cpu", pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._host = tensor.detach().to("cpu", copy=True)

    def read(self) -> Figures:
        """The figures of the step."""
        if self._event is not None:
            self._event.synchronize()
        loss, norm, finite, keep = self._host.tolist()
        return Figures(self.step, loss, norm, "ok" if keep else "spike" if finite else "non-finite")


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

    def figures(self, step: int) -> LateRead:
        """Figures of the last check, under way to the host; read them one step later."""
        if self._last is None:
            raise RuntimeError("figures() before the first check()")
        return LateRead(step, self._last)

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

    def observe(self, figures: Figures) -> Decision:
        """Verdict of one step, in the order of steps."""
        step, window = figures.step, self.recipe.spike_window
        self.left_out = [old for old in self.left_out if old > step - window]
        if figures.verdict == "ok":
            return Decision("go")
        self.left_out.append(step)
        event = {
            "event": "step left out",
            "step": step,
            "reason": figures.verdict,
            "loss": _plain(figures.loss),
            "gradient_norm": _plain(figures.gradient_norm),
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


# ---- do the ranks still agree? ------------------------------------------------------------------------------------

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 1 << 22


@torch.no_grad()
def parameter_hash(tensor: torch.Tensor) -> torch.Tensor:
    """0-dim int64 hash of a tensor's bits, computed where the tensor lives.

    Every element's bits are multiplied by an odd number of their own and summed modulo 2^64: exact and the same on
    every device, and any single changed element changes the sum.
    """
    bits = tensor.detach().contiguous().view(-1).view(_INTEGERS[tensor.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, bits.numel(), _CHUNK):
        chunk = bits[start : start + _CHUNK].to(torch.int64)
        place = torch.arange(start, start + chunk.numel(), device=tensor.device)
        total += (chunk * (place * 0x5851F42D4C957F2D * 2 + 1)).sum()
    return total


def hash_parameters(named: Iterable[tuple[str, torch.Tensor]]) -> dict[str, int]:
    """Hash by name. One transfer to the host for all of them."""
    hashes = {name: parameter_hash(tensor) for name, tensor in named}
    values = torch.stack(list(hashes.values())).tolist() if hashes else []
    return dict(zip(hashes, values, strict=True))


@dataclass(frozen=True)
class Divergence:
    """Ranks whose weights differ from those of most ranks."""

    ranks: list[int]
    parameters: list[str]

    def __str__(self) -> str:
        ranks = ", ".join(map(str, self.ranks))
        more = f" and {len(self.parameters) - 1} more" if len(self.parameters) > 1 else ""
        subject = f"ranks {ranks} differ" if len(self.ranks) > 1 else f"rank {ranks} differs"
        return f"{subject} in {self.parameters[0]}{more}"


def find_divergence(hashes: list[dict[str, int]]) -> Divergence | None:
    """Compare the hashes of all ranks, in rank order (``ranks.on_all(lambda: hash_parameters(...))``).

    Returns None when all agree. Where no majority exists, the rank that comes first counts as right.
    """
    wrong: set[int] = set()
    parameters = []
    for name in hashes[0]:
        values = [rank.get(name) for rank in hashes]
        right, _ = Counter(values).most_common(1)[0]
        differing = {rank for rank, value in enumerate(values) if value != right}
        if differing:
            parameters.append(name)
            wrong |= differing
    return Divergence(sorted(wrong), parameters) if wrong else None
