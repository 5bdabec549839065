"""Pretraining on one process or many: steps, checkpoints, metrics, exact resume.

A run's position is its step alone: rows are a function of the step, schedules are functions of the step, and nothing in
the model draws random numbers. A resumed run therefore repeats an uninterrupted one bit for bit on as many ranks as
before, and within rounding on any other number: every step reads the same rows, of which each rank takes its slice.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch

from cognica_poe.data.rows.reader import Rows
from cognica_poe.errors import TrainingStopped, UserError
from cognica_poe.interrupts import Interrupted, interruptible
from cognica_poe.recipe.fields import Recipe
from cognica_poe.seals import require_made_from
from cognica_poe.training.backlog import Backlog, LaunchedStep, Progress
from cognica_poe.training.build import rows_of_a_rank, works_by_stages
from cognica_poe.training.checkpoint import Checkpoint, CheckpointFolder
from cognica_poe.training.guard import Decision, SpikePolicy, StepGuard, never_finite
from cognica_poe.training.initial import initial_weights
from cognica_poe.training.journal import Journal
from cognica_poe.training.lineage import parts_of
from cognica_poe.training.memory import copy_to_device, copy_to_host, keep_freed_memory
from cognica_poe.training.optim.schedule import Schedule
from cognica_poe.training.parallel.ranks import Ranks
from cognica_poe.training.replica import Replica
from cognica_poe.training.soundness import require_equal, require_finite
from cognica_poe.training.stopping import StopRequests
from cognica_poe.training.validation import NO_VALIDATION, Validation

Log = Callable[[str], None]


class Trainer:
    """Trains one recipe inside a run folder.

    Args:
        recipe, run, rows: checked recipe, run folder, the training rows.
        resume: continue from the newest sound checkpoint; otherwise the folder must hold none. Workers that torchrun
            has restarted always resume.
        log: receives lines about what happens, on the first rank.
        progress: receives ``(step, metrics)`` after every step, on the first rank.
        ranks: this process among those of the run; all of them share the run folder.
        validation: what is measured while training, and when.
    """

    def __init__(
        self,
        recipe: Recipe,
        run: Path,
        rows: Rows,
        *,
        resume: bool = False,
        log: Log = lambda line: None,
        progress: Progress = lambda step, metrics: None,
        ranks: Ranks | None = None,
        validation: Validation = NO_VALIDATION,
    ):
        self.recipe, self.run, self.rows, self.ranks = recipe, Path(run), rows, ranks or Ranks()
        self.resume = resume or self.ranks.restarts > 0
        self.log: Log = log if self.ranks.is_first else lambda line: None
        self.progress: Progress = progress if self.ranks.is_first else lambda step, metrics: None
        self.checkpoints = CheckpointFolder(self.run / "checkpoints", self._on_damage, self.ranks)
        self.made_from = parts_of(recipe, rows.manifest, rows.tokenizer)
        """sha256 of recipe, data and tokenizer, for every checkpoint."""
        self.requests, self.validation = StopRequests(self.run, self.ranks), validation
        self.step = 0
        self.saved: int | None = None
        """Step of the checkpoint that holds what this process holds, or held when it stood there."""
        self.started = False

    def start(self) -> None:
        """Make model, objective and optimiser, and take up the newest checkpoint of a run that is resumed.

        ``train`` does it where nobody did before.

        Raises:
            UserError: the ranks cannot share the rows, the folder holds checkpoints that are not wanted or none that
                is sound, or the newest one belongs to other rows or to another recipe.
        """
        keep_freed_memory()
        self.rank_rows = rows_of_a_rank(self.recipe, self.ranks)
        self.events = Journal(self.run / "events.jsonl", self.ranks.is_first, log=self.log)
        found = self.checkpoints.take_up(self.resume)
        self._build(found)
        if found is not None:
            self._restore(found)
            self.log(f"resumed at step {self.step}")
        elif (weights := initial_weights(self.run)) is not None:
            self.optimizer.load_weights(weights)
        self.releases = self.policy.releases(self.recipe.released_steps())
        """Steps to release: those of the recipe without what roll-backs and steps left out have taken from it."""
        self.metrics = Journal(self.run / "metrics.jsonl", self.ranks.is_first, self.step, self.log)
        self.backlog = Backlog(self.recipe, self.policy, self.metrics, self.events, self.log, self.progress)
        self.validation.begin(self.run, self.metrics, self.events, self.ranks, self.log)
        # CUDA trains on while the host reads and writes; where the host itself trains, nothing is won by it.
        self.background = self.ranks.in_background() if self.device.type == "cuda" else None
        """The ranks as they speak while saving beside the training; None to save in between."""
        self.steps_in_flight = 1 if self.device.type == "cuda" else 0
        """Steps under way while the host reads an earlier one."""
        self.started = True

    def _build(self, found: Checkpoint | None) -> None:
        """Everything that a step needs, in its initial state; a checkpoint decides the dtype of the products alone."""
        training = self.recipe.training
        self.replica = Replica(self.recipe, self.ranks, found.state["compute_dtype"] if found else None)
        self.device, self.model = self.replica.device, self.replica.model
        self.objective, self.optimizer = self.replica.objective, self.replica.optimizer
        self.schedule = Schedule(training.schedule, training.steps)
        self.guard = StepGuard(training.guard, self.ranks.mean, self.ranks.world, self.device)
        self.policy = SpikePolicy(training.guard)

    def _restore(self, found: Checkpoint, rewind: bool = False) -> None:
        """Load weights, optimiser and step; with ``rewind``, roll-backs since are remembered."""
        where = self.checkpoints.path(found.step)
        made_from = {**found.made_from, "rows": found.state["rows"]}
        wanted = {**self.made_from, "rows": self.rows.fingerprint}
        require_made_from(made_from, wanted, where, "undo the change, or start a new --out")
        try:
            self.optimizer.load_weights(found.weights)
            self.optimizer.load_state_dict(found.optimizer)
            if "guard" in found.state:
                self.guard.restore(found.state["guard"])
                (self.policy.rewind if rewind else self.policy.restore)(found.state["policy"])
        except (RuntimeError, ValueError) as error:
            first = str(error).strip().splitlines()[-1].strip()
            raise UserError(f"{where} does not fit this recipe: {first}") from error
        self.step = self.saved = found.step

    # ---- steps ----------------------------------------------------------------------------------------------------

    def train(self, at_release: Callable[[int], None] = lambda step: None) -> None:
        """Run to the last step; the first rank calls ``at_release(step)`` after the checkpoint of every released step.

        Raises:
            TrainingStopped: on every rank, after SIGTERM or SIGINT on any of them, or once there is a file ``stop`` in
                the run folder. The last complete step is saved then; a step under way is dropped.
            UserError: as for ``start``; loss or gradient stayed non-finite (no such step is applied), a weight became
                so (no such weight is saved), the weights of the ranks came to differ, or the disk is full.
        """
        if not self.started:
            self.start()
        self.events.write({"event": "resume" if self.step else "start", "step": self.step, **self.replica.facts()})
        with self.requests.heed(self.checkpoints.steps):
            ahead = self.recipe.training.steps * self.recipe.training.batch_rows if self.ranks.leads_machine else 0
            with self.replica.at_work(), self.rows.packed_ahead(ahead):
                self._train(at_release)
            self.checkpoints.wait()
            if self.requests.asked():
                self._stop()
            self.events.write({"event": "end", "step": self.step})

    def _train(self, at_release: Callable[[int], None]) -> None:
        """All steps that are left, with the comparisons, checkpoints and releases that fall due between them."""
        compare_every = self.recipe.training.guard.compare_ranks_every
        self.validation.measure_if_due(self.step, self.replica)
        if self.step in self.releases:
            self._save_and_release(at_release)
        while self._goes_on():
            stop = not self._train_step()
            rolled_back = self._read(self.steps_in_flight)
            # What is saved has been judged: nothing may be in flight then.
            settles = stop or self._is_due() or self.validation.is_due(self.step)
            if rolled_back or (settles and self._read(0)):
                continue
            due = self._is_due() and not stop
            if due or stop or (compare_every and not self.step % compare_every):
                require_equal(self.objective.shared(), self.step, self.ranks, self.events)
            if stop:
                self._stop()
            self.validation.measure_if_due(self.step, self.replica)
            if due:
                self._save_and_release(at_release if self.step in self.releases else None)

    def _goes_on(self) -> bool:
        """Move on to the next step that no roll-back passes over. False at the end of the run."""
        steps = self.recipe.training.steps
        step = self.policy.next_step(self.step)
        while step >= steps:
            decision = self.policy.judge_end(steps)
            if decision is None or not self._set_back(decision):
                if not self.releases:  # not one step was applied
                    self._give_up(0, None)
                return False
            step = self.policy.next_step(self.step)
        self.step = step
        return True

    def _is_due(self) -> bool:
        """Whether a checkpoint is. After a step that was not finite none is but for a release: it may be to blame."""
        periodic = self.step % self.recipe.training.checkpoint_every == 0 and not self.policy.failed(self.step - 1)
        return periodic or self.step in self.releases

    def _train_step(self) -> bool:
        """Launch a step, to be read later. False when the run is asked to stop: the step is dropped then."""
        began = time.perf_counter()
        losses = self._backward()
        if losses is None:
            self.optimizer.zero_grad()
            return False
        keep = self.guard.check(losses[: self.objective.paths].mean(), self.optimizer.gradients())
        rates = self.schedule.rates(self.step)
        if self.device.type == "cuda":
            self.optimizer.step(*rates, keep=keep)
        elif keep:  # reading costs nothing here, selecting would
            self.optimizer.step(*rates)
        self.optimizer.zero_grad()
        on_host = copy_to_host(self.ranks.mean(losses))
        self.backlog.add(LaunchedStep(self.step, began, on_host, self.guard.observation(self.step), self.rows.reading))
        self.step += 1
        return True

    def _backward(self) -> torch.Tensor | None:
        """Gradients of this rank's rows of the step; returns their mean losses ``[K + E]``.

        None when the run is asked to stop, found between micro-batches; ranks in a line of stages ask before a step.
        """
        training = self.recipe.training
        if self.objective.begin(self.step / training.steps):
            self.optimizer.arrange(self.objective.sections())
        batch = self._batch()
        if self.requests.asked() or batch is None:
            return None
        rows = copy_to_device(torch.from_numpy(batch[self.rank_rows]), self.device)
        in_line = works_by_stages(self.recipe, self.ranks)
        losses, scale = torch.zeros((), device=self.device), training.micro_rows / training.batch_rows
        micro_batches = torch.split(rows, training.micro_rows)
        for i, micro in enumerate(micro_batches):
            if i and not in_line and self.requests.asked():
                return None
            with self.optimizer.micro_batch(last=i == len(micro_batches) - 1):
                losses = losses + self.objective.backward(micro[:, :-1], micro[:, 1:], scale)
        return losses / len(micro_batches)

    def _batch(self) -> np.ndarray | None:
        """The rows of the step. Packing a shard of them can take long: None when a signal interrupted it."""
        try:
            with interruptible():
                return self.rows.batch(self.step, self.recipe.training.batch_rows)
        except Interrupted:
            return None

    def _stop(self) -> NoReturn:
        """Save where the run stands, and end."""
        self._save_once()
        self.checkpoints.wait()
        self.events.write({"event": "stopped", "step": self.step})
        self.requests.obeyed()
        raise TrainingStopped(self.step, self.requests.number or signal.SIGTERM)

    def _read(self, in_flight: int) -> bool:
        """Take in all but the last steps in flight. True when that led back to a checkpoint."""
        while (decision := self.backlog.read(in_flight)) is not None:
            if self._set_back(decision):
                return True
        self._update_releases()
        return False

    def _set_back(self, decision: Decision) -> bool:
        """Roll back, or end the run. False without a checkpoint to roll back to: steps go on being left out then."""
        self.checkpoints.wait()
        span = decision.pass_over
        found = self.checkpoints.load_latest(span[0]) if span else None
        found = found or self.checkpoints.load_latest(decision.first - 1)
        if span is None:
            self._give_up(decision.first, found)
        if found is None:
            self.events.write({**decision.event, "event": "no checkpoint to roll back to"})
            return False
        span = max(span[0], found.step), span[1]
        self.events.write({**decision.event, "pass_over": list(span), "to": found.step})
        self.log(f"rolled back to step {found.step}; steps {span[0]} to {span[1]} are passed over")
        self._go_back(found)
        self.policy.pass_over(*span)
        self._update_releases()
        self._save()  # a kill does not forget the roll-back
        return True

    def _give_up(self, first: int, found: Checkpoint | None) -> NoReturn:
        """End a run in which nothing is finite any more, so that ``--resume`` starts from what was."""
        self.events.write({"event": "non-finite loss", "step": first})
        way = "--resume: the run starts again"
        if found is not None:
            self._go_back(found)
            self.policy.begin_again(found.step)
            self._save()
            self.checkpoints.wait()
            way = f"--resume: the run goes on from step {found.step}"
        elif self.ranks.on_first(self.checkpoints.steps):
            way = "start again in another --out: every checkpoint here may be to blame"
        raise never_finite(first, way)

    def _go_back(self, found: Checkpoint) -> None:
        """Stand where an earlier checkpoint stands; what was trained since is forgotten."""
        self.backlog.clear()
        self.optimizer.zero_grad()
        self._restore(found, rewind=True)
        self.metrics.drop_after(self.step)
        self.validation.look()
        self.checkpoints.delete(step for step in self.checkpoints.steps() if step > self.step)

    def _update_releases(self) -> None:
        """Take from the releases what was passed over or holds the weights of another one, and say so."""
        releases = self.policy.releases(self.recipe.released_steps())
        for step in sorted(set(self.releases) - set(releases)):
            passed = self.policy.passes_over(step - 1)
            reason = "a roll-back passed over it" if passed else "no step since the release before it was applied"
            self.log(f"step {step} is not released: {reason}")
            self.events.write({"event": "release left out", "step": step, "reason": reason})
        self.releases = releases

    def _save_and_release(self, at_release: Callable[[int], None] | None) -> None:
        self._save_once()
        if at_release is not None and not self.policy.failed(self.step - 1):
            self.checkpoints.wait()
            try:
                alone = self.ranks.world == 1  # ranks that wait for the first one cannot be told that it left
                with self.replica.as_released(), interruptible() if alone else contextlib.nullcontext():
                    self.ranks.on_first(lambda: at_release(self.step))
            except Interrupted:  # what is measured is measured again when the run resumes
                if self.requests.asked():
                    self._stop()

    def _save_once(self) -> None:
        """Save unless the checkpoint of this step is there."""
        if self.saved != self.step:
            self._save()

    def _save(self) -> None:
        state = {"rows": self.rows.fingerprint, "compute_dtype": self.replica.dtype_name, "ranks": self.ranks.world}
        state |= {"guard": self.guard.state(), "policy": self.policy.state()}
        weights, optimizer = self.optimizer.weights(), self.optimizer.state_dict()
        require_finite({**weights, **optimizer}, self.step, self.ranks, self.events, self.checkpoints)
        checkpoint = Checkpoint(self.step, weights, optimizer, state, self.made_from)
        self.checkpoints.save(checkpoint, self.background)
        self.saved = self.step
        self.checkpoints.prune(self.recipe.training.keep_checkpoints, self.releases)

    def _on_damage(self, line: str) -> None:
        self.log(line)
        self.events.write({"event": "damaged checkpoint", "found": line})
