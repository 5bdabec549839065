"""Pretraining on one process: steps, checkpoints, metrics, exact resume.

A run's position is its step alone: rows are a function of the step, schedules are functions of the step, and nothing in
the model draws random numbers. A resumed run therefore repeats an uninterrupted one bit for bit.
"""

from __future__ import annotations

import dataclasses
import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from cognica_poe.data.rows import Rows
from cognica_poe.errors import TrainingStopped, UserError
from cognica_poe.files import write_bytes
from cognica_poe.modeling.configuration_cognica_poe import CognicaPoEConfig
from cognica_poe.modeling.modeling_cognica_poe import CognicaPoEForCausalLM
from cognica_poe.recipes import ModelRecipe, Recipe
from cognica_poe.training.checkpoint import Checkpoint, CheckpointFolder
from cognica_poe.training.memory import keep_freed_memory
from cognica_poe.training.objective import Objective
from cognica_poe.training.optimizer import MuonAdamW
from cognica_poe.training.precision import choose_compute_dtype, default_device
from cognica_poe.training.schedule import Schedule

Log = Callable[[str], None]


def build_model(recipe: ModelRecipe, seed: int = 0) -> CognicaPoEForCausalLM:
    """A freshly initialised model. Raises UserError when the shape contradicts itself."""
    try:
        config = CognicaPoEConfig(**dataclasses.asdict(recipe))
    except ValueError as error:
        raise UserError(f"recipe: {error}") from error
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CognicaPoEForCausalLM(config)


