"""Drafters: who proposes the tokens that the full pool verifies. All are exact, they differ in cost.

==========  ========================================================================================================
stage       the first stages of the model itself; what they compute is reused when verifying
int8, int4  a copy of the first stages with quantised weights, on a cache of its own
lookup      n-grams of the text so far, checked by the first stages in blocks: the tokens of ``stage`` for fewer passes
==========  ========================================================================================================

Each draws from the head behind a segment of layers, that of a stage or of an exit inside one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import nn

from .engine_cognica_poe import Engines
from .loops_cognica_poe import fill_cache
from .request_cognica_poe import Transcript, pad_rows
from .sampling_cognica_poe import DRAFT, inverse_cdf
from .stages_cognica_poe import StageCache

DRAFTERS = ("stage", "int8", "int4", "lookup")
"""Names of the drafters."""


@dataclass(frozen=True)
class Drafts:
    """What a drafter proposes in one round."""

    tokens: torch.Tensor  # [B, k] int64; a row's drafts come first, the rest is padding
    drawn_from: torch.Tensor | None  # distributions [B, k, V] that drew the tokens; None when greedy
    counts: list[int]  # drafts of every row


class Drafter(Protocol):
    """What a round of speculation asks of a drafter."""

    adds_token: bool
    """Whether the pool may run behind a round's last draft too, which gives one more token where all are kept."""

    def draft(self, limits: list[int]) -> Drafts:
        """Draft at most ``limits[r]`` tokens behind the known ones of row r, and make them known to the cache."""

    def follow(self) -> None:
        """Take note that the cache forgot the rejected drafts and that the answer grew."""


def make_drafter(
    name: str, model, cache: StageCache, transcript: Transcript, segment: int, confidence: float
) -> Drafter:
    """A drafter by name for one generation over ``cache``, with the head behind ``segment``."""
    if name == "lookup":
        return LookupDrafter(cache, transcript, segment, confidence)
    own = cache
    if name != "stage":
        own = fill_cache(Engines.attached(model).get(model, name, segment + 1), transcript.request)
    return StageDrafter(own, cache, transcript, segment, confidence)


class StageDrafter:
    """Drafts token by token with the segments up to ``segment`` of ``own``, which may be ``cache`` itself.

    Args:
        own: the cache that drafting runs on.
        cache: the cache that verifies; drafts are made known there.
        transcript: the answer so far.
        segment: deepest segment that drafts.
        confidence: stop a row with the first draft of lower probability. That draft is kept: dropping a token for what
            it is would bend the distribution.
    """

    adds_token = True

    def __init__(self, own: StageCache, cache: StageCache, transcript: Transcript, segment: int, confidence: float):
        self.own, self.cache, self.transcript = own, cache, transcript
        self.segment, self.confidence = segment, confidence

    def draft(self, limits: list[int]) -> Drafts:
        """See :class:`Drafter`."""
        own, drafts, drawn_from = self.own, self.own.ids.new_zeros(len(limits), 0), []
        counts, going = [0] * len(limits), [limit > 0 for limit in limits]
        while any(going):
            # In rows that go on, the last known token is the only one that the drafting segments have not seen.
            own.advance(0, self.segment, going)
            scores = own.logits(self.segment, own.last_known())
            tokens, probabilities, sure = draw(self.transcript, scores, drafts, counts, self.confidence)
            drafts = torch.cat((drafts, tokens), dim=1)
            drawn_from += [] if probabilities is None else [probabilities]
            own.append(tokens, going)
            if own is not self.cache:
                self.cache.append(tokens, going)
            counts = [count + part for count, part in zip(counts, going, strict=True)]
            states = zip(going, counts, limits, sure, strict=True)
            going = [part and count < limit and stays for part, count, limit, (stays,) in states]
        return Drafts(drafts, torch.cat(drawn_from, dim=1) if drawn_from else None, counts)

    def follow(self) -> None:
        """See :class:`Drafter`; a cache of its own learns what the verifying one knows."""
        if self.own is self.cache:
            return
        rows = self.transcript.open_rows
        self.own.truncate([known - part for known, part in zip(self.cache.known, rows, strict=True)])
        last = torch.tensor(self.cache.last_known(), device=self.cache.ids.device)[:, None]
        self.own.append(self.cache.ids.gather(1, last), rows)


