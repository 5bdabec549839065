"""torch.compile of a model's blocks: for the steps of training and nothing beside them, never given up in silence."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from cognica_poe.errors import UserError

MOST_GRAPHS = 64
"""Graphs of a block at most. All blocks share one code object, and the layers of 3b are of six kinds already."""


def compile_blocks(model: nn.Module) -> None:
    """Have every block compiled when it is first run."""
    for block in model.get_submodule("transformer.h").children():
        block.compile()


@contextlib.contextmanager
def bounded_compilation() -> Iterator[None]:
    """Compile each kind of block within. Raises UserError where one would run uncompiled after ``MOST_GRAPHS`` graphs.

    torch goes on without a word there, at several times the time and memory.
    """
    from torch._dynamo import config
    from torch._dynamo.exc import FailOnRecompileLimitHit

    with config.patch(recompile_limit=MOST_GRAPHS, fail_on_recompile_limit_hit=True):
        try:
            yield
        except FailOnRecompileLimitHit as error:
            raise UserError(
                f"torch.compile made {MOST_GRAPHS} graphs of a block and wants more; train with --training.compile off"
            ) from error


@contextlib.contextmanager
def without_compilation() -> Iterator[None]:
    """Run what is compiled as it is written, and make no graph.

    What a release computes comes in other shapes than training: its graphs would use up those that a block may have.
    """
    with torch.compiler.set_stance("force_eager"):
        yield
