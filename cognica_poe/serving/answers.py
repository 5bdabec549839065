"""One answer under way: its tokens, the text that may be shown of them, its log-probabilities, and why it ended."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from cognica_poe.modeling.request_cognica_poe import GenerationRequest, Transcript
from cognica_poe.modeling.sampling_cognica_poe import FINAL

REPLACEMENT = "�"
"""What a tokenizer shows of bytes that are no character yet."""


@dataclass(frozen=True)
class Likely:
    """A token with its log-probability, and the likeliest ones in its place."""

    token: int
    logprob: float
    top: list[tuple[int, float]]


@dataclass
class Piece:
    """What became known of an answer at once."""

    text: str
    tokens: list[int]
    likely: list[Likely]
    finish: str | None = None
    """``stop`` behind an end token or a stop string, ``length`` at the limit, ``error``."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What the mode has to tell of the whole answer; with the last piece."""
    offsets: list[int] = field(default_factory=list)
    """Where the text of each token begins, counted from the start of the answer."""


class Text:
    """The text of a growing list of tokens, without halves of characters, up to a stop string.

    What might become a stop string is held back until it is clear.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str]):
        self.tokenizer, self.stops = tokenizer, [stop for stop in stops if stop]
        self.tokens: list[int] = []
        self.first, self.read = 0, 0
        """Tokens from ``first`` to ``read`` are those whose text was decoded last."""
        self.whole, self.shown = "", 0
        self.begins = 0
        """Where the text of the last token begins."""

    def add(self, token: int, last: bool = False) -> tuple[str, bool]:
        """Text that may be shown now, and whether a stop string is complete; all that is left with the ``last``."""
        before = self._decode(self.first, self.read)
        self.begins = len(self.whole) + len(self._decode(self.first, len(self.tokens))) - len(before)
        self.tokens.append(token)
        now = self._decode(self.first, len(self.tokens))
        if last or not now.endswith(REPLACEMENT):
            self.whole += now[len(before) :]
            self.first, self.read = self.read, len(self.tokens)
        found = [at for stop in self.stops if (at := self.whole.find(stop, max(0, self.shown - len(stop)))) >= 0]
        end = min(found) if found else len(self.whole) - (0 if last else self._held())
        text, self.shown = self.whole[self.shown : max(end, self.shown)], max(end, self.shown)
        return text, bool(found)

    def _decode(self, start: int, end: int) -> str:
        text: str = self.tokenizer.decode(self.tokens[start:end], skip_special_tokens=True)
        return text

    def _held(self) -> int:
        """Characters at the end that a stop string may begin with."""
        longest = 0
        for stop in self.stops:
            for size in range(min(len(stop) - 1, len(self.whole)), longest, -1):
                if self.whole.endswith(stop[:size]):
                    longest = size
                    break
        return longest


class Answer:
    """An answer that grows token by token.

    Args:
        request: what is asked, of one row.
        options: what it was built from, as keywords of the decoding modes.
        text: its text.
        top: how many likely tokens to tell beside each; None for no log-probabilities.
        emit: called with every piece, from the thread that decodes.
    """

    def __init__(
        self,
        request: GenerationRequest,
        options: dict[str, Any],
        text: Text,
        top: int | None,
        emit: Callable[[Piece], None],
    ):
        self.request, self.options, self.text, self.top, self.emit = request, options, text, top, emit
        self.transcript = Transcript(request)
        self.cancelled = False
        self.finish: str | None = None

    @property
    def done(self) -> bool:
        """Nothing more comes, or nobody wants it."""
        return self.finish is not None or self.cancelled

    def choose(self, scores: torch.Tensor) -> int:
        """Take the next token from the pool's log-probabilities ``[V]``, tell of it, and return it."""
        processed = self.transcript.processed(scores[None, None], [[]], [0])
        token = int(self.request.choice.pick(processed, self.transcript.uniforms(FINAL, [[0]])))
        self.take(token, [] if self.top is None else [likely(scores, token, self.top)])
        return token

    def take(self, token: int, likely: list[Likely], facts: dict[str, Any] | None = None) -> None:
        """Write down a token and tell of it; ``facts`` say that it is the last one."""
        self.transcript.extend(0, [token])
        ended = self.transcript.done or facts is not None
        at_end = token in self.request.eos
        text, stopped = self.text.add(token, last=ended)
        if stopped or ended:
            self.finish = "stop" if stopped or at_end else "length"
        self.emit(Piece(text, [token], likely, self.finish, facts or {}, [self.text.begins]))


def likely(logprobs: torch.Tensor, token: int, top: int) -> Likely:
    """What log-probabilities ``[V]`` say of a token and of the ``top`` likeliest ones."""
    values, ids = logprobs.topk(min(top, len(logprobs))) if top else (logprobs[:0], logprobs[:0])
    return Likely(token, float(logprobs[token]), [(int(i), float(v)) for i, v in zip(ids, values, strict=True)])