class Trainer:
    """Trains one recipe inside a run folder.

    Args:
        recipe: checked recipe.
        run: run folder.
        rows: the training rows.
        resume: continue from the newest sound checkpoint; otherwise the folder must hold none.
        log: receives lines about what happens.
        progress: receives ``(step, metrics)`` after every step.
    """

    def __init__(
        self,
        recipe: Recipe,
        run: Path,
        rows: Rows,
        *,
        resume: bool = False,
        log: Log = lambda line: None,
        progress: Callable[[int, dict[str, Any]], None] = lambda step, metrics: None,
    ):
        keep_freed_memory()
        self.recipe, self.run, self.rows = recipe, Path(run), rows
        self.log, self.progress = log, progress
        training, model = recipe.training, recipe.model
        self.device = default_device()
        self.checkpoints = CheckpointFolder(self.run / "checkpoints", log)
        found = self.checkpoints.load_latest() if resume else None
        if not resume and self.checkpoints.steps():
            raise UserError(f"{self.run} already holds checkpoints: add --resume, or choose another --out")
        self.model = build_model(model, training.seed).to(self.device).train()
        batch_tokens = training.batch_rows * model.max_position_embeddings
        self.optimizer = MuonAdamW(self.model, training.optimizer, batch_tokens)
        self.schedule = Schedule(training.schedule, training.steps)
        self.step, dtype = 0, training.compute_dtype
        if found is not None:
            dtype = self._restore(found)
        self.compute_dtype = choose_compute_dtype(dtype, self.device)
        self.objective = Objective(self.model, self.compute_dtype)
        if training.compile == "on" or (training.compile == "auto" and self.device.type == "cuda"):
            for block in self.model.transformer.h:
                block.compile()
        self.events = _Lines(self.run / "events.jsonl")
        self.metrics = _Lines(self.run / "metrics.jsonl", keep_until=self.step)
        self._stop = False

    def _restore(self, found: Checkpoint) -> str:
        """Load weights, optimiser and step; returns the compute dtype of the interrupted run."""
        if found.state["rows"] != self.rows.fingerprint:
            raise UserError(
                f"{self.run}: data, tokenizer or row seed changed since step {found.step}; start a new --out"
            )
        try:
            self.model.load_state_dict(found.weights)
            self.optimizer.load_state_dict(found.optimizer)
        except (RuntimeError, ValueError) as error:
            first = str(error).strip().splitlines()[-1].strip()
            raise UserError(f"{self.checkpoints.path(found.step)} does not fit this recipe: {first}") from error
        self.step = found.step
        self.log(f"resumed at step {self.step}")
        return found.state["compute_dtype"]

    def train(self, at_release: Callable[[int], None] = lambda step: None) -> None:
        """Run to the last step; ``at_release(step)`` is called after the checkpoint of every released step.

        Raises:
            TrainingStopped: after SIGTERM or SIGINT, once the step was saved.
            UserError: the loss became non-finite (nothing of that step is applied), or the disk is full.
        """
        training = self.recipe.training
        released = set(self.recipe.released_steps())
        previous = {sig: signal.signal(sig, self._on_signal) for sig in (signal.SIGTERM, signal.SIGINT)}
        self.events.write({"event": "resume" if self.step else "start", "step": self.step, **self._facts()})
        try:
            if self.step in released:
                self._save_and_release(at_release)
            while self.step < training.steps:
                metrics = self._train_step()
                self.metrics.write(metrics)
                self.progress(self.step, metrics)
                due = self.step % training.checkpoint_every == 0 or self.step in released
                if self._stop:
                    self._save()
                    self.events.write({"event": "stopped", "step": self.step})
                    raise TrainingStopped(self.step)
                if due:
                    self._save_and_release(at_release if self.step in released else None)
            self.events.write({"event": "end", "step": self.step})
        finally:
            for sig, handler in previous.items():
                signal.signal(sig, handler)

    def _train_step(self) -> dict[str, Any]:
        training, began = self.recipe.training, time.perf_counter()
        batch = torch.from_numpy(self.rows.batch(self.step, training.batch_rows)).to(self.device)
        micro = batch.split(training.micro_rows)
        losses = sum(self.objective.backward(rows[:, :-1], rows[:, 1:], 1 / len(micro)) for rows in micro) / len(micro)
        values = losses.tolist()
        if not all(value == value and abs(value) != float("inf") for value in values):
            self.events.write({"event": "non-finite loss", "step": self.step})
            raise UserError(
                f"the loss is not finite at step {self.step}: nothing of this step was applied; "
                "lower the learning rates and --resume from the last checkpoint"
            )
        lr_scale = self.schedule.lr_scale(self.step)
        self.optimizer.step(
            lr_scale, self.schedule.muon_momentum(self.step), self.schedule.weight_decay_scale(self.step)
        )
        self.optimizer.zero_grad()
        self.step += 1
        tokens = training.batch_rows * self.recipe.model.max_position_embeddings
        return {
            "step": self.step,
            "loss": sum(values) / len(values),
            "loss_stages": values,
            "lr_scale": lr_scale,
            "tokens": tokens * self.step,
            "tokens_per_second": tokens / (time.perf_counter() - began),
        }

    def _save_and_release(self, at_release: Callable[[int], None] | None) -> None:
        self._save()
        if at_release is not None:
            self.model.eval()
            at_release(self.step)
            self.model.train()

    def _save(self) -> None:
        state = {"rows": self.rows.fingerprint, "compute_dtype": str(self.compute_dtype).removeprefix("torch.")}
        weights, optimizer = self.model.state_dict(), self.optimizer.state_dict()
        self.checkpoints.save(Checkpoint(self.step, weights, optimizer, state))
        self.checkpoints.prune(self.recipe.training.keep_checkpoints, self.recipe.released_steps())

    def _on_signal(self, number: int, frame: Any) -> None:
        self._stop = True

    def _facts(self) -> dict[str, Any]:
        return {
            "device": str(self.device),
            "threads": torch.get_num_threads(),
            "compute_dtype": str(self.compute_dtype).removeprefix("torch."),
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "torch": torch.__version__,
        }


class _Lines:
    """A .jsonl file, one flushed line per record; on resume, lines of steps that will be repeated are dropped."""

    def __init__(self, path: Path, keep_until: int | None = None):
        self.path = path
        if keep_until is not None and path.is_file():
            kept = []
            for line in path.read_bytes().splitlines():
                try:
                    if json.loads(line)["step"] <= keep_until:
                        kept.append(line + b"\n")
                except (ValueError, KeyError, TypeError):
                    continue  # the line that a kill cut off
            write_bytes(path, b"".join(kept))

    def write(self, record: dict[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
