"""An exit trained on a frozen model: its own head learns, and nothing else changes."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from cognica_poe.data.rows.reader import Rows
from cognica_poe.errors import UserError
from cognica_poe.modeling.blocks_cognica_poe import rmsnorm
from cognica_poe.modeling.modeling_cognica_poe import CognicaPoEForCausalLM
from cognica_poe.recipe.fields import OptimizerRecipe, ScheduleRecipe
from cognica_poe.training.cross_entropy import softcap_cross_entropy
from cognica_poe.training.optim.optimizer import MuonAdamW
from cognica_poe.training.optim.schedule import Schedule
from cognica_poe.training.precision import choose_compute_dtype


@dataclass(frozen=True)
class ExitRecipe:
    """How an exit is trained."""

    layer: int
    """Layers before it."""
    rank: int = 0
    """Of its head, beside the shared one; 0: a full matrix."""
    tokens: int = 2_000_000
    """Tokens to train on; a shorter text is read again in another order."""
    batch_rows: int = 16
    lr: float = 0.008
    """AdamW's rate, scaled by batch and width as that of all heads."""
    seed: int = 0

    def steps(self, context: int) -> int:
        """Optimiser steps for rows of ``context`` tokens."""
        return max(1, self.tokens // (self.batch_rows * context))


def with_exit(model: CognicaPoEForCausalLM, recipe: ExitRecipe) -> CognicaPoEForCausalLM:
    """``model`` with one exit more, that begins as the shared head; all other weights are copies.

    Raises UserError for a layer that can have no exit or has one, and for a rank that is not that of its other exits.
    """
    config, layer = copy.deepcopy(model.config), recipe.layer
    before = list(config.poe_exit_layers)
    if layer in before:
        raise UserError(f"--layer {layer}: the release has an exit there already")
    if before and recipe.rank != config.exit_head_rank:
        raise UserError(f"--rank is {recipe.rank}, the exits of the release have {config.exit_head_rank}: use that")
    fields = {"poe_exit_layers": sorted([*before, layer]), "exit_head_rank": recipe.rank}
    try:
        config = type(config).from_dict({**config.to_dict(), **fields, "poe_wand_p99_bounds_per_exit": None})
    except ValueError as error:
        raise UserError(f"--layer {layer}: {error}") from error
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        made = CognicaPoEForCausalLM(config)
    own = config.poe_exit_layers.index(layer)
    state = made.state_dict()
    for name, weight in model.state_dict().items():
        if name.startswith("lm_head_exits."):  # those behind the new one move on by a place
            place = int(name.split(".")[1])
            name = name.replace(f".{place}.", f".{place + (place >= own)}.", 1)
        state[name] = weight
    made.load_state_dict(state)
    made.generation_config = copy.deepcopy(model.generation_config)
    made.to(model.device)  # type: ignore[arg-type]  # transformers hides the signature
    return made


def train_exit(
    model: CognicaPoEForCausalLM, rows: Rows, recipe: ExitRecipe, progress: Callable[[int, dict[str, Any]], None]
) -> None:
    """Train the head of the exit behind ``recipe.layer`` layers of an fp32 model; nothing else changes.

    Args:
        model: has the exit already.
        rows: rows of the context plus one token.
        recipe: how.
        progress: receives ``(step, metrics)`` after every step.

    Raises:
        UserError: a loss is not finite.
    """
    config, device = model.config, model.device
    exit, steps = config.poe_exit_layers.index(recipe.layer), recipe.steps(config.max_position_embeddings)
    batch_tokens = recipe.batch_rows * config.max_position_embeddings
    trained = model.training
    model.train().requires_grad_(False)
    model.lm_head_exits[exit].requires_grad_(True)
    optimizer = MuonAdamW(model, OptimizerRecipe(unembedding_lr=recipe.lr), batch_tokens)
    schedule = Schedule(ScheduleRecipe(warmup_steps=min(20, steps // 10)), steps)
    dtype = choose_compute_dtype("auto", device)
    for step in range(steps):
        began = time.perf_counter()
        ids = torch.from_numpy(rows.batch(step, recipe.batch_rows)).to(device, torch.int64)
        inputs, targets = ids[:, :-1], ids[:, 1:].reshape(-1)
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            with torch.no_grad():
                x0 = model.embed(inputs)
                positions = torch.arange(inputs.shape[1], device=device)[None]
                x = model.run_layers(range(recipe.layer), x0, x0, inputs, model.rotary(positions), model.masks(x0))
                n = rmsnorm(x, config.rms_norm_eps).flatten(0, 1)
            loss = softcap_cross_entropy(n, model.exit_weight(exit), targets, config.logit_softcap)
        loss.backward()  # type: ignore[no-untyped-call]  # torch's
        value = loss.item()
        if not torch.isfinite(loss):
            raise UserError(f"exit {recipe.layer}: the loss is {value} at step {step}: lower --lr")
        optimizer.step(*schedule.rates(step))
        optimizer.zero_grad()
        seconds = time.perf_counter() - began
        done = {"tokens": batch_tokens * (step + 1), "tokens_per_second": batch_tokens / seconds}
        progress(step + 1, {**done, "loss_stages": [value]})
    model.requires_grad_(True).train(trained)
