"""The plain decoding loops over :class:`StageCache`: a fixed pool of stages, and early exit.

Each takes the model and a checked :class:`GenerationRequest` and returns the :class:`Transcript`. Tokens stay on the
model's device; one copy to the host per step, and one per stage with early exit, serves decisions, end tokens and
streaming.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .engine_cognica_poe import Engine, Engines
from .request_cognica_poe import GenerationRequest, Transcript
from .sampling_cognica_poe import FINAL, combine
from .stages_cognica_poe import StageCache


def prompt_cache(model, request: GenerationRequest, stages: int | None = None) -> StageCache:
    """A cache for the first ``stages`` stages (all when None) with the prompts in it; nothing has been run yet."""
    return fill_cache(Engines.of(model).get(model, stages=stages), request)


def fill_cache(engine: Engine, request: GenerationRequest) -> StageCache:
    """A cache of one engine with the prompts of a request in it and room for the whole answer."""
    prompts = [request.prompt(row) for row in range(len(request.lengths))]
    return StageCache(engine, prompts, max(request.lengths) + request.max_new_tokens)


def decode_pool(
    model, request: GenerationRequest, stages: Sequence[int], weights: Sequence[float] | None, alpha: float
) -> Transcript:
    """Every token from the same weighted pool of ``stages``; layers above the deepest of them are never run."""
    cache, transcript = prompt_cache(model, request, stages=max(stages) + 1), Transcript(request)
    while not transcript.done:
        decode_token(cache, transcript, stages, weights, alpha)
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
    used: list[list[int]] = [[] for _ in request.lengths]
    while not transcript.done:
        rows = undecided = transcript.open_rows
        logits: list[torch.Tensor] = []
        depth, chosen = [0] * len(rows), torch.empty(0)
        for stage in range(model.config.num_stages):
            cache.advance(stage, stage, undecided)
            logits.append(cache.logits(stage, cache.last_known())[:, 0])
            pool = combine(logits, model.config.poe_alpha)
            # Rows that left earlier keep their pool; what the cache holds for them at this stage is older.
            stay = torch.tensor(undecided, device=pool.device)
            chosen = torch.where(stay[:, None], pool, chosen) if stage else pool
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


def decode_token(cache: StageCache, transcript: Transcript, stages: Sequence[int], weights, alpha: float) -> None:
    """Decode one token per open row from the pool of ``stages``."""
    rows = transcript.open_rows
    cache.advance(0, max(stages), rows)
    _write(cache, transcript, cache.pool(stages, cache.last_known(), 1, weights, alpha)[:, 0], rows)


def _write(cache: StageCache, transcript: Transcript, logprobs: torch.Tensor, rows: list[bool]) -> None:
    """Choose one token per open row from log-probabilities ``[B, V]`` and make it known."""
    request = transcript.request
    scores = transcript.processed(logprobs[:, None], [[]] * len(rows), [0] * len(rows))
    tokens = request.choice.pick(scores, transcript.uniforms(FINAL, [[0]] * len(rows)))
    for row, new in enumerate(tokens.tolist()):
        if rows[row]:
            transcript.extend(row, new)
    cache.append(tokens, transcript.open_rows)