@dataclass
class LookupRow:
    """One row during a round of :class:`LookupDrafter`."""

    limit: int  # drafts at most
    going: bool  # whether drafting goes on
    drafts: list[int] = field(default_factory=list)  # what the stage has drawn so far
    drawn_from: list[torch.Tensor] = field(default_factory=list)  # their distributions [n, V] per check, when sampling
    guesses: list[int] = field(default_factory=list)  # tokens to check, behind the drafts
    confirmed: int = 0  # leading guesses that the last check made drafts
    own: int | None = None  # the draft behind these, drawn where a guess was wrong or none was left

    def take(self, drawn: list[int], probabilities: torch.Tensor | None, sure: list[bool]) -> None:
        """Turn what a check found into drafts.

        Args:
            drawn: what the stage draws behind the drafts and behind every guess.
            probabilities: the distributions ``[n, V]`` that it draws from; None when greedy.
            sure: whether drafting may go on behind each.
        """
        # A token counts as long as everything before it is what the stage itself would have written.
        agreeing = next((i for i, guess in enumerate(self.guesses) if guess != drawn[i]), len(self.guesses))
        count = min(agreeing + 1, self.limit - len(self.drafts)) if self.going else 0
        count = next((i + 1 for i in range(count) if not sure[i]), count)
        self.drafts += drawn[:count]
        if probabilities is not None:
            self.drawn_from.append(probabilities[:count])
        self.going = self.going and len(self.drafts) < self.limit and sure[count - 1]
        self.confirmed, self.own = min(count, agreeing), drawn[agreeing] if count > agreeing else None


class LookupDrafter:
    """Guesses from earlier n-grams; the drafting stages run over guesses in blocks and keep what they would have drawn.

    The tokens, and when sampling their distributions, are those of :class:`StageDrafter` on the same random numbers.
    The last draft of a round is not run through the drafting stages for the sake of the one token behind it: the first
    check of the next round does so beside its guesses.
    """

    adds_token = False

    def __init__(self, cache: StageCache, transcript: Transcript, segment: int, confidence: float):
        self.cache, self.transcript = cache, transcript
        self.segment, self.confidence = segment, confidence
        request = transcript.request
        self.texts = [NgramText(request.prompt(row).tolist()) for row in range(len(request.lengths))]

    def draft(self, limits: list[int]) -> Drafts:
        """See :class:`Drafter`."""
        rows = [LookupRow(limit, going=limit > 0) for limit in limits]
        while any(row.going for row in rows):
            # Between checks the cache knows the answer and the drafts, and in rows that go on the last of these tokens
            # is the only one that the drafting stages have not seen.
            known = list(self.cache.known)
            self._guess(rows)
            drawn, probabilities, sure = self._check(rows, known)
            for number, row in enumerate(rows):
                row.take(drawn[number], None if probabilities is None else probabilities[number], sure[number])
            self._settle(rows, known)
        tokens = pad_rows([row.drafts for row in rows], 0).to(self.cache.ids.device)
        pieces = [torch.cat(row.drawn_from) for row in rows if row.drawn_from]  # of all rows, or of none when greedy
        drawn_from = nn.utils.rnn.pad_sequence(pieces, batch_first=True) if pieces else None
        return Drafts(tokens, drawn_from, [len(row.drafts) for row in rows])

    def _guess(self, rows: list[LookupRow]) -> None:
        """Look up what may stand behind the drafts. Guesses fill the lanes of one step, which costs as much without."""
        lanes = self.cache.engine.width - 1
        for text, row in zip(self.texts, rows, strict=True):
            row.guesses = text.guess(row.drafts, min(row.limit - len(row.drafts), lanes)) if row.going else []

    def _check(self, rows: list[LookupRow], known: list[int]):
        """What the stage draws behind the last known token and behind every guess, see :func:`draw`."""
        cache, guesses = self.cache, [row.guesses for row in rows]
        width = max(map(len, guesses))
        if width:
            cache.append(pad_rows(guesses, 0).to(cache.ids.device), [len(guess) for guess in guesses])
        cache.advance(0, self.segment, [row.going for row in rows])
        scores = cache.logits(self.segment, [count - 1 for count in known], width + 1)
        ahead = [row.drafts + row.guesses for row in rows]
        first = [len(row.drafts) for row in rows]
        tokens, probabilities, sure = draw(self.transcript, scores, ahead, first, self.confidence)
        return tokens.tolist(), probabilities, sure

    def _settle(self, rows: list[LookupRow], known: list[int]) -> None:
        """Forget the guesses that did not become drafts; make known what the stage drew itself."""
        cache = self.cache
        cache.truncate([count + row.confirmed for count, row in zip(known, rows, strict=True)])
        tokens = torch.tensor([[row.own or 0] for row in rows], device=cache.ids.device)
        cache.append(tokens, [row.own is not None for row in rows])

    def follow(self) -> None:
        """See :class:`Drafter`; n-grams learn the tokens that were added to the answer."""
        for text, length, row in zip(self.texts, self.transcript.request.lengths, self.transcript.rows, strict=True):
            text.extend(row[len(text.tokens) - length :])


