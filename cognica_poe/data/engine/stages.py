"""The jobs that there are: a build of data, and packing; from the folder of one, a task is run by name and number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cognica_poe.data.engine.decide import Decide
from cognica_poe.data.engine.duplicates import Duplicates
from cognica_poe.data.engine.gather import Gather
from cognica_poe.data.engine.job import Job, Log, Made, Stage, read_plan
from cognica_poe.data.engine.near import Near
from cognica_poe.data.engine.pack import Pack
from cognica_poe.data.engine.read import Read
from cognica_poe.data.engine.route import Held, Route, Slices
from cognica_poe.errors import UserError


def _build() -> tuple[Stage, ...]:
    return Read(), Duplicates(), Near(), Decide(), Held(), Route(), Slices(), Gather()


def _pack() -> tuple[Stage, ...]:
    return (Pack(),)


JOBS = {"build": _build, "pack": _pack}
"""Stages of each kind of job, in their order."""


def open_job(folder: Path, plan: dict[str, Any] | None = None) -> Job:
    """The job of a folder, by its plan, or by ``plan`` where that was just written. Raises UserError without one."""
    plan = read_plan(folder) if plan is None else plan
    if plan.get("kind") not in JOBS:
        raise UserError(f"{folder} holds the plan of another version of this package: start that command again")
    return Job(folder, JOBS[plan["kind"]](), plan)


def run_task(folder: Path, stage: str, number: int, log: Log = lambda line: None) -> Made:
    """Do task ``number`` of ``stage`` of the job in ``folder`` unless it is done.

    Raises UserError for a stage or number that the job has not, and for one whose turn it is not yet.
    """
    job = open_job(folder)
    if stage not in job.stages:
        raise UserError(f"there is no stage {stage!r} in {folder}; its stages are {', '.join(job.stages)}")
    if not 0 <= number < (count := job.count(stage)):
        raise UserError(f"stage {stage} has tasks 0 to {count - 1}, there is no task {number}")
    return job.run(stage, number, log)
