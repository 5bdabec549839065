"""Pretraining on one process or many: steps, checkpoints, metrics, exact resume.

A run's position is its step alone: rows are a function of the step, schedules are functions of the step, and nothing in
the model draws random numbers. A resumed run therefore repeats an uninterrupted one bit for bit on as many ranks as
before, and within rounding on any other number: every step reads the same rows, of which each rank takes its slice.
"""

from __future__ import annotations

import dataclasses
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cognica_poe.data.rows.reader import Rows
from cognica_poe.errors import TrainingStopped, UserError
from cognica_poe.modeling.configuration_cognica_poe import CognicaPoEConfig
from cognica_poe.modeling.modeling_cognica_poe import CognicaPoEForCausalLM
from cognica_poe.recipe.fields import ModelRecipe, RanksRecipe, Recipe
from cognica_poe.training.checkpoint import Checkpoint, CheckpointFolder
from cognica_poe.training.guard import LateRead, SpikePolicy, StepGuard, find_divergence, hash_parameters
from cognica_poe.training.journal import Journal
from cognica_poe.training.memory import keep_freed_memory
from cognica_poe.training.objective import Objective
from cognica_poe.training.optim.optimizer import MuonAdamW
from cognica_poe.training.optim.schedule import Schedule
from cognica_poe.training.parallel.ranks import Ranks
from cognica_poe.training.parallel.stages import StageParallelMuonAdamW, StageParallelObjective
from cognica_poe.training.parallel.zero2 import DistMuonAdamW
from cognica_poe.training.precision import choose_compute_dtype, default_device

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


