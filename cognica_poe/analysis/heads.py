"""Geometry of the stage heads: how alike the K additive heads are, and what each one is worth.

The card's probes of ``lm_head_stages[k].weight`` [V, D]: alignment of dominant singular vectors, unique share by
Gram-Schmidt, tokens of the dominant direction, one stage head switched off, and all of them scaled by beta.

A caution that belongs to every number here: ``lm_head + lm_head_stages[k]`` holds one matrix too many. Adding M to the
shared head and subtracting it from every stage head changes no prediction, but does change alignment, unique shares and
perturbations; they describe the optimiser's choice as much as the function.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from cognica_poe.analysis.bits_per_byte import measure_paths
from cognica_poe.analysis.bootstrap import Bootstrap, Interval

if TYPE_CHECKING:
    from cognica_poe.data.tokenizer import Tokenizer
    from cognica_poe.modeling.modeling_cognica_poe import CognicaPoEForCausalLM

BETAS = (0.0, 0.5, 2.0)


@dataclass(frozen=True)
class HeadGeometry:
    """From the weights alone; ``None`` where a head is zero (as at initialisation) and the number has no meaning.

    alignment, K rows of K: cosine of the dominant left singular vectors u_i, u_j, signed by that of the right ones, so
    that the free sign of a singular pair cancels. unique_share [K]: squared norm of head k outside the span of the
    heads before it (as vectors of V * D numbers), relative to its squared norm; the first is 1. norm [K]: Frobenius.
    top_tokens [K]: the tokens with the largest entries of u_k, oriented so that its cubes sum to a positive number.
    """

    norm: list[float]
    alignment: list[list[float | None]]
    unique_share: list[float | None]
    top_tokens: list[list[str]]


@dataclass(frozen=True)
class HeadPerturbation:
    """Change of the full BPB when stage heads are scaled by ``beta``: all of them, or the one ``stage``."""

    stage: int | None
    beta: float
    value: float
    low: float
    high: float


@torch.no_grad()
def head_geometry(model: CognicaPoEForCausalLM, tokenizer: Tokenizer, *, tokens: int = 10) -> HeadGeometry | None:
    """Geometry of the stage heads of ``model``, in fp64; ``None`` if it has no two stage heads."""
    config = model.config
    if config.num_stages < 2 or not config.per_stage_head or config.poe_mode == "none":
        return None
    heads = [weight.detach().double() for weight in _stage_heads(model, range(config.num_stages))]
    gram = torch.stack([torch.stack([(a * b).sum() for b in heads]) for a in heads]).cpu()
    dominant = [_dominant_pair(head) for head in heads]
    return HeadGeometry(
        norm=[float(value) for value in gram.diagonal().sqrt()],
        alignment=[[_alignment(a, b) for b in dominant] for a in dominant],
        unique_share=_unique_shares(gram),
        top_tokens=[[] if pair is None else _top_tokens(pair[0], tokenizer, tokens) for pair in dominant],
    )


def _stage_heads(model: CognicaPoEForCausalLM, stages: Iterable[int]) -> list[Tensor]:
    """Weights [V, D] of the additive heads of ``stages``."""
    return [model.stage_weight(stage) for stage in stages]


def _dominant_pair(head: Tensor) -> tuple[Tensor, Tensor] | None:
    """Left [V] and right [D] singular vectors of the largest singular value; ``None`` for a zero head."""
    if not head.any():
        return None
    right = torch.linalg.eigh(head.T @ head).eigenvectors[:, -1]  # D x D instead of an SVD of V x D
    left = head @ right
    return left / left.norm(), right


def _alignment(a: tuple[Tensor, Tensor] | None, b: tuple[Tensor, Tensor] | None) -> float | None:
    if a is None or b is None:
        return None
    sign = 1.0 if float(a[1] @ b[1]) >= 0 else -1.0
    return float((sign * (a[0] @ b[0])).clamp(-1.0, 1.0))


def _unique_shares(gram: Tensor) -> list[float | None]:
    """Gram-Schmidt from inner products [K, K] alone: what least squares over the earlier heads leaves of each."""
    unique: list[float | None] = []
    for k, norm in enumerate(gram.diagonal()):
        if norm == 0:
            unique.append(None)
            continue
        explained = torch.zeros(())
        if k:
            inner = gram[:k, k]
            explained = inner @ torch.linalg.pinv(gram[:k, :k], hermitian=True) @ inner
        unique.append(float((1.0 - explained / norm).clamp(0.0, 1.0)))
    return unique


def _top_tokens(left: Tensor, tokenizer: Tokenizer, count: int) -> list[str]:
    left = left if float((left**3).sum()) >= 0 else -left
    best = left[: tokenizer.vocab_size].topk(min(count, tokenizer.vocab_size)).indices
    return [tokenizer.decode([int(index)]) for index in best]


def perturb_heads(
    model: CognicaPoEForCausalLM,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    betas: Sequence[float] = BETAS,
    batch_rows: int = 16,
    seed: int = 0,
    log: Callable[[str], None] = lambda line: None,
) -> list[HeadPerturbation]:
    """One stage head switched off at a time, then all scaled by each beta: paired change of the full BPB.

    Takes ``1 + K + len(betas)`` passes over ``texts`` (two documents or more); the weights are restored bit for bit.
    """
    stages = model.config.num_stages

    def nats() -> tuple[np.ndarray, np.ndarray]:
        sums = measure_paths(model, tokenizer, texts, batch_rows=batch_rows, positions=0).sums
        return sums.nats["full"], sums.bytes

    before, size = nats()
    bootstrap = Bootstrap(len(texts), seed=seed)
    results = []
    for stage, beta in [*((k, 0.0) for k in range(stages)), *((None, beta) for beta in betas)]:
        with _scaled_heads(model, range(stages) if stage is None else [stage], beta):
            after, _ = nats()
        change: Interval = bootstrap.difference(after, size, before, size, 1.0 / np.log(2))
        results.append(HeadPerturbation(stage, beta, change.value, change.low, change.high))
        name = "all stage heads" if stage is None else f"stage head {stage}"
        log(f"{name} times {beta:g}: {change.value:+.4f} bits per byte")
    return results


@contextlib.contextmanager
def _scaled_heads(model: CognicaPoEForCausalLM, stages: Sequence[int], beta: float) -> Iterator[None]:
    weights = [model.stage_factor(stage) for stage in stages]
    kept = [weight.detach().clone() for weight in weights]
    try:
        with torch.no_grad():
            for weight in weights:
                weight.mul_(beta)
        yield
    finally:
        with torch.no_grad():
            for weight, value in zip(weights, kept, strict=True):
                weight.copy_(value)
