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


def prompt_cache(model, request: GenerationRequest, segments: int | None = None) -> StageCache:
    """A cache for the first ``segments`` segments (all when None) with the prompts in it; nothing has been run yet."""
    return fill_cache(Engines.of(model).get(model, segments=segments), request)


def fill_cache(engine: Engine, request: GenerationRequest) -> StageCache:
    """A cache of one engine with the prompts of a request in it and room for the whole answer."""
    prompts = [request.prompt(row) for row in range(len(request.lengths))]
    return StageCache(engine, prompts, max(request.lengths) + request.max_new_tokens)


def decode_pool(
    model, request: GenerationRequest, heads: Sequence[int], weights: Sequence[float] | None, alpha: float
) -> Transcript:
    """Every token from the same weighted pool of the heads behind some segments; deeper layers are never run."""
    cache, transcript = prompt_cache(model, request, segments=max(heads) + 1), Transcript(request)
    while not transcript.done:
        decode_token(cache, transcript, heads, weights, alpha)
    return transcript


def decode_all(model, request: GenerationRequest) -> Transcript:
    """Plain cached decoding: the pool of all stages."""
    return decode_pool(model, request, model.config.stage_segments, None, model.config.poe_alpha)


def decode_wand(
    model, request: GenerationRequest, margins: Sequence[float], exit_margins: Sequence[float] = ()
) -> tuple[Transcript, list[list[int]]]:
    """Early exit. The deep layers of a token that left early run when a later token needs them, in one block with it.

    Args:
        model: the causal language model.
        request: what is wanted.
        margins: a token leaves after stage k when its first two scores are further apart, ``[K - 1]`` nats.
        exit_margins: the same for every exit; none to pass by the exits.

    Returns:
        the transcript and, per row, the number of stages that each new token used, one that it left at an exit
        included.
    """
    cache, transcript = prompt_cache(model, request), Transcript(request)
    used: list[list[int]] = [[] for _ in request.lengths]
    stops = _stops(model.config, margins, exit_margins)
    while not transcript.done:
        rows = undecided = transcript.open_rows
        logits: list[torch.Tensor] = []
        depth, chosen = [0] * len(rows), torch.empty(0)
        start = 0
        for segment, stage, margin, is_exit in stops:
            cache.advance(start, segment, undecided)
            head = cache.logits(segment, cache.last_known())[:, 0]
            logits += [] if is_exit else [head]
            scores = head.log_softmax(dim=-1) if is_exit else combine(logits, model.config.poe_alpha)
            # Rows that left earlier keep their scores; what the cache holds for them at this stage is older.
            stay = torch.tensor(undecided, device=scores.device)
            chosen = torch.where(stay[:, None], scores, chosen) if start else scores
            depth = [stage + 1 if part else before for part, before in zip(undecided, depth, strict=True)]
            if (start := segment + 1) == len(model.config.poe_cuts):
                break
            first, second = scores.topk(2, dim=-1).values.unbind(dim=-1)
            certain = (first - second > margin).tolist()
            undecided = [part and not leaves for part, leaves in zip(undecided, certain, strict=True)]
            if not any(undecided):
                break
        for row, part in enumerate(rows):
            used[row] += [depth[row]] if part else []
        _write(cache, transcript, chosen, rows)
    return transcript, used


def _stops(config, margins: Sequence[float], exit_margins: Sequence[float]) -> list[tuple[int, int, float, bool]]:
    """Where a token may leave: the segment, its stage, the margin that it takes, and whether it is an exit."""
    ends = config.stage_segments
    stops = [(end, stage, margin, False) for stage, (end, margin) in enumerate(zip(ends, [*margins, 0.0], strict=True))]
    for exit, margin in enumerate(exit_margins):
        segment = config.poe_cuts.index(config.poe_exit_layers[exit])
        stops.append((segment, sum(end < segment for end in ends), margin, True))
    return sorted(stops)


def decode_token(cache: StageCache, transcript: Transcript, heads: Sequence[int], weights, alpha: float) -> None:
    """Decode one token per open row from the pool of the heads behind some segments."""
    rows = transcript.open_rows
    cache.advance(0, max(heads), rows)
    _write(cache, transcript, cache.pool(heads, cache.last_known(), 1, weights, alpha)[:, 0], rows)


def _write(cache: StageCache, transcript: Transcript, logprobs: torch.Tensor, rows: list[bool]) -> None:
    """Choose one token per open row from log-probabilities ``[B, V]`` and make it known."""
    request = transcript.request
    scores = transcript.processed(logprobs[:, None], [[]] * len(rows), [0] * len(rows))
    tokens = request.choice.pick(scores, transcript.uniforms(FINAL, [[0]] * len(rows)))
    for row, new in enumerate(tokens.tolist()):
        if rows[row]:
            transcript.extend(row, new)
    cache.append(tokens, transcript.open_rows)
