"""Geometry of the stage heads: how alike the K additive heads are, in three gauges.

The card's probes of ``lm_head_stages[k].weight`` [V, D]: alignment of dominant singular vectors, unique share by
Gram-Schmidt, tokens of the dominant direction. What each head is worth is measured by ``diversity``.

``lm_head + lm_head_stages[k]`` holds one matrix too many: adding M to the shared head and subtracting it from every
stage head changes no prediction, but does change what the *stored* heads look like. Two other gauges do not depend on
it: the *folded* heads ``lm_head + lm_head_stages[k]``, which predict, and the *centred* ones, the stage heads less
their mean, which say how the stages differ. Centred heads sum to zero: the last always lies in the span of the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from cognica_poe.data.tokenizer import Tokenizer
    from cognica_poe.modeling.modeling_cognica_poe import CognicaPoEForCausalLM


Pair = tuple[Tensor, Tensor]
"""Left [V] and right [D] singular vector."""


@dataclass(frozen=True)
class Geometry:
    """K heads in one gauge; ``None`` where a head is zero (as at initialisation) and the number has no meaning.

    alignment, K rows of K: cosine of the dominant left singular vectors u_i, u_j, signed by that of the right ones, so
    that the free sign of a singular pair cancels. unique_share [K]: squared norm of head k outside the span of the
    heads before it (as vectors of V * D numbers), relative to its squared norm; the first is 1. norm [K]: Frobenius.
    """

    norm: list[float]
    alignment: list[list[float | None]]
    unique_share: list[float | None]


@dataclass(frozen=True)
class HeadGeometry(Geometry):
    """Of the stored heads, and of the other gauges.

    top_tokens [K]: the tokens with the largest entries of u_k, oriented so that its cubes sum to a positive number, as
    ``readable`` bytes.
    """

    top_tokens: list[list[str]]
    folded: Geometry
    centred: Geometry


@torch.no_grad()
def head_geometry(model: CognicaPoEForCausalLM, tokenizer: Tokenizer, *, tokens: int = 10) -> HeadGeometry | None:
    """Geometry of the stage heads of ``model``, in fp64; ``None`` if it has no two stage heads."""
    config = model.config
    if config.num_stages < 2 or not config.per_stage_head or config.poe_mode == "none":
        return None
    heads = [model.stage_weight(stage).detach().double() for stage in range(config.num_stages)]
    shared = model.lm_head.weight.detach().double()
    pairs = [_dominant_pair(head) for head in heads]
    stored = geometry_of(heads, pairs)
    mean = torch.stack(heads).mean(0)
    return HeadGeometry(
        norm=stored.norm,
        alignment=stored.alignment,
        unique_share=stored.unique_share,
        top_tokens=[[] if pair is None else _top_tokens(pair[0], tokenizer, tokens) for pair in pairs],
        folded=geometry_of([shared + head for head in heads]),
        centred=geometry_of([head - mean for head in heads]),
    )


def geometry_of(heads: list[Tensor], pairs: list[Pair | None] | None = None) -> Geometry:
    """Of heads [V, D] in fp64; ``pairs`` where their dominant singular vectors are known."""
    gram = torch.stack([torch.stack([(a * b).sum() for b in heads]) for a in heads]).cpu()
    dominant = [_dominant_pair(head) for head in heads] if pairs is None else pairs
    return Geometry(
        norm=[float(value) for value in gram.diagonal().sqrt()],
        alignment=[[_alignment(a, b) for b in dominant] for a in dominant],
        unique_share=_unique_shares(gram),
    )


def _dominant_pair(head: Tensor) -> Pair | None:
    """Left [V] and right [D] singular vectors of the largest singular value; ``None`` for a zero head."""
    if not head.any():
        return None
    right = torch.linalg.eigh(head.T @ head).eigenvectors[:, -1]  # D x D instead of an SVD of V x D
    left = head @ right
    return left / left.norm(), right


def _alignment(a: Pair | None, b: Pair | None) -> float | None:
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
    return [readable(tokenizer.bytes_of(int(index))) for index in best]


def readable(data: bytes) -> str:
    """Bytes as text where they are text that can be printed, else each as ``\\xNN``."""
    text = data.decode("utf-8", errors="backslashreplace")
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)
