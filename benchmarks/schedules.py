"""Schedules of a line of ranks that hold the stages, replayed operation by operation: who idles how long, and why.

Forward and backward of one micro-batch take what the caller says, messages nothing; what is counted is waiting that no
network could spare. Ranks meet at the end of every step, where the guard judges it, what stages share is summed, and
weights change.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

SCHEDULES = ("flat", "delayed", "pipeline")
"""Local losses; gradients a step late; gradients in time, one forward and one backward in turn (1F1B)."""


@dataclass(frozen=True)
class Work:
    """A forward (``F``) or backward (``B``) of a micro-batch, counted over all steps."""

    kind: str
    micro_batch: int


def schedule_of(kind: str, rank: int, world: int, micro_batches: int, steps: int) -> list[list[Work]]:
    """What a rank does in every step, in order."""
    lag = {"flat": 0, "delayed": 2 * (world - 1 - rank), "pipeline": world - 1 - rank}[kind]
    waiting: deque[int] = deque()
    found = []
    for step in range(steps):
        work = []
        for i in range(step * micro_batches, (step + 1) * micro_batches):
            work.append(Work("F", i))
            waiting.append(i)
            if len(waiting) > lag:
                work.append(Work("B", waiting.popleft()))
        while kind == "pipeline" and waiting:
            work.append(Work("B", waiting.popleft()))
        found.append(work)
    return found


def replay(
    kind: str, forward: Sequence[float], backward: Sequence[float], micro_batches: int, steps: int = 4
) -> list[float]:
    """Share of the time of a step that each rank idles, once the line is filled: in all steps but the first.

    Args:
        kind: one of ``SCHEDULES``.
        forward, backward: time of a micro-batch on every rank.
        micro_batches: of a step.
        steps: replayed, at least 2.
    """
    world = len(forward)
    plans = [schedule_of(kind, rank, world, micro_batches, steps) for rank in range(world)]
    done: dict[tuple[str, int, int], float] = {}
    clock, first_end = 0.0, 0.0
    for step in range(steps):
        clock = _replay_step(kind, [plan[step] for plan in plans], forward, backward, clock, done)
        first_end = first_end or clock
    busy = [micro_batches * (steps - 1) * (f + b) for f, b in zip(forward, backward, strict=True)]
    return [1.0 - part / (clock - first_end) for part in busy]


def _replay_step(
    kind: str,
    plans: Sequence[Sequence[Work]],
    forward: Sequence[float],
    backward: Sequence[float],
    start: float,
    done: dict[tuple[str, int, int], float],
) -> float:
    """Time at which the last rank ends the step that all begin at ``start``; ``done`` notes when each work is."""
    world, clocks, left = len(plans), [start] * len(plans), [deque(plan) for plan in plans]
    while any(left):
        moved = False
        for rank, plan in enumerate(left):
            while plan and (ready := _ready(kind, plan[0], rank, world, done)) is not None:
                work = plan.popleft()
                duration = forward[rank] if work.kind == "F" else backward[rank]
                clocks[rank] = max(clocks[rank], ready) + duration
                done[work.kind, rank, work.micro_batch] = clocks[rank]
                moved = True
        if not moved:
            raise RuntimeError(f"{kind}: every rank waits for another")
    return max(clocks)


def _ready(kind: str, work: Work, rank: int, world: int, done: dict[tuple[str, int, int], float]) -> float | None:
    """When what a work needs of its neighbour is there; None while it is not known."""
    if work.kind == "F":
        return done.get(("F", rank - 1, work.micro_batch)) if rank else 0.0
    if kind == "flat" or rank + 1 == world:
        return 0.0
    return done.get(("B", rank + 1, work.micro_batch))


def boundary_bytes(kind: str, world: int, tokens: int, width: int, micro_batches: int) -> int:
    """Bytes in fp32 of boundary states, and of their gradients where they come back, that a line sends in a step.

    Args:
        tokens: of a micro-batch.
        width: of the residual stream.
    """
    ways = 1 if kind == "flat" else 2
    return ways * (world - 1) * micro_batches * tokens * width * 4
