"""Acceptance of drafts by their length, from one greedy text per prompt.

Greedy speculation writes the text of plain decoding whatever the drafts are, and a draft is kept while it repeats that
text. Behind kept drafts a drafting stage has read the text itself: which drafts of any length would be kept, round by
round, follows from where the stage's first token is that of the text. So one text and one pass of the stage over it
give the counts of every draft length (``count_rounds``, the rounds of ``decode_speculative`` with a stage).

Prompts come from anywhere in the held-out documents: their ends stand at even distances in all of the text, each behind
``context`` tokens of its document. Tokens of one continuation depend on one another, as do continuations of one
document: intervals are over documents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from cognica_poe.analysis.bootstrap import Bootstrap
from cognica_poe.analysis.conditions import evaluation_mode
from cognica_poe.analysis.speculative import SpeculativeResult

if TYPE_CHECKING:
    from cognica_poe.data.tokenizer import Tokenizer
    from cognica_poe.modeling.modeling_cognica_poe import CognicaPoEForCausalLM

LENGTHS = tuple(range(1, 9))
"""Draft lengths that are counted."""
DRAFTS = 10_000
"""Drafts of length 1 that are asked for; longer ones propose more."""
CONTEXT = 32
NEW_TOKENS = 60
_LOGITS_BYTES = 256 * 2**20


@dataclass(frozen=True)
class DraftLength:
    """Drafts of one length over all prompts; ``low``, ``high``: 95 % interval, ``None`` for a single document."""

    k_draft: int
    proposed: int
    accepted: int
    rounds: int
    acceptance: float
    low: float | None
    high: float | None
    tokens_per_round: float


@dataclass(frozen=True)
class DraftCurve:
    """Acceptance by length behind ``prompts`` places in ``documents`` documents, ``context`` tokens before each (BOS
    among them) and ``new_tokens`` greedy tokens behind it."""

    prompts: int
    documents: int
    context: int
    new_tokens: int
    draft_stage: int
    lengths: list[DraftLength]


def measure_drafts(
    model: CognicaPoEForCausalLM,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    units: NDArray[np.int64],
    *,
    drafts: int = DRAFTS,
    draft_stage: int = 0,
    batch_rows: int = 64,
    seed: int = 0,
    log: Callable[[str], None] = lambda line: None,
) -> DraftCurve | None:
    """Acceptance of greedy drafts of ``LENGTHS`` tokens; ``None`` where nothing can be drafted.

    Twice as many tokens are written as ``drafts`` asks for: a round of length 1 takes up to two.

    ``units`` [texts]: what the interval resamples, documents or what several of them were cut from. A stage of a model
    of one stage, or trained on the plain path, drafts nothing; nor does a text shorter than the context.
    """
    config = model.config
    context = min(CONTEXT, config.max_position_embeddings // 2)
    new_tokens = min(NEW_TOKENS, config.max_position_embeddings - context)
    if config.poe_mode == "none" or config.num_stages == 1 or new_tokens < 2:
        return None
    encoded = [np.asarray(ids, dtype=np.int64) for ids in tokenizer.encode_batch(list(texts))]
    owner, prompts = choose_places(encoded, tokenizer.bos_id, -(-drafts // max(1, (new_tokens - 1) // 2)), context)
    if not len(owner):
        return None
    parts = []
    with evaluation_mode(model):
        for start in range(0, len(prompts), batch_rows):
            some = prompts[start : start + batch_rows].tolist()
            parts.append(_repeats(model, some, new_tokens, draft_stage))
            log(f"drafts: {start + len(some):,} of {len(prompts):,} greedy texts")
    matches, groups = np.concatenate(parts), units[owner]
    lengths = [_of_length(matches, k, groups, seed) for k in LENGTHS]
    return DraftCurve(len(prompts), len(np.unique(groups)), context, new_tokens, draft_stage, lengths)


def drafts_behind(
    model: CognicaPoEForCausalLM,
    prompts: Sequence[Sequence[int]],
    *,
    k_draft: int,
    new_tokens: int = NEW_TOKENS,
    draft_stage: int = 0,
    seed: int = 0,
) -> SpeculativeResult | None:
    """Acceptance behind given prompts (ids with BOS, of any lengths), as ``speculative.measure_acceptance`` counts it,
    but beyond the end of a text; ``None`` where the context has no room."""
    new_tokens = min(new_tokens, model.config.max_position_embeddings - max(map(len, prompts)))
    if new_tokens < 3:
        return None
    with evaluation_mode(model):
        matches = _repeats(model, prompts, new_tokens, draft_stage)
    counts = [count_rounds(row.tolist(), k_draft) for row in matches]
    proposed, accepted, rounds = (np.array(column) for column in zip(*counts, strict=True))
    interval = Bootstrap(len(counts), seed=seed).ratio(accepted, proposed)
    return SpeculativeResult(
        acceptance=int(accepted.sum()) / int(proposed.sum()),
        low=max(0.0, interval.low),
        high=min(1.0, interval.high),
        proposed=int(proposed.sum()),
        accepted=int(accepted.sum()),
        rounds=int(rounds.sum()),
        draft_stage=draft_stage,
        k_draft=k_draft,
        prompts=len(counts),
        new_tokens=new_tokens,
        by_prompt=[(row[0], row[1]) for row in counts],
    )


def choose_places(
    encoded: Sequence[NDArray[np.int64]], bos: int, count: int, context: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Document [P] and prompt [P, context] of at most ``count`` places, evenly spread over all that have the context.

    A prompt is BOS and ``context - 1`` tokens, wherever they stand in the document. There are no more prompts than the
    text has tokens for.
    """
    fitting = np.array([max(0, len(ids) - context + 2) for ids in encoded], dtype=np.int64)
    total = int(fitting.sum())
    count = min(count, -(-total // context))
    place = (np.arange(count) + 0.5) * total / max(1, count)
    ends = fitting.cumsum()
    owner = np.searchsorted(ends, place.astype(np.int64), side="right")
    first = place.astype(np.int64) - (ends - fitting)[owner]
    rows = [
        [bos, *encoded[document][begin : begin + context - 1]] for document, begin in zip(owner, first, strict=True)
    ]
    return owner, np.array(rows, dtype=np.int64).reshape(len(rows), context)


@torch.no_grad()
def _repeats(
    model: CognicaPoEForCausalLM, prompts: Sequence[Sequence[int]], new_tokens: int, stage: int
) -> NDArray[np.bool_]:
    """Where [B, new_tokens] the stage's first token is that of the pool's greedy text behind each of the prompts."""
    device, lengths = next(model.parameters()).device, [len(prompt) for prompt in prompts]
    longest = max(lengths)
    padded = [[prompt[0]] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (longest - length) + [1] * length for length in lengths]
    ids, real = torch.tensor(padded, device=device), torch.tensor(mask, device=device)
    out = model.generate_prefix(ids, attention_mask=real, max_new_tokens=new_tokens, eos_token_id=[])
    text = out[:, longest:]
    whole = [torch.cat((out[row, longest - length : -1], ids[row, :1].expand(longest - length)))
             for row, length in enumerate(lengths)]  # fmt: skip  # padded on the right: nothing reads what follows it
    places = torch.tensor(lengths, device=device)[:, None] - 1 + torch.arange(new_tokens, device=device)
    rows = max(1, _LOGITS_BYTES // (4 * model.config.vocab_size * out.shape[1]))
    parts = zip(torch.split(torch.stack(whole), rows), torch.split(places, rows), strict=True)
    best = [model.forward_stage(part, stage).argmax(dim=-1).gather(1, place) for part, place in parts]
    repeats: NDArray[np.bool_] = (torch.cat(best) == text).cpu().numpy()
    return repeats


def count_rounds(matches: Sequence[bool], k: int) -> tuple[int, int, int]:
    """Proposed and accepted drafts and rounds of ``generate_speculative`` with drafts of ``k`` by a stage.

    ``matches``: whether the stage's first token is the text's, by place. The pool writes the first token, and one
    behind the kept drafts of every round: no draft is asked for where that one ends the text.
    """
    proposed = accepted = rounds = 0
    place = 1
    while place < len(matches):
        drafted = min(k, len(matches) - place - 1)
        kept = next((i for i in range(drafted) if not matches[place + i]), drafted)
        proposed, accepted, rounds = proposed + drafted, accepted + kept, rounds + 1
        place += kept + 1
    return proposed, accepted, rounds


def _of_length(matches: NDArray[np.bool_], k: int, groups: NDArray[np.int64], seed: int) -> DraftLength:
    counts = np.array([count_rounds(row.tolist(), k) for row in matches], dtype=np.int64)
    ranks = np.unique(groups, return_inverse=True)[1]
    proposed, accepted = (np.bincount(ranks, weights=column) for column in counts.T[:2])
    low = high = None
    if len(proposed) > 1:
        interval = Bootstrap(len(proposed), seed=seed).ratio(accepted, proposed)
        low, high = max(0.0, interval.low), min(1.0, interval.high)
    total, kept, rounds = (int(value) for value in counts.sum(0))
    written = matches.shape[0] * (matches.shape[1] - 1)
    return DraftLength(k, total, kept, rounds, kept / total, low, high, written / rounds)
