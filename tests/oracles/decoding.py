"""The generation modes written as slowly and plainly as possible: every token re-runs the whole text, row by row.

No cache, no padding, no batches; shared with the fast modes are the check of a request and the choice of a token.
Every function takes the model and a :class:`GenerationRequest` and returns one list of new ids per row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from cognica_poe.modeling.request_cognica_poe import GenerationRequest
from cognica_poe.modeling.sampling_cognica_poe import ACCEPT, DRAFT, FINAL, combine, inverse_cdf


@torch.no_grad()
def stage_logits(model, ids: list[int]) -> list[torch.Tensor]:
    """Capped logits ``[T, V]`` of all stages for one text."""
    text = torch.tensor([ids], device=model.device)
    return [logits[0] for logits in model.all_logits(text)[0]]


@torch.no_grad()
def exit_logits(model, ids: list[int]) -> list[torch.Tensor]:
    """Capped logits ``[T, V]`` of all exits for one text."""
    text = torch.tensor([ids], device=model.device)
    return [model.forward_exit(text, layer)[0] for layer in model.config.poe_exit_layers]


def decode(
    model,
    request: GenerationRequest,
    rule: Callable[[list[torch.Tensor]], torch.Tensor],
    heads: Callable[..., list[torch.Tensor]] = stage_logits,
) -> list[list[int]]:
    """Generate with ``rule``: from the logits ``[V]`` of ``heads`` to the log-probabilities ``[V]`` to choose from."""
    rows = []
    for row, length in enumerate(request.lengths):
        text = request.prompt(row).tolist()
        while not _ended(request, row, text[length:]):
            scores = rule([logits[-1] for logits in heads(model, text)])
            text.append(_pick(request, _processed(request, row, text, scores), row, len(text) - length, FINAL))
        rows.append(text[length:])
    return rows


def prefix(model, request: GenerationRequest, max_stages: int) -> list[list[int]]:
    """Pool of the first ``max_stages`` stages."""
    return decode(model, request, lambda logits: combine(logits[:max_stages], model.config.poe_alpha))


def single_stage(model, request: GenerationRequest, stage: int) -> list[list[int]]:
    """One stage's own head."""
    return decode(model, request, lambda logits: logits[stage].log_softmax(dim=-1))


def single_exit(model, request: GenerationRequest, exit: int) -> list[list[int]]:
    """One exit's own head."""
    return decode(model, request, lambda logits: logits[exit].log_softmax(dim=-1), exit_logits)


def composition(
    model, request: GenerationRequest, stages: Sequence[int], weights: Sequence[float] | None
) -> list[list[int]]:
    """Weighted pool of chosen stages; weights are taken as given, without ``poe_alpha``."""
    alpha = model.config.poe_alpha if weights is None else 0.0
    return decode(model, request, lambda logits: combine([logits[stage] for stage in stages], alpha, weights))


def wand(
    model, request: GenerationRequest, bounds: Sequence[float], safety: float
) -> tuple[list[list[int]], list[list[int]]]:
    """Early exit: leave after stage k when the margin of the pool so far exceeds what the rest may still move."""
    used: list[list[int]] = [[]]

    def rule(logits: list[torch.Tensor]) -> torch.Tensor:
        for stage in range(len(logits)):
            pool = combine(logits[: stage + 1], model.config.poe_alpha)
            first, second = pool.topk(2).values.tolist()
            if stage == len(logits) - 1 or first - second > safety * sum(bounds[stage:]):
                break
        used[-1].append(stage + 1)
        return pool

    rows = decode(model, request, rule)
    flat, counts = used[0], []
    for row in rows:
        counts.append(flat[: len(row)])
        flat = flat[len(row) :]
    return rows, counts


def wand_with_exits(
    model, request: GenerationRequest, bounds: Sequence[float], exit_bounds: Sequence[float], safety: float
) -> tuple[list[list[int]], list[list[int]]]:
    """Early exit at exits as well: their own margin, against their bound and those of the transitions to come."""
    used, config, depth = [], model.config, 0
    stops: list[tuple[int, int, int | None]] = []
    for stage, layers in enumerate(config.poe_stage_layers):
        inside = [e for e, layer in enumerate(config.poe_exit_layers) if depth < layer < depth + layers]
        depth += layers
        stops += [(config.poe_exit_layers[e], stage, e) for e in inside] + [(depth, stage, None)]

    def rule(logits: list[torch.Tensor]) -> torch.Tensor:
        for depth, stage, exit in stops:
            if exit is None:
                scores, rest = combine(logits[: stage + 1], config.poe_alpha), sum(bounds[stage:])
            else:
                scores = logits[config.num_stages + exit].log_softmax(dim=-1)
                rest = exit_bounds[exit] + sum(bounds[stage:])
            first, second = scores.topk(2).values.tolist()
            if depth == config.num_hidden_layers or first - second > safety * rest:
                break
        used.append(stage + 1)
        return scores

    rows = decode(model, request, rule, lambda model, text: stage_logits(model, text) + exit_logits(model, text))
    counts = []
    for row in rows:
        counts.append(used[: len(row)])
        used = used[len(row) :]
    return rows, counts


