"""The local engine: the tasks of a job in this process, or in worker processes of which one may die without a hang."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from cognica_poe.data.engine.job import Job, Log
from cognica_poe.data.engine.stages import open_job
from cognica_poe.errors import UserError
from cognica_poe.leftovers import sweep

SMALL = 16_000_000
"""Bytes of input below which starting processes takes longer than the work."""


@dataclass
class _Worker:
    """A process that waits for numbers of tasks, and the task that it is at."""

    process: BaseProcess
    pipe: Connection
    task: int | None = None


def run_locally(job: Job, workers: int, log: Log) -> None:
    """Every stage of ``job``, each after the one before it, finished tasks left as they are.

    With one worker all of it happens in this process. Raises UserError: the first of a stage in the order of its tasks
    once those under way have ended, or that a worker was killed.
    """
    with contextlib.ExitStack() as stack:
        pool: Pool | None = None
        for stage in job.stages:
            sweep(job.folder, job.folder / stage)
            count = job.count(stage)
            if workers > 1 and count > 1:
                pool = pool or stack.enter_context(started(job.folder, workers))
                kept = pool.run(stage, count, log)
            else:
                kept = sum(job.run(stage, number, log).kept for number in range(count))
            if kept:
                log(f"data: {stage}: {kept} of {count} tasks were done before")


@contextlib.contextmanager
def started(folder: Path, workers: int) -> Iterator[Pool]:
    """Worker processes for the job of ``folder``; they end with the block, at once where it raises."""
    pool = Pool(folder, workers)
    try:
        yield pool
    finally:
        pool.end()


class Pool:
    """Processes that do tasks of one job."""

    def __init__(self, folder: Path, workers: int) -> None:
        """Start ``workers`` processes; they begin with what they import while the first tasks are handed out."""
        self.folder = folder
        context = multiprocessing.get_context("spawn")  # threads of this process would not survive a fork
        self._workers: list[_Worker] = []
        for _ in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(str(folder), theirs), daemon=True)
            process.start()
            theirs.close()
            self._workers.append(_Worker(process, ours))

    def run(self, stage: str, count: int, log: Log) -> int:
        """All tasks of a stage; returns how many were done before. Raises UserError as ``run_locally`` does."""
        waiting = list(range(count))[::-1]
        errors: dict[int, BaseException] = {}
        kept = 0
        while waiting or any(worker.task is not None for worker in self._workers):
            for worker in self._workers:
                if worker.task is None and waiting and not errors:
                    worker.task = waiting.pop()
                    with contextlib.suppress(OSError):  # it is dead: its pipe says so below
                        worker.pipe.send((stage, worker.task))
            busy = [worker for worker in self._workers if worker.task is not None]
            if not busy:
                break
            for pipe in wait([worker.pipe for worker in busy]):
                worker = next(worker for worker in busy if worker.pipe is pipe)
                done, lines, error = self._hear(worker, stage)
                for line in lines:
                    log(line)
                if error is not None and worker.task is not None:
                    errors[worker.task] = error
                kept += done
                worker.task = None
        if errors:
            raise errors[min(errors)]
        return kept

    def _hear(self, worker: _Worker, stage: str) -> tuple[bool, Sequence[str], BaseException | None]:
        """What a worker says of its task: it was done before, lines of log, what it raised."""
        try:
            said: tuple[bool, Sequence[str], BaseException | None] = worker.pipe.recv()
            return said
        except (EOFError, OSError):
            worker.process.join(10)
            code = worker.process.exitcode or 0
            how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            raise UserError(
                f"the worker process at task {worker.task} of stage {stage} was {how}, perhaps for want of memory: run "
                "the same command again, with fewer --workers; finished tasks are kept"
            ) from None

    def end(self) -> None:
        """End the processes and remove what those that were at work left half-written."""
        for worker in self._workers:
            if worker.task is not None:
                worker.process.terminate()
            worker.pipe.close()
        for worker in self._workers:
            worker.process.join(10)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
        if self.folder.is_dir():
            sweep(self.folder, *(path for path in self.folder.iterdir() if path.is_dir()))


def _work(folder: str, pipe: Connection) -> None:
    """A worker: does the tasks that it is told to, until nobody is there to tell it more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that started it decides
    os.environ["OMP_NUM_THREADS"] = "1"
    job: Job | None = None
    while True:
        try:
            stage, number = pipe.recv()
        except EOFError:
            return
        lines: list[str] = []
        answer: tuple[bool, Sequence[str], Any]
        try:
            job = job or open_job(Path(folder))
            answer = job.run(stage, number, lines.append).kept, lines, None
        except Exception as error:  # whatever it is, the process that asked raises it
            answer = False, lines, error
        try:
            pipe.send(answer)
        except OSError:
            return  # nobody is there any more
        except Exception as error:  # what was raised cannot be sent
            pipe.send((False, lines, RuntimeError(f"{type(answer[2]).__name__}: {answer[2]} ({error})")))
