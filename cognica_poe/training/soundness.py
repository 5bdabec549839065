"""Weights as they must be before they are saved: finite everywhere, and the same on all ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from cognica_poe.errors import UserError
from cognica_poe.training.checkpoint import CheckpointFolder
from cognica_poe.training.journal import Journal
from cognica_poe.training.parallel.divergence import find_divergence, hash_parameters
from cognica_poe.training.parallel.ranks import Ranks


@torch.no_grad()
def find_non_finite(tensors: Mapping[str, torch.Tensor]) -> str | None:
    """Name of the first tensor that holds NaN or infinity; None when all are finite. One pass, one wait."""
    filled = {name: tensor.detach() for name, tensor in tensors.items() if tensor.numel()}
    if not filled:
        return None
    largest = torch._foreach_norm(list(filled.values()), math.inf)
    finite = torch.stack([value.isfinite() for value in largest]).tolist()
    return next((name for name, sound in zip(filled, finite, strict=True) if not sound), None)


def require_finite(
    tensors: Mapping[str, torch.Tensor], step: int, ranks: Ranks, events: Journal, checkpoints: CheckpointFolder
) -> None:
    """Raise UserError on every rank when this rank's ``tensors``, or those of another, hold NaN or infinity.

    Loss and gradients need not show it: the weights of a token that no text holds take part in neither.
    """
    found = [name for name in ranks.on_all(lambda: find_non_finite(tensors)) if name is not None]
    if not found:
        return
    events.write({"event": "weights not finite", "step": step, "parameter": found[0]})
    checkpoints.wait()
    sound = ranks.on_first(checkpoints.steps)
    way = f"goes on from step {sound[-1]}" if sound else "starts again"
    raise UserError(
        f"{found[0]} is not finite at step {step}: the step was not saved; --resume {way}; if it comes to this again, "
        "lower the learning rates (--training.optimizer.matrix-lr and the others), or choose another --out"
    )


def require_equal(shared: Mapping[str, torch.Tensor], step: int, ranks: Ranks, events: Journal) -> None:
    """Raise UserError when ``shared``, the replicas of the weights, differ between ranks in a single bit."""
    if ranks.world == 1:
        return
    divergence = find_divergence(ranks.on_all(lambda: hash_parameters(shared.items())))
    if divergence is not None:
        events.write({"event": "ranks differ", "step": step, "found": str(divergence)})
        raise UserError(
            f"{divergence} at step {step}: a device or link computes wrongly; "
            "check it and --resume from the last checkpoint"
        )
