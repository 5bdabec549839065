"""Pretraining on one process or many: steps, checkpoints, metrics, exact resume.

A run's position is its step alone: rows are a function of the step, schedules are functions of the step, and nothing in
the model draws random numbers. A resumed run therefore repeats an uninterrupted one bit for bit on as many ranks as
before, and within rounding on any other number: every step reads the same rows, of which each rank takes its slice.
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
from cognica_poe.training.collectives import Ranks
from cognica_poe.training.distributed import DistMuonAdamW, DistributedRecipe
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


def _rows_of_a_rank(recipe: Recipe, world: int) -> int:
    """Rows of a step on one rank. Raises UserError unless every rank gets as many whole micro-batches."""
    training = recipe.training
    if training.batch_rows % (training.micro_rows * world):
        raise UserError(
            f"recipe {recipe.name}: training.batch-rows {training.batch_rows} cannot be shared by {world} ranks in "
            f"micro-batches of {training.micro_rows} rows; change --training.micro-rows or the number of ranks"
        )
    return training.batch_rows // world


class Trainer:
    """Trains one recipe inside a run folder.

    Args:
        recipe: checked recipe.
        run: run folder.
        rows: the training rows.
        resume: continue from the newest sound checkpoint; otherwise the folder must hold none. Workers that torchrun
            has restarted always resume.
        log: receives lines about what happens, on the first rank.
        progress: receives ``(step, metrics)`` after every step, on the first rank.
        ranks: this process among those of the run; all of them share the run folder.
        distributed: how several ranks share a step.
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
        ranks: Ranks | None = None,
        distributed: DistributedRecipe | None = None,
    ):
        keep_freed_memory()
        self.recipe, self.run, self.rows, self.ranks = recipe, Path(run), rows, ranks or Ranks()
        self.log: Log = log if self.ranks.is_first else lambda line: None
        self.progress = progress
        training, model = recipe.training, recipe.model
        self.rank_rows = _rows_of_a_rank(recipe, self.ranks.world)
        self.device = default_device()
        self.checkpoints = CheckpointFolder(self.run / "checkpoints", self.log, self.ranks)
        self.checkpoints.recover()
        found = self.checkpoints.load_latest() if resume or self.ranks.restarts else None
        if found is None and self.ranks.first(self.checkpoints.steps):
            if resume or self.ranks.restarts:
                raise UserError(f"{self.run}: no checkpoint is sound; restore one, or choose another --out")
            raise UserError(f"{self.run} already holds checkpoints: add --resume, or choose another --out")
        self.model = build_model(model, training.seed).to(self.device).train()
        dtype = found.state["compute_dtype"] if found else training.compute_dtype
        self.compute_dtype = self.ranks.first(lambda: choose_compute_dtype(dtype, self.device))
        self.objective = Objective(self.model, self.compute_dtype)
        if training.compile == "on" or (training.compile == "auto" and self.device.type == "cuda"):
            for block in self.model.transformer.h:
                block.compile()
        self.optimizer = self._optimizer(distributed or DistributedRecipe())
        self.schedule = Schedule(training.schedule, training.steps)
        self.step = 0
        if found is not None:
            self._restore(found)
        self.events = _Lines(self.run / "events.jsonl", self.ranks.is_first)
        self.metrics = _Lines(self.run / "metrics.jsonl", self.ranks.is_first, keep_until=self.step)
        self._stop = False

    def _optimizer(self, distributed: DistributedRecipe) -> MuonAdamW:
        training = self.recipe.training
        batch_tokens = training.batch_rows * self.recipe.model.max_position_embeddings
        if self.ranks.world == 1:
            return MuonAdamW(self.model, training.optimizer, batch_tokens)
        if distributed.replica_dtype == "auto":
            replicas = "bfloat16" if self.compute_dtype == torch.bfloat16 else "float32"
            distributed = dataclasses.replace(distributed, replica_dtype=replicas)
        sections = self.objective.sections()
        return DistMuonAdamW(self.model, training.optimizer, batch_tokens, self.ranks, distributed, sections)

    def _restore(self, found: Checkpoint) -> None:
        """Load weights, optimiser and step."""
        if found.state["rows"] != self.rows.fingerprint:
            raise UserError(
                f"{self.run}: data, tokenizer or row seed changed since step {found.step}; start a new --out"
            )
        try:
            if isinstance(self.optimizer, DistMuonAdamW):
                self.optimizer.load_weights(found.weights)
            else:
                self.model.load_state_dict(dict(found.weights))
            self.optimizer.load_state_dict(found.optimizer)
        except (RuntimeError, ValueError) as error:
            first = str(error).strip().splitlines()[-1].strip()
            raise UserError(f"{self.checkpoints.path(found.step)} does not fit this recipe: {first}") from error
        self.step = found.step
        self.log(f"resumed at step {self.step}")

    def train(self, at_release: Callable[[int], None] = lambda step: None) -> None:
        """Run to the last step; the first rank calls ``at_release(step)`` after the checkpoint of every released step.

        Raises:
            TrainingStopped: after SIGTERM or SIGINT on any rank, once the step was saved; on every rank.
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
                if self.ranks.is_first:
                    self.progress(self.step, metrics)
                due = self.step % training.checkpoint_every == 0 or self.step in released
                if self.ranks.any([self._stop])[0]:
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
        batch = self.rows.batch(self.step, training.batch_rows)
        first = self.ranks.rank * self.rank_rows
        micro = torch.from_numpy(batch[first : first + self.rank_rows]).to(self.device).split(training.micro_rows)
        losses, scale = 0.0, 1 / (len(micro) * self.ranks.world)
        for i, rows in enumerate(micro):
            with self.optimizer.micro_batch(last=i == len(micro) - 1):
                losses = losses + self.objective.backward(rows[:, :-1], rows[:, 1:], scale)
        values = self.ranks.mean(losses / len(micro)).tolist()
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
            self.ranks.first(lambda: at_release(self.step))
            self.model.train()

    def _save(self) -> None:
        dtype = str(self.compute_dtype).removeprefix("torch.")
        state = {"rows": self.rows.fingerprint, "compute_dtype": dtype, "ranks": self.ranks.world}
        sharded = isinstance(self.optimizer, DistMuonAdamW)
        weights = self.optimizer.weights() if sharded else self.model.state_dict()
        self.checkpoints.save(Checkpoint(self.step, weights, self.optimizer.state_dict(), state))
        self.checkpoints.prune(self.recipe.training.keep_checkpoints, self.recipe.released_steps())

    def _on_signal(self, number: int, frame: Any) -> None:
        self._stop = True

    def _facts(self) -> dict[str, Any]:
        return {
            "device": str(self.device),
            "ranks": self.ranks.world,
            "restarts": self.ranks.restarts,
            "threads": torch.get_num_threads(),
            "compute_dtype": str(self.compute_dtype).removeprefix("torch."),
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "torch": torch.__version__,
        }


class _Lines:
    """A .jsonl file, one flushed line per record; on resume, lines of steps that will be repeated are dropped."""

    def __init__(self, path: Path, writes: bool, keep_until: int | None = None):
        self.path, self.writes = path, writes
        if writes and keep_until is not None and path.is_file():
            kept = []
            for line in path.read_bytes().splitlines():
                try:
                    if json.loads(line)["step"] <= keep_until:
                        kept.append(line + b"\n")
                except (ValueError, KeyError, TypeError):
                    continue  # the line that a kill cut off
            write_bytes(path, b"".join(kept))

    def write(self, record: dict[str, Any]) -> None:
        if not self.writes:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
