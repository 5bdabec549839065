"""nanochat's own model and optimiser, from a checkout of it, as its trainer drives them: compiled as a whole."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from cognica_poe.errors import UserError
from cognica_poe.recipe.fields import ModelRecipe


def check_checkout(path: Path) -> Path:
    """The absolute path of a nanochat checkout. Raises UserError when there is none."""
    if not (path / "nanochat" / "gpt.py").is_file():
        raise UserError(f"bench: {path} is no nanochat checkout (nanochat/gpt.py is missing)")
    return path.resolve()


def build_step(
    path: Path, shape: ModelRecipe, dtype: str, device: torch.device, rows: int, micro_rows: int, compiled: bool
) -> tuple[Callable[..., None], Callable[[], None]]:
    """Backward of one batch (or its first ``micro_batches``) and the update that follows, with nanochat's own code.

    Args:
        path: checkout.
        shape: must be one that nanochat can build: MLP four times the width, one prediction path.
    """
    os.environ["NANOCHAT_DTYPE"] = dtype
    sys.path.insert(0, str(path))
    with contextlib.redirect_stdout(sys.stderr):
        from nanochat.gpt import GPT, GPTConfig

        config = GPTConfig(
            sequence_len=shape.max_position_embeddings,
            vocab_size=shape.vocab_size,
            n_layer=shape.num_hidden_layers,
            n_head=shape.num_attention_heads,
            n_kv_head=shape.num_key_value_heads,
            n_embd=shape.hidden_size,
            window_pattern=shape.window_pattern,
        )
        with torch.device("meta"):
            model = GPT(config)
        model.to_empty(device=device)
        model.init_weights()
        optimizer = model.setup_optimizer(weight_decay=0.28)
    run = torch.compile(model, dynamic=False) if compiled else model
    ids = torch.randint(shape.vocab_size, (rows, shape.max_position_embeddings + 1), device=device)

    def backward(micro_batches: int | None = None) -> None:
        for part in ids.split(micro_rows)[:micro_batches]:
            (run(part[:, :-1].contiguous(), part[:, 1:].contiguous()) * (micro_rows / rows)).backward()

    def update() -> None:
        optimizer.step()
        model.zero_grad(set_to_none=True)

    return backward, update
