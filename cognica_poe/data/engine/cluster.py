"""The engines ``slurm`` and ``ray``: datatrove's executors carry the tasks, what a task does is ours.

A task is named to a node by folder, stage and number, so all of it lies in the folder, which the nodes must share.
datatrove's own marks of completion know nothing of code or inputs: every attempt has a folder of its own for them, and
each task looks at its sidecar first.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from cognica_poe.data.engine.job import Job, Log
from cognica_poe.data.engine.stages import run_task
from cognica_poe.errors import UserError

_POLL = 2.0
_PATIENCE = 30.0  # seconds without progress where nothing tells whether a job still waits or runs


class StageTask:
    """A step of a datatrove pipeline: task ``rank`` of a stage. Nodes import it by its name."""

    def __init__(self, folder: str, stage: str, attempt: str) -> None:
        """The job's folder, the stage, and the folder of this attempt."""
        self.folder, self.stage, self.attempt = folder, stage, attempt

    def __call__(self, data: Any, rank: int, world_size: int) -> None:
        """Do the task. What it raises is left in the attempt's folder for whoever waits for it."""
        try:
            run_task(Path(self.folder), self.stage, rank)
        except Exception as error:
            said = str(error) if isinstance(error, UserError) else traceback.format_exc()
            file = Path(self.attempt) / "errors" / f"{rank:05d}"
            file.parent.mkdir(exist_ok=True)
            file.write_text(said, encoding="utf-8")
            raise


def run_on_cluster(job: Job, engine: str, workers: int, options: Mapping[str, str], log: Log) -> None:
    """Every stage of ``job`` on Slurm or Ray, ``workers`` tasks at a time (-1: all).

    ``options`` go to datatrove's executor, as numbers where they read like one. Raises UserError where datatrove or Ray
    is missing, an option is unknown, or tasks did not end well; finished tasks are kept.
    """
    execute = {"slurm": _slurm, "ray": _ray}[engine]
    attempts = job.folder / "attempts"
    for stage in job.stages:
        count = job.count(stage)
        number = sum(1 for _ in attempts.glob("*")) if attempts.is_dir() else 0
        attempt = attempts / f"{number:04d}-{stage}"
        attempt.mkdir(parents=True)
        log(f"data: {stage}: {count} tasks on {engine}")
        settings = {name: _value(text) for name, text in options.items()}
        settings |= {"tasks": count, "workers": workers, "logging_dir": str(attempt)}
        execute(StageTask(str(job.folder), stage, str(attempt)), settings, partial(_left, attempt, count))
        if left := _left(attempt, count):
            log(f"data: the logs of stage {stage} are in {attempt}")
            raise _failure(attempt, stage, left, count)


def _left(attempt: Path, count: int) -> int:
    """Tasks of an attempt that have not ended well so far."""
    return count - sum(1 for _ in (attempt / "completions").glob("*"))


def _failure(attempt: Path, stage: str, left: int, count: int) -> UserError:
    """The line for an attempt of which tasks are left: what the first of them said."""
    errors = sorted((attempt / "errors").glob("*"))
    lines = errors[0].read_text(encoding="utf-8").strip().splitlines() if errors else []
    said = lines[-1] if lines else f"it said nothing; its logs are in {attempt}"
    return UserError(f"{left} of {count} tasks of stage {stage} failed, the others are kept; the first one: {said}")


def _slurm(step: StageTask, settings: dict[str, Any], left: Callable[[], int]) -> None:
    """Submit an array of jobs and wait for its end."""
    executors = _datatrove("slurm")
    if missing := [name for name in ("partition", "time") if name not in settings]:
        raise UserError(f"--engine slurm needs --engine-option {missing[0]}=...")
    venv = {} if {"venv_path", "condaenv", "env_command"} & set(settings) else {"venv_path": sys.prefix}
    settings = {"mail_type": "NONE", "job_name": f"cognica-poe-{step.stage}", **venv, **settings}
    executor = _made(executors.SlurmPipelineExecutor, step, settings)
    try:
        executor.run()
    except FileNotFoundError as error:
        raise UserError(f"--engine slurm needs the command {error.filename}, which is not here") from error
    except subprocess.CalledProcessError as error:
        raise UserError(f"{error.cmd[0]} ended with exit code {error.returncode}: see what it says above") from error
    known, since = left(), time.monotonic()
    while left():
        state = _queued(executor.job_id)
        if left() != known:
            known, since = left(), time.monotonic()
        if state is False or (state is None and time.monotonic() - since > _PATIENCE):
            time.sleep(_POLL)  # what the last task wrote may take a moment to be seen
            return
        time.sleep(_POLL)


def _queued(job_id: str) -> bool | None:
    """Whether Slurm has a job waiting or running; None where that cannot be asked."""
    try:
        asked = subprocess.run(["squeue", "-h", "-j", str(job_id)], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return bool(asked.stdout.strip())


def _ray(step: StageTask, settings: dict[str, Any], left: Callable[[], int]) -> None:
    """Run all tasks on the Ray cluster that this machine belongs to, or on this machine alone."""
    executors = _datatrove("ray")
    try:
        import ray
    except ImportError as error:
        raise UserError("--engine ray needs Ray, which is not installed: pip install ray") from error
    address = settings.pop("address", None)
    if not ray.is_initialized():
        ray.init(address=address, log_to_driver=False, logging_level="error")
    executor = _made(executors.RayPipelineExecutor, step, settings)
    with contextlib.suppress(Exception):  # what a task raised stands in the attempt's folder
        executor.run()


def _made(kind: Any, step: StageTask, settings: dict[str, Any]) -> Any:
    try:
        return kind([step], **settings)
    except TypeError as error:
        raise UserError(f"--engine-option: {str(error).partition('.__init__() ')[2] or error}") from error


def _datatrove(module: str) -> Any:
    """datatrove's module of an executor, its own talk silenced."""
    try:
        import importlib

        from datatrove.utils.logging import logger

        logger.remove()
        return importlib.import_module(f"datatrove.executor.{module}")
    except ImportError as error:
        raise UserError(
            f"--engine {module} is carried by datatrove, which is not installed: pip install 'cognica-poe[cluster]'"
        ) from error


def _value(text: str) -> Any:
    """An option's text as a number where it is one."""
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return {"true": True, "false": False}.get(text.lower(), text)