class NgramText:
    """A growing text that remembers what last followed every n-gram of 1 to 3 tokens."""

    LONGEST = 3

    def __init__(self, tokens: list[int]):
        self.tokens: list[int] = []
        self.after: dict[tuple[int, ...], int] = {}
        self.extend(tokens)

    def extend(self, tokens: list[int]) -> None:
        """Append ``tokens``."""
        for token in tokens:
            end = len(self.tokens)
            for n in range(1, min(self.LONGEST, end) + 1):
                self.after[tuple(self.tokens[end - n : end])] = end
            self.tokens.append(token)

    def guess(self, ahead: list[int], limit: int) -> list[int]:
        """At most ``limit`` tokens to follow the text and ``ahead``: what followed the longest known n-gram."""
        text = self.tokens[-self.LONGEST :] + ahead
        grams = (tuple(text[len(text) - n :]) for n in range(min(self.LONGEST, len(text)), 0, -1))
        start = next((self.after[gram] for gram in grams if gram in self.after), None)
        guess: list[int] = []
        if start is None:
            return guess
        for place in range(start, start + limit):
            beyond = place - len(self.tokens)
            # Behind its own end the text goes on with what is being guessed: a loop is followed round and round.
            guess.append(self.tokens[place] if beyond < 0 else (ahead + guess)[beyond])
        return guess


def draw(
    transcript: Transcript, scores: torch.Tensor, ahead: torch.Tensor | list, first: list[int], confidence: float
) -> tuple[torch.Tensor, torch.Tensor | None, list[list[bool]]]:
    """Draw a draft at every lane.

    Args:
        transcript: the answer so far.
        scores: a stage's logits ``[B, n, V]``.
        ahead: tokens of every row behind the answer so far, of which lane i has seen the first ``first[r] + i``.
        first: see ``ahead``; also the place of lane 0's random number.
        confidence: see :class:`StageDrafter`.

    Returns:
        tokens ``[B, n]``, their distributions ``[B, n, V]`` (None when greedy), and per row and lane whether drafting
        may go on behind it.
    """
    request, lanes = transcript.request, range(scores.shape[1])
    if not (request.choice.do_sample or request.processors or confidence):  # normalising moves no maximum
        tokens, probabilities = scores.argmax(dim=-1), None
        if not request.eos:
            return tokens, probabilities, [[True] * len(lanes)] * len(first)
        return tokens, probabilities, [[token not in request.eos for token in row] for row in tokens.tolist()]
    scores = transcript.processed(scores.log_softmax(dim=-1), ahead, first)
    uniform, probabilities = transcript.uniforms(DRAFT, [[place + i for i in lanes] for place in first]), None
    if uniform is None:
        tokens = scores.argmax(dim=-1)
    else:
        probabilities = request.choice.probabilities(scores)
        tokens = inverse_cdf(probabilities, uniform)
    sure = torch.ones_like(tokens, dtype=torch.bool)
    if confidence > 0:
        weights = scores.softmax(dim=-1) if probabilities is None else probabilities
        sure = weights.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) >= confidence
    for end in request.eos:
        sure = sure & (tokens != end)
    return tokens, probabilities, sure.tolist()
