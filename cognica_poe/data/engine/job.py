"""A job: stages of idempotent tasks in a folder, each output with a sidecar that names what it was made from.

A task reads files and writes files, and belongs to no process: whoever runs it, on any machine that sees the folder,
gets the same bytes. Its sidecar, written last by a rename, holds stage, code version, parameters, the digests of its
inputs and of its outputs, and what it counted. A task whose sidecar says all that of what stands there is kept, any
other is done again; who reads an output compares it with its sidecar first.

    FOLDER/plan.json                      what the job is to do, sealed
    FOLDER/STAGE/00007.parquet, .npz      outputs of task 7 of a stage
    FOLDER/STAGE/00007.json               its sidecar, sealed
"""

from __future__ import annotations

import contextlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, ClassVar

from cognica_poe.errors import UserError
from cognica_poe.files import disk_errors, sha256_file
from cognica_poe.leftovers import partial_file
from cognica_poe.seals import content_sha256, read_sealed, require_sha256, sealed

PLAN = "plan.json"
Log = Callable[[str], None]
Values = dict[str, Any]
"""JSON values."""


@dataclass(frozen=True)
class Made:
    """What a sidecar says of a finished task."""

    stage: str
    number: int
    version: int
    parameters: Values
    inputs: Mapping[str, str]
    """Hex sha256 of what was read: for a task of another stage that of its sidecar's outputs, for a file its own."""
    outputs: Mapping[str, str]
    """Hex sha256 by the ending of the file's name."""
    counts: Values
    kept: bool = False
    """It was done before."""

    @property
    def sha256(self) -> str:
        """One digest of all outputs."""
        return content_sha256(dict(self.outputs))


class Outputs:
    """The files that a task is writing, one after the other."""

    def __init__(self, folder: Path, number: int, endings: Sequence[str]) -> None:
        """``endings`` of the names that the stage's files have."""
        self._folder, self._number, self._endings = folder, number, endings
        self.digests: dict[str, str] = {}

    @contextlib.contextmanager
    def write(self, ending: str) -> Iterator[IO[bytes]]:
        """Yield a file that gets its name once the block ends. It is not synced: who reads it compares its digest."""
        if ending not in self._endings or ending in self.digests:
            raise ValueError(f"{ending} is no output that is left to write")
        with partial_file(self._folder) as (file, partial):
            yield file
            file.flush()
            self.digests[ending] = sha256_file(partial)
            os.chmod(partial, 0o644)
            os.replace(partial, self._folder / f"{self._number:05d}{ending}")


class Stage(ABC):
    """One step of a job: a number of tasks that do not need each other."""

    name: ClassVar[str]
    version: ClassVar[int] = 1
    """Of the code: raised whenever the same inputs give other outputs."""
    endings: ClassVar[tuple[str, ...]]
    """Of the names of a task's files."""

    @abstractmethod
    def count(self, job: Job) -> int:
        """Number of tasks; those of earlier stages may have to be finished to know it."""

    def parameters(self, job: Job, number: int) -> Values:
        """Everything beside the inputs that decides what a task writes."""
        return {}

    def needs(self, job: Job, number: int) -> Iterable[tuple[str, int]]:
        """(stage, number) of the tasks whose outputs it reads."""
        return ()

    def is_current(self, job: Job, made: Made) -> bool:
        """Whether the files from outside that a finished task read are still those."""
        return True

    @abstractmethod
    def work(self, job: Job, number: int, out: Outputs) -> Values:
        """Write the outputs; returns the counts for the sidecar. What was read from outside goes under ``files``."""


