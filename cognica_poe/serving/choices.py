"""The choices of one request as OpenAI's objects: whole, or chunk by chunk."""

from __future__ import annotations

import time
from typing import Any

from openai.types import Completion, CompletionChoice
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from cognica_poe.serving.answers import Likely, Piece
from cognica_poe.serving.engine import Prompt
from cognica_poe.serving.protocol import ChatRequest, CompletionRequest


def message_of(sentence: str) -> dict[str, Any]:
    """An error in OpenAI's form, for the middle of a stream."""
    return {"message": sentence, "type": "server_error", "param": None, "code": None}


class Choices:
    """What is known of all answers to a request.

    Args:
        body: the request.
        prompts: its prompts; each has ``body.n`` choices.
        tokenizer: shows single tokens.
        mode: that answers.
    """

    def __init__(self, body: CompletionRequest | ChatRequest, prompts: list[Prompt], tokenizer: Any, mode: str):
        self.body, self.prompts, self.tokenizer, self.mode = body, prompts, tokenizer, mode
        self.chat = isinstance(body, ChatRequest)
        self.prefix, self.id, self.name, self.created = "chatcmpl" if self.chat else "cmpl", "", "", int(time.time())
        count = len(prompts) * body.n
        self.texts = [""] * count
        self.tokens: list[list[int]] = [[] for _ in range(count)]
        self.likely: list[list[Likely | None]] = [[] for _ in range(count)]
        self.offsets: list[list[int]] = [[] for _ in range(count)]
        self.finish: list[str | None] = [None] * count
        self.facts: list[dict[str, Any]] = []
        self.echoed = [0] * count
        """Characters of the prompt that a choice begins with."""

    @property
    def done(self) -> bool:
        """All have ended."""
        return all(self.finish)

    def echo(self, likely: list[list[Likely | None]]) -> None:
        """Begin every choice with its prompt."""
        for number in range(len(self.texts)):
            prompt = self.prompts[number // self.body.n]
            self.texts[number], self.echoed[number] = prompt.text, len(prompt.text)
            self.likely[number] = list(likely[number // self.body.n])
            if self.likely[number]:
                shown = [self.tokenizer.decode([token], skip_special_tokens=True) for token in prompt.ids]
                self.tokens[number] = list(prompt.ids)
                self.offsets[number] = [sum(map(len, shown[:place])) for place in range(len(shown))]

    def add(self, number: int, piece: Piece) -> None:
        """Take in a piece of an answer."""
        self.texts[number] += piece.text
        self.tokens[number] += piece.tokens
        self.likely[number] += piece.likely
        self.offsets[number] += [self.echoed[number] + offset for offset in piece.offsets]
        self.finish[number] = piece.finish or self.finish[number]
        self.facts += [piece.facts] if piece.facts else []

    def whole(self) -> dict[str, Any]:
        """The response."""
        shared = {"id": self.id, "created": self.created, "model": self.name}
        choices = [self._choice(number) for number in range(len(self.texts))]
        if self.chat:
            found = ChatCompletion.model_validate(
                {**shared, "object": "chat.completion", "choices": choices, "usage": self.usage()}
            )
            return found.model_dump(mode="json")
        frame = Completion.model_validate({**shared, "object": "text_completion", "choices": [], "usage": self.usage()})
        return {**frame.model_dump(mode="json"), "choices": choices}

    def opening(self) -> list[dict[str, Any]]:
        """Chunks before the first token: the role of chats, the prompt of completions that repeat it."""
        if self.chat:
            return [
                self._chunk(number, {"role": "assistant", "content": ""}, None) for number in range(len(self.texts))
            ]
        if not any(self.echoed):
            return []
        return [self._chunk(number, text, None, self._logprobs(number)) for number, text in enumerate(self.texts)]

    def chunk(self, number: int, piece: Piece) -> dict[str, Any] | None:
        """A chunk for a piece; None where it shows nothing."""
        if not (piece.text or piece.likely or piece.finish):
            return None
        start = len(self.tokens[number]) - len(piece.tokens)
        logprobs = self._logprobs(number, start) if piece.likely else None
        delta: Any = {"content": piece.text} if self.chat else piece.text
        return self._chunk(number, delta, piece.finish, logprobs)

    def usage_chunk(self) -> dict[str, Any]:
        """The last chunk of a stream that asks for counts."""
        return {**self._frame(), "choices": [], "usage": self.usage()}

    def usage(self) -> dict[str, Any]:
        """Counts over all choices."""
        new = sum(map(len, self.tokens)) - sum(
            len(self.prompts[number // self.body.n].ids)
            for number, likely in enumerate(self.likely)
            if self.echoed[number] and likely
        )
        asked = sum(len(prompt.ids) for prompt in self.prompts)
        poe: dict[str, Any] = {"mode": self.mode}
        for name in ("proposed", "accepted", "rounds"):
            if values := [facts[name] for facts in self.facts if name in facts]:
                poe[name] = sum(values)
        if used := [facts["mean_stages_used"] for facts in self.facts if "mean_stages_used" in facts]:
            poe["mean_stages_used"] = sum(used) / len(used)
        return {"prompt_tokens": asked, "completion_tokens": new, "total_tokens": asked + new, "poe": poe}

    # ---- their forms ----------------------------------------------------------------------------------------------

    def _choice(self, number: int) -> dict[str, Any]:
        shared: dict[str, Any] = {"index": number, "finish_reason": self.finish[number]}
        shared["logprobs"] = self._logprobs(number)
        if self.chat:
            return {**shared, "message": {"role": "assistant", "content": self.texts[number], "refusal": None}}
        # The package's type would refuse what the service itself says of a prompt's first token: null.
        choice = CompletionChoice.model_construct(None, text=self.texts[number], **shared)
        return choice.model_dump(warnings=False)

    def _frame(self) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return {"id": self.id, "created": self.created, "model": self.name, "object": kind}

    def _chunk(self, number: int, delta: Any, finish: str | None, logprobs: Any = None) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": number, "finish_reason": finish, "logprobs": logprobs}
        if self.chat:
            whole = {**self._frame(), "choices": [{**choice, "delta": delta}]}
            return ChatCompletionChunk.model_validate(whole).model_dump(mode="json", exclude_none=False)
        return {**self._frame(), "choices": [{**choice, "text": delta}]}

    def _logprobs(self, number: int, start: int = 0) -> dict[str, Any] | None:
        """Log-probabilities of a choice from its token ``start`` on, in the form of the request's kind."""
        known = self.likely[number]
        if not known:
            return None
        tokens, known = self.tokens[number][start:], known[start:]
        if self.chat:
            return {"content": [self._chat_logprob(entry) for entry in known if entry], "refusal": None}
        top = [entry and {self._show(token): value for token, value in entry.top} for entry in known]
        return {
            "tokens": [self._show(token) for token in tokens],
            "token_logprobs": [entry and entry.logprob for entry in known],
            "top_logprobs": top if self.body.logprobs else None,
            "text_offset": self.offsets[number][start:],
        }

    def _chat_logprob(self, entry: Likely) -> dict[str, Any]:
        def shown(token: int, value: float) -> dict[str, Any]:
            text = self._show(token)
            return {"token": text, "logprob": value, "bytes": list(text.encode())}

        top = [shown(token, value) for token, value in entry.top]
        return {**shown(entry.token, entry.logprob), "top_logprobs": top}

    def _show(self, token: int) -> str:
        text: str = self.tokenizer.decode([token])
        return text
