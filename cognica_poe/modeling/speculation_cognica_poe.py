"""Self-speculation: a drafter proposes, the pool of all stages verifies, and the drafter that pays is found by trial.

One round of :func:`decode_speculative` for a row whose answer so far ends with the token a; d and e are drafts::

                     tokens known to the cache      what the pool says behind them
    before           ... a                          nothing: the last known token has passed no stage
    drafted          ... a d e                      behind a, behind d and, if the drafter lets it, behind e
    d kept, e not    ... a d x                      x, the pool's own token, stands behind what was kept
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import StoppingCriteriaList

from .drafting_cognica_poe import Drafts, make_drafter
from .engine_cognica_poe import Engines
from .loops_cognica_poe import decode_all, decode_token, prompt_cache
from .request_cognica_poe import GenerationRequest, Transcript
from .sampling_cognica_poe import ACCEPT, FINAL, accept_or_resample, count_leading

TRIAL_TOKENS = 48
"""New tokens of one trial."""

CANDIDATES = (("stage", 3), ("stage", 7), ("int8", 7), ("int4", 7), ("lookup", 7), ("lookup", 15))
"""Drafters and draft lengths that are tried, beside none at all. The pool looks at one token more than the drafts of a
stage: with it they fill steps of 4 and 8 lanes."""

Verifier = Callable[[Transcript, torch.Tensor, Drafts], tuple[torch.Tensor, torch.Tensor]]
"""A rule of acceptance, see :func:`verify`."""


@dataclass
class DraftCounts:
    """What self-speculation did, summed over rows."""

    proposed: int = 0  # drafted tokens that were verified; those behind an accepted end of the text do not count
    accepted: int = 0  # drafted tokens that were kept
    rounds: int = 0  # verifications

    def as_dict(self) -> dict:
        """With ``acceptance``, accepted / proposed, 0 when nothing was proposed."""
        return {"acceptance": self.accepted / self.proposed if self.proposed else 0.0, **dataclasses.asdict(self)}


def verify(transcript: Transcript, pool: torch.Tensor, drafts: Drafts) -> tuple[torch.Tensor, torch.Tensor]:
    """The exact rule: greedy text is that of plain decoding, sampled text follows the pool's distribution.

    Args:
        transcript: the answer so far.
        pool: log-probabilities ``[B, k+1, V]`` behind the last known token and behind every draft. Where the drafter's
            last draft was not run, its lane repeats the one before and its token is dropped.
        drafts: what was proposed.

    Returns:
        number of kept drafts ``[B]`` and the token ``[B]`` behind them.
    """
    choice, rows, k = transcript.request.choice, len(drafts.counts), drafts.tokens.shape[1]
    counts = torch.tensor(drafts.counts, device=pool.device)
    pool = transcript.processed(pool, drafts.tokens, [0] * rows)
    final = transcript.uniforms(FINAL, [range(k + 1)] * rows)
    if final is None:
        best = pool.argmax(dim=-1)
        kept = count_leading(best[:, :-1] == drafts.tokens, counts)
        return kept, best.gather(1, kept[:, None]).squeeze(1)
    if drafts.drawn_from is None:  # nobody drafted
        return torch.zeros_like(counts), choice.pick(pool[:, 0], final[:, 0])
    accept = transcript.uniforms(ACCEPT, [range(k)] * rows)
    assert accept is not None
    return accept_or_resample(choice.probabilities(pool), drafts.drawn_from, drafts.tokens, counts, accept, final)


def decode_speculative(
    model,
    request: GenerationRequest,
    draft_segment: int,
    k_draft: int,
    drafter: str = "stage",
    confidence: float = 0.0,
    verifier: Verifier = verify,
) -> tuple[Transcript, DraftCounts]:
    """A drafter proposes, the full pool verifies all proposals in one block; rows accept unequal numbers of drafts.

    Args:
        model: the causal language model.
        request: what is wanted.
        draft_segment: deepest segment that drafts, with the head behind it: that of a stage or of an exit.
        k_draft: drafts per round at most.
        drafter: name of a drafter, see :func:`make_drafter`, or ``auto``, see :func:`choose_drafter`.
        confidence: a row stops drafting with the first token whose draft probability is below this.
        verifier: which drafts to keep. Any but :func:`verify` is for timing: the text is no longer the model's.
    """
    counts = DraftCounts()
    if drafter == "auto":
        chosen, k_draft = choose_drafter(model, request, draft_segment, verifier)
        if chosen is None:
            return decode_all(model, request), counts
        drafter = chosen
    cache, transcript = prompt_cache(model, request), Transcript(request)
    heads, alpha = model.config.stage_segments, model.config.poe_alpha
    proposer = make_drafter(drafter, model, cache, transcript, draft_segment, confidence)
    extra = int(proposer.adds_token)
    decode_token(cache, transcript, heads, None, alpha)  # the token behind the prompt, as in plain decoding
    proposer.follow()
    while not transcript.done:
        # The cache knows the answer so far; in open rows its last token has passed no stage.
        rows, known, last = transcript.open_rows, cache.known, cache.last_known()
        # No more is asked for than the row may still receive, with room for the pool's own token.
        drafts = proposer.draft([min(k_draft, max(transcript.remaining(row) - extra, 0)) for row in range(len(rows))])
        # It also knows the drafts, which the drafting segments have passed up to the last. Without ``extra`` that one
        # waits for the next round, and only the deeper segments have work left.
        cache.advance(0 if extra else draft_segment + 1, heads[-1], rows)
        pool = cache.pool(heads, last, drafts.tokens.shape[1] + extra, None, alpha)
        kept, behind = verifier(transcript, pool if extra else torch.cat((pool, pool[:, -1:]), dim=1), drafts)
        numbers, grows = _write(transcript, kept, behind, drafts, not extra, counts)
        # Rejected drafts are forgotten, and the pool's own tokens made known where the row goes on: as at the start.
        cache.truncate([length + number for length, number in zip(known, numbers, strict=True)])
        cache.append(behind[:, None], grows)
        proposer.follow()
    return transcript, counts


def choose_drafter(
    model, request: GenerationRequest, draft_segment: int, verifier: Verifier = verify
) -> tuple[str | None, int]:
    """The fastest of no drafter and ``CANDIDATES`` for this model, batch size, kind of choice and rule of acceptance.

    Every candidate answers the beginning of the request twice, in turns, and the better time counts. A small advantage
    over plain decoding is no reason to speculate. The choice is remembered with the engines.

    Returns:
        drafter (None: decode plainly) and draft length.
    """
    measured = Engines.of(model).measured
    key = (len(request.lengths), request.choice.do_sample, draft_segment, verifier)
    if key not in measured:
        # Nobody is told of a trial's text, and the time that it takes ends no row of it.
        trial = dataclasses.replace(
            request,
            max_new_tokens=min(TRIAL_TOKENS, request.max_new_tokens),
            stopping=StoppingCriteriaList(),
            streamer=None,
        )
        narrow = model.config.hidden_size % 32 or model.config.intermediate_size % 32
        candidates = [(name, k) for name, k in CANDIDATES if not (narrow and name == "int4")]
        seconds: dict[tuple[str | None, int], float] = dict.fromkeys([(None, 0), *candidates], float("inf"))
        decode_all(model, dataclasses.replace(trial, max_new_tokens=1))  # arranging the weights is not decoding
        for _ in range(2):
            for name, k in seconds:
                began = time.perf_counter()
                if name is None:
                    decode_all(model, trial)
                else:
                    decode_speculative(model, trial, draft_segment, k, name, verifier=verifier)
                seconds[name, k] = min(seconds[name, k], time.perf_counter() - began)
        best = min(seconds, key=seconds.__getitem__)
        measured[key] = best if seconds[best] < 0.95 * seconds[None, 0] else (None, 0)
    return measured[key]


def _write(
    transcript: Transcript, kept: torch.Tensor, behind: torch.Tensor, drafts: Drafts, blind: bool, counts: DraftCounts
) -> tuple[list[int], list[bool]]:
    """Write a verifier's answer, in one copy to the host, into the rows that have not ended, and count it.

    A ``blind`` pool has no lane, and so no token of its own, behind a row's last draft.

    Returns:
        kept drafts of every row, and whether the pool's own token is known from now on.
    """
    host = torch.cat((kept[:, None], behind[:, None], drafts.tokens), dim=1).tolist()
    grows = [False] * len(host)
    for row, (number, token, *tokens) in enumerate(host):
        if transcript.ended[row]:
            continue
        proposed = drafts.counts[row]
        has_token = not blind or number < proposed
        written = transcript.extend(row, tokens[:number] + [token] * has_token)
        counts.rounds += 1
        counts.accepted += min(written, number)
        # Where the text ended within the kept drafts, those behind its end were never asked for.
        counts.proposed += written if written <= number else proposed
        grows[row] = has_token and not transcript.ended[row]
    return [number for number, *_ in host], grows