class Job:
    """A folder of stages with its plan."""

    def __init__(self, folder: Path, stages: Sequence[Stage], plan: Values) -> None:
        """``stages`` in their order; ``plan`` as JSON gives it back."""
        self.folder, self.plan = Path(folder), plan
        self.stages = {stage.name: stage for stage in stages}
        self._known: dict[tuple[str, int], Made] = {}

    def file(self, stage: str, number: int, ending: str) -> Path:
        """Where an output, or with ``.json`` the sidecar, of a task stands."""
        return self.folder / stage / f"{number:05d}{ending}"

    def count(self, stage: str) -> int:
        """Number of tasks of a stage."""
        return self.stages[stage].count(self)

    def made(self, stage: str, number: int) -> Made:
        """What a finished task says of itself. Raises UserError where it is not finished or its sidecar damaged."""
        if (stage, number) not in self._known:
            file = self.file(stage, number, ".json")
            if not file.is_file():
                raise UserError(f"task {number} of stage {stage} is not done ({file} is missing): run that stage first")
            said = read_sealed(file, "sidecar", _REMEDY)
            try:
                self._known[stage, number] = Made(**said)
            except TypeError as error:
                raise UserError(f"sidecar {file} is of another version of this package; {_REMEDY}") from error
        return self._known[stage, number]

    def all_made(self, stage: str) -> list[Made]:
        """What every task of a stage says of itself."""
        return [self.made(stage, number) for number in range(self.count(stage))]

    def output(self, stage: str, number: int, ending: str) -> Path:
        """A file of a finished task, compared with its sidecar. Raises UserError naming it where it differs."""
        file = self.file(stage, number, ending)
        require_sha256(file, self.made(stage, number).outputs[ending], "file of a build", _REMEDY)
        return file

    def run(self, stage: str, number: int, log: Log = lambda line: None) -> Made:
        """Do a task unless it is done; a kept one has ``kept``. Raises UserError for inputs that are not there."""
        step = self.stages[stage]
        wanted = {"version": step.version, "parameters": _as_json(step.parameters(self, number))}
        needed = {f"{name} {of:05d}": self.made(name, of).sha256 for name, of in step.needs(self, number)}
        if found := self._finished(step, number, {**wanted, "inputs": needed}, log):
            return found
        folder = self.folder / stage
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._known.pop((stage, number), None)
            self.file(stage, number, ".json").unlink(missing_ok=True)
            out = Outputs(folder, number, step.endings)
            counts = step.work(self, number, out)
            if missing := set(step.endings) - set(out.digests):
                raise ValueError(f"stage {stage} left out {sorted(missing)}")
            said = {"stage": stage, "number": number, **wanted, "inputs": needed}
            _write(self.file(stage, number, ".json"), {**said, "outputs": out.digests, "counts": counts})
        return self.made(stage, number)

    def _finished(self, step: Stage, number: int, wanted: Values, log: Log) -> Made | None:
        """The task as it was done before, from the same by the same code, with all its files as they were written."""
        if not self.file(step.name, number, ".json").is_file():
            return None
        try:
            self._known.pop((step.name, number), None)
            made = self.made(step.name, number)
            if {key: getattr(made, key) for key in wanted} != wanted or not step.is_current(self, made):
                return None
            for ending in step.endings:
                self.output(step.name, number, ending)
        except UserError as error:
            log(f"data: {str(error).partition(';')[0]}; it is made again")
            return None
        return Made(**{**vars(made), "kept": True})


_REMEDY = "run the same command again: what is not as it was is made again"


def write_plan(folder: Path, plan: Values) -> None:
    """Write the plan of a job."""
    with disk_errors(folder):
        Path(folder).mkdir(parents=True, exist_ok=True)
        _write(Path(folder) / PLAN, plan)


def read_plan(folder: Path) -> Values:
    """The plan of a job's folder. Raises UserError where there is none, or it was changed."""
    file = Path(folder) / PLAN
    if not file.is_file():
        raise UserError(f"{folder} holds no {PLAN}: no stages were planned there")
    return read_sealed(file, "plan", "run the command that made it again")


def _write(file: Path, value: Values) -> None:
    """Sealed JSON by a rename. It is not synced: what a power cut leaves of it has no sound seal, and is made again."""
    with partial_file(file.parent) as (opened, partial):
        opened.write((json.dumps(sealed(value), indent=1) + "\n").encode())
        opened.flush()
        os.chmod(partial, 0o644)
        os.replace(partial, file)


def _as_json(value: Values) -> Values:
    found: Values = json.loads(json.dumps(value))
    return found
