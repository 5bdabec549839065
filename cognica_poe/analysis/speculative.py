"""Acceptance of self-speculative decoding: a stage drafts, the full pool verifies.

Acceptance is accepted / proposed draft tokens, pooled over prompts (the definition behind the numbers of the model
card). Prompts are the openings of validation documents, spread evenly over those that are long enough; the interval is
a bootstrap over prompts, because tokens of one continuation are correlated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cognica_poe.analysis.bootstrap import Bootstrap
from cognica_poe.analysis.conditions import evaluation_mode

if TYPE_CHECKING:
    from cognica_poe.data.tokenizer import Tokenizer
    from cognica_poe.modeling.modeling_cognica_poe import CognicaPoEForCausalLM

Prompts = list[list[int]]


@dataclass(frozen=True)
class SpeculativeResult:
    """Pooled counts, acceptance and its 95 % interval; ``None`` where nothing was proposed (a single stage)."""

    acceptance: float | None
    low: float | None
    high: float | None
    proposed: int
    accepted: int
    rounds: int
    draft_stage: int
    k_draft: int
    prompts: int
    new_tokens: int
    by_prompt: list[tuple[int, int]]
    """Proposed and accepted tokens of every prompt."""


def choose_prompts(tokenizer: Tokenizer, texts: Sequence[str], *, count: int, tokens: int) -> Prompts:
    """BOS and the first ``tokens - 1`` tokens of up to ``count`` documents, evenly spaced over the long enough ones.

    If no document is that long, all documents with any token serve as a whole.
    """
    encoded = [ids for ids in tokenizer.encode_batch(list(texts)) if len(ids)]
    long = [ids for ids in encoded if len(ids) >= tokens - 1] or encoded
    if not long:
        return []
    places = np.unique(np.linspace(0, len(long) - 1, num=min(count, len(long))).round().astype(int))
    return [[tokenizer.bos_id, *map(int, long[place][: tokens - 1])] for place in places]


def measure_acceptance(
    model: CognicaPoEForCausalLM,
    prompts: Prompts,
    *,
    new_tokens: int = 32,
    draft_stage: int = 0,
    draft_layer: int | None = None,
    k_draft: int = 4,
    seed: int = 0,
    log: Callable[[str], None] = lambda line: None,
) -> SpeculativeResult:
    """Greedy speculative decoding of every prompt by itself, drafted by a stage, or by the exit at ``draft_layer``.

    A model without a stage to draft with (one stage, or trained on the plain path) proposes nothing, nor does an empty
    list of prompts: acceptance is then ``None``. With fewer than two prompts that proposed something the interval is
    ``None``.
    """
    empty = SpeculativeResult(None, None, None, 0, 0, 0, draft_stage, k_draft, 0, new_tokens, [])
    if model.config.poe_mode == "none" or (model.config.num_stages == 1 and draft_layer is None) or not prompts:
        return empty
    device = next(model.parameters()).device
    drafting: dict[str, Any] = {"draft_stage": draft_stage} if draft_layer is None else {"draft_layer": draft_layer}
    rows = []
    with evaluation_mode(model):
        for index, prompt in enumerate(prompts):
            ids = torch.tensor([prompt], device=device)
            _, counts = model.generate_speculative(
                ids,
                max_new_tokens=new_tokens,
                **drafting,
                k_draft=k_draft,
                return_acceptance=True,
            )
            rows.append((counts["proposed"], counts["accepted"], counts["rounds"]))
            if (index + 1) % 8 == 0:
                log(f"speculative decoding of {index + 1} of {len(prompts)} prompts")
    proposed, accepted, rounds = (np.array(column, dtype=np.int64) for column in zip(*rows, strict=True))
    low = high = None
    if (proposed > 0).sum() >= 2:
        interval = Bootstrap(len(rows), seed=seed).ratio(accepted, proposed)
        low, high = interval.low, interval.high
    total = int(proposed.sum())
    return SpeculativeResult(
        acceptance=int(accepted.sum()) / total if total else None,
        low=low,
        high=high,
        proposed=total,
        accepted=int(accepted.sum()),
        rounds=int(rounds.sum()),
        draft_stage=draft_stage,
        k_draft=k_draft,
        prompts=len(rows),
        new_tokens=new_tokens,
        by_prompt=[(row[0], row[1]) for row in rows],
    )
