"""Checkpoints of a training run: a folder per step that appears whole or not at all.

``checkpoints/step-N/`` holds ``state.json``, ``MANIFEST.sha256`` and, from one process, ``model.safetensors`` and
``optimizer.safetensors``. Several ranks write one file each, ``model-00002-of-00004.safetensors``: a tensor is what the
files hold under its name, joined along the first dimension in file order. That is all a reader needs to know, so that
any number of processes loads what any other number wrote. Loading verifies the manifest first; a damaged step is
reported and the one before it is used.

torch's DCP is not used: its metadata and its non-tensor parts are pickles, and it loads a flipped bit without a word.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from cognica_poe.errors import UserError
from cognica_poe.files import (
    MANIFEST,
    Manifest,
    atomic_folder,
    read_json,
    require_space,
    sha256_file,
    verify_manifest,
    write_bytes,
)
from cognica_poe.files import write_json as write_json_file
from cognica_poe.leftovers import partial_folder, sweep
from cognica_poe.training.parallel.ranks import Ranks

_STEP = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class Checkpoint:
    """What a step folder holds; on saving, each rank passes its own pieces of the tensors."""

    step: int
    weights: Mapping[str, torch.Tensor]
    optimizer: Mapping[str, torch.Tensor]
    state: dict[str, Any]
    made_from: Mapping[str, str] = field(default_factory=dict)
    """sha256 of recipe, data and tokenizer; it stands in the manifest."""


class Pieces(Mapping[str, torch.Tensor]):
    """Tensors of a part of a checkpoint by name, each read and joined when it is asked for.

    Raises UserError when a file is missing or is no safetensors file.
    """

    def __init__(self, folder: Path, part: str):
        files = [folder / f"{part}.safetensors"]
        if not files[0].is_file():
            files = sorted(folder.glob(f"{part}-*-of-*.safetensors"))
        if not files:
            raise UserError(f"checkpoint {folder} holds no {part}.safetensors; use another step")
        self._holders: dict[str, list[Any]] = {}
        for file in files:
            try:
                opened: Any = safe_open(file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise UserError(f"checkpoint file {file} cannot be read ({error}); use another step") from error
            for name in opened.keys():  # noqa: SIM118 - not a mapping
                self._holders.setdefault(name, []).append(opened)

    def __getitem__(self, name: str) -> torch.Tensor:
        pieces = [file.get_tensor(name) for file in self._holders[name]]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def __iter__(self) -> Iterator[str]:
        return iter(self._holders)

    def __len__(self) -> int:
        return len(self._holders)


class CheckpointFolder:
    """The ``checkpoints`` folder of a run, on a file system that all ranks share.

    With several ranks ``save``, ``load_latest`` and ``prune`` are collective.
    """

    def __init__(self, folder: Path, log: Callable[[str], None] = lambda line: None, ranks: Ranks | None = None):
        self.folder, self.log, self.ranks = Path(folder), log, ranks or Ranks()
        self._writer: threading.Thread | None = None
        self._failure: BaseException | None = None

    def recover(self) -> None:
        """Remove what a killed run left half-written."""
        self.ranks.on_first(lambda: sweep(self.folder))

    def path(self, step: int) -> Path:
        """Folder of a step."""
        return self.folder / f"step-{step}"

    def steps(self) -> list[int]:
        """Steps present, in order."""
        if not self.folder.is_dir():
            return []
        matches = (_STEP.fullmatch(path.name) for path in self.folder.iterdir() if path.is_dir())
        return sorted(int(match[1]) for match in matches if match)

    def save(self, checkpoint: Checkpoint, background: Ranks | None = None) -> None:
        """Write a step atomically: no rank returns before all of it is on disk under its final name.

        With ``background`` (``Ranks.in_background()``) the tensors are copied and written while training goes on; an
        earlier step is waited for. Raises UserError on every rank, leaving earlier steps alone, when the disk of any
        rank is full; while training goes on, the next ``save`` or ``wait`` raises it.
        """
        self.wait()
        if background is None:
            self._save(checkpoint, self.ranks)
            return
        weights, optimizer = (
            {name: tensor.detach().to("cpu", copy=True) for name, tensor in part.items()}
            for part in (checkpoint.weights, checkpoint.optimizer)
        )
        snapshot = replace(checkpoint, weights=weights, optimizer=optimizer)
        self._writer = threading.Thread(target=self._save_beside, args=(snapshot, background), name="checkpoint")
        self._writer.start()

    def wait(self) -> None:
        """Until nothing is being written; raises what went wrong in a save beside the training."""
        if self._writer is not None:
            self._writer.join()
        self._writer, failure, self._failure = None, self._failure, None
        if failure is not None:
            raise failure

    def _save_beside(self, checkpoint: Checkpoint, ranks: Ranks) -> None:
        try:
            self._save(checkpoint, ranks)
        except BaseException as error:  # handed over to the thread that trains
            self._failure = error

    def _save(self, checkpoint: Checkpoint, ranks: Ranks) -> None:
        path = self.path(checkpoint.step)
        groups = {"model": checkpoint.weights, "optimizer": checkpoint.optimizer}
        sizes = ranks.on_all(lambda: sum(t.nbytes for group in groups.values() for t in group.values()))
        ranks.on_first(lambda: require_space(self.folder, sum(sizes) + 2**20))
        with contextlib.ExitStack() as stack:
            opened = atomic_folder(path, "checkpoint", trusted=True)  # a damaged step is trained and written again
            partial = ranks.on_first(lambda: stack.enter_context(opened))
            digests = ranks.on_all(lambda: {part: self._write(partial, part, groups[part]) for part in groups})
            lines = dict(line for written in digests for line in written.values())

            def finish() -> None:
                write_json_file(partial / "state.json", {"step": checkpoint.step, **checkpoint.state})
                lines["state.json"] = sha256_file(partial / "state.json")
                write_bytes(partial / MANIFEST, Manifest("checkpoint", lines, checkpoint.made_from).data())
                stack.close()

            ranks.on_first(finish)

    def _write(self, partial: Path, part: str, tensors: Mapping[str, torch.Tensor]) -> tuple[str, str]:
        """Write this rank's file of a part; returns its name and sha256."""
        ranks = self.ranks
        name = f"{part}.safetensors" if ranks.world == 1 else f"{part}-{ranks.rank:05}-of-{ranks.world:05}.safetensors"
        data = save({key: value.detach().cpu().contiguous() for key, value in tensors.items()})
        write_bytes(partial / name, data)
        return name, hashlib.sha256(data).hexdigest()

    def load(self, step: int) -> Checkpoint:
        """Open a step. Raises UserError when it is missing or differs from its manifest."""
        self._verify(step)
        return self._open(step)

    def take_up(self, resume: bool) -> Checkpoint | None:
        """The newest sound checkpoint of a run that is resumed, None for a new one.

        Raises UserError when no checkpoint is sound, or a new run finds some.
        """
        self.recover()
        found = self.load_latest() if resume else None
        if found is None and self.ranks.on_first(self.steps):
            run = self.folder.parent
            if resume:
                raise UserError(f"{run}: no checkpoint is sound; restore one, or choose another --out")
            raise UserError(f"{run} already holds checkpoints: add --resume, or choose another --out")
        return found

    def load_latest(self, at_most: int | None = None) -> Checkpoint | None:
        """The newest step (of at most ``at_most``) that passes its manifest; damaged ones are reported, passed over."""
        step = self.ranks.on_first(lambda: self._latest_sound(at_most))
        return None if step is None else self._open(step)

    def _verify(self, step: int) -> None:
        folder = self.path(step)
        if not folder.is_dir():
            known = ", ".join(map(str, self.steps())) or "none"
            raise UserError(f"no checkpoint of step {step} in {self.folder}; steps there: {known}")
        verify_manifest(folder)

    def _latest_sound(self, at_most: int | None) -> int | None:
        for step in reversed(self.steps()):
            if at_most is not None and step > at_most:
                continue
            try:
                self._verify(step)
                self._open(step)
                return step
            except UserError as error:
                self.log(f"checkpoint of step {step} passed over: {error}")
        return None

    def _open(self, step: int) -> Checkpoint:
        folder = self.path(step)
        weights, optimizer = Pieces(folder, "model"), Pieces(folder, "optimizer")
        state = read_json(folder / "state.json", "checkpoint state")
        return Checkpoint(step, weights, optimizer, state, Manifest.read(folder).made_from)

    def prune(self, keep_last: int, keep: Collection[int]) -> None:
        """Delete all but the last ``keep_last`` steps and those in ``keep``."""
        self.delete(step for step in self.steps()[:-keep_last] if step not in keep)

    def delete(self, steps: Iterable[int]) -> None:
        """Delete steps."""
        if self.ranks.is_first:
            for step in steps:
                with partial_folder(self.folder / f"doomed-{step}") as doomed:
                    os.replace(self.path(step), doomed / "doomed")  # a kill leaves no step with files missing
