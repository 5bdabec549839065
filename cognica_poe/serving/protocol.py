"""What clients may ask: OpenAI's fields with their ranges. What is not served is refused by name, never ignored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from transformers import LogitsProcessor

MOST_CHOICES, MOST_PROMPTS, MOST_STOPS, MOST_LIKELY = 16, 64, 4, 20

Count = Annotated[int, Field(ge=1)]
Ids = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class StreamOptions(BaseModel):
    """How a stream ends."""

    model_config = ConfigDict(extra="forbid")
    include_usage: bool = False


class _Common(BaseModel):
    """Fields of both kinds of request."""

    model_config = ConfigDict(extra="forbid", strict=True)
    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int = Field(default=1, ge=1, le=MOST_CHOICES)
    temperature: float = Field(default=1.0, ge=0, le=2, allow_inf_nan=False)
    top_p: float = Field(default=1.0, gt=0, le=1, allow_inf_nan=False)
    top_k: int | None = Field(default=None, ge=1)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = None
    presence_penalty: float = Field(default=0.0, ge=-2, le=2, allow_inf_nan=False)
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2, allow_inf_nan=False)
    logit_bias: dict[str, float] | None = None
    user: str | None = None
    """Whom a client works for; has no influence on answers."""

    @field_validator("*", mode="before")
    @classmethod
    def _nothing_is_the_default(cls, value: Any, info: Any) -> Any:
        """Clients send null for what they leave open."""
        field = cls.model_fields[info.field_name]
        return field.get_default() if value is None and not field.is_required() else value

    @field_validator("stop")
    @classmethod
    def _few_stops(cls, stop: str | list[str] | None) -> str | list[str] | None:
        stops = [stop] if isinstance(stop, str) else stop or []
        if len(stops) > MOST_STOPS or not all(stops):
            raise ValueError(f"give at most {MOST_STOPS} stop strings, none of them empty")
        return stop

    @field_validator("logit_bias")
    @classmethod
    def _biases(cls, bias: dict[str, float] | None) -> dict[str, float] | None:
        for token, value in (bias or {}).items():
            if not token.isdecimal() or not -100 <= value <= 100:
                raise ValueError(
                    f"token {token!r} with {value}: give token ids as strings, with numbers from -100 to 100"
                )
        return bias

    @model_validator(mode="after")
    def _options_of_streams(self) -> Any:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is for streams: add stream")
        return self

    @property
    def stops(self) -> list[str]:
        """Stop strings."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def wants_usage(self) -> bool:
        """A stream ends with counts."""
        return self.stream_options is not None and self.stream_options.include_usage

    def seed_of(self, choice: int) -> int | None:
        """Seed of one of the choices: the same request again gives the same ones, and they differ."""
        return None if self.seed is None else (self.seed + choice) % 2**63

    def processors(self, vocabulary: int, prompt_tokens: int) -> list[LogitsProcessor]:
        """What changes scores. Raises ValueError for a bias on a token that does not exist."""
        found: list[LogitsProcessor] = []
        if self.presence_penalty or self.frequency_penalty:
            found.append(Penalties(self.presence_penalty, self.frequency_penalty, prompt_tokens))
        if self.logit_bias:
            ids = [int(token) for token in self.logit_bias]
            if max(ids) >= vocabulary:
                raise ValueError(f"logit_bias: token {max(ids)} does not exist, the vocabulary has {vocabulary}")
            found.append(Biases(ids, list(self.logit_bias.values())))
        return found

    def options(self, choice: int, processors: Sequence[LogitsProcessor]) -> dict[str, Any]:
        """Keywords of the decoding modes for one of the choices."""
        found: dict[str, Any] = {"logits_processor": list(processors)}
        if self.temperature > 0:
            found |= {"do_sample": True, "temperature": self.temperature, "seed": self.seed_of(choice)}
            found |= {"top_p": self.top_p} if self.top_p < 1 else {}
            found |= {} if self.top_k is None else {"top_k": self.top_k}
        return found


class CompletionRequest(_Common):
    """``POST /v1/completions``."""

    prompt: str | Ids | list[str] | list[Ids] = Field(union_mode="left_to_right")
    max_tokens: Count | None = None
    """Tokens to generate at most; what the context has room for when left out."""
    logprobs: int | None = Field(default=None, ge=0, le=MOST_LIKELY)
    echo: bool = False
    best_of: int | None = Field(default=None, ge=1)
    suffix: str | None = None
    parse_special_tokens: bool = False
    """Read names of special tokens in the prompt as such, not as text."""

    @field_validator("prompt")
    @classmethod
    def _some_prompts(cls, prompt: Any) -> Any:
        if isinstance(prompt, list) and not isinstance(prompt[:1], int) and not prompt:
            raise ValueError("give at least one prompt")
        if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) and len(prompt) > MOST_PROMPTS:
            raise ValueError(f"give at most {MOST_PROMPTS} prompts at once")
        return prompt

    @model_validator(mode="after")
    def _served(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of != self.n:
            raise ValueError("best_of is not served: leave it out, or give as many as n")
        if self.suffix:
            raise ValueError("suffix is not served: this model continues text and does not fill gaps")
        return self

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """One or several, each as text or as ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return self.prompt  # type: ignore[return-value]


class Message(BaseModel):
    """A turn of a conversation."""

    model_config = ConfigDict(extra="forbid", strict=True)
    role: Literal["system", "user", "assistant"]
    content: str
    name: str | None = None


class ChatRequest(_Common):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=MOST_LIKELY)
    response_format: dict[str, Any] | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None

    @model_validator(mode="after")
    def _served(self) -> ChatRequest:
        if self.response_format is not None and self.response_format != {"type": "text"}:
            raise ValueError("response_format is not served: answers are text")
        if self.tools or self.tool_choice not in (None, "none"):
            raise ValueError("tools are not served: leave tools and tool_choice out")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens differ: give one of them")
        return self


class Penalties(LogitsProcessor):
    """Lower the scores of tokens that the answer holds: once each, and once per time."""

    def __init__(self, presence: float, frequency: float, prompt_tokens: int):
        self.presence, self.frequency, self.prompt_tokens = presence, frequency, prompt_tokens

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """Scores ``[1, V]`` behind ids ``[1, T]``."""
        counts = torch.bincount(input_ids[0, self.prompt_tokens :], minlength=scores.shape[-1]).to(scores.dtype)
        return scores - self.presence * (counts > 0) - self.frequency * counts


class Biases(LogitsProcessor):
    """Add to the scores of some tokens."""

    def __init__(self, tokens: list[int], values: list[float]):
        self.tokens, self.values = torch.tensor(tokens), torch.tensor(values)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """Scores ``[1, V]`` behind ids ``[1, T]``."""
        return scores.index_add(-1, self.tokens.to(scores.device), self.values.to(scores)[None])
