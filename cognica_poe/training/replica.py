"""The model of one rank with what trains it: objective and optimiser, in the dtype and attention of its device."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from cognica_poe.recipe.fields import Recipe
from cognica_poe.training.build import build_model, build_objective_and_optimizer
from cognica_poe.training.compilation import bounded_compilation, compile_blocks, without_compilation
from cognica_poe.training.memory import full_memory_explained
from cognica_poe.training.parallel.ranks import Ranks
from cognica_poe.training.precision import choose_attention, choose_compute_dtype, default_device


class Replica:
    """Everything that a step needs, in its initial state.

    Args:
        recipe: checked recipe.
        ranks: this process among those of the run.
        compute_dtype: dtype of the products, when a checkpoint has decided it; the recipe's otherwise.
    """

    def __init__(self, recipe: Recipe, ranks: Ranks, compute_dtype: str | None = None):
        self.recipe, self.ranks, self.device = recipe, ranks, default_device()
        training = recipe.training
        self.model = build_model(recipe.model, training.seed)
        self.model.to(self.device).train()  # type: ignore[arg-type]  # transformers hides its arguments
        self.attention = choose_attention(training.attention, self.device, recipe.model.head_dim)
        self.model.set_attn_implementation(self.attention)
        dtype = compute_dtype or training.compute_dtype
        self.compute_dtype = ranks.on_first(lambda: choose_compute_dtype(dtype, self.device))
        self.objective, self.optimizer = build_objective_and_optimizer(self.model, recipe, self.compute_dtype, ranks)
        self.compiled = training.compile == "on" or (training.compile == "auto" and self.device.type == "cuda")
        if self.compiled:
            compile_blocks(self.model)

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """Around training: a full GPU, and a compiler at its limit, are said in one line."""
        compiling = bounded_compilation() if self.compiled else contextlib.nullcontext()
        with full_memory_explained(self.recipe.training.micro_rows), compiling:
            yield

    @contextlib.contextmanager
    def as_released(self) -> Iterator[None]:
        """The model as whoever loads its release has it: in evaluation mode, uncompiled, with sdpa."""
        self.model.eval()  # type: ignore[no-untyped-call]  # transformers'
        self.model.set_attn_implementation("sdpa")
        with without_compilation() if self.compiled else contextlib.nullcontext():
            yield
        self.model.set_attn_implementation(self.attention)
        self.model.train()

    @property
    def dtype_name(self) -> str:
        """The dtype of the products as a recipe has it."""
        return str(self.compute_dtype).removeprefix("torch.")

    def facts(self) -> dict[str, Any]:
        """What a run says of itself when it starts, for ``events.jsonl``."""
        return {
            "device": str(self.device),
            "ranks": self.ranks.world,
            "restarts": self.ranks.restarts,
            "threads": torch.get_num_threads(),
            "compute_dtype": self.dtype_name,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "torch": torch.__version__,
        }
