"""The decoding loops over :class:`StageCache`: a fixed pool of stages, early exit, self-speculation.

Each takes the model and a checked :class:`GenerationRequest` and returns the :class:`Transcript`. Tokens stay on the
model's device; one copy to the host per step (per round when speculating, also per stage with early exit) serves
decisions, end tokens and streaming.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import torch

from .drafting_cognica_poe import make_drafter
from .engine_cognica_poe import Engines
from .request_cognica_poe import GenerationRequest, Transcript
from .sampling_cognica_poe import ACCEPT, FINAL, accept_or_resample, agreeing_drafts, combine
from .stages_cognica_poe import StageCache


def prompt_cache(model, request: GenerationRequest, form: str = "dense", stages: int | None = None) -> StageCache:
    """A cache with room for the whole answer; nothing has been run yet."""
    engine = Engines.of(model).get(model, form, stages)
    prompts = [request.prompt(row) for row in range(len(request.lengths))]
    return StageCache(engine, prompts, max(request.lengths) + request.max_new_tokens)


def decode_pool(
    model, request: GenerationRequest, stages: Sequence[int], weights: Sequence[float] | None, alpha: float
) -> Transcript:
    """Every token from the same weighted pool of ``stages``; layers above the deepest of them are never run."""
    cache, transcript = prompt_cache(model, request, stages=max(stages) + 1), Transcript(request)
    while not transcript.done:
        _pool_step(cache, transcript, stages, weights, alpha)
    return transcript


def decode_all(model, request: GenerationRequest) -> Transcript:
    """Plain cached decoding: the pool of all stages."""
    return decode_pool(model, request, range(model.config.num_stages), None, model.config.poe_alpha)


def decode_wand(
    model, request: GenerationRequest, bounds: Sequence[float], safety: float
) -> tuple[Transcript, list[list[int]]]:
    """Early exit. The deep layers of a token that left early run when a later token needs them, in one block with it.

    Returns the transcript and, per row, the number of stages that each new token used.
    """
    cache, transcript = prompt_cache(model, request), Transcript(request)
    used = [[] for _ in request.lengths]
    while not transcript.done:
        rows = undecided = transcript.open_rows
        logits, depth, chosen = [], [0] * len(rows), None
        for stage in range(model.config.num_stages):
            cache.advance(stage, stage, undecided)
            logits.append(cache.logits(stage, _last(cache))[:, 0])
            pool = combine(logits, model.config.poe_alpha)
            # Rows that left earlier keep their pool; what the cache holds for them at this stage is older.
            stay = torch.tensor(undecided, device=pool.device)
            chosen = pool if chosen is None else torch.where(stay[:, None], pool, chosen)
            depth = [stage + 1 if part else before for part, before in zip(undecided, depth, strict=True)]
            if stage == model.config.num_stages - 1:
                break
            first, second = pool.topk(2, dim=-1).values.unbind(dim=-1)
            certain = (first - second > safety * sum(bounds[stage:])).tolist()
            undecided = [part and not leaves for part, leaves in zip(undecided, certain, strict=True)]
            if not any(undecided):
                break
        for row, part in enumerate(rows):
            used[row] += [depth[row]] if part else []
        _write(cache, transcript, chosen, rows)
    return transcript, used


@dataclass
class DraftCounts:
    """What self-speculation did, summed over rows."""

    proposed: int = 0
    """Drafted tokens that were verified; those behind an accepted end of the text do not count."""
    accepted: int = 0
    """Drafted tokens that were kept."""
    rounds: int = 0
    """Verifications."""
    kept: list[int] = field(default_factory=list)
    """Drafts kept in each verification, in order."""

    def as_dict(self) -> dict:
        """With ``acceptance``, accepted / proposed, 0 when nothing was proposed."""
        counts = {key: value for key, value in asdict(self).items() if key != "kept"}
        return {"acceptance": self.accepted / self.proposed if self.proposed else 0.0, **counts}


def decode_speculative(
    model,
    request: GenerationRequest,
    draft_stage: int,
    k_draft: int,
    drafter: str = "stage",
    confidence: float = 0.0,
) -> tuple[Transcript, DraftCounts]:
    """A drafter proposes, the full pool verifies all proposals in one block.

    Verifying runs the drafting stages on what they have not seen and the deeper stages on the whole block. Rejected
    tokens are forgotten by length. Rows accept unequal numbers of drafts. The pool behind the last draft gives one more
    token where all were accepted, unless the drafter leaves that draft to its next check (``adds_token``).

    Args:
        model: the causal language model.
        request: what is wanted.
        draft_stage: deepest stage that drafts.
        k_draft: drafts per round at most.
        drafter: name of a drafter, see :func:`make_drafter`.
        confidence: a row stops drafting with the first token whose draft probability is below this.
    """
    cache, transcript, counts = prompt_cache(model, request), Transcript(request), DraftCounts()
    stages, alpha = range(model.config.num_stages), model.config.poe_alpha
    drafter = make_drafter(drafter, model, cache, transcript, draft_stage, confidence)
    _pool_step(cache, transcript, stages, None, alpha)  # the token behind the prompt, as in plain decoding
    drafter.follow()
    one_more = int(drafter.adds_token)
    while not transcript.done:
        rows, start = transcript.open_rows, list(cache.known)
        limits = [min(k_draft, max(transcript.remaining(row) - one_more, 0)) for row in range(len(rows))]
        drafts, drawn_from, asked = drafter.draft(limits)
        cache.advance(0 if one_more else draft_stage + 1, stages[-1], rows)
        pool = cache.pool(stages, [length - 1 for length in start], drafts.shape[1] + one_more, None, alpha)
        kept, following = _verify(transcript, pool, drafts, drawn_from, asked)
        host = torch.cat((kept[:, None], following[:, None], drafts), dim=1).tolist()
        behind = [bool(one_more) or accepted < count for (accepted, *_), count in zip(host, asked, strict=True)]
        for row, (accepted, token, *proposals) in enumerate(host):
            if not rows[row]:
                continue
            written = transcript.extend(row, [*proposals[:accepted], *[token] * behind[row]])
            counts.rounds += 1
            counts.kept.append(min(written, accepted))
            counts.accepted += min(written, accepted)
            counts.proposed += written if written <= accepted else asked[row]
        cache.truncate([length + accepted for length, (accepted, *_) in zip(start, host, strict=True)])
        follows = [part and is_open for part, is_open in zip(behind, transcript.open_rows, strict=True)]
        cache.append(following[:, None], follows)
        drafter.follow()
    return transcript, counts


def _verify(
    transcript: Transcript,
    pool: torch.Tensor,
    drafts: torch.Tensor,
    drawn_from: torch.Tensor | None,
    asked: list[int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Number of kept drafts ``[B]`` and the token ``[B]`` after them, from the pool ``[B, k+1, V]``.

    With a pool of k lanes the token behind k kept drafts is meaningless.
    """
    choice, rows, k = transcript.request.choice, len(asked), drafts.shape[1]
    if pool.shape[1] == k:
        pool = torch.cat((pool, pool[:, -1:]), dim=1)
    counts = torch.tensor(asked, device=pool.device)
    pool = transcript.processed(pool, drafts, [0] * rows)
    if not choice.do_sample:
        best = pool.argmax(dim=-1)
        kept = agreeing_drafts(best, drafts, counts)
        return kept, best.gather(1, kept[:, None]).squeeze(1)
    final = transcript.uniforms(FINAL, [range(k + 1)] * rows)
    if k == 0:
        return torch.zeros_like(counts), choice.pick(pool[:, 0], final[:, 0])
    accept = transcript.uniforms(ACCEPT, [range(k)] * rows)
    return accept_or_resample(choice.probabilities(pool), drawn_from, drafts, counts, accept, final)


def _last(cache: StageCache) -> list[int]:
    """Slot of the last known token of every row."""
    return [known - 1 for known in cache.known]


def _pool_step(cache: StageCache, transcript: Transcript, stages: Sequence[int], weights, alpha: float) -> None:
    """Decode one token per open row from the pool of ``stages``."""
    rows = transcript.open_rows
    cache.advance(0, max(stages), rows)
    _write(cache, transcript, cache.pool(stages, _last(cache), 1, weights, alpha)[:, 0], rows)


def _write(cache: StageCache, transcript: Transcript, logprobs: torch.Tensor, rows: list[bool]) -> None:
    """Choose one token per open row from log-probabilities ``[B, V]`` and make it known."""
    request = transcript.request
    scores = transcript.processed(logprobs[:, None], [[]] * len(rows), [0] * len(rows))
    tokens = request.choice.pick(scores, transcript.uniforms(FINAL, [[0]] * len(rows)))
    for row, new in enumerate(tokens.tolist()):
        if rows[row]:
            transcript.extend(row, new)
    cache.append(tokens, transcript.open_rows)
