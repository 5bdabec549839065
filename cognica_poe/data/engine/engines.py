"""The engines that carry the tasks of a job: processes of this machine, Slurm, Ray; each leaves the same bytes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from cognica_poe.data.engine.job import Job, Log
from cognica_poe.data.engine.local import run_locally
from cognica_poe.errors import UserError

Name: TypeAlias = Literal["local", "slurm", "ray"]


@dataclass(frozen=True)
class Engine:
    """Who does the tasks, and how many at a time."""

    name: Name = "local"
    workers: int | None = 1
    """None: as many as this machine has processors, on a cluster all tasks at once."""
    options: dict[str, str] = field(default_factory=dict)
    """For the cluster's executor."""

    @classmethod
    def of(cls, name: Name, workers: int | None, options: Sequence[str]) -> Engine:
        """From the words of a command line, ``options`` as ``key=value``. Raises UserError for others."""
        pairs = [text.partition("=") for text in options]
        if wrong := [text for text, (key, sign, _) in zip(options, pairs, strict=True) if not (key and sign)]:
            raise UserError(f"--engine-option {wrong[0]!r} must read key=value")
        if options and name == "local":
            raise UserError("--engine-option is for --engine slurm and ray; leave it out")
        return cls(name, workers, {key: value for key, _, value in pairs})

    def run(self, job: Job, log: Log, small: bool = False) -> None:
        """Every stage of ``job``; one that is ``small`` in this process. Raises UserError as the engines do."""
        if self.name == "local":
            processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            return run_locally(job, 1 if small else self.workers or processors, log)
        from cognica_poe.data.engine.cluster import run_on_cluster

        return run_on_cluster(job, self.name, self.workers or -1, self.options, log)


HERE = Engine()
"""This process alone."""
