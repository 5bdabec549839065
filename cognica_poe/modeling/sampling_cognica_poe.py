"""Distributions over the next token: the pool of experts, filters, the choice of a token, the acceptance of drafts.

Everything here is a pure function of its tensors: random numbers come in as uniforms, one per row, new token and
purpose. A row therefore never depends on the other rows of its batch, and the three purposes never share a number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from transformers import LogitsProcessorList

DRAFT, ACCEPT, FINAL = range(3)
"""Last index of the uniforms: draw a draft, test a draft, draw the token that is kept."""


def combine(
    logits: Sequence[torch.Tensor], alpha: float = 0.0, weights: Sequence[float] | None = None, normalise: bool = True
) -> torch.Tensor:
    """Log-probabilities ``[..., V]`` of the product of experts (model card, "Inference").

    ``s = K^alpha * sum_k w_k log p_k``, normalised by ``logsumexp``; ``w`` is uniform ``1/K`` unless given. At alpha 0
    this equals the softmax of the mean of the capped logits.

    Args:
        logits: one ``[..., V]`` tensor of logits or log-probabilities per stage.
        alpha: exponent of the number of experts; 0 is the geometric mean, 1 the full product.
        weights: one non-negative weight per stage.
        normalise: turn every stage's logits into log-probabilities first. That moves nothing but roundings, for a
            stage's normaliser is the same for the whole vocabulary; decoding saves itself the work.
    """
    if weights is None:
        weights = [1.0 / len(logits)] * len(logits)
    if len(weights) != len(logits):
        raise ValueError(f"{len(weights)} weights for {len(logits)} stages; give one weight per stage")
    if normalise:
        logits = [F.log_softmax(z, dim=-1) for z in logits]
    pooled = sum(weight * z for weight, z in zip(weights, logits, strict=True))
    return F.log_softmax(len(logits) ** alpha * pooled, dim=-1)


def uniforms(seed: int, rows: int, new_tokens: int) -> torch.Tensor:
    """Random numbers ``[rows, new_tokens, 3]`` fp64 in [0, 1), last index ``DRAFT``, ``ACCEPT`` or ``FINAL``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(rows, new_tokens, 3, dtype=torch.float64, generator=generator)


def exact_dtype(device: torch.device) -> torch.dtype:
    """fp64, or fp32 on the one kind of device that has no fp64."""
    return torch.float32 if device.type == "mps" else torch.float64


def inverse_cdf(weights: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Draw ids ``[...]`` from unnormalised ``weights`` ``[..., V]`` by ``uniform`` ``[...]``; never one of weight 0."""
    # A cumulative sum over a vocabulary in fp32 would lose the tokens below 1e-7.
    total = weights.to(exact_dtype(weights.device)).cumsum(dim=-1)
    last = total[..., -1:]
    # u * total may round up to the total itself, which no id reaches.
    target = torch.minimum(uniform.to(total.dtype).unsqueeze(-1) * last, torch.nextafter(last, torch.zeros_like(last)))
    return torch.searchsorted(total, target, right=True).squeeze(-1)


@dataclass(frozen=True)
class TokenChoice:
    """How a token is taken from a distribution: the most probable one, or a draw after temperature and filters."""

    do_sample: bool = False  # draw instead of taking the most probable token (the lowest id among equals)
    temperature: float = 1.0  # divides the log-probabilities before the filters
    top_k: int | None = None  # keep the k most probable tokens and whatever ties with the last of them
    top_p: float | None = None  # keep the smallest set of most probable tokens that reaches this probability
    chain: LogitsProcessorList | None = None  # transformers' own filters, instead of the three above

    def probabilities(self, logprobs: torch.Tensor) -> torch.Tensor:
        """The distribution ``[..., V]`` that a draw follows: temperature, then top-k, then top-p, as transformers."""
        if self.chain is not None:  # none of the filters reads the text
            flat = cast(torch.FloatTensor, logprobs.reshape(-1, logprobs.shape[-1]))
            return self.chain(cast(torch.LongTensor, None), flat).view_as(logprobs).softmax(dim=-1)
        scores = logprobs / self.temperature
        if self.top_k is not None and self.top_k < scores.shape[-1]:
            kth = scores.topk(self.top_k, dim=-1).values[..., -1:]
            scores = scores.masked_fill(scores < kth, float("-inf"))
        if self.top_p is not None and self.top_p < 1.0:
            ascending, order = scores.sort(dim=-1, stable=True)
            outside = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1.0 - self.top_p
            outside[..., -1] = False
            scores = scores.masked_fill(torch.zeros_like(outside).scatter(-1, order, outside), float("-inf"))
        return scores.softmax(dim=-1)

    def pick(self, logprobs: torch.Tensor, uniform: torch.Tensor | None) -> torch.Tensor:
        """Ids ``[...]`` from log-probabilities ``[..., V]``; ``uniform`` ``[...]`` is read only when sampling."""
        if not self.do_sample:
            return logprobs.argmax(dim=-1)
        assert uniform is not None
        return inverse_cdf(self.probabilities(logprobs), uniform)


def count_leading(holds: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """In how many leading places a test ``[B, k]`` of a row's drafts holds, ``[B]``; ``counts`` ``[B]`` are real."""
    valid = torch.arange(holds.shape[1], device=holds.device) < counts[:, None]
    return (holds & valid).cumprod(dim=1).sum(dim=1)


def accept_or_resample(
    target: torch.Tensor,
    draft: torch.Tensor,
    drafts: torch.Tensor,
    counts: torch.Tensor,
    accept: torch.Tensor,
    final: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Exact speculative sampling (Leviathan et al. 2023, Algorithm 1): the kept tokens follow ``target``.

    Draft i is kept when ``u < target(x) / draft(x)``; the first one that is not is replaced by a draw from
    ``max(target - draft, 0)``; after the last kept draft one more token is drawn from ``target`` itself.

    Args:
        target: verifier's distribution ``[B, k+1, V]`` at every drafted position and the one after.
        draft: distribution ``[B, k, V]`` that the drafts were truly drawn from.
        drafts: drafted ids ``[B, k]``.
        counts: number of real drafts per row ``[B]``.
        accept: uniforms ``[B, k]`` for the tests, independent of those that drew the drafts.
        final: uniforms ``[B, k+1]`` for the replacing or extra token.

    Returns:
        number of kept drafts ``[B]`` and the id ``[B]`` that follows them.
    """
    k = drafts.shape[1]
    at_draft = drafts.unsqueeze(-1)
    p, q = target[:, :k].gather(-1, at_draft).squeeze(-1), draft.gather(-1, at_draft).squeeze(-1)
    kept = count_leading(accept * q.to(accept.dtype) < p.to(accept.dtype), counts)
    rows = torch.arange(len(kept), device=kept.device)
    wanted = target[rows, kept]
    if k:
        proposed = draft[rows, kept.clamp(max=k - 1)] * (kept < counts)[:, None]
        residual = (wanted - proposed).clamp(min=0)
        # An empty residual means equal distributions, where a rejection has probability zero but for rounding.
        wanted = torch.where(residual.sum(dim=-1, keepdim=True) > 0, residual, wanted)
    return kept, inverse_cdf(wanted, final[rows, kept])
