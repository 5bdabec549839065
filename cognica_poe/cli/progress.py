"""What a long command shows: log lines on stderr, and a training bar with loss per stage, tokens/s and ETA."""

from __future__ import annotations

import os
import sys
import time
from types import TracebackType
from typing import Any


def log(line: str) -> None:
    """One line on stderr; stdout is for results."""
    print(line, file=sys.stderr, flush=True)


def quiet_transformers() -> None:
    """Keep transformers' own bars and advice out of a command's output; set before it is imported."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def duration(seconds: float) -> str:
    """``1h02m``, ``3m05s`` or ``12s``."""
    whole = max(0, round(seconds))
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


class TrainingProgress:
    """A bar on a terminal, a line every ``every`` seconds elsewhere. Use as a context manager; call it per step."""

    def __init__(self, steps: int, first: int = 0, every: float = 10.0, losses: str = "loss by stage"):
        self.losses = losses
        """What the losses are called."""
        self.steps, self.first, self.every = steps, first, every
        self.began = self.shown = time.monotonic()
        self.busy = 0.0
        self.bar: Any = None

    def __enter__(self) -> TrainingProgress:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

            columns = (TextColumn("train"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
            self.bar = Progress(*columns, console=Console(stderr=True), transient=False)
            self.bar.start()
            self.task = self.bar.add_task("", total=self.steps, completed=self.first)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.stop()

    def __call__(self, step: int, metrics: dict[str, Any]) -> None:
        """Show a step; ``metrics`` as the trainer writes them."""
        if self.busy == 0.0:
            self.first = step - 1
        self.busy += metrics["tokens"] / step / metrics["tokens_per_second"]
        left = self.busy / (step - self.first) * (self.steps - step)
        losses = " ".join(f"{loss:.3f}" for loss in metrics["loss_stages"])
        line = f"{self.losses} {losses}  {metrics['tokens_per_second']:,.0f} tokens/s  ETA {duration(left)}"
        if self.bar is not None:
            self.bar.update(self.task, completed=step, description=line)
        elif time.monotonic() - self.shown >= self.every or step == self.steps:
            self.shown = time.monotonic()
            log(f"train: step {step}/{self.steps}  {line}")