@dataclass(frozen=True)
class _Unread:
    """A step whose figures are on their way to the host."""

    step: int
    began: float
    losses: torch.Tensor
    figures: LateRead


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
    ):
        keep_freed_memory()
        self.recipe, self.run, self.rows, self.ranks = recipe, Path(run), rows, ranks or Ranks()
        self.log: Log = log if self.ranks.is_first else lambda line: None
        self.progress = progress
        training, model = recipe.training, recipe.model
        distributed = training.ranks
        self.by_stages = distributed.parallel == "stages" and self.ranks.world > 1
        self.shares = 1 if self.by_stages else self.ranks.world  # into how many parts the rows of a step are split
        self.rank_rows = _rows_of_a_rank(recipe, self.shares)
        self.device = default_device()
        self.events = Journal(self.run / "events.jsonl", self.ranks.is_first)
        self.checkpoints = CheckpointFolder(self.run / "checkpoints", self._on_damage, self.ranks)
        self.checkpoints.recover()
        found = self.checkpoints.load_latest() if resume or self.ranks.restarts else None
        if found is None and self.ranks.on_first(self.checkpoints.steps):
            if resume or self.ranks.restarts:
                raise UserError(f"{self.run}: no checkpoint is sound; restore one, or choose another --out")
            raise UserError(f"{self.run} already holds checkpoints: add --resume, or choose another --out")
        self.model = build_model(model, training.seed).to(self.device).train()
        if training.attention == "flex_attention" and self.device.type != "cuda":
            raise UserError(f"recipe {recipe.name}: training.attention flex_attention trains on CUDA alone; use sdpa")
        self.model.set_attn_implementation(training.attention)
        dtype = found.state["compute_dtype"] if found else training.compute_dtype
        self.compute_dtype = self.ranks.on_first(lambda: choose_compute_dtype(dtype, self.device))
        if self.by_stages:
            self.objective = StageParallelObjective(self.model, self.compute_dtype, self.ranks, training.recompute)
        else:
            self.objective = Objective(self.model, self.compute_dtype, training.recompute)
        if training.compile == "on" or (training.compile == "auto" and self.device.type == "cuda"):
            for block in self.model.transformer.h:
                block.compile()
        self.optimizer = self._optimizer(distributed)
        self.schedule = Schedule(training.schedule, training.steps)
        self.faults = training.guard
        self.guard = StepGuard(self.faults, self.ranks.mean, self.ranks.world, self.device)
        self.policy = SpikePolicy(self.faults)
        self.step = 0
        if found is not None:
            self._restore(found)
        self.metrics = Journal(self.run / "metrics.jsonl", self.ranks.is_first, keep_until=self.step)
        self._stop = False
        self._unread: list[_Unread] = []
        self._last_read = 0.0
        # CUDA trains on while the host reads and writes; where the host itself trains, nothing is won by it.
        on_cuda = self.device.type == "cuda"
        self.saves_apart = self.ranks.in_background() if on_cuda else None
        self.lateness = 1 if on_cuda else 0  # steps under way while the host reads an earlier one

    def _optimizer(self, distributed: RanksRecipe) -> MuonAdamW:
        training = self.recipe.training
        batch_tokens = training.batch_rows * self.recipe.model.max_position_embeddings
        if self.ranks.world == 1:
            return MuonAdamW(self.model, training.optimizer, batch_tokens)
        if self.by_stages:
            return StageParallelMuonAdamW(self.objective, training.optimizer, batch_tokens)
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
            if isinstance(self.optimizer, DistMuonAdamW | StageParallelMuonAdamW):
                self.optimizer.load_weights(found.weights)
            else:
                self.model.load_state_dict(dict(found.weights))
            self.optimizer.load_state_dict(found.optimizer)
            if "guard" in found.state:
                self.guard.restore(found.state["guard"])
                self.policy.restore(found.state["policy"])
        except (RuntimeError, ValueError) as error:
            first = str(error).strip().splitlines()[-1].strip()
            raise UserError(f"{self.checkpoints.path(found.step)} does not fit this recipe: {first}") from error
        self.step = found.step
        self.log(f"resumed at step {self.step}")

    def train(self, at_release: Callable[[int], None] = lambda step: None) -> None:
        """Run to the last step; the first rank calls ``at_release(step)`` after the checkpoint of every released step.

        Raises:
            TrainingStopped: after SIGTERM or SIGINT on any rank, once the step was saved; on every rank.
            UserError: loss or gradient stayed non-finite or spikes came back (no such step is applied), the weights of
                the ranks came to differ, or the disk is full.
        """
        training = self.recipe.training
        released = set(self.recipe.released_steps())
        previous = {sig: signal.signal(sig, self._on_signal) for sig in (signal.SIGTERM, signal.SIGINT)}
        self.events.write({"event": "resume" if self.step else "start", "step": self.step, **self._facts()})
        try:
            if self.step in released:
                self._save_and_release(at_release)
            while self.step < training.steps:
                self._train_step()
                went_on = self._read(self.lateness)
                due = self.step % training.checkpoint_every == 0 or self.step in released
                stop = self.ranks.any([self._stop])[0]
                if not (went_on and (not (due or stop) or self._read(0))):
                    continue  # rolled back
                if due or stop or (self.faults.compare_ranks_every and not self.step % self.faults.compare_ranks_every):
                    self._compare_ranks()
                if stop:
                    self._save()
                    self.checkpoints.wait()
                    self.events.write({"event": "stopped", "step": self.step})
                    raise TrainingStopped(self.step)
                if due:
                    self._save_and_release(at_release if self.step in released else None)
            self.checkpoints.wait()
            self.events.write({"event": "end", "step": self.step})
        finally:
            for sig, handler in previous.items():
                signal.signal(sig, handler)

    def _train_step(self) -> None:
        """Launch a step; its figures wait in ``_unread``. Steps that a roll-back passes over are only counted."""
        training, began = self.recipe.training, time.perf_counter()
        if self.policy.passes_over(self.step):
            self.step += 1
            return
        batch = self.rows.batch(self.step, training.batch_rows)
        first = 0 if self.by_stages else self.ranks.rank * self.rank_rows
        micro = torch.from_numpy(batch[first : first + self.rank_rows]).to(self.device).split(training.micro_rows)
        losses, scale = 0.0, 1 / (len(micro) * self.shares)
        for i, rows in enumerate(micro):
            with self.optimizer.micro_batch(last=i == len(micro) - 1):
                losses = losses + self.objective.backward(rows[:, :-1], rows[:, 1:], scale)
        losses = losses / len(micro)
        keep = self.guard.check(losses.mean(), self.optimizer.gradients())
        schedule = self.schedule
        rates = schedule.lr_scale(self.step), schedule.muon_momentum(self.step), schedule.weight_decay_scale(self.step)
        if self.device.type == "cuda":
            self.optimizer.step(*rates, keep=keep)
        elif keep:  # reading costs nothing here, selecting would
            self.optimizer.step(*rates)
        self.optimizer.zero_grad()
        self._unread.append(
            _Unread(self.step, began, self._to_host(self.ranks.mean(losses)), self.guard.figures(self.step))
        )
        self.step += 1

    def _to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy under way; complete once figures asked for later have arrived."""
        host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        return host.copy_(tensor, non_blocking=True)

    def _read(self, late: int) -> bool:
        """Take in the figures of all but the last ``late`` steps. False when that led back to a checkpoint."""
        while len(self._unread) > late:
            unread = self._unread.pop(0)
            figures = unread.figures.read()
            first = (*self.policy.left_out, figures.step)[0]
            decision = self.policy.observe(figures)
            if decision.action == "go":
                self._record(unread, figures.gradient_norm)
                continue
            self.log(
                f"step {figures.step} left out ({figures.verdict}): loss {figures.loss:.4g}, "
                f"gradient norm {figures.gradient_norm:.4g}"
            )
            if decision.action == "left_out":
                self.events.write(decision.event)
                continue
            self.checkpoints.wait()
            found = self.checkpoints.load_latest(decision.before) if decision.action == "roll_back" else None
            if found is None:
                self._give_up(first, figures.verdict)
            self.events.write({**decision.event, "to": found.step})
            self._roll_back(found)
            return False
        return True

    def _record(self, unread: _Unread, gradient_norm: float) -> None:
        now, values = time.perf_counter(), unread.losses.tolist()
        tokens = self.recipe.training.batch_rows * self.recipe.model.max_position_embeddings
        metrics = {
            "step": unread.step + 1,
            "loss": sum(values) / len(values),
            "loss_stages": values,
            "gradient_norm": gradient_norm,
            "lr_scale": self.schedule.lr_scale(unread.step),
            "tokens": tokens * (unread.step + 1),
            "tokens_per_second": tokens / (now - max(unread.began, self._last_read)),
        }
        self._last_read = now
        self.metrics.write(metrics)
        if self.ranks.is_first:
            self.progress(unread.step + 1, metrics)

    def _give_up(self, first: int, verdict: str) -> None:
        if verdict == "non-finite":
            self.events.write({"event": "non-finite loss", "step": first})
            raise UserError(
                f"loss or gradient is not finite at step {first}: nothing since was applied, and no checkpoint helps; "
                "lower the learning rates and --resume from the last checkpoint"
            )
        self.events.write({"event": "stop after repeated spikes", "step": first})
        raise UserError(
            f"loss or gradient norm spikes at step {first}, after {len(self.policy.ranges)} roll-backs; "
            "lower the learning rates and --resume from the last checkpoint"
        )

    def _roll_back(self, found: Checkpoint) -> None:
        """Go on from an earlier checkpoint; what was trained since is forgotten."""
        self._unread.clear()
        self.optimizer.zero_grad()
        self._restore(found)
        self.metrics.drop_after(self.step)
        self.checkpoints.delete(step for step in self.checkpoints.steps() if step > self.step)

    def _compare_ranks(self) -> None:
        """Raises UserError when the replicas of the weights are not the same on all ranks, bit for bit."""
        if self.ranks.world == 1:
            return
        held = self.objective.shared() if self.by_stages else dict(self.model.named_parameters())
        divergence = find_divergence(self.ranks.on_all(lambda: hash_parameters(held.items())))
        if divergence is not None:
            self.events.write({"event": "ranks differ", "step": self.step, "found": str(divergence)})
            raise UserError(
                f"{divergence} at step {self.step}: a device or link computes wrongly; "
                "check it and --resume from the last checkpoint"
            )

    def _save_and_release(self, at_release: Callable[[int], None] | None) -> None:
        self._save()
        if at_release is not None:
            self.checkpoints.wait()
            self.model.eval()
            self.ranks.on_first(lambda: at_release(self.step))
            self.model.train()

    def _save(self) -> None:
        dtype = str(self.compute_dtype).removeprefix("torch.")
        state = {"rows": self.rows.fingerprint, "compute_dtype": dtype, "ranks": self.ranks.world}
        state |= {"guard": self.guard.state(), "policy": self.policy.state()}
        sharded = isinstance(self.optimizer, DistMuonAdamW | StageParallelMuonAdamW)
        weights = self.optimizer.weights() if sharded else self.model.state_dict()
        self.checkpoints.save(Checkpoint(self.step, weights, self.optimizer.state_dict(), state), self.saves_apart)
        self.checkpoints.prune(self.recipe.training.keep_checkpoints, self.recipe.released_steps())

    def _on_damage(self, line: str) -> None:
        self.log(line)
        self.events.write({"event": "damaged checkpoint", "found": line})

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
