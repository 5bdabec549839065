"""Checkpoints of a training run: a folder per step that appears whole or not at all.

``checkpoints/step-N/`` holds ``model.safetensors``, ``optimizer.safetensors``, ``state.json`` and ``MANIFEST.sha256``.
Loading verifies the manifest first; a damaged step is reported and the one before it is used.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from cognica_poe.errors import UserError
from cognica_poe.files import atomic_folder, read_json, remove_partials, require_space, verify_manifest, write_bytes
from cognica_poe.files import write_json as write_json_file

_STEP = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class Checkpoint:
    """What a step folder holds."""

    step: int
    weights: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]
    state: dict[str, Any]


class CheckpointFolder:
    """The ``checkpoints`` folder of a run."""

    def __init__(self, folder: Path, log: Callable[[str], None] = lambda line: None):
        self.folder, self.log = Path(folder), log
        remove_partials(self.folder)

    def path(self, step: int) -> Path:
        """Folder of a step."""
        return self.folder / f"step-{step}"

    def steps(self) -> list[int]:
        """Steps present, in order."""
        if not self.folder.is_dir():
            return []
        matches = (_STEP.fullmatch(path.name) for path in self.folder.iterdir() if path.is_dir())
        return sorted(int(match[1]) for match in matches if match)

    def save(self, checkpoint: Checkpoint) -> None:
        """Write a step atomically. Raises UserError, leaving earlier steps alone, when the disk is full."""
        tensors = {"model": checkpoint.weights, "optimizer": checkpoint.optimizer}
        size = sum(t.numel() * t.element_size() for group in tensors.values() for t in group.values())
        require_space(self.folder, size + 2**20)
        with atomic_folder(self.path(checkpoint.step)) as folder:
            for name, group in tensors.items():
                contiguous = {key: value.detach().cpu().contiguous() for key, value in group.items()}
                write_bytes(folder / f"{name}.safetensors", save(contiguous))
            write_json_file(folder / "state.json", {"step": checkpoint.step, **checkpoint.state})

    def load(self, step: int) -> Checkpoint:
        """Read a step. Raises UserError when it is missing or differs from its manifest."""
        folder = self.path(step)
        if not folder.is_dir():
            known = ", ".join(map(str, self.steps())) or "none"
            raise UserError(f"no checkpoint of step {step} in {self.folder}; steps there: {known}")
        verify_manifest(folder)
        try:
            weights, optimizer = (load_file(folder / f"{name}.safetensors") for name in ("model", "optimizer"))
        except (SafetensorError, OSError) as error:
            raise UserError(f"checkpoint {folder} cannot be read ({error}); use another step") from error
        return Checkpoint(step, weights, optimizer, read_json(folder / "state.json", "checkpoint state"))

    def load_latest(self) -> Checkpoint | None:
        """The newest step that passes its manifest; damaged ones are reported and passed over."""
        for step in reversed(self.steps()):
            try:
                return self.load(step)
            except UserError as error:
                self.log(f"checkpoint of step {step} passed over: {error}")
        return None

    def prune(self, keep_last: int, keep: Collection[int]) -> None:
        """Delete all but the last ``keep_last`` steps and those in ``keep``."""
        for step in self.steps()[:-keep_last]:
            if step not in keep:
                shutil.rmtree(self.path(step), ignore_errors=True)
