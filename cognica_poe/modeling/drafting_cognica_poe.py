"""Drafters: who proposes the tokens that the full pool verifies. All are exact, they differ in cost.

==========  ========================================================================================================
stage       the first stages of the model itself; what they compute is reused when verifying
int8, int4  a copy of the first stages with quantised weights, on a cache of its own
lookup      n-grams of the text so far, checked by the first stages in blocks: the tokens of ``stage`` for fewer passes
==========  ========================================================================================================
"""

from __future__ import annotations

import torch

from .engine_cognica_poe import Engines
from .request_cognica_poe import Transcript
from .sampling_cognica_poe import DRAFT
from .stages_cognica_poe import StageCache

DRAFTERS = ("stage", "int8", "int4", "lookup")
"""Names of the drafters."""

Drafts = tuple[torch.Tensor, torch.Tensor | None, list[int]]


def make_drafter(name: str, model, cache: StageCache, transcript: Transcript, stage: int, confidence: float):
    """A drafter by name for one generation over ``cache``."""
    if name == "lookup":
        return LookupDrafter(cache, transcript, stage, confidence)
    if name == "stage":
        return StageDrafter(cache, cache, transcript, stage, confidence)
    engine = Engines.attached(model).get(model, name, stage + 1)
    request = transcript.request
    prompts = [request.prompt(row) for row in range(len(request.lengths))]
    own = StageCache(engine, prompts, max(request.lengths) + request.max_new_tokens)
    return StageDrafter(own, cache, transcript, stage, confidence)


class StageDrafter:
    """Drafts token by token with the stages up to ``stage`` of ``own``, which may be ``cache`` itself.

    Args:
        own: the cache that drafting runs on.
        cache: the cache that verifies; drafts are made known there.
        transcript: the answer so far.
        stage: deepest stage that drafts.
        confidence: stop a row with the first draft of lower probability. That draft is kept: dropping a token for what
            it is would bend the distribution.
    """

    adds_token = True

    def __init__(self, own: StageCache, cache: StageCache, transcript: Transcript, stage: int, confidence: float):
        self.own, self.cache, self.transcript = own, cache, transcript
        self.stage, self.confidence = stage, confidence

    def draft(self, limits: list[int]) -> Drafts:
        """Draft at most ``limits[r]`` tokens per row behind the known ones, and make them known.

        Returns:
            drafts ``[B, k]``, the distributions ``[B, k, V]`` that drew them (None when greedy), drafts per row.
        """
        own, drafts, drawn_from = self.own, self.own.ids.new_zeros(len(limits), 0), []
        counts, going = [0] * len(limits), [limit > 0 for limit in limits]
        while any(going):
            own.advance(0, self.stage, going)
            scores = own.logits(self.stage, [known - 1 for known in own.known])
            tokens, probabilities, sure = draw(self.transcript, scores, drafts, counts, self.confidence)
            drafts = torch.cat((drafts, tokens), dim=1)
            drawn_from.append(probabilities)
            own.append(tokens, going)
            if own is not self.cache:
                self.cache.append(tokens, going)
            counts = [count + part for count, part in zip(counts, going, strict=True)]
            going = [
                part and count < limit and stays[0]
                for part, count, limit, stays in zip(going, counts, limits, sure, strict=True)
            ]
        sampled = drawn_from and drawn_from[0] is not None
        return drafts, torch.cat(drawn_from, dim=1) if sampled else None, counts

    def follow(self) -> None:
        """Take note that the verifying cache forgot its rejected drafts and learnt the token behind them."""
        if self.own is self.cache:
            return
        rows = self.transcript.open_rows
        self.own.truncate([known - part for known, part in zip(self.cache.known, rows, strict=True)])
        last = torch.tensor([known - 1 for known in self.cache.known], device=self.cache.ids.device)[:, None]
        self.own.append(self.cache.ids.gather(1, last), rows)


