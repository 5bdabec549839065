"""The decoding loops over :class:`StageCache`: a fixed pool of stages, early exit, self-speculation.

Each takes the model and a checked :class:`GenerationRequest` and returns the :class:`Transcript`. Tokens stay on the
model's device; one copy to the host per step (per round when speculating, also per stage with early exit) serves
decisions, end tokens and streaming.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

from .request_cognica_poe import GenerationRequest, Transcript
from .sampling_cognica_poe import ACCEPT, DRAFT, FINAL, accept_or_resample, agreeing_drafts, combine, inverse_cdf
from .stages_cognica_poe import StageCache


def prompt_cache(model, request: GenerationRequest) -> StageCache:
    """A cache with room for the whole answer; nothing has been run yet."""
    prompts = [request.prompt(row) for row in range(len(request.lengths))]
    return StageCache(model, prompts, max(request.lengths) + request.max_new_tokens)


def decode_pool(
    model, request: GenerationRequest, stages: Sequence[int], weights: Sequence[float] | None, alpha: float
) -> Transcript:
    """Every token from the same weighted pool of ``stages``; layers above the deepest of them are never run."""
    cache, transcript = prompt_cache(model, request), Transcript(request)
    while not transcript.done:
        rows = _open(transcript)
        cache.advance(0, max(stages), rows)
        logits = [_last_logits(model, cache, stage) for stage in stages]
        _write(cache, transcript, combine(logits, alpha, weights), rows)
    return transcript


def decode_wand(
    model, request: GenerationRequest, bounds: Sequence[float], safety: float
) -> tuple[Transcript, list[list[int]]]:
    """Early exit. The deep layers of a token that left early run when a later token needs them, in one block with it.

    Returns the transcript and, per row, the number of stages that each new token used.
    """
    cache, transcript = prompt_cache(model, request), Transcript(request)
    used = [[] for _ in request.lengths]
    while not transcript.done:
        rows = undecided = _open(transcript)
        logits, depth, chosen = [], [0] * len(rows), None
        for stage in range(model.config.num_stages):
            cache.advance(stage, stage, undecided)
            logits.append(_last_logits(model, cache, stage))
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

    def as_dict(self) -> dict:
        """With ``acceptance``, accepted / proposed, 0 when nothing was proposed."""
        return {"acceptance": self.accepted / self.proposed if self.proposed else 0.0, **asdict(self)}


def decode_speculative(
    model, request: GenerationRequest, draft_stage: int, k_draft: int
) -> tuple[Transcript, DraftCounts]:
    """Draft with one stage, verify all drafts in one block with the full pool.

    Verifying runs the drafting stages on the last draft only and the deeper stages on the whole block; what the
    drafts computed is reused. Rejected tokens are forgotten by length. Rows accept unequal numbers of drafts.
    """
    cache, transcript, counts = prompt_cache(model, request), Transcript(request), DraftCounts()
    while not transcript.done:
        rows, start = _open(transcript), list(cache.known)
        asked = [min(k_draft, max(transcript.remaining(row) - 1, 0)) for row in range(len(rows))]
        drafts, drawn_from = _draft(model, cache, transcript, draft_stage, asked)
        cache.advance(0, model.config.num_stages - 1, rows)
        before = [length - 1 for length in start]
        states = [cache.read(stage + 1, before, max(asked) + 1) for stage in range(model.config.num_stages)]
        pool = combine([model.stage_head(x, k) for k, x in enumerate(states)], model.config.poe_alpha)
        kept, following = _verify(transcript, pool, drafts, drawn_from, torch.tensor(asked, device=pool.device))
        host = torch.cat((kept[:, None], following[:, None], drafts), dim=1).tolist()
        for row, (accepted, token, *proposals) in enumerate(host):
            if not rows[row]:
                continue
            written = transcript.extend(row, [*proposals[:accepted], token])
            counts.rounds += 1
            counts.accepted += min(written, accepted)
            counts.proposed += written if written <= accepted else asked[row]
        cache.truncate([length + accepted for length, (accepted, *_) in zip(start, host, strict=True)])
        cache.append(following, _open(transcript))
    return transcript, counts


def _draft(
    model, cache: StageCache, transcript: Transcript, stage: int, asked: list[int]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Draft ``asked[r]`` tokens per row: ids ``[B, k]`` and, when sampling, what drew them ``[B, k, V]``."""
    choice, drafts, drawn_from = transcript.request.choice, [], []
    for i in range(max(asked)):
        rows = [i < count for count in asked]
        cache.advance(0, stage, rows)
        scores = _last_logits(model, cache, stage).log_softmax(dim=-1)
        if choice.do_sample:
            drawn_from.append(choice.probabilities(scores))
            drafts.append(inverse_cdf(drawn_from[-1], _uniform(transcript, DRAFT, i)))
        else:
            drafts.append(scores.argmax(dim=-1))
        cache.append(drafts[-1], rows)
    if not drafts:
        return cache.ids.new_zeros(len(asked), 0), None
    return torch.stack(drafts, dim=1), torch.stack(drawn_from, dim=1) if choice.do_sample else None


def _verify(
    transcript: Transcript,
    pool: torch.Tensor,
    drafts: torch.Tensor,
    drawn_from: torch.Tensor | None,
    asked: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Number of kept drafts ``[B]`` and the token ``[B]`` after them, from the pool ``[B, k+1, V]``."""
    choice, k = transcript.request.choice, drafts.shape[1]
    if not choice.do_sample:
        best = pool.argmax(dim=-1)
        kept = agreeing_drafts(best, drafts, asked)
        return kept, best.gather(1, kept[:, None]).squeeze(1)
    final = torch.stack([_uniform(transcript, FINAL, i) for i in range(k + 1)], dim=1)
    if k == 0:
        return torch.zeros_like(asked), choice.pick(pool[:, 0], final[:, 0])
    accept = torch.stack([_uniform(transcript, ACCEPT, i) for i in range(k)], dim=1)
    return accept_or_resample(choice.probabilities(pool), drawn_from, drafts, asked, accept, final)


def _open(transcript: Transcript) -> list[bool]:
    return [not ended for ended in transcript.ended]


def _last_logits(model, cache: StageCache, stage: int) -> torch.Tensor:
    """Logits ``[B, V]`` of a stage for the last known token; meaningless in rows that have not run it yet."""
    return model.stage_head(cache.read(stage + 1, [known - 1 for known in cache.known])[:, 0], stage)


def _uniform(transcript: Transcript, purpose: int, ahead: int = 0) -> torch.Tensor | None:
    """Random numbers ``[B]`` for the token that stands ``ahead`` places after the next one of every row."""
    table = transcript.request.uniforms
    if table is None:
        return None
    places = [min(len(row) + ahead, table.shape[1] - 1) for row in transcript.rows]
    return table[torch.arange(len(places), device=table.device), torch.tensor(places, device=table.device), purpose]


def _write(cache: StageCache, transcript: Transcript, logprobs: torch.Tensor, rows: list[bool]) -> None:
    """Choose one token per open row from log-probabilities ``[B, V]`` and make it known."""
    tokens = transcript.request.choice.pick(logprobs, _uniform(transcript, FINAL))
    for row, token in enumerate(tokens.tolist()):
        if rows[row]:
            transcript.extend(row, [token])
    cache.append(tokens, _open(transcript))