def speculative(
    model,
    request: GenerationRequest,
    draft_stage: int,
    k_draft: int,
    adds_token: bool = True,
    drafting: Callable[..., list[torch.Tensor]] = stage_logits,
) -> tuple[list[list[int]], dict]:
    """Draft with one stage, or with one exit where ``drafting`` gives these, and verify with the full pool.

    Greedy, or by the accept/residual rule when sampling.

    The token behind the prompt comes from the full pool, and a row stops drafting behind a drafted end of the text.
    With ``adds_token`` the pool gives one more token where it kept all drafts.
    """
    rows, proposed, accepted, rounds = [], 0, 0, 0
    for row, length in enumerate(request.lengths):
        text = request.prompt(row).tolist()
        first = combine([logits[-1] for logits in stage_logits(model, text)], model.config.poe_alpha)
        text.append(_pick(request, _processed(request, row, text, first), row, 0, FINAL))
        while not _ended(request, row, text[length:]):
            done = len(text) - length
            k = min(k_draft, request.max_new_tokens - done - adds_token)
            drafts, draft_scores = [], []
            while len(drafts) < k and not (drafts and drafts[-1] in request.eos):
                scores = drafting(model, text + drafts)[draft_stage][-1].log_softmax(dim=-1)
                draft_scores.append(_processed(request, row, text + drafts, scores))
                drafts.append(_pick(request, draft_scores[-1], row, done + len(drafts), DRAFT))
            pool = combine(stage_logits(model, text + drafts), model.config.poe_alpha)[len(text) - 1 :]
            new = []
            for i, draft in enumerate([*drafts, *[None] * adds_token]):
                scores = _processed(request, row, text + drafts[:i], pool[i])
                drawn_from = request.choice.probabilities(draft_scores[i]) if draft is not None else None
                token = _verify(request, scores, draft, drawn_from, row, done + i)
                new.append(token)
                accepted += token == draft
                ended = _ended(request, row, text[length:] + new)
                if token != draft or ended:
                    break
            # Drafts after a rejected one were proposed too; those after an accepted end of the text were not.
            proposed += len(new) if ended and token == draft else len(drafts)
            rounds += 1
            text += new
        rows.append(text[length:])
    return rows, {
        "acceptance": accepted / proposed if proposed else 0.0,
        "proposed": proposed,
        "accepted": accepted,
        "rounds": rounds,
    }


def _processed(request: GenerationRequest, row: int, text: list[int], scores: torch.Tensor) -> torch.Tensor:
    """Scores ``[V]`` of the token behind ``text`` after the logits processors."""
    if not request.processors:
        return scores
    return request.processors[row](torch.tensor([text], device=scores.device), scores[None].clone())[0]


def _verify(request: GenerationRequest, pool, draft: int | None, draft_probabilities, row: int, position: int) -> int:
    """The token that the verifier puts at one position: the draft itself when it is kept."""
    if draft is None:
        return _pick(request, pool, row, position, FINAL)
    if not request.choice.do_sample:
        return int(pool.argmax())
    target = request.choice.probabilities(pool)
    ratio = float(target[draft] / draft_probabilities[draft])
    if float(request.uniforms[row, position, ACCEPT]) < ratio:
        return draft
    residual = (target - draft_probabilities).clamp(min=0)
    return int(inverse_cdf(residual, request.uniforms[row, position, FINAL]))


def _pick(request: GenerationRequest, logprobs: torch.Tensor, row: int, position: int, purpose: int) -> int:
    uniform = request.uniforms[row, position, purpose] if request.choice.do_sample else None
    return int(request.choice.pick(logprobs, uniform))


def _ended(request: GenerationRequest, row: int, new: list[int]) -> bool:
    return bool(new) and request.ends(row, new)