class LookupDrafter:
    """Guesses from earlier n-grams; the drafting stages run over guesses in blocks and keep what they would have drawn.

    The tokens, and when sampling their distributions, are those of :class:`StageDrafter` on the same random numbers.
    The last draft of a round is not run through the drafting stages for the sake of the one token behind it: the first
    check of the next round does so beside its guesses.
    """

    adds_token = False

    def __init__(self, cache: StageCache, transcript: Transcript, stage: int, confidence: float):
        self.cache, self.transcript = cache, transcript
        self.stage, self.confidence = stage, confidence
        request = transcript.request
        self.texts = [NgramText(request.prompt(row).tolist()) for row in range(len(request.lengths))]

    def draft(self, limits: list[int]) -> Drafts:
        """As :meth:`StageDrafter.draft`."""
        drafts, drawn_from = [[] for _ in limits], [[] for _ in limits]
        going = [limit > 0 for limit in limits]
        while any(going):
            # Guesses fill the lanes of one step, which costs the same with one token in it.
            lanes = self.cache.engine.width - 1
            guesses = [
                text.guess(row, min(limit - len(row), lanes)) if part else []
                for text, row, limit, part in zip(self.texts, drafts, limits, going, strict=True)
            ]
            tokens, probabilities, sure = self._check(drafts, guesses, going)
            own = []
            for row, part in enumerate(going):
                take, same = 0, _agreement(guesses[row], tokens[row])
                if part:
                    take = min(same + 1, limits[row] - len(drafts[row]))
                    take = next((i + 1 for i in range(take) if not sure[row][i]), take)
                    going[row] = len(drafts[row]) + take < limits[row] and sure[row][take - 1]
                drafts[row] += tokens[row][:take]
                drawn_from[row] += [] if probabilities is None else [probabilities[row, :take]]
                own.append(tokens[row][same] if take > same else None)
                self.known[row] += min(take, same)
            self._settle(own)
        return self._stack(drafts, drawn_from)

    def _check(self, drafts: list[list[int]], guesses: list[list[int]], going: list[bool]):
        """What the stage draws behind the pending token and behind every guess, and whether it is sure of it."""
        cache, self.known = self.cache, list(self.cache.known)
        width = max(map(len, guesses))
        if width:
            rows = [guess + [0] * (width - len(guess)) for guess in guesses]
            cache.append(torch.tensor(rows, device=cache.ids.device), [len(guess) for guess in guesses])
        cache.advance(0, self.stage, going)
        scores = cache.logits(self.stage, [known - 1 for known in self.known], width + 1)
        ahead = [row + guess for row, guess in zip(drafts, guesses, strict=True)]
        tokens, probabilities, sure = draw(
            self.transcript, scores, ahead, [len(row) for row in drafts], self.confidence
        )
        return tokens.tolist(), probabilities, sure

    def _settle(self, own: list[int | None]) -> None:
        """Forget refuted guesses; where the stage drew a token of its own, make that known."""
        cache = self.cache
        cache.truncate(self.known)
        tokens = torch.tensor([[token or 0] for token in own], device=cache.ids.device)
        cache.append(tokens, [token is not None for token in own])

    def _stack(self, drafts: list[list[int]], drawn_from: list[list[torch.Tensor]]) -> Drafts:
        width = max(map(len, drafts))
        rows = [row + [0] * (width - len(row)) for row in drafts]
        ids = torch.tensor(rows, dtype=torch.int64, device=self.cache.ids.device).view(len(rows), width)
        counts = [len(row) for row in drafts]
        pieces = [torch.cat(row) if row else None for row in drawn_from]
        some = next((piece for piece in pieces if piece is not None), None)
        if some is None:
            return ids, None, counts
        table = some.new_zeros(len(rows), width, some.shape[-1])
        for row, piece in enumerate(pieces):
            if piece is not None:
                table[row, : len(piece)] = piece
        return ids, table, counts

    def follow(self) -> None:
        """Learn the tokens that were added to the answer."""
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
        for n in range(min(self.LONGEST, len(text)), 0, -1):
            start = self.after.get(tuple(text[len(text) - n :]))
            if start is not None:
                break
        else:
            return []
        guess: list[int] = []
        for place in range(start, start + limit):
            beyond = place - len(self.tokens)
            # Behind its own end the text goes on with what is being guessed: a loop is followed round and round.
            guess.append(self.tokens[place] if beyond < 0 else (ahead + guess)[beyond])
        return guess


def draw(transcript: Transcript, scores: torch.Tensor, ahead, first: list[int], confidence: float):
    """Draw a draft at every lane.

    Args:
        transcript: the answer so far.
        scores: a stage's logits ``[B, n, V]``.
        ahead: tokens of every row behind the answer so far, of which lane i has seen the first ``first[r] + i``.
        first: see ``ahead``; also the place of lane 0 in the table of random numbers.
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
    probabilities = request.choice.probabilities(scores) if request.choice.do_sample else None
    uniform = transcript.uniforms(DRAFT, [[place + i for i in lanes] for place in first])
    tokens = scores.argmax(dim=-1) if uniform is None else request.choice.draw(probabilities, uniform)
    sure = torch.ones_like(tokens, dtype=torch.bool)
    if confidence > 0:
        weights = scores.softmax(dim=-1) if probabilities is None else probabilities
        sure = weights.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) >= confidence
    for end in request.eos:
        sure = sure & (tokens != end)
    return tokens, probabilities, sure.tolist()


def _agreement(guess: list[int], drawn: list[int]) -> int:
    """Leading guesses that equal what was drawn."""
    return next((i for i, token in enumerate(guess) if token != drawn[i]), len(guess))
